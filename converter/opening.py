"""Opening what a user names for `verify` and `inspect`: weights of any layout, or an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from converter.checkpoint import Checkpoint, open_checkpoint, open_model
from converter.checkpoint.standard import holds_weights
from converter.choices import place
from converter.errors import SourceNotFound

if TYPE_CHECKING:
    import torch

Given: TypeAlias = "Checkpoint | str | Path | torch.nn.Module"
"""What every function of the API takes for a checkpoint: an open one, a directory, file or hub id,
or a live model (`open_model`)."""
_FIRST = ("model.onnx", "decoder_model_merged.onnx", "decoder_model.onnx", "model_fp16.onnx")
"""Names of the graphs that clients open where nothing else is asked for, in that order."""


def opened(given: Given, adapter: str | Path | None = None) -> Checkpoint:
    """A checkpoint, opened unless it is so already, with an adapter merged into it.

    Raises: see `open_checkpoint`, `open_model` and `converter.adapter.with_adapter`.
    """
    if isinstance(given, Checkpoint):
        checkpoint = given
    else:
        checkpoint = open_checkpoint(given) if isinstance(given, (str, Path)) else open_model(given)
    return adapted(checkpoint, adapter)


def adapted(
    checkpoint: Checkpoint, adapter: str | Path | None, *, allow_pickle: bool = False
) -> Checkpoint:
    """The checkpoint with an adapter merged into it; itself where there is none."""
    if adapter is None:
        return checkpoint
    from converter.adapter import with_adapter

    return with_adapter(checkpoint, adapter, allow_pickle=allow_pickle)


def open_artifact(
    given: Given,
    *,
    revision: str | None = None,
    cfg: str | Path | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Open a checkpoint, an ONNX file, or a directory that holds a graph and no weight file.

    Raises: see `open_checkpoint` and `converter.onnx.read_onnx`.
    """
    if not isinstance(given, (str, Path)):
        return opened(given)
    path = place(given, "SOURCE", "Give a directory, a weight file, an ONNX file or a hub id.")
    graph = path if path.suffix == ".onnx" else None
    if path.is_dir() and not holds_weights(path):
        graph = next(iter(graphs_in(path)), None)
    if graph is not None and not graph.is_file() and path.suffix == ".onnx":
        raise SourceNotFound(
            "There is no such ONNX file.", where=str(given), do="Check the name of the graph."
        )
    if graph is not None and graph.is_file():
        from converter.onnx.opening import open_graph

        return open_graph(graph, str(given), directory=path if path.is_dir() else None)
    return open_checkpoint(given, revision=revision, cfg=cfg, allow_pickle=allow_pickle)


def graphs_in(directory: Path) -> list[Path]:
    """All ONNX files of a model's directory, and of the folders in it that are no models of their
    own (transformers.js keeps its graphs in onnx/). The one that clients open first is first."""
    folders = [
        folder
        for folder in sorted(directory.iterdir())
        if folder.is_dir()
        and not folder.name.startswith(".")
        and (folder.name == "onnx" or not (folder / "config.json").exists())
    ]

    def rank(path: Path) -> tuple[int, bool, str]:
        place = _FIRST.index(path.name) if path.name in _FIRST else len(_FIRST)
        return place, path.parent != directory, str(path)

    found = [path for folder in (directory, *folders) for path in folder.glob("*.onnx")]
    return sorted((p for p in found if p.is_file() and not p.name.startswith(".")), key=rank)
