"""The weights of a graph that names them as it likes: each is looked for by its bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from converter.checkpoint import HEAD, Checkpoint
from converter.layout import Slot
from converter.layout.ops import Sizes
from converter.onnx.opening import GraphReader, reader_of
from converter.progress import Progress, silent
from converter.route import Expected, Route
from converter.verification.weights import Mismatch


@dataclass(frozen=True)
class ByValue:
    """Which weights a graph has, under whatever name and as whichever way round."""

    found: int
    missing: tuple[str, ...]
    """`hooked` names of those that it has not as they are: it may hold them fused, or rounded."""
    wrong: tuple[Mismatch, ...]
    """Of the shape of a weight that is missing, and none of the weights."""
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
        progress(f"weights: {key}")
        arrays = [made[code].tensor(key) for code in codes]
        forms = (form for array in arrays for form in _forms(slot, array, sizes))
        names = {name for form in forms for name in digests.get(_digest(form), ())}
        known |= names
        found += bool(names)
        if not names and not all(np.all(a == a.flat[0]) for a in arrays):
            missing.append(slot)
    lost = {tuple(sorted(slot.shape)) for slot in missing}
    matrices = {tuple(sorted(slot.shape)) for slot in graph.slots.values() if len(slot.shape) > 1}
    wrong, more = [], []
    for name, tensor in reader.tensors.items():
        shape = tuple(sorted(tensor.shape))
        if name in known:
            continue
        if shape in lost:
            wrong.append(_wrong(name, reader, missing, made[tensor.code], graph))
        elif shape in matrices:
            more.append(name)
    return ByValue(found, tuple(slot.key for slot in missing), tuple(wrong), tuple(more))


def _forms(slot: Slot, array: np.ndarray, sizes: Sizes) -> Iterator[np.ndarray]:
    """A weight as exporters write it: in the layout's axes, turned, or with an axis for heads."""
    flat = slot.to_hub.inverse.apply(array, sizes)
    yield flat
    yield flat.T
    yield array


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()


def _wrong(
    name: str, reader: GraphReader, missing: list[Slot], made: Expected, graph: Checkpoint
) -> Mismatch:
    """With the most similar of the weights that are missing, or none."""
    array = reader.read(name)
    named = next((key for key, t in graph.stored.items() if t.name == name), None)
    best, share = named, -1.0
    for slot in missing if named is None else ():
        for form in _forms(slot, made.tensor(slot.key), graph.config.sizes):
            if form.shape == array.shape and (same := float(np.mean(form == array))) > share:
                best, share = slot.key, same
    if best is None:
        return Mismatch("", "", name)
    return Mismatch(graph.slots[best].place, best, name)
