"""ONNX as the pipeline asks for it: where the graph goes, and what is left beside it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from converter.checkpoint import Checkpoint, NeoConfig
from converter.checkpoint.publish import adding
from converter.checkpoint.record import bears_seal
from converter.checkpoint.replaceable import require_free
from converter.choices import Client, GraphWeights, flags, of_kind, one_of
from converter.errors import NeoconvertError, UsageError, VerificationFailed
from converter.request import Checking
from converter.routing import plain
from converter.verification import Verification

if TYPE_CHECKING:
    from converter.onnx import ExportResult

_FOLDER = "onnx"
_MARK = b"\x12\x0aneoconvert"
"""The field of a graph that says who wrote it, near its beginning (see `record.bears_seal`)."""


@dataclass(frozen=True)
class Graph:
    """What was asked for.

    `weights`: "shared", "external" or "inline" (`converter.onnx.weights`). `hooks`: patterns of
    TransformerLens's hook points. `client`: None, or "transformers-js" for its folders.

    Raises:
        UsageError: no such value. Or: transformers.js looks for the graph in a folder of its own,
            and a graph cannot share weights outside its folder.
    """

    weights: GraphWeights = "shared"
    with_past: bool = True
    hooks: Sequence[str] = ()
    client: str | None = None

    def __post_init__(self) -> None:
        one_of(self.weights, get_args(GraphWeights), "--weights")
        flags({"with_past": self.with_past})
        of_kind(self.hooks, Collection, "--hook", "Give the hook points' names, or patterns.")
        hooks = (self.hooks,) if isinstance(self.hooks, str) else tuple(self.hooks)
        for hook in hooks:
            of_kind(hook, str, "--hook", "Give the hook points' names, or patterns.")
        object.__setattr__(self, "hooks", hooks)
        if self.client is not None:
            one_of(self.client, get_args(Client), "--for")
        if self.client and self.weights == "shared":
            raise UsageError(
                "A graph in the folder onnx/ cannot share weight files outside it.",
                where="--for transformers-js --weights shared",
                do="Use --weights external. Or leave --for out: transformers.js opens a directory"
                " that holds model.onnx when it is given { subfolder: '' }.",
            )

    @staticmethod
    def of(
        weights: GraphWeights | None, with_past: bool, hooks: Sequence[str], client: str | None
    ) -> Graph:
        """`weights` None: "shared", or where the client cannot have that, "external"."""
        return Graph(
            weights or ("external" if client else "shared"), with_past, tuple(hooks), client
        )

    def to_json(self) -> dict[str, Any]:
        """What provenance keeps, as the command line has it."""
        return {
            "weights": self.weights,
            "past": self.with_past,
            "hooks": list(self.hooks),
            "for": self.client,
        }

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says for the graph's clients."""
        if not self.client or self.weights != "external":
            return {}
        return {"transformers.js_config": {"use_external_data_format": True}}

    def require_possible(self, config: NeoConfig, nbytes: int) -> None:
        """Refuse what cannot be written before a weight is read.

        Args:
            nbytes: of all weights.

        Raises:
            UsageError: a hook point that the model does not have; too much to be inline.
            NotRepresentable: an activation that the graph cannot express.
        """
        from converter.onnx.graph import require_activation
        from converter.onnx.hooks import hooks_matching
        from converter.onnx.weights import require_inline

        if self.weights == "inline":
            require_inline(nbytes)
        hooks_matching(self.hooks, config)
        require_activation(config.act_fn)

    def write(self, checkpoint: Checkpoint, made: dict[str, Any]) -> ExportResult:
        """Add the graph to the directory of a checkpoint's weights, and what onnxruntime-genai opens
        it by."""
        from converter.onnx import export, genai

        directory, name = checkpoint.directory, "model.onnx"
        if self.client:
            directory /= _FOLDER
            name = "model_fp16.onnx" if checkpoint.dtype == "F16" else name
        result = export(
            checkpoint, directory, weights=self.weights, with_past=self.with_past,
            hooks=self.hooks, file_name=name, made=made,
        )  # fmt: skip
        if self.with_past:
            graph = result.path.relative_to(checkpoint.directory).as_posix()
            genai.write(checkpoint.directory / genai.GENAI, checkpoint, graph)
        return result


@dataclass(frozen=True)
class Addition:
    """What `add_graph` did, or with `published` False would do."""

    source: Checkpoint
    path: Path
    result: ExportResult | None
    verification: Verification | None
    warnings: tuple[str, ...] = ()
    """What did not go as it should, though the graph is published."""

    def __repr__(self) -> str:
        state = "verified" if self.verification else "published" if self.published else "planned"
        return f"<Addition {self.path} beside {self.source!r}, {state}>"

    @property
    def published(self) -> bool:
        return self.result is not None

    def to_json(self) -> dict[str, Any]:
        """The keys of a conversion, as far as they mean something."""
        route = plain(self.source)
        return {
            "source": self.source.source.given,
            "output": str(self.path),
            "layout": self.source.layout,
            "steps": list(route.steps),
            "reverse": "none",
            "notes": list(self.source.notes),
            "published": self.published,
            "onnx": facts(self.result) if self.result else None,
            "verification": self.verification.to_json() if self.verification else None,
        }


def facts(result: ExportResult) -> dict[str, Any]:
    """A written graph, as plain JSON."""
    return {
        "path": str(result.path),
        "weights": result.weights,
        "with_past": result.with_past,
        "hooks": list(result.hooks),
        "graph_bytes": result.graph_bytes,
        "weight_bytes": result.weight_bytes,
        "weight_files": [p.name for p in (*result.shared, *result.written[1:])],
        "nodes": result.nodes,
        "opset": result.opset,
    }


def add_graph(
    source: Checkpoint,
    graph: Graph,
    checking: Checking,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Addition:
    """Add model.onnx beside a checkpoint's own weights, which it shares, and genai_config.json where
    no other is. Nothing else changes.

    Args:
        checking: how it is run in onnxruntime before it gets its name, against the checkpoint.

    Raises:
        UsageError: what must be written besides the graph; or model.onnx is there (OutputExists).
        VerificationFailed: the graph does not compute what the checkpoint does.
    """
    from converter.onnx import export
    from converter.onnx.opening import open_graph
    from converter.onnx.weights import place_weights

    if graph.client or graph.weights == "external":
        raise UsageError(
            "This writes more than a graph, so it needs an OUTPUT of its own.",
            where="--for" if graph.client else "--weights external",
            do=f"Name an OUTPUT directory, or leave {'--for' if graph.client else '--weights'} out.",
        )
    path = source.directory / "model.onnx"
    graph.require_possible(source.config, sum(stored.nbytes for stored in source.stored.values()))
    if dry_run:
        require_free(path, mark=_MARK, overwrite=overwrite)
        place_weights(source, graph.weights, "")
        return Addition(source, path, None, None)
    with adding(path, mark=_MARK, overwrite=overwrite) as stage:
        written = export(
            source, weights=graph.weights, with_past=graph.with_past, hooks=graph.hooks,
            file_name=stage.path.name,
        )  # fmt: skip
        route = replace(plain(source), scale=source.config.score_divisors)
        verification = checking.verify(source, open_graph(stage.path, str(path)), route)
        if verification:
            require_verified(verification)
        source.source.require_unchanged()
    result = replace(written, path=path, written=(path,))
    warnings = (*stage.warnings, *_renew_genai(source, path, with_past=graph.with_past))
    return Addition(source, path, result, verification, warnings)


def _renew_genai(source: Checkpoint, graph: Path, *, with_past: bool) -> Iterator[str]:
    """Have genai_config.json be of this graph, which is published: what fails is a warning."""
    from converter.onnx import genai

    path = graph.parent / genai.GENAI
    if os.path.lexists(path) and not bears_seal(path, genai.MARK):
        yield f"{genai.GENAI} is not neoconvert's, and was left as it is"
        return
    try:
        if with_past:
            with adding(path, mark=genai.MARK, overwrite=True) as stage:
                genai.write(stage.path, source, graph.name)
            yield from stage.warnings
        else:
            path.unlink(missing_ok=True)
    except (NeoconvertError, OSError) as error:
        yield f"{genai.GENAI} could not be written: {error}"


def require_verified(verification: Verification) -> None:
    """
    Raises:
        VerificationFailed: it is not; the message says where it first showed.
    """
    if verification.passed:
        return
    part = verification.first_divergence
    where = f"{part.unit}{f', {part.named}' if part.named else ''}: " if part else ""
    raise VerificationFailed(
        "The converted files do not reproduce the original; nothing was published.",
        where=where + " ".join(verification.problems[:2]),
        do="A fault of neoconvert or of this machine: please report it, with --json's output.",
        details={"verification": verification.to_json()},
    )
