"""The result of a conversion as tensors or as a model: the same weights that the files would hold,
bit for bit, and on no disk. The source, a live model above all, stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from converter.checkpoint import Checkpoint, sidecar
from converter.checkpoint.memory import Memory
from converter.checkpoint.opening import read_checkpoint
from converter.checkpoint.plan import make_plan
from converter.checkpoint.reader import TorchReader
from converter.checkpoint.source import Source
from converter.choices import Reverse, one_of
from converter.dtypes import NAMES
from converter.errors import UsageError
from converter.layout import LAYOUTS, Layout, UnitKind
from converter.opening import Given, opened
from converter.processing import parse
from converter.progress import Progress, silent
from converter.request import code_asked
from converter.route import Route
from converter.routing import biased_units, has_ledger, processing, reversing
from converter.streaming import stream
from converter.verification.loading import require_bridge, require_hooked, resolve_device

if TYPE_CHECKING:
    import torch


def to_state_dict(
    source: Given,
    *,
    layout: Layout,
    process: str = "none",
    reverse: Reverse = "auto",
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors that a conversion would write, on the CPU, each with memory of its own.

    Args:
        source: a checkpoint, a directory, file or hub id, or a live model; see `open_model`.
        layout: "hf", "hooked" (HookedTransformer's names and axes) or "bridge"
            (TransformerBridge's). A tied head is left out in "hf", as it is of the files: load
            it with strict=False, or ask for the model (`to_hf_model`).
        process: "none", "default", "all", or TransformerLens's step names with commas.
        reverse: how processing is undone on the way to "hf"; see `tl_to_hf`.
        dtype: such as "float16" or torch.float16; None keeps each tensor's own.

    Raises:
        UsageError: no such layout, step or other value; or `reverse` together with `process`.
        BadInput: the source is not sound; CannotUndo, NotRepresentable: see `tl_to_hf`.
    """
    return _made(source, layout, process, reverse, dtype, progress).state


def to_hf_model(
    source: Given,
    *,
    process: str = "none",
    reverse: Reverse = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Any:
    """A GPTNeoForCausalLM in eval mode, tied where embedding and head are one matrix.

    Args:
        process: processing to bake in; see `bake`. Further arguments: see `to_state_dict`.
        device: "cpu", "cuda" or "cuda:N", "auto"; None: where a live source is, else the CPU.

    Raises:
        CannotDoHere: no such device here. Others: see `to_state_dict`.
    """
    from converter.verification.libraries import hf_model

    where = _device(source, device)
    made = _made(source, "hf", process, reverse, dtype, progress)
    model = hf_model(made.checkpoint, where, made.dtype, made.state)
    if (generation := made.checkpoint.source.generation_config) is not None:
        model.generation_config = type(model.generation_config).from_dict(generation)
    return model


def to_hooked(
    source: Given,
    *,
    process: str = "none",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Any:
    """A HookedTransformer in eval mode, with the source's tokenizer.

    Args:
        process: "default" for what `HookedTransformer.from_pretrained` does, computed in float64.
            Further arguments: see `to_hf_model`.

    Raises:
        CannotDoHere: TransformerLens 4, which has no HookedTransformer; or no such device.
        Others: see `to_state_dict`.
    """
    require_hooked("to_hooked", "Use converter.to_bridge, which gives the same hooks and function.")
    from converter.verification.libraries import hooked_model

    where = _device(source, device)
    made = _made(source, "hooked", process, "auto", dtype, progress)
    return hooked_model(made.checkpoint, where, made.dtype, tokenizer=True, state=made.state)


def to_bridge(
    source: Given,
    *,
    process: str = "none",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Any:
    """A TransformerBridge in eval mode, with the source's tokenizer; in compatibility mode where
    its LayerNorms are folded, since only there it has the biases that folding makes.

    Arguments: see `to_hooked`.

    Raises:
        CannotDoHere: TransformerLens 2, which has no TransformerBridge; or no such device.
        Others: see `to_state_dict`.
    """
    require_bridge("to_bridge", "Upgrade transformer-lens, or use converter.to_hooked.")
    from converter.verification.libraries import bridge_model

    where = _device(source, device)
    made = _made(source, "bridge", process, "auto", dtype, progress)
    return bridge_model(made.checkpoint, where, made.dtype, made.state)


@dataclass(frozen=True)
class _Made:
    """A conversion's result."""

    checkpoint: Checkpoint
    state: dict[str, torch.Tensor]
    """Its tensors, which nobody else holds."""

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor as it is."""
        import torch

        result: torch.dtype = getattr(torch, NAMES[self.checkpoint.dtype])
        return result


def _made(
    given: Given,
    layout: Layout,
    process: str,
    reverse: Reverse,
    dtype: str | torch.dtype | None,
    progress: Progress | None,
) -> _Made:
    one_of(layout, LAYOUTS, "--layout")
    code, source = code_asked(dtype), opened(given)
    route = _route(source, layout, process, reverse, recast=code is not None)
    plan = make_plan(route, layout, dtype=code)
    has_cfg = LAYOUTS[layout].has_cfg
    tl = sidecar.cfg(route, plan, recast=True) if has_cfg else None
    hf = None if has_cfg else sidecar.hf_config(route, plan, recast=True)
    memory = Memory(plan)
    stream(route, plan, memory, None, progress or silent)
    place = Path(f"{layout} in memory")
    made = Source(
        given=f"{source.source.given} as {layout}",
        path=place,
        readers=(TorchReader(memory.tensors, place),),
        hf_config=hf,
        tl_config=tl,
        generation_config=source.original_generation_config if layout == "hf" else None,
        provenance=None,
        live=True,
        tokenizer=None if layout == "hf" else _tokenizer(source),
    )
    return _Made(read_checkpoint(made), memory.tensors)


def _route(
    source: Checkpoint, layout: Layout, process: str, reverse: Reverse, *, recast: bool
) -> Route:
    steps = parse(process)
    one_of(reverse, get_args(Reverse), "--reverse")
    if reverse != "auto" and (steps or layout != "hf"):
        raise UsageError(
            "Processing is undone on the way to plain Hugging Face weights, and nowhere else.",
            where=f"reverse={reverse!r}, process={process!r}, layout={layout!r}",
            do="Leave reverse out, or ask for layout 'hf' without processing.",
        )
    if layout == "hf" and not steps and (source.layout != "hf" or has_ledger(source)):
        return reversing(source, reverse, recast=recast)
    route = processing(source, steps, layout)
    # A bridge has query, key and value biases where its LayerNorms are folded, and only there.
    needed = layout == "bridge" and bool(biased_units(source) - {UnitKind.FINAL.value})
    return replace(route, folded=True) if needed else route


def _tokenizer(source: Checkpoint) -> Any:
    from converter.verification.tokenizer import local_tokenizer

    return local_tokenizer(source)


def _device(given: Given, device: str | torch.device | None) -> torch.device:
    import torch

    if device is not None:
        return resolve_device(str(device))
    if isinstance(given, torch.nn.Module):
        return next((p.device for p in given.parameters()), torch.device("cpu"))
    return torch.device("cpu")
