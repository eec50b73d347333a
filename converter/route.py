"""What becomes of the weights between source and target: nothing, processing, or its inverse.

A route says what the target will be before a weight is read, and makes its weights unit by unit.
The writer and the verifier take the same route: what is on disk must be what it makes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from converter.checkpoint import Checkpoint, NeoConfig
from converter.checkpoint.ledger_file import LedgerFile
from converter.dtypes import same_bits
from converter.layout import EMBEDDING, HEAD, Slot
from converter.piecewise import stored_as
from converter.processing import Carry, Step, absorb, apply_all, unrepresentable
from converter.processing.attn_scale import SCALED, unscaled
from converter.processing.ledger import decode_unit
from converter.processing.step import in_float64

Array = NDArray[Any]
Tensors = dict[str, Array]
"""A unit's tensors by `hooked` name without `blocks.{i}.`, in `hooked` axes."""
_CARRY = Carry()


@dataclass(frozen=True)
class Made:
    """A unit's weights on the far side: stored bits where only moved; where computed, float64, and
    matrices piece by piece (`converter.piecewise`)."""

    tensors: Tensors
    records: Sequence[Mapping[str, Array]] = ()
    original: frozenset[str] = frozenset()
    """Names of the tensors that are the original's, bit for bit, as a ledger says."""


@dataclass(frozen=True)
class Route:
    """The plain route: weights are moved, not computed (but for an attention scale)."""

    source: Checkpoint
    folded: bool
    """Whether the target's LayerNorms are folded."""
    tied: bool
    """Whether the target's head is its embedding."""
    steps: tuple[str, ...] = ()
    """TransformerLens's names of the steps that the target's weights have gone through."""
    reverse: str = "none"
    remarks: tuple[str, ...] = ()
    """What a person should know of what was found and decided."""
    unknown: str | None = None
    """Where neither its source nor digests of what it makes are here: why, as a clause."""
    scale: tuple[float, ...] = ()
    """What the target divides the scores of each layer by; W_Q and b_Q are that much larger.
    GPT-Neo divides by nothing."""

    name = "plain"
    whole_units = False
    """Whether a tensor's making needs the others of its unit."""

    @property
    def target_config(self) -> NeoConfig:
        return replace(self.source.config, folded=self.folded, score_divisors=self.scale)

    @property
    def rescales(self) -> bool:
        """Whether W_Q and b_Q take up another scale of the scores than they had."""
        return self.source.config.score_divisors != self.scale

    def code(self, key: str) -> str:
        """The storage dtype that the target keeps where no other is asked for."""
        return self.source.storage_code(key)

    def make(self, unit: Tensors, layer: int | None) -> Made:
        """The target's unit from the source's."""
        if layer is None or not self.rescales:
            return Made(unit)
        before, after = self.source.config.score_divisors, self.scale
        divisor = (before[layer] if before else 1.0) / (after[layer] if after else 1.0)
        return Made({n: unscaled(n, array, divisor) for n, array in unit.items()})

    def into(self, artifact: Checkpoint) -> Weights:
        """What it makes, in the dtypes of an artifact."""
        return Expected(self, {key: artifact.code(key) for key in artifact.slots})

    def moves(self, slot: Slot) -> bool:
        """Whether a weight stays what it is."""
        return not self.whole_units and not (self.rescales and slot.local in SCALED)

    def run(self, but: Collection[str] = ()) -> Iterator[tuple[list[Slot], Tensors, Made]]:
        """Unit by unit, in forward order: its slots, its source tensors, what became of them; without
        tensors for the slots that are left out."""
        for slots in groups(self.source.slots, whole=self.whole_units):
            if slots[0].key in but:
                yield slots, {}, Made({})
                continue
            unit = {slot.local: self.source.tensor(slot.key) for slot in slots}
            with np.errstate(all="ignore"):  # what is not finite is counted, and said once
                made = self.make(unit, slots[0].layer)
            yield slots, unit, made
            del made
            del unit  # before the next is read


def groups(slots: Mapping[str, Slot], *, whole: bool) -> Iterator[list[Slot]]:
    """The units' slots, or where tensors are independent, one slot at a time."""
    group: list[Slot] = []
    for slot in slots.values():
        if group and (not whole or (slot.unit, slot.layer) != (group[0].unit, group[0].layer)):
            yield group
            group = []
        group.append(slot)
    yield group


@dataclass(frozen=True)
class Processing(Route):
    """TransformerLens's steps in float64; for HF, with the biases carried by the null direction."""

    pipeline: tuple[Step, ...] = ()

    name = "processing"
    whole_units = True

    def make(self, unit: Tensors, layer: int | None) -> Made:
        wide = in_float64(super().make(unit, layer).tensors)
        result, records = apply_all(wide, self.pipeline)
        return Made(_moved(unit, wide, result), records)


@dataclass(frozen=True)
class Functional(Route):
    """Processed or biased TL weights as plain GPT-Neo: same function, no ledger."""

    name = "functional"
    whole_units = True

    def make(self, unit: Tensors, layer: int | None) -> Made:
        scaled = super().make(unit, layer).tensors
        if not unrepresentable(scaled):
            return Made(scaled)
        wide = in_float64(scaled)
        return Made(_moved(unit, wide, _CARRY.apply(wide)[0]))


@dataclass(frozen=True)
class Undoing(Route):
    """Back to the original basis, and where nothing was edited to the original bits."""

    ledger: LedgerFile | None = None
    edited: frozenset[str] = frozenset()
    """`hooked` names of processed tensors that are not as the ledger knew them."""
    from_file: bool = False
    """Nothing that the file holds is put back from the ledger; see `decode_unit`."""

    name = "undoing"
    whole_units = True

    def code(self, key: str) -> str:
        assert self.ledger is not None
        known = self.ledger.code(self.source.slots[key])
        if known is None and key == HEAD and self.ledger.tied:
            known = self.ledger.code(self.source.slots[EMBEDDING])
        return known or self.source.dtype

    def make(self, unit: Tensors, layer: int | None) -> Made:
        assert self.ledger is not None
        slots = [s for s in self.source.slots.values() if s.layer == layer and s.local in unit]
        present = {s.local: unit[s.local] for s in slots if s.key in self.source.stored}
        edited = {s.local for s in slots if s.key in self.edited}
        tied = {HEAD} if self.tied else set()  # what is not written need not be restored
        restored = decode_unit(
            self.ledger.unit(slots[0].prefix),
            present,
            edited=edited,
            without=tied,
            outright=self.ledger.kind == "exact" or not self.edited,
            from_file=self.from_file,
        )
        # A head that is tied in the processed file too has gone through no step.
        result = unit | {n: r.array for n, r in restored.items()}
        if unrepresentable(result):  # an edit that needs a bias the original did not have
            wide = in_float64(result)
            placed = absorb(wide)
            placed = _CARRY.apply(placed)[0] if unrepresentable(placed) else placed
            result = _moved(result, wide, placed)
        exact = {n for n, r in restored.items() if r.exact and result[n] is r.array}
        return Made(result, original=frozenset(exact))


def _moved(stored: Tensors, before: Tensors, after: Tensors) -> Tensors:
    """What no step touched keeps its stored bits (NaN payloads do not survive float64)."""
    return {
        name: stored[name] if array is before.get(name) and name in stored else array
        for name, array in after.items()
    }


class Weights(Protocol):
    """Weights by `hooked` name, in `hooked` axes and certain dtypes."""

    @property
    def config(self) -> NeoConfig: ...

    def tensor(self, key: str) -> Array: ...

    def is_(self, key: str, found: Array, *, bitwise: bool) -> bool:
        """Whether an array is this weight: its bits, or as numbers."""


class Expected:
    """What a route makes of its source: weights as a checkpoint has them, but on no disk.

    `codes`: safetensors dtype codes by `hooked` name, or one for all.
    """

    def __init__(self, route: Route, codes: Mapping[str, str] | str) -> None:
        self.route, self._codes = route, codes
        self.config = route.target_config
        self._units = {
            slot.key: slots
            for slots in groups(route.source.slots, whole=route.whole_units)
            for slot in slots
        }
        self._made: tuple[list[Slot], Tensors] | None = None

    def tensor(self, key: str) -> Array:
        """A weight by its `hooked` name. The last unit made is kept: ask unit by unit."""
        code = self._codes if isinstance(self._codes, str) else self._codes[key]
        if key == HEAD and self.route.tied and self.route.reverse != "none":
            return self.tensor(EMBEDDING).T  # undone, the two agree but for rounding
        slots = self._units[key]
        if self._made is None or self._made[0] is not slots:
            self._made = None  # released before the next is made
            unit = {slot.local: self.route.source.tensor(slot.key) for slot in slots}
            self._made = slots, self.route.make(unit, slots[0].layer).tensors
        made = self._made[1][self.route.source.slots[key].local]
        return np.asarray(stored_as(made, code))

    def is_(self, key: str, found: Array, *, bitwise: bool) -> bool:
        made = self.tensor(key)
        return same_bits(made, found) if bitwise else np.array_equal(made, found)
