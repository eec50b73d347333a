"""Where in a tensor something is, for people and as an index."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from converter.checkpoint import Checkpoint
from converter.explaining.compare import Match
from converter.explaining.products import LISTED, strongest
from converter.layout.ops import axes
from converter.processing.step import Array

_NOUNS = {"v": "token", "c": "position", "f": "neuron"}


class Place(NamedTuple):
    where: tuple[str, ...] = ()
    """Indices into the checkpoint's tensor; none: all over it."""
    words: str | None = None
    by_head: tuple[float, ...] = ()
    """Of a tensor that attention's heads share: how much of what is left is in each, of 1."""


def locate(match: Match, checkpoint: Checkpoint, key: str) -> Place:
    """Where the cells are that no step accounts for, if they are few.

    99 % of what is left, by its energy, counts as all of it: an edit from before the steps
    leaves a little everywhere, because they subtract means.
    """
    slot, h = checkpoint.slots[key], checkpoint.config.d_head
    hub = [axis for dim in axes(slot.to_hub.after) for axis in dim]
    stored = axes(slot.to_hub.before) if slot.name is not None else [[axis] for axis in hub]
    by_head = "n" in hub and match.others.size > 0
    energy = match.others.reshape(-1, h).sum(1) if by_head else np.zeros(0)
    heads = _named(energy)
    shares = tuple(float(x) for x in energy / energy.sum()) if energy.sum() > 0 else ()
    channels = _named(match.channels)
    # In a product the basis within a head cancels: there are heads, and no dimensions of them.
    others = _named(match.others) if match.product is None else []
    if by_head and 0 < 2 * len(heads) < len(_all(match.others)):
        others = []  # heads as a whole

    def index(i: int | None = None, channel: int | None = None, head: int | None = None) -> str:
        def part(dim: list[str]) -> str:
            if dim == ["d"]:
                return ":" if channel is None else str(channel)
            if head is not None:
                return {"n": str(head), "h": ":"}.get("".join(dim), f"{head * h}:{head * h + h}")
            if i is None:
                return ":"
            return str({"n": i // h, "h": i % h}.get("".join(dim), i))

        return f"[{', '.join(part(dim) for dim in stored)}]"

    def noun(i: int) -> str:
        if by_head:
            return f"head {i // h} dimension {i % h}"
        return f"{_NOUNS[hub[0] if hub[0] != 'd' else hub[-1]]} {i}"

    if others and channels and len(others) * len(channels) <= LISTED:
        cells = [(i, c) for i in others for c in channels]
        words = ", ".join(f"{noun(i)} channel {c}" for i, c in cells)
        return Place(tuple(index(i, c) for i, c in cells), words, shares)
    if others and not (channels and len(channels) < len(others)):
        return Place(tuple(index(i) for i in others), ", ".join(map(noun, others)), shares)
    if channels:
        words = f"{_plural('channel', channels)}{' of ' + _plural('head', heads) if heads else ''}"
        return Place(tuple(index(channel=c) for c in channels), words, shares)
    if heads:
        return Place(tuple(index(head=head) for head in heads), _plural("head", heads), shares)
    return Place(by_head=shares)


def _all(energy: Array) -> list[int]:
    return sorted(int(i) for i in strongest(energy))


def _named(energy: Array) -> list[int]:
    """The indices that hold what is left, if they are few beside the others."""
    found = _all(energy)
    return found if len(found) <= LISTED and len(found) < energy.size else []


def _plural(noun: str, numbers: list[int]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
