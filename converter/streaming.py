"""The weights on their way: read, made, cast, written, one unit at a time and piece by piece."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from converter.background import Background
from converter.checkpoint import Checkpoint
from converter.checkpoint.ledger_file import LedgerWriter
from converter.checkpoint.memory import Memory
from converter.checkpoint.plan import Plan, Planned
from converter.checkpoint.writer import Writer
from converter.choices import LedgerKind
from converter.dtypes import CODES, NAMES, cast, chunks, sha256
from converter.errors import CannotUndo, NotRepresentable
from converter.layout import EMBEDDING, HEAD, Slot
from converter.parallel import give_back
from converter.piecewise import Index, Piecewise, cut
from converter.processing.ledger import encode_unit
from converter.processing.step import is_vector
from converter.processing.unit_ledger import WITHOUT, UnitLedger
from converter.progress import Progress
from converter.route import Array, Made, Processing, Route, Tensors, Undoing

_LARGE = 2**25
"""Bytes of a unit after which it is worth giving back what is free."""


class Digests(NamedTuple):
    """SHA-256 of every tensor's bytes, by its own name."""

    read: dict[str, str]
    written: dict[str, str]
    not_finite: dict[str, int]
    """Source tensors that hold NaN or infinity, and in how many elements."""


def stream(
    route: Route, plan: Plan, sink: Writer | Memory, ledger: LedgerWriter | None, progress: Progress
) -> Digests:
    """Write the planned tensors. See `convert` for what it may raise.

    Pieces are made in this thread; the sink hashes and writes them, and what else must be known of
    a unit is found out in the background.
    """
    source = route.source
    planned = {tensor.slot.key: tensor for tensor in plan.tensors}
    read, not_finite = dict.fromkeys((t.name for t in source.stored.values()), ""), {}
    as_it_was: dict[str, str] = {}  # source tensors that are written as they are: one digest serves
    restored: dict[str, str] = {}
    done = 0
    hooked: dict[str, str] = {}  # digests in `hooked` axes, where the file has others

    def look(name: str, as_stored: Array) -> None:
        if name not in as_it_was:
            read[name] = sha256(as_stored)
        if count := sum(map(_not_finite, chunks(as_stored))):
            not_finite[name] = count

    def keep(slots: list[Slot], unit: Tensors, written: Tensors, made: Made) -> None:
        assert ledger is not None
        ledger.add(_kept(ledger.kind, slots[0].prefix, route, unit, written, made))
        for slot in slots:
            if slot.local in written and not planned[slot.key].slot.straight:
                hooked[slot.key] = sha256(written[slot.local])

    def prepare(slots: list[Slot], unit: Tensors, made: Made, background: Background) -> Tensors:
        """The unit in the planned dtypes. What is read of it is looked at in the background."""
        written: Tensors = {}
        for slot in slots:
            tensor, array = planned.get(slot.key), made.tensors[slot.local]
            if stored := source.stored.get(slot.key):
                given = unit[slot.local]
                if tensor and array is given and tensor.moves(slot, stored.code):
                    as_it_was[stored.name] = tensor.name
                as_stored = slot.to_hub.inverse.apply(given, source.config.sizes)
                background.do(look, stored.name, as_stored)
            if tensor is None:
                _require_neutral(array, slot, plan)
                continue
            written[slot.local] = _stored(array, tensor, source)
            if slot.local in made.original and CODES[tensor.code] == array.dtype:
                restored[slot.key] = tensor.name
        return written

    def write(tensor: Planned, array: Array) -> None:
        nonlocal done
        writer.write(tensor, array)
        done += tensor.nbytes
        progress(f"writing {tensor.name}", done, plan.nbytes)

    def copy(key: str) -> None:
        """Read, looked at, hashed and written a piece at a time."""
        counts: list[int] = []
        write(planned[key], _watched(copied[key], counts))
        if stored := source.stored.get(key):
            as_it_was[stored.name] = planned[key].name
            if count := sum(counts):
                not_finite[stored.name] = count

    copied = _copied(route, planned)
    with Background() as background, sink as writer:
        for slots, unit, made in route.run(but=copied):
            if slots[0].key in copied:
                copy(slots[0].key)
                continue
            written = prepare(slots, unit, made, background)
            if ledger:
                background.do(keep, slots, unit, written, made)
            for slot in slots:
                if slot.local in written:
                    tensor = planned[slot.key]
                    own = tensor.slot.to_hub.inverse
                    write(tensor, own.apply(written[slot.local], plan.config.sizes))
            if route.whole_units:
                background.finish()
            large = sum(array.nbytes for array in unit.values()) > _LARGE
            del unit, made, written  # before the next unit is read
            if large:
                give_back()
    if isinstance(route, Undoing):
        _require_original(route, plan, writer.sha256, restored)
    for name, target in as_it_was.items():
        read[name] = writer.sha256[target]
    if ledger:
        for tensor in plan.tensors:
            written_sha256 = writer.sha256[tensor.name]
            ledger.made_for(tensor.slot, hooked.get(tensor.slot.key, written_sha256))
    return Digests(read, writer.sha256, not_finite)


def _copied(route: Route, planned: dict[str, Planned]) -> dict[str, Array]:
    """The weights whose bytes go from file to file as they are, to be read piece by piece."""
    source = route.source
    result = {}
    for key, tensor in planned.items():
        whence = source.holder(key)
        stored, slot = source.stored.get(whence), source.slots[whence]
        if stored and route.moves(slot) and tensor.moves(slot, stored.code):
            result[key] = source.in_pieces(whence)
    return {key: pieces for key, pieces in result.items() if pieces is not None}


def _watched(array: Any, counts: list[int]) -> Any:
    """The same; of each piece that is asked for, how many elements are not finite is noted."""

    def compute(index: Index) -> Array:
        part: Array = array[index]
        counts.append(_not_finite(part))
        return part

    return Piecewise(array.shape, array.dtype, compute)


def _not_finite(array: Array) -> int:
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaNs
        return array.size - int(np.count_nonzero(np.isfinite(array)))


def _kept(
    kind: LedgerKind, prefix: str, route: Route, unit: Tensors, written: Tensors, made: Made
) -> UnitLedger:
    assert isinstance(route, Processing)
    # A head that stays tied in the target comes back by its tie.
    original = {n: a for n, a in unit.items() if n != HEAD or n in written}
    return encode_unit(original, written, route.pipeline, made.records, kind=kind, prefix=prefix)


def _require_neutral(array: Array, slot: Slot, plan: Plan) -> None:
    """What the target has no tensor for must be what its absence means there."""
    if slot.key == HEAD and plan.tied:
        return
    assert slot.absence is not None, slot.key
    differing = int(np.count_nonzero(array != slot.absence.value))
    if differing:
        name = slot.name or slot.key
        raise NotRepresentable(
            f"{name} is not {slot.absence.value:g} throughout, and layout {plan.layout} has no place for it.",
            where=f"{name}: {differing} of {array.size} elements",
            do="Convert with processing (fold_ln), or keep the checkpoint in its layout.",
        )


def _stored(array: Array, tensor: Planned, source: Checkpoint) -> Array:
    """In the planned dtype.

    Raises:
        NotRepresentable: now or with a piece. float16 ends at 65504: a weight beyond it would
            become infinite in silence.
    """
    dtype = CODES[tensor.code]
    if array.dtype == dtype:
        return array

    def compute(index: Index) -> Array:
        part = array[index]
        stored = cast(part, tensor.code)
        if _lost(stored, part):
            lost = sum(
                _lost(cast(part, tensor.code), part)
                for part in (array[piece] for piece in cut(array.shape, 0))
            )
            raise NotRepresentable(
                f"{lost} element(s) of {tensor.name} are too large for {NAMES[tensor.code]}.",
                where=f"{source.source.path}: {tensor.source or tensor.name}",
                do="Use --dtype bfloat16 or float32, or keep the dtype.",
            )
        return stored

    made: Any = Piecewise(array.shape, dtype, compute)
    return np.asarray(made) if is_vector(tensor.slot.local) else made


def _lost(stored: Array, array: Array) -> int:
    """Elements that have become infinite."""
    infinite = np.isinf(stored)
    return int((infinite & np.isfinite(array)).sum()) if infinite.any() else 0


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
            do=WITHOUT,
        )
