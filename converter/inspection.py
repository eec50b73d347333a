"""What a checkpoint is, from its headers and configs. No matrix is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from converter.checkpoint import Checkpoint
from converter.checkpoint.ledger_file import open_ledger
from converter.checkpoint.record import changes
from converter.dtypes import NAMES
from converter.errors import CorruptFile
from converter.opening import Given, graphs_in, open_artifact
from converter.routing import recorded_steps

_READ = 2**26
"""Bytes of a file that is hashed: tokenizers and graphs; of larger ones only the size is compared."""


def inspect(given: Given) -> Inspection:
    """What a checkpoint, an ONNX file or a live model is. Raises: see `open_artifact`."""
    return Inspection(open_artifact(given))


def changed_files(checkpoint: Checkpoint, *, largest: float = math.inf) -> dict[str, str]:
    """Files of its directory that are not what neoconvert.json beside them records: by name,
    "changed" or "missing". `largest`: see `record.changes`."""
    source = checkpoint.source
    directory = source.path
    if not source.is_directory:
        if checkpoint.graph is None:  # a bare weight file's neighbours are not its own
            return {}
        directory = checkpoint.graph.parent
        if directory.name == "onnx":
            directory = directory.parent
    found = changes(directory, largest=largest)
    if source.revision:  # of a hub's repository, not every file is fetched
        found = {name: what for name, what in found.items() if what != "missing"}
    return found


@dataclass(frozen=True)
class Inspection:
    """The facts `neoconvert inspect` shows."""

    checkpoint: Checkpoint

    @property
    def n_params(self) -> int:
        """Elements stored; a tied head that is not stored is not counted."""
        return sum(math.prod(t.shape) for t in self.checkpoint.kept.values())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.checkpoint.kept.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """dtype name -> number of tensors."""
        counts: dict[str, int] = {}
        for tensor in self.checkpoint.kept.values():
            counts[NAMES[tensor.code]] = counts.get(NAMES[tensor.code], 0) + 1
        return counts

    @property
    def steps(self) -> list[str]:
        """Processing steps, as provenance says, where it is of these weights, or as the state of the
        files shows."""
        recorded = list(recorded_steps(self.checkpoint))
        return recorded or (["fold_ln"] if self.checkpoint.config.folded else [])

    @property
    def ledger(self) -> str | None:
        """The kind of ledger that is beside the weights, "compact" or "exact"; or "unreadable"."""
        place = self.checkpoint.source.ledger_directory
        try:
            found = None if place is None else open_ledger(place)
        except CorruptFile:
            return "unreadable"
        return found.kind if found else None

    def to_json(self) -> dict[str, Any]:
        """The keys that DESIGN's JSON contract names, and more."""
        config = self.checkpoint.config
        return {
            "path": str(self.checkpoint.source.path),
            "layout": "onnx" if self.checkpoint.graph else self.checkpoint.layout,
            "steps": self.steps,
            "ledger": self.ledger,
            "config": {
                "n_layers": config.n_layers,
                "d_model": config.d_model,
                "n_heads": config.n_heads,
                "d_head": config.d_head,
                "d_mlp": config.d_mlp,
                "n_ctx": config.n_ctx,
                "d_vocab": config.d_vocab,
                "window_size": config.window_size,
                "attn_types": list(config.attn_types),
                "act_fn": config.act_fn,
                "eps": config.eps,
                "normalization_type": "LNPre" if config.folded else "LN",
                "attn_scale": list(config.score_divisors) or None,
            },
            "n_params": self.n_params,
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "head": "tied" if self.checkpoint.headless else "stored",
            "buffers": self.checkpoint.buffers,
            "left_out": self.checkpoint.dropped,
            "notes": list(self.checkpoint.notes),
            "tensors": [
                {
                    "name": t.name,
                    "dtype": NAMES[t.code],
                    "shape": list(t.shape),
                    "bytes": t.nbytes,
                    "file": t.file.name,
                }
                for t in self.checkpoint.kept.values()
            ],
            "tokenizer_files": [
                path.relative_to(self.checkpoint.source.path).as_posix()
                for path in self.checkpoint.source.tokenizer_files()
            ],
            "provenance": self.checkpoint.source.provenance,
            "changed_files": changed_files(self.checkpoint, largest=_READ),
            "onnx": self._onnx(),
        }

    def _onnx(self) -> dict[str, Any] | None:
        """The graph's own facts, where there is one."""
        path, source = self.checkpoint.graph, self.checkpoint.source
        if path is None and source.is_directory:
            path = next(iter(graphs_in(source.path)), None)
        if path is None:
            return None
        from converter.onnx import read_onnx

        file = read_onnx(path)
        return {
            "path": str(path),
            "weights_layout": self.checkpoint.layout,
            "producer": file.producer,
            "opset": file.opset,
            "nodes": file.nodes,
            "inputs": list(file.inputs),
            "outputs": list(file.outputs),
            "with_past": file.with_past,
            "hooks": list(file.hooks),
            "weight_files": [path.name for path in file.data_files],
        }
