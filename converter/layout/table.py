"""The layout table: one row per weight, from which every direction is derived.

`hooked` is `HookedTransformer.state_dict()` (TransformerLens <= 3), `bridge` is
`TransformerBridge.state_dict()` (TransformerLens >= 3), `hf` is `GPTNeoForCausalLM`.
HF and bridge share one orientation (`nn.Linear`: [out, in]), the column `flat`.
`hooked` is the hub: it has a place for everything, so HF <-> bridge goes through it.

Axes: v vocabulary, c context, d d_model, n heads, h d_head, f d_mlp.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from converter.layout.ops import Rearrange, Sizes, shape

Layout = Literal["hf", "hooked", "bridge"]
LAYOUTS: tuple[Layout, ...] = ("hf", "hooked", "bridge")


class Unit(Enum):
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


GAIN = Absence(1.0, raw=(), folded=("hooked",))
SHIFT = Absence(0.0, raw=(), folded=("hooked",))
QKV_BIAS = Absence(0.0, raw=("hf", "bridge"), folded=("hf",))
HEAD_BIAS = Absence(0.0, raw=("hf",), folded=("hf",))


@dataclass(frozen=True)
class Row:
    """One weight: its name in each layout (None: no such tensor there) and its einops axes."""

    unit: Unit
    hf: str | None
    hooked: str
    bridge: str | None
    flat: str
    axes: str
    absence: Absence | None = None


def _rows(
    unit: Unit, *rows: tuple[str | None, str, str | None, str, str, Absence | None]
) -> tuple[Row, ...]:
    return tuple(Row(unit, *row) for row in rows)


HEAD, EMBEDDING = "unembed.W_U", "embed.W_E"

# fmt: off
TABLE: tuple[Row, ...] = (
    *_rows(Unit.EMBED,
        # HF                                     hooked            bridge                flat       hooked   absent
        ("transformer.wte.weight",               "embed.W_E",      "embed.weight",       "v d",     "v d",   None),
        ("transformer.wpe.weight",               "pos_embed.W_pos", "pos_embed.weight",  "c d",     "c d",   None)),
    *_rows(Unit.BLOCK,
        ("transformer.h.{i}.ln_1.weight",        "blocks.{i}.ln1.w", "blocks.{i}.ln1.weight", "d",  "d",     GAIN),
        ("transformer.h.{i}.ln_1.bias",          "blocks.{i}.ln1.b", "blocks.{i}.ln1.bias",   "d",  "d",     SHIFT),
        ("transformer.h.{i}.attn.attention.q_proj.weight",
                                                 "blocks.{i}.attn.W_Q", "blocks.{i}.attn.q.weight", "(n h) d", "n d h", None),
        ("transformer.h.{i}.attn.attention.k_proj.weight",
                                                 "blocks.{i}.attn.W_K", "blocks.{i}.attn.k.weight", "(n h) d", "n d h", None),
        ("transformer.h.{i}.attn.attention.v_proj.weight",
                                                 "blocks.{i}.attn.W_V", "blocks.{i}.attn.v.weight", "(n h) d", "n d h", None),
        ("transformer.h.{i}.attn.attention.out_proj.weight",
                                                 "blocks.{i}.attn.W_O", "blocks.{i}.attn.o.weight", "d (n h)", "n h d", None),
        (None,                                   "blocks.{i}.attn.b_Q", "blocks.{i}.attn.q.bias", "(n h)", "n h", QKV_BIAS),
        (None,                                   "blocks.{i}.attn.b_K", "blocks.{i}.attn.k.bias", "(n h)", "n h", QKV_BIAS),
        (None,                                   "blocks.{i}.attn.b_V", "blocks.{i}.attn.v.bias", "(n h)", "n h", QKV_BIAS),
        ("transformer.h.{i}.attn.attention.out_proj.bias",
                                                 "blocks.{i}.attn.b_O", "blocks.{i}.attn.o.bias", "d",  "d",     None),
        ("transformer.h.{i}.ln_2.weight",        "blocks.{i}.ln2.w", "blocks.{i}.ln2.weight", "d",  "d",     GAIN),
        ("transformer.h.{i}.ln_2.bias",          "blocks.{i}.ln2.b", "blocks.{i}.ln2.bias",   "d",  "d",     SHIFT),
        ("transformer.h.{i}.mlp.c_fc.weight",    "blocks.{i}.mlp.W_in", "blocks.{i}.mlp.in.weight", "f d", "d f", None),
        ("transformer.h.{i}.mlp.c_fc.bias",      "blocks.{i}.mlp.b_in", "blocks.{i}.mlp.in.bias", "f", "f",   None),
        ("transformer.h.{i}.mlp.c_proj.weight",  "blocks.{i}.mlp.W_out", "blocks.{i}.mlp.out.weight", "d f", "f d", None),
        ("transformer.h.{i}.mlp.c_proj.bias",    "blocks.{i}.mlp.b_out", "blocks.{i}.mlp.out.bias", "d", "d", None)),
    *_rows(Unit.FINAL,
        ("transformer.ln_f.weight",              "ln_final.w",     "ln_final.weight",    "d",       "d",     GAIN),
        ("transformer.ln_f.bias",                "ln_final.b",     "ln_final.bias",      "d",       "d",     SHIFT),
        ("lm_head.weight",                       "unembed.W_U",    "unembed.weight",     "v d",     "d v",   None),
        (None,                                   "unembed.b_U",    "unembed.bias",       "v",       "v",     HEAD_BIAS)),
)

BUFFERS: dict[Layout, tuple[str, ...]] = {
    # Causal masks and constants that old files carry. Known, never written, recorded as dropped.
    "hf": ("transformer.h.{i}.attn.attention.bias", "transformer.h.{i}.attn.attention.masked_bias"),
    "hooked": ("blocks.{i}.attn.mask", "blocks.{i}.attn.IGNORE"),
    "bridge": (),
}
NO_BIAS: dict[str, str] = {
    # Biases that others' code has where GPT-Neo has none, by HF name. transformers ignores them.
    "transformer.h.{i}.attn.attention.q_proj.bias": "blocks.{i}.attn.b_Q",
    "transformer.h.{i}.attn.attention.k_proj.bias": "blocks.{i}.attn.b_K",
    "transformer.h.{i}.attn.attention.v_proj.bias": "blocks.{i}.attn.b_V",
    "lm_head.bias": "unembed.b_U",
}
# fmt: on


@dataclass(frozen=True)
class Slot:
    """A row of the table expanded for one layer and one layout."""

    key: str
    """The weight's `hooked` name: its identity in every layout."""
    name: str | None
    """Its name in this layout, or None where this layout has no such tensor."""
    shape: tuple[int, ...]
    """Its shape in this layout."""
    hub_shape: tuple[int, ...]
    """Its shape in `hooked`."""
    unit: Unit
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

    def in_file(self, layout: Layout, *, folded: bool) -> bool:
        """Whether a file of this layout and state holds the tensor."""
        if self.absence is None:
            return True
        return layout not in (self.absence.folded if folded else self.absence.raw)


def expand(layout: Layout, sizes: Sizes, n_layers: int) -> dict[str, Slot]:
    """Every weight of the model in this layout, by `hooked` name, in the order of the forward pass.

    The table is finite and checked here: one key, and at most one name, for each weight.
    """
    slots: dict[str, Slot] = {}
    blocks = [row for row in TABLE if row.unit is Unit.BLOCK]
    rows: list[tuple[Row, int | None]] = [(row, None) for row in TABLE if row.unit is Unit.EMBED]
    rows += [(row, i) for i in range(n_layers) for row in blocks]
    rows += [(row, None) for row in TABLE if row.unit is Unit.FINAL]
    for row, layer in rows:
        name: str | None = getattr(row, layout)
        own = row.axes if layout == "hooked" else row.flat
        key = row.hooked.format(i=layer)
        slots[key] = Slot(
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
    if len(slots) != len(rows) or len(set(names)) != len(names):
        raise AssertionError(f"the {layout} column of the layout table is not one-to-one")
    return slots


def buffers(layout: Layout, n_layers: int) -> set[str]:
    """Names of the known buffers that a file of this layout may hold beside its weights."""
    return {name.format(i=i) for name in BUFFERS[layout] for i in range(n_layers)}


def no_biases(layout: Layout, n_layers: int) -> dict[str, str]:
    """Names of biases that a file of this layout may hold for nothing -> what they would be."""
    named = NO_BIAS if layout == "hf" else {}
    return {
        name.format(i=i): key.format(i=i) for name, key in named.items() for i in range(n_layers)
    }
