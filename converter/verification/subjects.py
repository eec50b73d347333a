"""What of an artifact is run, and in which software: its weights, its graph, other environments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from converter.checkpoint import Checkpoint
from converter.errors import CannotDoHere
from converter.opening import graph_in
from converter.verification.loading import resolve_device
from converter.verification.runtimes import Runtime, open_runtime

RUNTIMES = ("torch", "onnxruntime")


@dataclass(frozen=True)
class Subject:
    """An artifact in one runtime, which is opened when its turn comes."""

    checkpoint: Checkpoint
    open: Callable[[], Runtime]


def subjects_of(
    artifact: Checkpoint, device: str, runtime: str | None = None, pythons: Sequence[Path] = ()
) -> list[Subject]:
    """All there is to run: the weights in torch, here and in other environments, and the graph,
    the artifact itself or the one beside its weights, in onnxruntime.

    Args:
        runtime: "torch" or "onnxruntime" alone; None: both, where there is something for them.
        pythons: interpreters of other environments that run the weights too.

    Raises:
        CannotDoHere: there is nothing for the runtime that was asked for.
        BadInput: the graph is unsound.
    """
    found: list[Subject] = []
    if artifact.graph is None and runtime != "onnxruntime":
        found.append(Subject(artifact, partial(open_runtime, artifact, device)))
        if pythons:
            from converter.verification.remote import open_remote

            found += [Subject(artifact, partial(open_remote, artifact, p, device)) for p in pythons]
    graph = graph_beside(artifact) if runtime != "torch" else None
    if graph is not None:
        from converter.verification.onnx_runtime import open_onnx

        required = runtime == "onnxruntime"
        opener = partial(open_onnx, graph, resolve_device(device), required=required)
        found.append(Subject(graph, opener))
    if not found:
        raise CannotDoHere(
            f"There is nothing here that {runtime} could run.",
            where=f"{artifact.source.given} ({'ONNX' if artifact.graph else artifact.layout})",
            do="Leave --runtime out."
            if artifact.graph
            else "Make a graph first: neoconvert export-onnx.",
        )
    return found


def graph_beside(artifact: Checkpoint) -> Checkpoint | None:
    """The artifact if it is a graph, or else the graph in its directory."""
    if artifact.graph is not None:
        return artifact
    path = graph_in(artifact.source.path) if artifact.source.is_directory else None
    if path is None:
        return None
    from converter.onnx.opening import open_graph

    return open_graph(path)
