"""The pipeline: plan -> stream units -> export a graph -> verify -> publish."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint import Checkpoint, open_checkpoint, provenance, sidecar
from converter.checkpoint.ledger_file import LEDGER, LedgerWriter
from converter.checkpoint.plan import Plan, make_plan
from converter.checkpoint.publish import check_output, staging
from converter.checkpoint.source import WEIGHTS
from converter.dtypes import code_named
from converter.errors import BadInput, UsageError
from converter.exporting import Addition, Graph, add_graph, facts, require_verified
from converter.layout import Layout
from converter.processing import parse
from converter.progress import Progress, silent
from converter.route import Processing, Route
from converter.routing import Reverse, plain, processing, reversing
from converter.streaming import stream
from converter.verification import Verification, verify
from converter.verification.loading import resolve_device

if TYPE_CHECKING:
    from converter.onnx import ExportResult


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, or with `published` False would do."""

    route: Route
    output: Path
    plan: Plan
    published: bool
    verification: Verification | None
    graph: ExportResult | None = None
    graph_alone: bool = False
    """The graph has the weights itself, and no weight file is beside it."""

    @property
    def source(self) -> Checkpoint:
        return self.route.source

    def to_json(self) -> dict[str, Any]:
        """The keys that DESIGN's JSON contract names, and the plan's figures."""
        return {
            "source": self.source.source.given,
            "output": str(self.output),
            "layout": self.plan.layout,
            "steps": list(self.plan.steps),
            "reverse": self.route.reverse,
            "notes": list(self.source.notes),
            "remarks": list(self.route.remarks),
            "published": self.published,
            "tensors": len(self.plan.tensors),
            "bytes": self.plan.nbytes,
            "shards": [] if self.graph_alone else list(self.plan.shards),
            "dropped": list(self.plan.dropped),
            "invented": list(self.plan.invented),
            "onnx": facts(self.graph) if self.graph else None,
            "verification": self.verification.to_json() if self.verification else None,
        }


def hf_to_tl(
    source: Checkpoint | str | Path,
    output: str | Path,
    *,
    layout: Layout = "hooked",
    process: str = "none",
    **options: Any,
) -> Conversion:
    """HF -> TransformerLens.

    Args:
        layout: "hooked" or "bridge".
        process: "none", "default", "all", or TransformerLens's step names with commas.
        options: see `convert`.

    Raises:
        BadInput: SOURCE is not HF. UsageError: no such step.
    """
    source, steps = _opened(source), parse(process)
    if source.layout != "hf":
        raise BadInput(
            f"SOURCE is a TransformerLens checkpoint already (layout {source.layout}).",
            where=str(source.source.path),
            do="Use neoconvert tl-to-hf to bring it to Hugging Face's layout.",
        )
    check_output(Path(output), source.source.path, overwrite=bool(options.get("overwrite")))
    return convert(processing(source, steps, layout), Path(output), layout=layout, **options)


def bake(
    source: Checkpoint | str | Path, output: str | Path, *, process: str = "default", **options: Any
) -> Conversion:
    """HF -> HF with TransformerLens's processing baked in: a plain GPTNeoForCausalLM directory.

    The biases that folding makes, which GPT-Neo has no tensors for, are carried by the null
    direction of the LayerNorms (`converter.processing.carry`). Arguments: see `hf_to_tl`.
    """
    source, steps = _opened(source), parse(process)
    if source.layout != "hf":
        raise BadInput(
            f"SOURCE is a TransformerLens checkpoint (layout {source.layout}).",
            where=str(source.source.path),
            do="Use neoconvert tl-to-hf --reverse functional, which bakes what TL processed.",
        )
    check_output(Path(output), source.source.path, overwrite=bool(options.get("overwrite")))
    return convert(processing(source, steps, "hf"), Path(output), layout="hf", **options)


def tl_to_hf(
    source: Checkpoint | str | Path,
    output: str | Path,
    *,
    reverse: Reverse = "auto",
    **options: Any,
) -> Conversion:
    """TransformerLens (or HF that `bake` made, with its ledger) -> HF.

    Args:
        reverse: how to undo processing. "exact": the original bits, from an exact ledger, or
            CannotUndo. "functional": plain GPT-Neo of the same function, no ledger needed.
            "auto": the best that can be had; `Conversion.route` says which.
        options: see `convert`.

    Raises:
        BadInput: SOURCE is HF and has no ledger. CannotUndo: see `reverse`.
    """
    source = _opened(source)
    if source.layout == "hf" and not (source.directory / LEDGER).is_file():
        raise BadInput(
            "SOURCE is in Hugging Face's layout already.",
            where=str(source.source.path),
            do="Use neoconvert hf-to-tl to bring it to TransformerLens's layout.",
        )
    check_output(Path(output), source.source.path, overwrite=bool(options.get("overwrite")))
    route = reversing(source, reverse, recast=options.get("dtype") is not None)
    return convert(route, Path(output), layout="hf", **options)


def _opened(source: Checkpoint | str | Path) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else open_checkpoint(source)


def export_onnx(
    source: Checkpoint | str | Path, output: str | Path | None = None, **options: Any
) -> Conversion | Addition:
    """HF or TransformerLens -> ONNX.

    Without `output`, model.onnx is added beside SOURCE's own weights, which it shares. With one,
    SOURCE is copied there in its layout, with the graph (`options`: see `convert`).

    Args:
        options: `graph` (an `exporting.Graph`), `overwrite`, `dry_run`, `check`, `device` and
            what else `verify` takes; with `output` also `dtype` and `max_shard_size`.
    """
    source = _opened(source)
    graph = options.pop("graph", None) or Graph()
    if output is None:
        if options.pop("dtype", None) or options.pop("max_shard_size", "5GB") != "5GB":
            raise UsageError(
                "The weights stay as they are where no OUTPUT is named.",
                where="--dtype or --max-shard-size",
                do="Name an OUTPUT directory.",
            )
        return add_graph(source, graph, **options)
    check_output(Path(output), source.source.path, overwrite=bool(options.get("overwrite")))
    return convert(plain(source), Path(output), layout=source.layout, graph=graph, **options)


def convert(
    route: Route,
    output: Path,
    *,
    layout: Layout,
    dtype: str | None = None,
    ledger: str = "compact",
    max_shard_size: str = "5GB",
    graph: Graph | None = None,
    keep_weights: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    check: bool = True,
    progress: Progress | None = None,
    **verifying: Any,
) -> Conversion:
    """Convert by `route` to `layout` and publish at `output`, verified.

    Args:
        dtype: "float32", "float16" or "bfloat16" to store in; None keeps each tensor's own.
        ledger: what is kept so that processing can be undone: "compact", "exact" or "none".
        max_shard_size: as the hub writes it, such as "5GB".
        graph: an ONNX graph to write as well.
        keep_weights: keep the safetensors files beside a graph that has the weights itself.
        check: verify the files written (weights and function) before publishing.
        verifying: further arguments of `verify`: `device`, `runtime`, `effort`.

    Raises:
        NotRepresentable: the target cannot hold what the source holds.
        OutputExists, SamePlace: see `publish.check_output`.
        VerificationFailed: the files do not reproduce the source; nothing was published.
    """
    source = route.source
    check_output(output, source.source.path, overwrite=overwrite)
    code = code_named(dtype) if dtype else None
    plan = make_plan(route, layout, dtype=code, max_shard_size=max_shard_size)
    if layout == "hooked":
        sidecar.cfg(route, plan)  # an activation that TL lacks is refused before a weight is read
    graph_alone = graph is not None and graph.weights != "shared" and not keep_weights
    if graph is not None:
        graph.require_possible(plan.config, plan.nbytes)
    if dry_run:
        return Conversion(route, output, plan, False, None, None, graph_alone)
    if check:
        # A device that is not here is told before an hour's work.
        resolve_device(verifying.get("device", "auto"))
    keeps = isinstance(route, Processing) and route.pipeline and ledger != "none"
    book = LedgerWriter(ledger) if keeps and not graph_alone else None
    with staging(output) as stage:
        sha256 = stream(route, plan, stage, book, progress or silent)
        said = graph.config if graph else None
        sidecar.write(route, plan, stage, recast=code is not None, graph=said)
        if book:
            book.save(stage, tied=source.tied, original_sha256=sha256.read)
        artifact, exported = open_checkpoint(stage), None
        if graph:
            made = {"route": route.name, "steps": list(plan.steps)}
            made["source_sha256"] = provenance.digest(sha256.read)
            exported = graph.write(artifact, made)
        verification = None
        if check:
            verification = verify(source, artifact, route=route, progress=progress, **verifying)
            verification = replace(verification, artifact=str(output))  # its name from now on
            require_verified(verification)
        if graph_alone:
            for name in (*plan.shards, f"{WEIGHTS}.index.json", "cfg.json"):
                (stage / name).unlink(missing_ok=True)
        provenance.write(
            stage,
            route,
            plan,
            source_sha256=sha256.read,
            output_sha256=sha256.written,
            verification=verification.kept() if verification else None,
        )
    if exported:
        exported = exported.moved(stage, output)
    return Conversion(route, output, plan, True, verification, exported, graph_alone)
