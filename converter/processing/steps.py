"""The steps in TransformerLens's order, and choosing among them.

`converter.choices.STEPS` names them; each is the module of this package with that name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from importlib import import_module
from typing import Any

from numpy.typing import NDArray

from converter import choices
from converter.choices import meant, of_kind
from converter.errors import UsageError
from converter.processing.step import FLOAT32, Array, Record, Rounding, State, Step, Unit

STEPS: tuple[Step, ...] = tuple(
    import_module(f"converter.processing.{name}").STEP for name in choices.STEPS
)
"""In the order in which `ProcessWeights.process_weights` applies them."""
BY_NAME = {step.name: step for step in STEPS}
DEFAULT = tuple(BY_NAME[name] for name in choices.DEFAULT_STEPS)
"""What TransformerLens's `from_pretrained` does."""
_WORDS: dict[str, tuple[Step, ...]] = {"none": (), "default": DEFAULT, "all": STEPS}


def parse(spec: str) -> tuple[Step, ...]:
    """`none`, `default`, `all`, or step names with commas -> the steps, in order, each once.

    Raises:
        UsageError: a name that is no step's; the message offers the nearest ones.
    """
    of_kind(spec, str, "--process", "Write the steps as one string, with commas.")
    if spec in _WORDS:
        return _WORDS[spec]
    names = [name.strip() for name in spec.split(",")]
    known = [*BY_NAME, *_WORDS]
    for name in names:
        if name not in BY_NAME:
            raise UsageError(
                f"{name!r} is not a processing step."
                if name not in _WORDS
                else f"{name!r} stands alone; it does not go into a list of steps.",
                where=f"--process {spec}",
                do=f"Leave the others out, or choose from the steps: {', '.join(BY_NAME)}."
                if name in _WORDS
                else f"{meant(name, known, most=3)}Choose from {', '.join(known)}.",
            )
    return in_order(names)


def in_order(names: Iterable[str]) -> tuple[Step, ...]:
    """The steps of these names, in TransformerLens's order."""
    chosen = set(names)
    return tuple(step for step in STEPS if step.name in chosen)


def apply_all(
    unit: Unit, steps: Sequence[Step]
) -> tuple[dict[str, Array], list[dict[str, NDArray[Any]]]]:
    """The processed unit and each step's record, in the order of the steps."""
    result, records = dict(unit), []
    for step in steps:
        result, record = step.apply(result)
        records.append(record)
    return result, records


def undo_all(
    unit: Unit, steps: Sequence[Step], records: Sequence[Record], rounding: Rounding = FLOAT32
) -> dict[str, Array]:
    """The inverse of `apply_all`. `rounding` is that of the processed weights' storage."""
    result = dict(unit)
    for step, record in reversed(list(zip(steps, records, strict=True))):
        result = step.undo(result, record, rounding)
    return result


def undo_edited(
    unit: Unit,
    steps: Sequence[Step],
    records: Sequence[Record],
    rounding: Rounding = FLOAT32,
    *,
    edited: Collection[str],
) -> tuple[dict[str, Array], frozenset[str]]:
    """`undo_all` of weights of which some were edited, and the names of the tensors that come
    back other than the original ones because of it."""
    result, changed = dict(unit), frozenset(edited)
    for step, record in reversed(list(zip(steps, records, strict=True))):
        displaced = step.displaced(result, record, rounding) if changed else frozenset()
        result = step.undo(result, record, rounding)
        changed = displaced | _made_from(changed, result, step, record)
    return result, changed


def made_from(
    names: Collection[str], unit: Unit, steps: Sequence[Step], records: Sequence[Record]
) -> frozenset[str]:
    """The original tensors that `undo_all` makes from any of these processed ones."""
    found = frozenset(names)
    for step, record in reversed(list(zip(steps, records, strict=True))):
        found = _made_from(found, unit, step, record)
    return found


def _made_from(names: frozenset[str], unit: Unit, step: Step, record: Record) -> frozenset[str]:
    return frozenset(name for name in unit if step.reads(name, record) & names)


def detect(unit: Unit, rounding: Rounding, steps: Sequence[Step] = STEPS) -> dict[str, State]:
    """What a unit's weights tell about each step that concerns it, by the step's name.

    `rounding` is that of the dtype the weights were stored in.
    """
    states = {step.name: step.state(unit, rounding) for step in steps}
    return {name: state for name, state in states.items() if state is not None}
