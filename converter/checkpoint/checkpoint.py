"""A GPT-Neo checkpoint of any layout: its architecture, and its weights by `hooked` name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converter.checkpoint.config import NeoConfig
from converter.checkpoint.hf_config import ties
from converter.checkpoint.names import TRUNK
from converter.checkpoint.reader import Stored
from converter.checkpoint.source import Source
from converter.checkpoint.standard import holds_weights
from converter.dtypes import CODES, cast, code_stated, holding, same_bits
from converter.layout import EMBEDDING, HEAD, LAYOUTS, Layout, Slot
from converter.piecewise import Index, Piecewise, cut

if TYPE_CHECKING:
    from converter.adapter import Merged

BUFFER = "a buffer, not a weight"


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
    dropped: dict[str, str]
    """What the files hold beside the weights (known buffers, other heads), each with the reason."""
    notes: tuple[str, ...] = ()
    """What was found, filled in or passed over on opening, that a person should know: one
    sentence each, without a full stop."""
    storage: Mapping[str, str] = field(default_factory=dict)
    """Where a weight is not read in the dtype it is to be stored in: that one, by `hooked` name."""
    merged: Merged | None = None
    """The base and the adapter, where one is merged into these weights."""
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
    def graph_file(self) -> str:
        """The name of the graph's file for people: while it is being added it has another."""
        assert self.graph is not None
        given = Path(self.source.given)
        return given.name if given.suffix == ".onnx" else self.graph.name

    @property
    def directory(self) -> Path:
        return self.source.directory

    @property
    def as_saved(self) -> bool:
        """Whether the layout's own library opens the directory as it is: the files have the names it
        looks for, and its config.json is the config that goes with them."""
        path, given = self.source.path, self.source.config_path
        saved = self.source.is_directory and holds_weights(path)
        # A config in the weight file itself has the directory's path.
        beside = (path / "config.json").is_file()
        beside &= given in (path, path / "config.json", path / "cfg.json")
        return saved and beside and self.merged is None and not self.renamed

    @property
    def renamed(self) -> list[str]:
        """The names under which the layout's own library looks for weights that the files hold, and
        does not find them. transformers knows its own with or without the module around the trunk,
        and either of the tied two."""
        names = {stored.name for stored in self.stored.values()}
        if LAYOUTS[self.layout].library == "transformers":
            trunk = f"{TRUNK}."
            names |= {trunk + n for n in names} | {n.removeprefix(trunk) for n in names}
            if self.headless and self.slots[HEAD].name in names:
                names.add(str(self.slots[EMBEDDING].name))
        own = (str(self.slots[key].name) for key in self.stored)
        return [name for name in own if name not in names]

    def tensor_name(self, key: str) -> str:
        """A weight's name in this layout: of a tied head, the embedding's. Where the layout has no
        place for it, its name in `hooked`."""
        return self.slots[self.holder(key)].name or key

    def holder(self, key: str) -> str:
        """The weight whose tensor holds this one: of a head that is tied and not stored, the
        embedding."""
        return EMBEDDING if key == HEAD and self.headless else key

    @property
    def buffers(self) -> list[str]:
        """Known buffers that the files hold beside the weights, by the layout's names."""
        return [name for name, reason in self.dropped.items() if reason == BUFFER]

    @property
    def biased(self) -> bool:
        """Whether the files hold query, key and value biases."""
        return any(key.endswith(".b_Q") for key in self.stored)

    @cached_property
    def dtype(self) -> str:
        """The storage dtype (safetensors code): where they differ, the one that holds them all."""
        return holding(map(self.storage_code, self.stored))

    @property
    def coarse(self) -> bool:
        """Whether a weight is stored in 16 bits."""
        return any(CODES[self.storage_code(key)].itemsize < 4 for key in self.stored)

    @property
    def stated_dtype(self) -> str | None:
        """The dtype that the config beside the weights states, in which their library opens them."""
        has_cfg = LAYOUTS[self.layout].has_cfg
        said = (self.source.tl_config if has_cfg else self.source.hf_config) or {}
        return code_stated(str(said.get("dtype") or said.get("torch_dtype")).removeprefix("torch."))

    @property
    def headless(self) -> bool:
        """An HF checkpoint whose files hold no head of its own."""
        return HEAD not in self.stored

    @cached_property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix: compared as bytes, unless HF says untied."""
        if self.headless:
            return True
        if not ties(self.original_hf_config) or self.code(HEAD) != self.code(EMBEDDING):
            return False
        return self._same_matrix()

    def _same_matrix(self) -> bool:
        """Whether the head holds the embedding's bits: a piece of it is in memory at a time."""
        head, embedding = self.stored[HEAD], self.tensor(EMBEDDING)
        beside = embedding.T if self.slots[HEAD].straight else embedding  # in the file's axes
        reader = self.source.reader(head)
        return all(
            same_bits(reader.rows(head.name, rows.start, rows.stop), beside[rows])
            for (rows, *_) in cut(head.shape, 0)
        )

    def in_pieces(self, key: str) -> Any:
        """A weight in the file's axes, read piece by piece as it is asked for; None where its file
        must be read whole."""
        stored = self.stored[key]
        reader = self.source.reader(stored)
        if not reader.seeks or not stored.shape:
            return None

        def read(index: Index) -> np.ndarray:
            start, stop, _ = index[0].indices(stored.shape[0])
            return reader.rows(stored.name, start, stop)[(slice(None), *index[1:])]

        return Piecewise(stored.shape, CODES[stored.code], read)

    @property
    def original_hf_config(self) -> dict[str, Any] | None:
        """The HF config beside the weights, or the one that provenance kept through TL."""
        beside = self.source.hf_config or {}
        foreign = LAYOUTS[self.layout].has_cfg and beside.get("model_type") != "gpt_neo"
        return (None if foreign else self.source.hf_config) or self._kept("config")

    @property
    def original_generation_config(self) -> dict[str, Any] | None:
        beside = self.source.generation_config
        return self._kept("generation_config") if beside is None else beside

    def _kept(self, what: str) -> dict[str, Any] | None:
        kept = (self.source.provenance or {}).get("kept", {})
        value = kept.get(what) if isinstance(kept, dict) else None
        return value if isinstance(value, dict) else None

    @property
    def original_tl_config(self) -> dict[str, Any] | None:
        """The TL config that the weights were read by, or the one that provenance kept. A cfg.json
        beside HF weights is somebody else's: an SAE's, a run's."""
        beside = self.source.tl_config if LAYOUTS[self.layout].has_cfg else None
        return beside or self._kept("cfg")

    def code(self, key: str) -> str:
        """The dtype that `tensor` gives; a tensor that the files lack has the model's."""
        stored = self.stored.get(self.holder(key))
        return stored.code if stored else self.dtype

    @property
    def kept(self) -> dict[str, Stored]:
        """`stored`, each with the dtype that it is stored in, or is to be."""
        codes = self.storage
        return {k: replace(t, code=codes.get(k, t.code)) for k, t in self.stored.items()}

    def storage_code(self, key: str) -> str:
        """The dtype that a weight is stored in, or is to be."""
        return self.storage.get(key) or self.code(key)

    def tensor(self, key: str, dtype: str | None = None) -> np.ndarray:
        """A weight by its `hooked` name, in `hooked` axes, read now.

        Where the files lack it: the tied embedding for the head, else the value that
        absence stands for. `dtype` (safetensors code) casts it.
        """
        stored = self.stored.get(key)
        if stored is not None:
            raw = self.slots[key].to_hub.apply(self.source.read(stored), self.config.sizes)
        elif key == HEAD:
            raw = self.tensor(EMBEDDING).T
        else:
            slot = self.slots[key]
            assert slot.absence is not None, key
            raw = np.full(slot.hub_shape, slot.absence.value, CODES[self.dtype])
        return cast(raw, dtype) if dtype else raw
