"""A checkpoint with an adapter merged into it: float64 where it is changed, cast once when written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from converter.adapter.changes import Change, LowRank
from converter.adapter.files import Adapter, open_adapter
from converter.adapter.matching import changes_of
from converter.checkpoint.checkpoint import Checkpoint
from converter.checkpoint.provenance import placeless
from converter.checkpoint.reader import Reader, Stored
from converter.checkpoint.source import called
from converter.errors import CorruptFile, NotRepresentable
from converter.layout import EMBEDDING, HEAD, Slot, expand
from converter.processing import DEFAULT
from converter.routing import already_applied, biased_units, recorded_steps

_WRITES = {
    True: "neoconvert bake BASE DIR --process none --adapter FIRST",
    False: "neoconvert tl-to-hf BASE DIR --adapter FIRST",
}


@dataclass(frozen=True)
class Merged:
    """What a merged checkpoint was made of."""

    base: Checkpoint
    adapter: Adapter


class MergedReader(Reader):
    """The base's tensors under their names, those that the adapter changes in float64."""

    def __init__(
        self,
        base: Checkpoint,
        stored: Mapping[str, Stored],
        changes: Mapping[str, Sequence[Change]],
    ) -> None:
        self.base, self.changes = base, changes
        self.tensors = {tensor.name: tensor for tensor in stored.values()}
        self.other = {}
        self._keys = {tensor.name: key for key, tensor in stored.items()}
        self._hf = expand("hf", base.config.sizes, base.config.n_layers)

    def read(self, name: str) -> np.ndarray:
        key, sizes = self._keys[name], self.base.config.sizes
        array, slot = self.base.tensor(key), self.base.slots[key]
        if changes := self.changes.get(key):
            array = self._changed(array, changes, self._hf[key], name)
        return slot.to_hub.inverse.apply(array, sizes)

    def _changed(
        self, array: np.ndarray, changes: Sequence[Change], slot: Slot, name: str
    ) -> np.ndarray:
        sizes = self.base.config.sizes
        finite = bool(np.isfinite(array).all())
        wide = np.array(slot.to_hub.inverse.apply(array, sizes), np.float64, order="C")
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for change in changes:
                wide = change.apply(wide)
        if finite and not np.isfinite(wide).all():
            raise CorruptFile(
                f"With the adapter, {name} is not finite: {int((~np.isfinite(wide)).sum())} element(s).",
                where=str(slot.name),
                do="The adapter is broken (NaN, infinity, or a scale far too large); use another checkpoint of it.",
            )
        return slot.to_hub.apply(wide, sizes)


def with_adapter(
    base: Checkpoint, adapter: str | Path, *, allow_pickle: bool = False
) -> Checkpoint:
    """`base` with a PEFT adapter merged into it, tensor by tensor as it is read.

    Changed tensors are float64 and are cast once, to the dtype that the base stores them in
    unless another is asked for. Equal to peft's `merge_and_unload` to one rounding, but for an update
    of one of two tied matrices: that unties them, as the model was in which it was trained.

    Args:
        adapter: a directory with adapter_config.json, and adapter_model.safetensors or, with
            `allow_pickle`, adapter_model.bin. LoRA: also rslora, DoRA, rank and alpha patterns,
            trained biases, modules_to_save.

    Raises:
        NotRepresentable: another method, or the base's weights are processed.
        BadInput: see `open_adapter` and `changes_of`; the message names the tensor.
    """
    _require_unprocessed(base)
    opened = open_adapter(adapter, base.source.given, allow_pickle=allow_pickle)
    changes = changes_of(opened, base)
    stored = dict(base.stored)
    unties = base.tied and _differ(opened, changes)
    if base.headless:
        if unties:
            slot = base.slots[HEAD]
            stored[HEAD] = replace(stored[EMBEDDING], name=str(slot.name), shape=slot.shape)
        else:
            changes.pop(HEAD, None)  # the embedding's
    storage = {key: stored[key].code for key in changes}
    stored |= {key: replace(stored[key], code="F64") for key in changes}
    source = replace(base.source, readers=(MergedReader(base, stored, changes),))
    return replace(
        base,
        source=source,
        stored=stored,
        storage=storage,
        merged=Merged(base, opened),
        notes=(*base.notes, *_notes(opened, base, changes, unties)),
    )


def _differ(adapter: Adapter, changes: Mapping[str, Sequence[Change]]) -> bool:
    """Whether the adapter changes one of two tied matrices for itself."""
    own = any(isinstance(c, LowRank) for key in (EMBEDDING, HEAD) for c in changes.get(key, ()))
    return own or any(map(adapter.settings.is_saved, ("transformer.wte", "lm_head")))


def _notes(
    adapter: Adapter, base: Checkpoint, changes: Mapping[str, Sequence[Change]], unties: bool
) -> list[str]:
    settings = adapter.settings
    kind = "DoRA" if settings.dora else "LoRA"
    found = [
        f"adapter {called(adapter.given)} ({kind}, rank {settings.rank}, alpha {settings.alpha:g}) changes"
        f" {len(changes)} tensors; merged in float64"
    ]
    if settings.base and not _same_place(settings.base, base):
        found.append(
            f"the adapter says that its base is {placeless(settings.base)}; the shapes fit this one"
        )
    if unties:
        found.append(
            "embedding and head are no longer one matrix, as in the model that was trained (peft's"
            " merge_and_unload may change both)"
        )
    return found


def _same_place(said: str, base: Checkpoint) -> bool:
    given = base.source.given
    return said == given or Path(said).name == Path(given).name


def _require_unprocessed(base: Checkpoint) -> None:
    """
    Raises:
        NotRepresentable: the weights are not those that an adapter can have been trained on.
    """
    if base.graph is not None or base.merged is not None:
        raise NotRepresentable(
            "An adapter is merged into a checkpoint's own weights, and one at a time.",
            where=base.source.given,
            do=f"Write the first to a directory of its own ({_WRITES[base.layout == 'hf']}), and merge the"
            " second into DIR."
            if base.merged
            else "Give the checkpoint that the graph was exported from.",
        )
    steps = recorded_steps(base)
    reason = f"its weights went through {', '.join(steps)}" if steps else None
    if base.config.folded:
        reason = reason or "its LayerNorms are folded"
    if base.config.score_divisors:
        reason = reason or "it divides its attention scores"
    if reason is None and base.layout != "hf":
        if biased_units(base):
            reason = "it has query, key, value or unembedding biases"
        elif done := already_applied(base, DEFAULT):
            reason = f"its weights went through {', '.join(sorted(done))}"
    if reason:
        raise NotRepresentable(
            f"The adapter was trained on other weights than these: {reason}.",
            where=str(base.source.path),
            do="Bring the base back first (neoconvert tl-to-hf BASE DIR), and give DIR with --adapter.",
        )
