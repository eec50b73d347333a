"""TransformerLens's processing of weights, and its inverse. Arithmetic only, no I/O."""

from converter.processing.carry import Carry, absorb, unrepresentable
from converter.processing.step import Record, Rounding, State, Step, Unit
from converter.processing.steps import (
    DEFAULT,
    STEPS,
    apply_all,
    detect,
    in_order,
    parse,
    undo_all,
)

__all__ = [
    "DEFAULT",
    "STEPS",
    "Carry",
    "Record",
    "Rounding",
    "State",
    "Step",
    "Unit",
    "absorb",
    "apply_all",
    "detect",
    "in_order",
    "parse",
    "undo_all",
    "unrepresentable",
]
