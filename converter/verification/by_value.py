"""The weights of a graph that names them as it likes: each is looked for by its bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from converter.checkpoint import Checkpoint
from converter.layout import HEAD, Slot
from converter.layout.ops import Sizes
from converter.onnx.opening import reader_of
from converter.progress import Progress, silent
from converter.route import Expected, Route
from converter.verification.weights import Mismatch

_COPY = 0.5
"""The share of a weight's elements with which a matrix that is no weight is a wrong copy of it."""


@dataclass(frozen=True)
class ByValue:
    """Which weights a graph has, under whatever name and as whichever way round."""

    found: int
    missing: tuple[str, ...]
    """Those that it has not as they are: it may hold them fused, or rounded. By their names in the
    graph's layout."""
    wrong: tuple[Mismatch, ...]
    """Of the shape of a weight that is missing, and none of the weights; or a wrong copy of one."""
    more: tuple[str, ...]
    """Of the shape of a matrix that is there, and none of the weights: a mask, or its double."""


def compare_by_value(route: Route, graph: Checkpoint, progress: Progress = silent) -> ByValue:
    """Look for every weight that `route` makes among a graph's initializers.

    Weights of one value all over are passed over: exporters leave them out.
    """
    reader, sizes = reader_of(graph), graph.config.sizes
    digests: dict[bytes, list[str]] = {}
    for name, tensor in reader.tensors.items():
        if len(tensor.shape) > 0 and np.prod(tensor.shape) > 1:
            progress(f"weights: {name}")
            digests.setdefault(_digest(reader.read(name)), []).append(name)
    codes = sorted({tensor.code for tensor in reader.tensors.values()})
    made = {code: Expected(route, code) for code in codes}
    known: set[str] = set()
    missing: list[Slot] = []
    found = 0
    for key, slot in graph.slots.items():
        if key not in route.source.stored and key != HEAD:
            continue
        progress(f"weights: {slot.name or key}")
        arrays = [made[code].tensor(key) for code in codes]
        forms = (form for array in arrays for form in _forms(slot, array, sizes))
        names = {name for form in forms for name in digests.get(_digest(form), ())}
        known |= names
        found += bool(names)
        if not names and not all(np.all(a == a.flat[0]) for a in arrays):
            missing.append(slot)
    lost = {tuple(sorted(slot.shape)) for slot in missing}
    matrices = [slot for slot in graph.slots.values() if len(slot.shape) > 1]
    wrong, more = [], []
    for name, tensor in reader.tensors.items():
        shape = tuple(sorted(tensor.shape))
        if name in known:
            continue
        like = [slot for slot in matrices if tuple(sorted(slot.shape)) == shape]
        if shape in lost:
            wrong.append(_wrong(name, reader.read(name), missing, made[tensor.code], graph))
        elif like:
            # A tied matrix may be there twice: all weights are found, and the copy is what is used.
            of, share = _nearest(reader.read(name), like, made[tensor.code], graph)
            if of is not None and share > _COPY:
                wrong.append(Mismatch(graph.slots[of].place, of, name))
            else:
                more.append(name)
    return ByValue(
        found, tuple(slot.name or slot.key for slot in missing), tuple(wrong), tuple(more)
    )


def _forms(slot: Slot, array: np.ndarray, sizes: Sizes) -> Iterator[np.ndarray]:
    """A weight as exporters write it: in the layout's axes, turned, or with an axis for heads."""
    flat = slot.to_hub.inverse.apply(array, sizes)
    yield flat
    yield flat.T
    yield array


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()


def _wrong(
    name: str, array: np.ndarray, slots: Sequence[Slot], made: Expected, graph: Checkpoint
) -> Mismatch:
    """With the weight whose name it has, or else the most similar of `slots`, or none."""
    named = next((key for key, t in graph.stored.items() if t.name == name), None)
    best = named or _nearest(array, slots, made, graph)[0]
    return Mismatch(graph.slots[best].place if best else "", best or "", name)


def _nearest(
    array: np.ndarray, slots: Sequence[Slot], made: Expected, graph: Checkpoint
) -> tuple[str | None, float]:
    """The weight that most elements equal, and what share of them, zeros left out: masks and pruned
    weights have many."""
    best, share = None, -1.0
    for slot in slots:
        for form in _forms(slot, made.tensor(slot.key), graph.config.sizes):
            if form.shape != array.shape:
                continue
            counted = form != 0
            same = float(np.mean((form == array)[counted])) if counted.any() else 0.0
            if same > share:
                best, share = slot.key, same
    return best, share
