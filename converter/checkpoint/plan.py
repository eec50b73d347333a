"""What will be written, decided from headers alone, before a weight is read.

The plan is the dry run, and the writer follows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from huggingface_hub import split_state_dict_into_shards_factory

from converter.checkpoint.checkpoint import Checkpoint
from converter.checkpoint.config import NeoConfig
from converter.dtypes import CODES, nbytes
from converter.errors import UsageError
from converter.layout import HEAD, LAYOUTS, Layout, Slot, expand

if TYPE_CHECKING:
    from converter.route import Route


@dataclass(frozen=True)
class Planned:
    """One tensor of the output."""

    slot: Slot
    name: str
    code: str
    """safetensors dtype code."""
    shape: tuple[int, ...]
    source: str | None
    """The tensor it comes from, by its name in the source; None: invented (neutral)."""
    shard: str

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.code)

    def moves(self, slot: Slot, code: str) -> bool:
        """Whether a tensor that is stored so keeps its bytes, if nothing is computed."""
        return self.code == code and self.slot.to_hub.before == slot.to_hub.before


@dataclass(frozen=True)
class Plan:
    layout: Layout
    config: NeoConfig
    """The output's architecture."""
    tied: bool
    """HF: the head is not written, it is the embedding."""
    tensors: tuple[Planned, ...] = field(repr=False)
    """In the order in which they are made."""
    shards: tuple[str, ...]
    dropped: dict[str, str] = field(repr=False)
    """Source tensors that are not carried over, each with the reason."""
    steps: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def n_params(self) -> int:
        return sum(math.prod(t.shape) for t in self.tensors)

    @property
    def invented(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.tensors if t.source is None)

    def name(self, key: str) -> str:
        """The output's name of a weight that it holds, by its `hooked` name."""
        return next(t.name for t in self.tensors if t.slot.key == key)

    def in_shard(self, shard: str) -> list[Planned]:
        """A shard's tensors in file order: wide dtypes first, so that each stays aligned."""
        mine = [t for t in self.tensors if t.shard == shard]
        return sorted(mine, key=lambda t: -CODES[t.code].itemsize)


def make_plan(
    route: Route, layout: Layout, *, dtype: str | None = None, max_shard_size: str | int = "5GB"
) -> Plan:
    """Plan the conversion that `route` describes, to `layout`.

    Args:
        dtype: safetensors code to store in; None keeps the route's own.
        max_shard_size: as the hub's tools write it, such as "5GB" or "500MB".

    Raises:
        UsageError: max_shard_size is no size.
    """
    source, config = route.source, route.target_config
    slots = expand(layout, config.sizes, config.n_layers)
    tied = LAYOUTS[layout].ties and route.tied
    wanted = {
        key: slot
        for key, slot in slots.items()
        if slot.in_file(folded=config.folded) and not (tied and key == HEAD)
    }
    codes = {key: dtype or route.code(key) for key in wanted}
    split = split_by_size(
        {key: nbytes(slot.shape, codes[key]) for key, slot in wanted.items()}, max_shard_size
    )
    shard_of = {key: file for file, keys in split.items() for key in keys}
    tensors = tuple(
        Planned(slot, str(slot.name), codes[key], slot.shape, _origin(source, key), shard_of[key])
        for key, slot in wanted.items()
    )
    dropped = dict(source.dropped)
    for key in slots:
        if key not in wanted and key in source.stored:
            stored = source.stored[key].name
            dropped[source.slots[key].name or stored] = _reason(route, slots[key])
    shards = tuple(sorted(split))
    return Plan(layout, config, tied, tensors, shards, dropped, route.steps)


def split_by_size(sizes: dict[str, int], max_shard_size: str | int) -> dict[str, list[str]]:
    """Names of shards -> names of tensors, of which `sizes` gives the bytes.

    Raises:
        UsageError: max_shard_size is no size.
    """
    limit = int(max_shard_size) if str(max_shard_size).isdecimal() else max_shard_size
    try:
        if str(max_shard_size).startswith("-") or not set(str(max_shard_size)) & set("123456789"):
            raise ValueError("a size is more than zero")
        split = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=limit,
        )
    except (ValueError, OverflowError) as error:
        raise UsageError(
            f"--max-shard-size {max_shard_size!r} is not a size.",
            where="--max-shard-size",
            do="Write it as 5GB, 500MB or 100000.",
        ) from error
    return dict(split.filename_to_tensors)


def _reason(route: Route, slot: Slot) -> str:
    if slot.key == HEAD:
        return "the embedding again"
    if slot.in_file(folded=False):
        return "folded into the weights"
    if route.name == "undoing":
        return "processing made it, and is undone"
    if route.name == "functional":
        return f"{slot.layout} has no such bias; the LayerNorms carry it"
    return f"zero; {slot.layout} has no such bias"


def _origin(source: Checkpoint, key: str) -> str | None:
    stored = source.stored.get(source.holder(key))
    return stored.name if stored else None
