"""The conversions: each takes a source and gives an OUTPUT directory, published and verified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from converter.checkpoint import Checkpoint
from converter.checkpoint.replaceable import check_output
from converter.choices import one_of
from converter.errors import BadInput, UsageError
from converter.exporting import Addition, Graph, add_graph
from converter.layout import Layout
from converter.opening import Given, opened
from converter.pipeline import Conversion, convert
from converter.processing import parse
from converter.progress import Progress
from converter.request import Checking, LedgerKind, Runtime, Writing
from converter.routing import REVERSES, Reverse, has_ledger, plain, processing, reversing
from converter.verification.probes import Effort

if TYPE_CHECKING:
    import torch


def hf_to_tl(
    source: Given,
    output: str | Path,
    *,
    layout: Layout = "hooked",
    process: str = "none",
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    ledger: LedgerKind = "compact",
    max_shard_size: str | int = "5GB",
    graph: Graph | None = None,
    keep_weights: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    check: bool = True,
    device: str | torch.device = "auto",
    runtime: Runtime | None = None,
    effort: Effort = "standard",
    layers: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """HF -> TransformerLens.

    Args:
        layout: "hooked" or "bridge".
        adapter: a PEFT adapter's directory, merged into SOURCE; see `with_adapter`.
        process: "none", "default", "all", or TransformerLens's step names with commas.
        dtype: to store in, such as "float16" or torch.float16; None keeps each tensor's own.
        ledger: what is kept so that processing can be undone: "compact", "exact" or "none".
        max_shard_size: as the hub writes it, such as "5GB".
        graph: an ONNX graph to write as well.
        keep_weights: keep the safetensors files beside a graph that has the weights itself.
        overwrite: replace OUTPUT, whole, once all is verified.
        dry_run: plan and write nothing.
        check: verify the files written (weights and function) before publishing.
        device, runtime, effort, layers: of that verification; see `verify`.

    Raises:
        UsageError: no such step, layout or other value; nothing has been written.
        BadInput: SOURCE is not HF, or not sound.
        NotRepresentable: the target cannot hold what the source holds.
        OutputExists, SamePlace: OUTPUT may not be replaced.
        VerificationFailed: the files do not reproduce the source; nothing was published.
    """
    one_of(layout, ("hooked", "bridge"), "--layout")
    steps = parse(process)
    writing = Writing(dtype, ledger, max_shard_size, graph, keep_weights, overwrite, dry_run)
    checking = Checking(check, device, runtime, effort, layers, progress)
    source = opened(source, adapter)
    _require_hf(source, "Use neoconvert tl-to-hf to bring it to Hugging Face's layout.")
    check_output(Path(output), source.source.place, overwrite=overwrite)
    return convert(processing(source, steps, layout), Path(output), layout, writing, checking)


def bake(
    source: Given,
    output: str | Path,
    *,
    process: str = "default",
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    ledger: LedgerKind = "compact",
    max_shard_size: str | int = "5GB",
    graph: Graph | None = None,
    keep_weights: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    check: bool = True,
    device: str | torch.device = "auto",
    runtime: Runtime | None = None,
    effort: Effort = "standard",
    layers: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """HF -> HF with TransformerLens's processing baked in: a plain GPTNeoForCausalLM directory.

    The biases that folding makes, which GPT-Neo has no tensors for, are carried by the null
    direction of the LayerNorms (`converter.processing.carry`). Arguments: see `hf_to_tl`.
    """
    steps = parse(process)
    writing = Writing(dtype, ledger, max_shard_size, graph, keep_weights, overwrite, dry_run)
    checking = Checking(check, device, runtime, effort, layers, progress)
    source = opened(source, adapter)
    _require_hf(
        source, "Use neoconvert tl-to-hf --reverse functional, which bakes what TL processed."
    )
    check_output(Path(output), source.source.place, overwrite=overwrite)
    return convert(processing(source, steps, "hf"), Path(output), "hf", writing, checking)


def _require_hf(source: Checkpoint, do: str) -> None:
    if source.layout != "hf":
        raise BadInput(
            f"SOURCE is a TransformerLens checkpoint already (layout {source.layout}).",
            where=str(source.source.path),
            do=do,
        )


def tl_to_hf(
    source: Given,
    output: str | Path,
    *,
    reverse: Reverse = "auto",
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    ledger: LedgerKind = "compact",
    max_shard_size: str | int = "5GB",
    graph: Graph | None = None,
    keep_weights: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    check: bool = True,
    device: str | torch.device = "auto",
    runtime: Runtime | None = None,
    effort: Effort = "standard",
    layers: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """TransformerLens (or HF that `bake` made, with its ledger) -> HF.

    Args:
        reverse: how to undo processing. "exact": the original bits, from an exact ledger, or
            CannotUndo. "functional": plain GPT-Neo of the same function, no ledger needed.
            "auto": the best that can be had; `Conversion.route` says which.

    Further arguments: see `hf_to_tl`.

    Raises:
        BadInput: SOURCE is HF and has no ledger. CannotUndo: see `reverse`.
    """
    one_of(reverse, REVERSES, "--reverse")
    writing = Writing(dtype, ledger, max_shard_size, graph, keep_weights, overwrite, dry_run)
    checking = Checking(check, device, runtime, effort, layers, progress)
    source = opened(source, adapter)
    if source.layout == "hf" and not has_ledger(source):
        raise BadInput(
            "SOURCE is in Hugging Face's layout already.",
            where=str(source.source.path),
            do="Use neoconvert hf-to-tl to bring it to TransformerLens's layout.",
        )
    check_output(Path(output), source.source.place, overwrite=overwrite)
    route = reversing(source, reverse, recast=writing.code is not None)
    return convert(route, Path(output), "hf", writing, checking)


def export_onnx(
    source: Given,
    output: str | Path | None = None,
    *,
    graph: Graph | None = None,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    keep_weights: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    check: bool = True,
    device: str | torch.device = "auto",
    runtime: Runtime | None = None,
    effort: Effort = "standard",
    layers: bool = False,
    progress: Progress | None = None,
) -> Conversion | Addition:
    """HF or TransformerLens -> ONNX.

    Without `output`, model.onnx is added beside SOURCE's own weights, which it shares. With one,
    SOURCE is copied there in its layout, with the graph. Arguments: see `hf_to_tl`.

    Raises:
        UsageError: `dtype` or `max_shard_size` without `output`.
    """
    graph = graph or Graph()
    writing = Writing(dtype, "none", max_shard_size, graph, keep_weights, overwrite, dry_run)
    checking = Checking(check, device, runtime, effort, layers, progress)
    source = opened(source, adapter)
    if output is None:
        if source.merged:
            raise UsageError(
                "The weights that are there are not merged ones, so the graph cannot share them.",
                where="--adapter",
                do="Name an OUTPUT directory.",
            )
        if writing.code or max_shard_size != "5GB":
            raise UsageError(
                "The weights stay as they are where no OUTPUT is named.",
                where="--dtype or --max-shard-size",
                do="Name an OUTPUT directory.",
            )
        return add_graph(source, graph, checking, overwrite=overwrite, dry_run=dry_run)
    check_output(Path(output), source.source.place, overwrite=overwrite)
    return convert(plain(source), Path(output), source.layout, writing, checking)
