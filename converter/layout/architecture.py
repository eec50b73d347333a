"""An architecture: its weights, a row each, and its config's fields, from which every direction is
derived.

`hooked` is the hub: it has a place for everything, so HF <-> bridge goes through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from converter.layout.layouts import LAYOUTS, Layout
from converter.layout.ops import Rearrange, Sizes, shape

_BLOCK = "blocks.{i}."


class UnitKind(Enum):
    """The few tensors that are in memory at one time."""

    EMBED = "embed"
    BLOCK = "block"
    FINAL = "final"


class Absence(NamedTuple):
    """Which files lack a tensor, and the value it then stands for."""

    value: float
    raw: tuple[Layout, ...]
    """Layouts in which an unprocessed file lacks it."""
    folded: tuple[Layout, ...]
    """Layouts in which a file with folded LayerNorms (LNPre) lacks it."""


@dataclass(frozen=True)
class Row:
    """One weight: its name in each layout (None: no such tensor there) and its einops axes."""

    unit: UnitKind
    hf: str | None
    hooked: str
    bridge: str | None
    flat: str
    axes: str
    absence: Absence | None = None

    @property
    def local(self) -> str:
        """The `hooked` name within its unit."""
        return self.hooked.removeprefix(_BLOCK)

    def name(self, layout: Layout) -> str | None:
        """With `{i}` for the number of the block."""
        name: str | None = getattr(self, layout)
        return name


@dataclass(frozen=True)
class Slot:
    """A row of the table expanded for one layer and one layout."""

    layout: Layout
    key: str
    """The weight's `hooked` name: its identity in every layout."""
    name: str | None
    """Its name in this layout, or None where this layout has no such tensor."""
    shape: tuple[int, ...]
    """Its shape in this layout."""
    hub_shape: tuple[int, ...]
    """Its shape in `hooked`."""
    unit: UnitKind
    layer: int | None
    absence: Absence | None
    to_hub: Rearrange
    """From this layout to `hooked`; `to_hub.inverse` leads back."""

    @property
    def straight(self) -> bool:
        """Whether its bytes are in the order that they have in `hooked`."""
        return self.to_hub.before == self.to_hub.after

    @property
    def place(self) -> str:
        """Its unit's name for people: "embed", "block 3" or "final"."""
        return self.unit.value if self.layer is None else f"block {self.layer}"

    @property
    def prefix(self) -> str:
        """Of the unit's names: "blocks.3.", "embed." or "final."."""
        return f"{self.unit.value}." if self.layer is None else f"blocks.{self.layer}."

    @property
    def local(self) -> str:
        """The `hooked` name within its unit: "attn.W_Q" of "blocks.3.attn.W_Q"."""
        return self.key if self.layer is None else self.key.removeprefix(self.prefix)

    def in_file(self, *, folded: bool) -> bool:
        """Whether a file of this state holds the tensor; a tied head it may hold or not."""
        absence = self.absence or Absence(0.0, raw=(), folded=())
        lacking = absence.folded if folded else absence.raw
        return self.name is not None and self.layout not in lacking


class Field(NamedTuple):
    """What the configs of both libraries say."""

    name: str
    """TransformerLens's name of it, and `NeoConfig`'s."""
    hf: str
    default: int | float | str | None
    """What transformers takes where its config leaves it out; None: it depends on others."""
    axis: str | None = None
    """The axis whose length it is."""
    alias: str | None = None
    """transformers' other name of it. Where both are there, the alias wins, as there."""


@dataclass(frozen=True)
class Architecture:
    """What is known of a kind of model beside its sizes."""

    rows: tuple[Row, ...]
    masks: Mapping[Layout, tuple[str, ...]]
    """Buffers that old files hold: known, never written, recorded as dropped."""
    norms: Mapping[str, tuple[tuple[str, str], ...]]
    """Each LayerNorm with the weights that read it, and their biases, by `hooked` name within their
    unit. In all these weights the axis that they read is the one before the last."""
    fields: tuple[Field, ...] = ()
    """Of its configs, in the order in which they are written."""

    def expand(self, layout: Layout, sizes: Sizes, n_layers: int) -> dict[str, Slot]:
        """Every weight of the model in this layout, by `hooked` name, in the order of the forward
        pass.

        The result is finite and checked here: one key, and at most one name, for each weight.
        """
        slots: dict[str, Slot] = {}
        placed = list(self._in_order(n_layers))
        for row, layer in placed:
            name = row.name(layout)
            own = row.axes if LAYOUTS[layout].by_head else row.flat
            key = row.hooked.format(i=layer)
            slots[key] = Slot(
                layout=layout,
                key=key,
                name=None if name is None else name.format(i=layer),
                shape=shape(own, sizes),
                hub_shape=shape(row.axes, sizes),
                unit=row.unit,
                layer=layer,
                absence=row.absence,
                to_hub=Rearrange(own, row.axes),
            )
        names = [slot.name for slot in slots.values() if slot.name is not None]
        if len(slots) != len(placed) or len(set(names)) != len(names):
            raise AssertionError(f"the {layout} column of the layout table is not one-to-one")
        return slots

    def name(self, key: str, layout: Layout) -> str:
        """The name in a layout of a weight that is in no block."""
        return next(str(row.name(layout)) for row in self.rows if row.hooked == key)

    def _in_order(self, n_layers: int) -> Iterator[tuple[Row, int | None]]:
        blocks = [row for row in self.rows if row.unit is UnitKind.BLOCK]
        yield from ((row, None) for row in self.rows if row.unit is UnitKind.EMBED)
        yield from ((row, i) for i in range(n_layers) for row in blocks)
        yield from ((row, None) for row in self.rows if row.unit is UnitKind.FINAL)

    def buffers(self, layout: Layout, n_layers: int) -> set[str]:
        """Names of the known buffers that a file of this layout may hold beside its weights."""
        return {name.format(i=i) for name in self.masks[layout] for i in range(n_layers)}

    def without_place(self, layout: Layout) -> tuple[str, ...]:
        """The `hooked` names, within their units, of the weights that a layout never has."""
        return tuple(row.local for row in self.rows if row.name(layout) is None)

    def carriers(self, layout: Layout) -> dict[str, tuple[tuple[str, str], ...]]:
        """The LayerNorms whose readers have no bias in a layout, with those readers."""
        lacking = self.without_place(layout)
        norms = self.norms.items()
        return {norm: pairs for norm, pairs in norms if any(b in lacking for _, b in pairs)}

    def writers(self, axis: str) -> tuple[str, ...]:
        """The weights and biases that write along an axis, their last, by `hooked` name within
        their units: all but the LayerNorms'."""
        return tuple(
            row.local
            for row in self.rows
            if row.axes.split()[-1] == axis and row.local.rpartition(".")[0] not in self.norms
        )

    def no_biases(self, layout: Layout, n_layers: int) -> dict[str, str]:
        """Names of biases that a file of this layout may hold for nothing -> what they would be:
        others' code has them where the architecture has none, and the library ignores them."""
        named = self._no_biases(layout).items()
        return {name.format(i=i): key.format(i=i) for name, key in named for i in range(n_layers)}

    def _no_biases(self, layout: Layout) -> dict[str, str]:
        of = {row.hooked: row.name(layout) for row in self.rows}
        weights = {key: of.get(key.replace(".b_", ".W_")) for key, name in of.items() if not name}
        return {w.removesuffix("weight") + "bias": key for key, w in weights.items() if w}

    def templates(self, layout: Layout) -> Iterator[str]:
        """All names that a file of this layout may hold, with `{i}` for the number of the block."""
        yield from (name for row in self.rows if (name := row.name(layout)))
        yield from self.masks[layout]
        yield from self._no_biases(layout)
