"""The weights on their way: read, made, cast, written, one unit at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from converter.checkpoint import EMBEDDING, HEAD
from converter.checkpoint.ledger_file import LedgerWriter
from converter.checkpoint.plan import Plan, Planned
from converter.checkpoint.sink import Sink
from converter.dtypes import NAMES, cast, chunks, sha256
from converter.errors import CannotUndo, NotRepresentable
from converter.layout import Slot
from converter.processing.ledger import encode_unit
from converter.progress import Progress
from converter.route import Array, Made, Processing, Route, Tensors, Undoing


class Digests(NamedTuple):
    """SHA-256 of every tensor's bytes, by its own name."""

    read: dict[str, str]
    written: dict[str, str]
    not_finite: dict[str, int]
    """Source tensors that hold NaN or infinity, and in how many elements."""


def stream(
    route: Route, plan: Plan, sink: Sink, ledger: LedgerWriter | None, progress: Progress
) -> Digests:
    """Write the planned tensors. See `convert` for what it may raise."""
    source = route.source
    planned = {tensor.slot.key: tensor for tensor in plan.tensors}
    read: dict[str, str] = {}
    not_finite: dict[str, int] = {}
    done, total = 0, plan.nbytes

    def hashing(key: str) -> Array:
        array = source.tensor(key)
        if stored := source.stored.get(key):
            as_stored = source.slots[key].to_hub.inverse.apply(array, source.config.sizes)
            read[stored.name] = sha256(as_stored)
            if count := sum(int((~np.isfinite(chunk)).sum()) for chunk in chunks(as_stored)):
                not_finite[stored.name] = count
        return array

    restored: dict[str, str] = {}
    with sink as writer:
        for slots, unit, made in route.run(hashing):
            written: Tensors = {}
            for slot in slots:
                tensor, array = planned.get(slot.key), made.tensors[slot.local]
                if tensor is None:
                    _require_neutral(array, slot, plan)
                    continue
                stored = cast(array, tensor.code)
                _require_finite(stored, array, tensor, str(source.source.path))
                writer.write(tensor, tensor.slot.to_hub.inverse.apply(stored, plan.config.sizes))
                if ledger:
                    written[slot.local] = stored
                if slot.local in made.original and stored.dtype == array.dtype:
                    restored[slot.key] = tensor.name
                done += tensor.nbytes
                progress(f"writing {tensor.name}", done, total)
            if ledger:
                _keep(ledger, route, slots[0].prefix, unit, written, made)
            del unit, made, written  # before the next unit is read
    if isinstance(route, Undoing):
        _require_original(route, plan, writer.sha256, restored)
    return Digests(read, writer.sha256, not_finite)


def _keep(
    ledger: LedgerWriter, route: Route, prefix: str, unit: Tensors, written: Tensors, made: Made
) -> None:
    assert isinstance(route, Processing)
    # A head that stays tied in the target comes back by its tie.
    original = {n: a for n, a in unit.items() if n != HEAD or n in written}
    kept = encode_unit(
        original, written, route.pipeline, made.records, kind=ledger.kind, prefix=prefix
    )
    ledger.add(kept, {name: sha256(array) for name, array in written.items()})


def _require_neutral(array: Array, slot: Slot, plan: Plan) -> None:
    """What the target has no tensor for must be what its absence means there."""
    if slot.key == HEAD and plan.tied:
        return
    assert slot.absence is not None, slot.key
    differing = int(np.count_nonzero(array != slot.absence.value))
    if differing:
        raise NotRepresentable(
            f"{slot.key} is not {slot.absence.value:g} throughout, and layout {plan.layout} has no place for it.",
            where=f"{slot.key}: {differing} of {array.size} elements",
            do="Convert with processing (fold_ln), or keep the checkpoint in its layout.",
        )


def _require_finite(stored: Array, array: Array, tensor: Planned, where: str) -> None:
    """float16 ends at 65504: a weight beyond it would become infinite in silence."""
    if stored.dtype == array.dtype:
        return
    with np.errstate(invalid="ignore"):
        lost = int((np.isinf(stored) & np.isfinite(array)).sum())
    if lost:
        raise NotRepresentable(
            f"{lost} element(s) of {tensor.name} are too large for {NAMES[tensor.code]}.",
            where=f"{where}: {tensor.source or tensor.name}",
            do="Use --dtype bfloat16 or float32, or keep the dtype.",
        )


def _require_original(
    route: Undoing, plan: Plan, written: dict[str, str], restored: dict[str, str]
) -> None:
    """What comes back bit for bit must have the original's digest; all of it where all is exact.

    `restored`: the names of such tensors, by `hooked` name.
    """
    assert route.ledger is not None
    original = dict(route.ledger.original_sha256)
    if route.ledger.tied and HEAD in restored:  # a matrix of its own now, and the same as ever
        original[restored[HEAD]] = original.get(plan.name(EMBEDDING), "")
    names = {*original, *written} if route.reverse == "exact" else set(restored.values())
    wrong = sorted(n for n in names if original.get(n) != written.get(n))
    if wrong:
        raise CannotUndo(
            f"The ledger does not give back the original's SHA-256 for {len(wrong)} tensor(s).",
            where=f"{route.ledger.path}: {', '.join(wrong[:4])}",
            do="Restore the ledger from a copy, or use --reverse functional.",
        )
