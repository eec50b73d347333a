"""The conversions: each takes a source and gives an OUTPUT directory, published and verified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from converter.checkpoint import Checkpoint
from converter.checkpoint.replaceable import check_output
from converter.choices import Effort, LedgerOption, Reverse, RuntimeName, place
from converter.errors import UsageError
from converter.exporting import Addition, Graph, add_graph
from converter.layout import Layout
from converter.opening import Given, opened
from converter.pipeline import Conversion, convert
from converter.progress import Progress
from converter.request import Checking, Request, Writing

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
    ledger: LedgerOption = "compact",
    max_shard_size: str | int = "5GB",
    graph: Graph | None = None,
    keep_weights: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    model_card: bool = False,
    check: bool = True,
    device: str | torch.device = "auto",
    runtime: RuntimeName | None = None,
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
        model_card: write README.md too, as the hub shows it; see `converter.model_card`.
        check: verify the files written (weights and function) before publishing.
        device: where that verification runs the models; see `verify`.
        runtime: "torch" or "onnxruntime" alone; see `verify`.
        effort: how much it runs: "quick", "standard" or "thorough".
        layers: measure the error after each layer even where nothing failed.
        progress: called with what is going on; see `converter.progress`.

    Raises:
        UsageError: no such step, layout or other value; nothing has been written.
        BadInput: SOURCE is not HF, or not sound.
        NotRepresentable: the target cannot hold what the source holds.
        OutputExists, SamePlace: OUTPUT may not be replaced.
        VerificationFailed: the files do not reproduce the source; nothing was published.
    """
    request = Request(
        "hf-to-tl",
        Writing(dtype, ledger, max_shard_size, graph, keep_weights, overwrite, dry_run, model_card),
        Checking(check, device, runtime, effort, layers, progress),
        layout=layout,
        process=process,
    )
    return _converted(request, opened(source, adapter), _place(output))


def bake(
    source: Given,
    output: str | Path,
    *,
    process: str = "default",
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    ledger: LedgerOption = "compact",
    max_shard_size: str | int = "5GB",
    graph: Graph | None = None,
    keep_weights: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    model_card: bool = False,
    check: bool = True,
    device: str | torch.device = "auto",
    runtime: RuntimeName | None = None,
    effort: Effort = "standard",
    layers: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """HF -> HF with TransformerLens's processing baked in: a plain GPTNeoForCausalLM directory.

    The biases that folding makes, which GPT-Neo has no tensors for, are carried by the null
    direction of the LayerNorms (`converter.processing.carry`). Arguments: see `hf_to_tl`.
    """
    request = Request(
        "bake",
        Writing(dtype, ledger, max_shard_size, graph, keep_weights, overwrite, dry_run, model_card),
        Checking(check, device, runtime, effort, layers, progress),
        process=process,
    )
    return _converted(request, opened(source, adapter), _place(output))


def tl_to_hf(
    source: Given,
    output: str | Path,
    *,
    reverse: Reverse = "auto",
    adapter: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    ledger: LedgerOption = "compact",
    max_shard_size: str | int = "5GB",
    graph: Graph | None = None,
    keep_weights: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    model_card: bool = False,
    check: bool = True,
    device: str | torch.device = "auto",
    runtime: RuntimeName | None = None,
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
    request = Request(
        "tl-to-hf",
        Writing(dtype, ledger, max_shard_size, graph, keep_weights, overwrite, dry_run, model_card),
        Checking(check, device, runtime, effort, layers, progress),
        reverse=reverse,
    )
    return _converted(request, opened(source, adapter), _place(output))


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
    model_card: bool = False,
    check: bool = True,
    device: str | torch.device = "auto",
    runtime: RuntimeName | None = None,
    effort: Effort = "standard",
    layers: bool = False,
    progress: Progress | None = None,
) -> Conversion | Addition:
    """HF or TransformerLens -> ONNX.

    Without `output`, model.onnx is added beside SOURCE's own weights, which it shares. With one,
    SOURCE is copied there in its layout, with the graph. Arguments: see `hf_to_tl`.

    Raises:
        UsageError: `dtype`, `max_shard_size` or `model_card` without `output`.
    """
    request = Request(
        "export-onnx",
        Writing(
            dtype,
            "none",
            max_shard_size,
            graph or Graph(),
            keep_weights,
            overwrite,
            dry_run,
            model_card,
        ),
        Checking(check, device, runtime, effort, layers, progress),
    )
    return run(request, opened(source, adapter), None if output is None else _place(output))


def _place(output: str | Path) -> Path:
    return place(output, "OUTPUT", "Name a directory, which is made.")


def run(request: Request, source: Checkpoint, output: Path | None) -> Conversion | Addition:
    """Do what is requested. Raises: see the functions above."""
    writing = request.writing
    if output is not None:
        return _converted(request, source, output)
    assert writing.graph is not None, request.command
    if source.merged:
        raise UsageError(
            "The weights that are there are not merged ones, so the graph cannot share them.",
            where="--adapter",
            do="Name an OUTPUT directory.",
        )
    if writing.code or writing.max_shard_size != "5GB":
        raise UsageError(
            "The weights stay as they are where no OUTPUT is named.",
            where="--dtype or --max-shard-size",
            do="Name an OUTPUT directory.",
        )
    if writing.model_card:
        raise UsageError(
            "A card is about a whole directory, and the rest of this one is not neoconvert's.",
            where="--model-card",
            do="Name an OUTPUT directory.",
        )
    return add_graph(
        source, writing.graph, request.checking,
        overwrite=writing.overwrite, dry_run=writing.dry_run,
    )  # fmt: skip


def _converted(request: Request, source: Checkpoint, output: Path) -> Conversion:
    check_output(output, source.source.place, overwrite=request.writing.overwrite)
    return convert(
        request.route(source), output, request.target(source), request.writing, request.checking,
        asked=request.to_json(),
    )  # fmt: skip
