"""What of an artifact is run, and in which software: its weights, its graph, other environments."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from converter.checkpoint import Checkpoint
from converter.errors import CannotDoHere, UsageError
from converter.opening import graphs_in
from converter.verification.loading import has_hooked_transformer, has_software, resolve_device
from converter.verification.runtime import Runtime
from converter.verification.runtimes import open_runtime

THE_WEIGHTS = "the weights"
"""The name of an artifact's own weight files."""


@dataclass(frozen=True)
class Subject:
    """An artifact in one runtime, which is opened when its turn comes."""

    checkpoint: Checkpoint
    open: Callable[[], Runtime]
    name: str
    """Whose weights these are: the artifact's own, or the graph's."""
    ours: bool
    """Whether neoconvert wrote it, so that all links must be compared."""
    just_written: bool
    """Whether it has just been written: what refuses it then refuses our work, and no input."""

    @property
    def takes_positions(self) -> bool:
        """Whether its software takes the position where a sequence starts. HookedTransformer does
        not."""
        artifact = self.checkpoint
        return (
            artifact.graph is not None
            or artifact.layout != "hooked"
            or not has_hooked_transformer()
        )


def subjects_of(
    artifact: Checkpoint,
    device: str,
    runtime: str | None = None,
    pythons: Sequence[Path] = (),
    *,
    just_written: bool = False,
) -> list[Subject]:
    """All there is to run: the weights in torch, here and in other environments, or in those alone
    where no software here runs them; and the graphs, the artifact itself or all in its directory,
    in onnxruntime.

    Args:
        runtime: "torch" or "onnxruntime" alone; None: both, where there is something for them.
        pythons: interpreters of other environments that run the weights too.
        just_written: neoconvert has just written it.

    Raises:
        CannotDoHere: there is nothing for the runtime that was asked for.
        UsageError: interpreters are named, and no weights are run.
        BadInput: the graph is unsound.
    """
    found: list[Subject] = []
    if artifact.graph is None and runtime != "onnxruntime":
        ours = just_written or written_here(artifact)
        openers: list[Callable[[], Runtime]] = []
        if pythons:
            from converter.verification.remote import open_remote

            openers += [partial(open_remote, artifact, python, device) for python in pythons]
        # Our own forward is no software of users: it is run where nothing else is.
        if not pythons or has_software(artifact.layout):
            openers.insert(0, partial(open_runtime, artifact, device))
        found += [Subject(artifact, opener, THE_WEIGHTS, ours, just_written) for opener in openers]
    elif pythons:
        raise UsageError(
            "Other interpreters run weights, and only a graph is run here.",
            where=f"--python {pythons[0]}",
            do="Leave --python out." if artifact.graph else "Leave --python or --runtime out.",
        )
    graphs = graphs_of(artifact) if runtime != "torch" else []
    for graph in graphs:
        from converter.verification.onnx_runtime import open_onnx

        required = runtime == "onnxruntime"
        name = graph_name(graph, artifact)
        shown = name if len(graphs) > 1 else None
        opener = partial(open_onnx, graph, resolve_device(device), required=required, name=shown)
        found.append(
            Subject(graph, opener, name, just_written or written_here(graph), just_written)
        )
    if not found:
        raise CannotDoHere(
            f"There is nothing here that {runtime} could run.",
            where=f"{artifact.source.given} ({'ONNX' if artifact.graph else artifact.layout})",
            do="Leave --runtime out."
            if artifact.graph or artifact.source.live
            else "Leave --runtime out, or add a graph first: neoconvert export-onnx"
            f" {shlex.quote(artifact.source.given)}",
        )
    return found


def graphs_of(artifact: Checkpoint) -> list[Checkpoint]:
    """The artifact if it is a graph, and all graphs of the directory if that was named.

    Raises:
        BadInput: one of them is unsound, or no language model.
    """
    own = [] if artifact.graph is None else [artifact]
    if not artifact.source.is_directory:
        return own
    from converter.onnx.opening import open_graph

    return own + [
        open_graph(path) for path in graphs_in(artifact.source.path) if path != artifact.graph
    ]


def written_here(artifact: Checkpoint) -> bool:
    """Whether it says that neoconvert wrote it: the graph, or what lies beside the weights."""
    if artifact.graph is None:
        return bool((artifact.source.provenance or {}).get("route"))
    from converter.onnx.graph import PRODUCER
    from converter.onnx.opening import reader_of

    return bool(reader_of(artifact).model.producer_name == PRODUCER)


def graph_name(graph: Checkpoint, artifact: Checkpoint) -> str:
    """A graph's file, as seen from the artifact's directory."""
    assert graph.graph is not None
    if not artifact.source.is_directory:
        return graph.graph_file
    return graph.graph.relative_to(artifact.source.path).as_posix()
