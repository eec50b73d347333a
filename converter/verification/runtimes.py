"""Opening a checkpoint in the software that its users run it in."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from converter.checkpoint import Checkpoint
from converter.errors import BadInput, CannotDoHere, Fault, NeoconvertError, classified
from converter.layout import LAYOUTS
from converter.verification.evidence import NotComparable
from converter.verification.libraries import bridge_model, hf_model, hooked_model
from converter.verification.library_runtime import Library
from converter.verification.loading import (
    OWN,
    has_software,
    installed,
    resolve_device,
)
from converter.verification.probes import Probe
from converter.verification.runtime import Runtime, exact_float32

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class OwnForward(Runtime):
    """`converter.verification.reference` in float32, where no library runs the layout."""

    checkpoint: Checkpoint

    def exact_logits(self, probe: Probe) -> Tensor:
        raise NotComparable(
            "no software in its environment runs the layout, and the reference is not compared with itself"
        )

    def logits(self, probe: Probe) -> Tensor:
        import torch

        from converter.verification.reference import forward

        with torch.inference_mode(), exact_float32():
            run = forward(self.checkpoint, [probe], dtype=torch.float32, device=self.device)
            return run.logits(0)


def open_runtime(checkpoint: Checkpoint, device: str = "auto") -> Runtime:
    """Load a checkpoint into the software that its layout is for.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        CannotDoHere: no such device here.
        BadInput: the software refuses the checkpoint.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    where = resolve_device(device)
    if checkpoint.graph is not None:
        from converter.verification.onnx_runtime import open_onnx

        return open_onnx(checkpoint, where)
    lens = installed("transformer-lens")
    if lens and LAYOUTS[checkpoint.layout].library == "transformer_lens":
        _require_lens(lens)

    def library(name: str, version: str, load: Callable[..., Any]) -> Library:
        model = load(checkpoint, where, torch.float32)
        what = type(model).__name__
        if load is hf_model and checkpoint.merged and installed("peft"):
            what += f" with peft {installed('peft')}"
        rounded = any(stored.code == "F64" for stored in checkpoint.stored.values())
        again = partial(load, checkpoint, where, torch.float64) if rounded else None
        return Library(name, what, version, where, model, again)

    try:
        if checkpoint.layout == "hf":
            return library("transformers", installed("transformers"), hf_model)
        if has_software(checkpoint.layout):
            load = hooked_model if checkpoint.layout == "hooked" else bridge_model
            return library("transformer_lens", lens, load)
    except (
        NeoconvertError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
        AssertionError, OSError, StrictDataclassError, SafetensorError,
    ) as error:  # fmt: skip
        if not isinstance(classified(error), Fault):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"The software that this layout is for refuses the checkpoint: {reason}",
            where=f"{checkpoint.source.given} ({checkpoint.layout} layout)",
            do="Compare the config beside the weights with the one they came with.",
        ) from error
    why = (
        f"transformer-lens {lens} cannot run this layout" if lens else "TransformerLens is missing"
    )
    what = f"{OWN} ({why})"
    return OwnForward("neoconvert", what, installed("neoconvert"), where, checkpoint)


def _require_lens(version: str) -> None:
    """
    Raises:
        CannotDoHere: TransformerLens is installed, and broken.
    """
    try:
        importlib.import_module("transformer_lens")
    except ImportError as error:
        raise CannotDoHere(
            f"TransformerLens is installed here and cannot be imported: {error}",
            where=f"transformer-lens {version}",
            do="Install it again, or verify in an environment where it works with --python.",
        ) from error
