"""What must be kept beside processed weights so that processing can be undone. No files here.

compact  every step's record, and the original biases and LayerNorms outright: the basis comes
         back to about 1e-7 of the weights, for edited weights too.
exact    also the residue of every matrix over a prediction of it: the bits come back.

The prediction is `undo_all` of the processed weights *as they were stored*, with the records
*as they are stored here*, cast to the original dtype. Steps undo matrices portably (see `Step`),
so it has the same bits on every machine. It is made for each tensor from few
others (`reads`): an edit of one processed tensor leaves the others exact.

Names: `{prefix}{step}.{key}` for records, `{prefix}original.{tensor}` for originals kept outright,
`{prefix}residue.{tensor}.{stream}`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.choices import LedgerKind
from converter.dtypes import bits, code_of, same_bits
from converter.processing import residue
from converter.processing.step import Record, Rounding, Step, in_float64, is_vector
from converter.processing.steps import made_from, undo_all, undo_edited
from converter.processing.unit_ledger import (
    Applied,
    How,
    Kept,
    UnitLedger,
    corrupt_ledger,
    tensor_of,
)

Arrays = Mapping[str, NDArray[Any]]
"""A unit's tensors as files hold them: by unit name, in `hooked` axes, in their storage dtype.
Processed matrices may be computed piece by piece (`converter.piecewise`)."""


@dataclass(frozen=True)
class Restored:
    array: NDArray[Any]
    """In the original dtype if exact, otherwise in float64, matrices piece by piece."""
    exact: bool


def encode_unit(
    original: Arrays,
    processed: Arrays,
    steps: Sequence[Step],
    records: Sequence[Record],
    *,
    kind: LedgerKind,
    prefix: str = "",
) -> UnitLedger:
    """The ledger of one unit.

    Tensors left out of `original` come back in no other way than undoing gives them.
    `processed` lacks what its layout has no tensor for: folded LayerNorms, zero biases.
    """
    arrays: dict[str, NDArray[Any]] = {}
    tensors: dict[str, Kept] = {}
    for name, array in original.items():
        how: How
        if name in processed and same_bits(array, processed[name]):
            how = "same"
        elif not bits(array).any():
            how = "zero"
        elif is_vector(name):
            how = "original"
            arrays[f"{prefix}original.{name}"] = array
        else:
            how = "residue" if kind == "exact" else "basis"
        tensors[name] = Kept(how, code_of(array), array.shape)
    coded = [name for name, kept in tensors.items() if kept.how == "residue"]
    double = any(array.dtype == np.float64 for array in (*original.values(), *processed.values()))
    applied = []
    for step, record in zip(steps, records, strict=True):
        outright = tuple(key for key in record if _is_outright(key, record[key], original, tensors))
        applied.append(Applied(step, outright))
        for key in record.keys() - set(outright):
            narrow = _narrow(record[key], bool(coded), double)
            arrays[f"{prefix}{step.name}.{key}"] = narrow
    ledger = UnitLedger(prefix, tensors, tuple(applied), _rounding(processed), arrays)
    if coded:
        basis = undo_all(*_undoing(ledger, processed))
        for name in coded:
            streams = residue.encode(original[name], basis[name], tensors[name].code)
            arrays |= {f"{prefix}residue.{name}.{s}": stream for s, stream in streams.items()}
    return replace(ledger, arrays=dict(sorted(arrays.items())))


def decode_unit(
    ledger: UnitLedger,
    processed: Arrays,
    *,
    edited: Collection[str] = (),
    without: Collection[str] = (),
    outright: bool = True,
    from_file: bool = False,
) -> dict[str, Restored]:
    """The original unit, from the processed one.

    `edited` names the processed tensors that are not what the ledger was made for. What reads
    them comes back in float64, in the original basis and with the edited function; so does
    every matrix of a compact ledger. The rest comes back bit for bit. `without` names tensors
    that are not wanted. With `outright` False, biases that processing changed come back as the
    processed weights have them, and not as the ledger does: nearer to the function of a file of
    which some part was edited.

    Raises:
        CorruptFile: the ledger's arrays are not what its own metadata says.
    """
    unit, steps, records, rounding = _undoing(ledger, processed)
    if from_file:
        edited, rounding = processed, Rounding(0.0, 0.0)
    computed = frozenset() if outright else made_from(unit, unit, steps, records)
    try:
        basis, changed = undo_edited(unit, steps, records, rounding, edited=edited)
    except (KeyError, ValueError) as error:
        raise corrupt_ledger(ledger.prefix, f"undoing stopped at {error}") from error
    result: dict[str, Restored] = {}
    for name in {**basis, **ledger.tensors}:
        kept = ledger.tensors.get(name)
        if name in without:
            continue
        undone = kept is None or kept.how == "basis" or name in changed
        if undone or (name in computed and ledger.tensors[name].how == "original"):
            result[name] = Restored(basis[name], False)
        else:
            result[name] = Restored(_bits(ledger, processed, basis, name), True)
    return result


def _undoing(
    ledger: UnitLedger, processed: Arrays
) -> tuple[dict[str, NDArray[np.float64]], list[Step], list[dict[str, NDArray[Any]]], Rounding]:
    """The processed unit in float64, and what undoing it takes."""
    unit = in_float64(processed)
    for name, kept in ledger.tensors.items():
        if name not in unit:  # what the processed layout has no tensor for
            unit[name] = np.ones(kept.shape) if name.endswith(".w") else np.zeros(kept.shape)
        elif unit[name].shape != kept.shape:
            found, wanted = list(unit[name].shape), list(kept.shape)
            raise corrupt_ledger(
                f"{ledger.prefix}{name}", f"it is for {wanted}, the weights are {found}"
            )
    records = ledger.records({name: array.shape for name, array in unit.items()})
    own, then = _rounding(processed), ledger.rounding
    rounding = Rounding(max(own.relative, then.relative), max(own.absolute, then.absolute))
    return unit, [applied.step for applied in ledger.steps], records, rounding


def _bits(
    ledger: UnitLedger, processed: Arrays, basis: Mapping[str, NDArray[np.float64]], name: str
) -> NDArray[Any]:
    kept = ledger.tensors[name]
    if kept.how == "same":
        return processed[name]
    if kept.how in ("zero", "original"):
        return ledger.original(name)
    key = f"{ledger.prefix}residue.{name}"
    try:
        streams = {s: ledger.arrays[f"{key}.{s}"] for s in residue.STREAMS}
        return residue.decode(streams, basis[name], kept.code)
    except (KeyError, ValueError) as error:
        raise corrupt_ledger(key, str(error)) from error


def _is_outright(
    key: str, array: NDArray[Any], original: Arrays, tensors: Mapping[str, Kept]
) -> bool:
    """Whether a record's array is an original tensor that the ledger holds anyway."""
    name = tensor_of(key)
    return (
        name in original
        and tensors[name].how in ("zero", "original")
        and np.array_equal(original[name].astype(np.float64), array)
    )


def _narrow(array: NDArray[Any], coded: bool, double: bool) -> NDArray[Any]:
    """float32 where that is enough.

    The record's rounding then adds to that of stored weights without topping it. Where a residue
    is coded, four more bytes for a mean save more than four in its row; for a gauge they do not.
    """
    if array.dtype.kind == "i" or double or (coded and array.ndim < 3):
        return array
    with np.errstate(over="ignore"):  # weights of such size were infinite in storage before
        return array.astype(np.float32)


def _rounding(processed: Arrays) -> Rounding:
    """The coarsest of the unit's tensors."""
    each = [Rounding.of(code_of(array)) for array in processed.values()]
    return Rounding(max(r.relative for r in each), max(r.absolute for r in each))
