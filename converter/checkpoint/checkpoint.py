"""A GPT-Neo checkpoint of any layout: its architecture, and its weights by `hooked` name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from converter.checkpoint.config import NeoConfig
from converter.checkpoint.hf_config import from_hf
from converter.checkpoint.reader import Stored
from converter.checkpoint.source import Source, find
from converter.checkpoint.tl_config import from_tl
from converter.choices import flags, of_kind
from converter.dtypes import CODES, cast, same_bits
from converter.errors import ConfigError, MissingTensor, TensorMismatch, UnknownTensor
from converter.layout import Layout, Slot, buffers, expand

HEAD, EMBEDDING = "unembed.W_U", "embed.W_E"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. Nothing but headers has been read; `tensor` reads."""

    source: Source
    layout: Layout
    config: NeoConfig
    slots: dict[str, Slot]
    """The layout's table for this model, by `hooked` name."""
    stored: dict[str, Stored]
    """By `hooked` name. Absent: not in the files (neutral, or the tied head)."""
    dropped: tuple[str, ...]
    """Known buffers that the files hold beside the weights."""
    notes: tuple[str, ...] = ()
    """What was found, filled in or passed over on opening, that a person should know: one
    sentence each, without a full stop."""
    graph: Path | None = None
    """The ONNX file that the weights were read from: its graph computes, not the layout's library."""

    def __repr__(self) -> str:
        sizes = f"{self.config.n_layers} layers, d_model {self.config.d_model}"
        return f"<Checkpoint {self.source.given} ({self.layout}): {sizes}>"

    @property
    def complete(self) -> bool:
        """Whether every weight is known. Of a graph that others wrote, it may not be."""
        return all(
            key in self.stored or slot.absence or key == HEAD for key, slot in self.slots.items()
        )

    @property
    def directory(self) -> Path:
        return self.source.directory

    @property
    def biased(self) -> bool:
        """Whether the files hold query, key and value biases."""
        return any(key.endswith(".b_Q") for key in self.stored)

    @property
    def dtype(self) -> str:
        """The storage dtype (safetensors code): that of the embedding."""
        embedding = self.stored.get(EMBEDDING)
        return embedding.code if embedding else "F32"

    @property
    def headless(self) -> bool:
        """An HF checkpoint whose files hold no head of its own."""
        return HEAD not in self.stored

    @cached_property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix: compared as bytes, unless HF says untied."""
        if self.headless:
            return True
        config = self.original_hf_config
        if config is not None and config.get("tie_word_embeddings", True) is False:
            return False
        if self.stored[HEAD].code != self.dtype:
            return False
        return same_bits(self.tensor(EMBEDDING), self.tensor(HEAD).T)

    @property
    def original_hf_config(self) -> dict[str, Any] | None:
        """The HF config beside the weights, or the one that provenance kept through TL."""
        beside = self.source.hf_config or {}
        foreign = self.layout == "hooked" and beside.get("model_type") != "gpt_neo"
        return (None if foreign else self.source.hf_config) or self._kept("config")

    @property
    def original_generation_config(self) -> dict[str, Any] | None:
        return self.source.generation_config or self._kept("generation_config")

    def _kept(self, what: str) -> dict[str, Any] | None:
        kept = (self.source.provenance or {}).get("kept", {})
        value = kept.get(what) if isinstance(kept, dict) else None
        return value if isinstance(value, dict) else None

    @property
    def original_tl_config(self) -> dict[str, Any] | None:
        """The TL config that the weights were read by, or the one that provenance kept. A cfg.json
        beside HF weights is somebody else's: an SAE's, a run's."""
        beside = self.source.tl_config if self.layout == "hooked" else None
        return beside or self._kept("cfg")

    def code(self, key: str) -> str:
        """The storage dtype of a weight; a tensor that the files lack has the model's."""
        stored = self.stored.get(key)
        return stored.code if stored else self.dtype

    def tensor(self, key: str, dtype: str | None = None) -> np.ndarray:
        """A weight by its `hooked` name, in `hooked` axes, read now.

        Where the files lack it: the tied embedding for the head, else the value that
        absence stands for. `dtype` (safetensors code) casts it.
        """
        stored = self.stored.get(key)
        if stored is not None:
            reader = next(r for r in self.source.readers if stored.name in r.tensors)
            raw = self.slots[key].to_hub.apply(reader.read(stored.name), self.config.sizes)
        elif key == HEAD:
            raw = self.tensor(EMBEDDING).T
        else:
            slot = self.slots[key]
            assert slot.absence is not None, key
            raw = np.full(slot.hub_shape, slot.absence.value, CODES[self.dtype])
        return cast(raw, dtype) if dtype else raw


def open_checkpoint(
    given: str | Path,
    *,
    revision: str | None = None,
    cfg: str | Path | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Open a directory, a weight file or a hub id, and check names, shapes and dtypes.

    Raises:
        BadInput: see `converter.errors`; the message names the file, the tensor, what was
            expected and what was found.
    """
    of_kind(given, (str, Path), "SOURCE", "Give a directory, a weight file or a hub id.")
    flags({"--allow-pickle": allow_pickle})
    config = None if cfg is None else Path(cfg)
    return read_checkpoint(
        find(str(given), revision=revision, cfg=config, allow_pickle=allow_pickle)
    )


def read_checkpoint(source: Source) -> Checkpoint:
    """What a source's headers and config say. Raises: see `open_checkpoint`."""
    found = {name: stored for reader in source.readers for name, stored in reader.tensors.items()}
    other = {name: code for reader in source.readers for name, code in reader.other.items()}
    layout = detect(set(found), source)
    notes: list[str] = []
    config = _config(source, layout, len(found), notes)
    if layout == "hf" and "wte.weight" in found:
        found = {f"transformer.{name}": stored for name, stored in found.items()}
        other = {f"transformer.{name}": code for name, code in other.items()}
    slots = expand(layout, config.sizes, config.n_layers)
    known = buffers(layout, config.n_layers)
    dropped = sorted(known & (set(found) | set(other)))
    stored = _match(slots, {n: s for n, s in found.items() if n not in known}, source)
    unknown = sorted(set(other) - known)
    if unknown:
        raise UnknownTensor(
            f"{len(unknown)} tensor(s) have no place in a GPT-Neo model: {', '.join(unknown[:4])}"
            f" ({other[unknown[0]]}).",
            where=str(source.path),
            do="Remove them from the checkpoint, or convert the model they belong to.",
        )
    if layout == "hooked" and not any(".ln1." in key for key in stored) and config.n_layers:
        config = NeoConfig(**{**config.__dict__, "folded": True})
    _check_present(layout, slots, stored, config, source)
    return Checkpoint(source, layout, config, slots, stored, tuple(dropped), tuple(notes))


def detect(names: set[str], source: Source) -> Layout:
    """The layout, from the embedding's name. UnknownTensor where there is none."""
    if "embed.W_E" in names:
        return "hooked"
    if "embed.weight" in names:
        return "bridge"
    if names & {"transformer.wte.weight", "wte.weight"}:
        return "hf"
    if source.hf_config is not None:
        from_hf(source.hf_config, str(source.config_path))  # names a wrong model type
    raise MissingTensor(
        "No GPT-Neo embedding is among the tensors (transformer.wte.weight, embed.W_E or embed.weight).",
        where=f"{source.path}: {', '.join(sorted(names)[:3]) or 'no tensors'}",
        do="Give a GPT-Neo checkpoint in the Hugging Face, HookedTransformer or TransformerBridge layout.",
    )


def _config(source: Source, layout: Layout, n_tensors: int, notes: list[str]) -> NeoConfig:
    where = str(source.config_path)
    if layout != "hooked" and source.hf_config and source.tl_config and source.config_path:
        where = str(source.config_path.with_name("config.json"))
        notes.append("the cfg.json beside the weights is not theirs, and was not used")
    if layout == "hooked" and source.tl_config is not None:
        config = from_tl(source.tl_config, where, notes)
    elif source.hf_config is not None:
        config = from_hf(source.hf_config, where, notes)
    elif source.tl_config is not None:
        config = from_tl(source.tl_config, where, notes)
    else:
        wanted = "cfg.json" if layout == "hooked" else "config.json"
        raise ConfigError(
            f"There is no {wanted} beside the weights, and shapes alone do not tell the heads.",
            where=str(source.path),
            do="Give it with --cfg FILE (for TransformerLens: model.cfg.to_dict() as JSON).",
        )
    if config.n_layers > n_tensors:  # before a table of that size is built
        raise ConfigError(
            f"The config says {config.n_layers} layers; the files hold {n_tensors} tensors.",
            where=where,
            do="Check the config against the checkpoint it came with.",
        )
    return config


def _match(slots: dict[str, Slot], found: dict[str, Stored], source: Source) -> dict[str, Stored]:
    by_name = {slot.name: slot for slot in slots.values() if slot.name is not None}
    unknown = sorted(set(found) - set(by_name))
    if unknown:
        raise UnknownTensor(
            f"{len(unknown)} tensor(s) have no place in this GPT-Neo model: {', '.join(unknown[:4])}.",
            where=f"{found[unknown[0]].file}: {unknown[0]} {list(found[unknown[0]].shape)}",
            do="Check that the config's number of layers is right, or remove what is not GPT-Neo's.",
        )
    for name, stored in found.items():
        expected = by_name[name].shape
        if stored.shape != expected:
            ends = by_name[name].key in (EMBEDDING, HEAD)
            raise TensorMismatch(
                f"Tensor {name} has shape {list(stored.shape)}; the config makes it {list(expected)}"
                + (" (vocab_size by d_model)." if ends else "."),
                where=f"{stored.file}, with {source.config_path}",
                do="Give the config that belongs to these weights.",
            )
    return {by_name[name].key: stored for name, stored in found.items()}


def _check_present(
    layout: Layout,
    slots: dict[str, Slot],
    stored: dict[str, Stored],
    config: NeoConfig,
    source: Source,
) -> None:
    tied = layout == "hf" and (source.hf_config or {}).get("tie_word_embeddings", True) is not False
    missing = [
        slot.name
        for slot in slots.values()
        if slot.key not in stored
        and slot.name is not None
        and slot.in_file(layout, folded=config.folded)
        and not (slot.key == HEAD and tied)
    ]
    if missing:
        raise MissingTensor(
            f"{len(missing)} tensor(s) of the model are missing: {', '.join(missing[:4])}.",
            where=str(source.path),
            do="The checkpoint is incomplete, or its config is another model's."
            if missing != ["lm_head.weight"]
            else "The config says tie_word_embeddings=false, so the head must be there; set it to true if it is tied.",
        )
