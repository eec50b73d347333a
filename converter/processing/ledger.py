"""What must be kept beside processed weights so that processing can be undone. No files here.

A unit's ledger is a dict of named arrays, for `ledger.safetensors`, and a dict of plain JSON.

compact  every step's record, and the original biases and LayerNorms outright: the basis comes
         back to about 1e-7 of the weights, for edited weights too.
exact    also the residue of every matrix over a prediction of it: the bits come back.

The prediction is `undo_all` of the processed weights *as they were stored*, with the records
*as they are stored here*, cast to the original dtype. Steps undo matrices portably (see `Step`),
so it has the same bits on every machine, whatever its BLAS. It is made for each tensor from few
others (`reads`): an edit of one processed tensor leaves the others exact.

Names: `{prefix}{step}.{key}` for records, `{prefix}original.{tensor}` for originals kept outright,
`{prefix}residue.{tensor}.{stream}`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from converter.dtypes import CODES, bits, code_of, same_bits
from converter.errors import CorruptFile
from converter.processing import residue
from converter.processing.carry import Carry
from converter.processing.step import Record, Rounding, Step
from converter.processing.steps import BY_NAME, reads, undo_all

Kind = Literal["compact", "exact"]
Stored = Mapping[str, NDArray[Any]]
"""A unit's tensors as files hold them: by unit name, in `hooked` axes, in their storage dtype."""
Json = dict[str, Any]
_STEPS: dict[str, Step] = {**BY_NAME, Carry.name: Carry()}


@dataclass(frozen=True)
class UnitLedger:
    arrays: dict[str, NDArray[Any]]
    meta: Json
    """Plain JSON. `meta["tensors"][name]` is open to further keys, such as a digest."""


@dataclass(frozen=True)
class Restored:
    array: NDArray[Any]
    """In the original dtype if exact, otherwise in float64."""
    exact: bool


def encode_unit(
    original: Stored,
    processed: Stored,
    steps: Sequence[Step],
    records: Sequence[Record],
    *,
    kind: Kind,
    prefix: str = "",
) -> UnitLedger:
    """The ledger of one unit.

    Tensors left out of `original` are given no residue: a tied head comes back by its tie.
    `processed` lacks what its layout has no tensor for: folded LayerNorms, zero biases.
    """
    arrays: dict[str, NDArray[Any]] = {}
    tensors: Json = {}
    for name, array in original.items():
        if name in processed and same_bits(array, processed[name]):
            how = "same"
        elif not bits(array).any():
            how = "zero"
        elif _is_vector(name):
            how = "original"
            arrays[f"{prefix}original.{name}"] = array
        else:
            how = "residue" if kind == "exact" else "basis"
        tensors[name] = {"kept": how, "dtype": code_of(array), "shape": list(array.shape)}
    meta: Json = {"kind": kind, "tensors": tensors, "steps": [], "rounding": _rounding(processed)}
    coded = [name for name, tensor in tensors.items() if tensor["kept"] == "residue"]
    double = any(array.dtype == np.float64 for array in (*original.values(), *processed.values()))
    for step, record in zip(steps, records, strict=True):
        told: Json = {"name": step.name, "from_original": []}
        for key, array in record.items():
            if _is_told(key, array, original, tensors):
                told["from_original"].append(key)
            else:
                arrays[f"{prefix}{step.name}.{key}"] = _narrow(array, bool(coded), double)
        meta["steps"].append(told)
    ledger = UnitLedger(arrays, meta)
    if coded:
        basis = _basis(ledger, processed, prefix)
        for name in coded:
            streams = residue.encode(original[name], basis[name], tensors[name]["dtype"])
            arrays |= {f"{prefix}residue.{name}.{s}": stream for s, stream in streams.items()}
    return ledger


def decode_unit(
    ledger: UnitLedger, processed: Stored, *, edited: Collection[str] = (), prefix: str = ""
) -> dict[str, Restored]:
    """The original unit, from the processed one.

    `edited` names the processed tensors that are not what the ledger was made for. What reads
    them comes back in float64, in the original basis and with the edited function; so does
    every matrix of a compact ledger. The rest comes back bit for bit.

    Raises:
        CorruptFile: the ledger's arrays are not what its own metadata says.
    """
    steps, records = steps_of(ledger, prefix)
    tensors: Json = ledger.meta["tensors"]
    changed = set(edited)
    exact = {
        name
        for name, tensor in tensors.items()
        if tensor["kept"] != "basis" and not changed & reads(name, steps, records)
    }
    basis = _basis(ledger, processed, prefix)
    result: dict[str, Restored] = {}
    for name in {**basis, **tensors}:
        if name in exact:
            result[name] = Restored(_bits(ledger, processed, basis, name, prefix), True)
        else:
            result[name] = Restored(basis[name], False)
    return result


def steps_of(ledger: UnitLedger, prefix: str = "") -> tuple[list[Step], list[dict[str, Any]]]:
    """The steps that were applied, and their records as the ledger holds them, in float64."""
    steps: list[Step] = []
    records: list[dict[str, Any]] = []
    for told in ledger.meta["steps"]:
        if told["name"] not in _STEPS:
            raise _corrupt(f"{prefix}{told['name']}", "it names a step that does not exist")
        steps.append(_STEPS[told["name"]])
        start = f"{prefix}{told['name']}."
        record = {k.removeprefix(start): v for k, v in ledger.arrays.items() if k.startswith(start)}
        for key in told["from_original"]:
            record[key] = _outright(ledger, _tensor_of(key), prefix)
        records.append(
            {k: v if v.dtype.kind == "i" else v.astype(np.float64) for k, v in record.items()}
        )
    return steps, records


def _basis(ledger: UnitLedger, processed: Stored, prefix: str) -> dict[str, NDArray[np.float64]]:
    steps, records = steps_of(ledger, prefix)
    unit = {name: array.astype(np.float64) for name, array in processed.items()}
    for name, tensor in ledger.meta["tensors"].items():
        if name not in unit:  # what the processed layout has no tensor for
            gain = name.endswith(".w")
            unit[name] = np.ones(tensor["shape"]) if gain else np.zeros(tensor["shape"])
    rounding = ledger.meta["rounding"]
    return undo_all(unit, steps, records, Rounding(rounding["relative"], rounding["absolute"]))


def _bits(
    ledger: UnitLedger,
    processed: Stored,
    basis: Mapping[str, NDArray[np.float64]],
    name: str,
    prefix: str,
) -> NDArray[Any]:
    tensor = ledger.meta["tensors"][name]
    if tensor["kept"] == "same":
        return processed[name]
    if tensor["kept"] in ("zero", "original"):
        return _outright(ledger, name, prefix)
    try:
        streams = {s: ledger.arrays[f"{prefix}residue.{name}.{s}"] for s in residue.STREAMS}
        return residue.decode(streams, basis[name], tensor["dtype"])
    except (KeyError, ValueError) as error:
        raise _corrupt(f"{prefix}residue.{name}", str(error)) from error


def _outright(ledger: UnitLedger, name: str, prefix: str) -> NDArray[Any]:
    """An original tensor that is in the ledger as it was, or is all zeros."""
    tensor = ledger.meta["tensors"][name]
    if tensor["kept"] == "zero":
        return np.zeros(tensor["shape"], CODES[tensor["dtype"]])
    key = f"{prefix}original.{name}"
    if key not in ledger.arrays:
        raise _corrupt(key, "it is missing")
    array = ledger.arrays[key]
    if list(array.shape) != tensor["shape"] or array.dtype != CODES[tensor["dtype"]]:
        raise _corrupt(key, f"it is {array.dtype} {list(array.shape)}, not as recorded")
    return array


def _corrupt(where: str, why: str) -> CorruptFile:
    return CorruptFile(
        f"The ledger does not fit itself: {why}.",
        where=where,
        do="Use the ledger that was written beside these weights, unchanged.",
    )


def _is_vector(name: str) -> bool:
    """Biases and LayerNorms: small, so kept outright; the rest are matrices."""
    return name.rsplit(".", 1)[-1].startswith(("b", "w"))


def _tensor_of(key: str) -> str:
    return key.removeprefix("fold.")


def _is_told(key: str, array: NDArray[Any], original: Stored, tensors: Json) -> bool:
    """Whether a record's array is an original tensor that the ledger holds anyway."""
    name = _tensor_of(key)
    return (
        name in original
        and tensors[name]["kept"] in ("zero", "original")
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


def _rounding(processed: Stored) -> dict[str, float]:
    """The coarsest of the unit's tensors."""
    each = [Rounding.of(code_of(array)) for array in processed.values()]
    return {
        "relative": max(r.relative for r in each),
        "absolute": max(r.absolute for r in each),
    }
