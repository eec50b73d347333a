"""Running a checkpoint, in float32, in the software its users run it in."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.checkpoint import Checkpoint
from converter.errors import BadInput, CannotDoHere, NeoconvertError
from converter.verification.libraries import bridge_model, hf_model, hooked_model
from converter.verification.loading import (
    has_bridge,
    has_hooked_transformer,
    installed,
    resolve_device,
)
from converter.verification.probes import Probe

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class Runtime(ABC):
    """A loaded model. `logits` gives float32 [batch, pos, v] on `device`."""

    name: str
    """ "transformers", "transformer_lens" or "neoconvert"."""
    what: str
    """For people: which class runs it."""
    version: str
    device: torch.device

    @abstractmethod
    def logits(self, probe: Probe) -> Tensor: ...

    def to_json(self) -> dict[str, str]:
        return {
            "name": self.name,
            "what": self.what,
            "version": self.version,
            "device": str(self.device),
        }


@dataclass
class Library(Runtime):
    """A module of transformers or TransformerLens."""

    model: Any

    def logits(self, probe: Probe) -> Tensor:
        import torch

        arguments: dict[str, Tensor] = {}
        if probe.mask is not None:
            arguments["attention_mask"] = torch.from_numpy(probe.mask).long().to(self.device)
            if self.what != "HookedTransformer":
                # HF does not derive positions from the mask for GPT-Neo.
                arguments["position_ids"] = torch.from_numpy(probe.positions).to(self.device)
        with torch.inference_mode(), exact_float32():
            out = self.model(torch.from_numpy(probe.tokens).to(self.device), **arguments)
        result: Tensor = getattr(out, "logits", out)
        assert result.dtype is torch.float32, f"{self.what} computed in {result.dtype}"
        return result


@dataclass
class OwnForward(Runtime):
    """`converter.verification.reference` in float32, where no library runs the layout."""

    checkpoint: Checkpoint

    def logits(self, probe: Probe) -> Tensor:
        import torch

        from converter.verification.reference import forward

        with torch.inference_mode(), exact_float32():
            run = forward(self.checkpoint, [probe], dtype=torch.float32, device=self.device)
            return run.logits(0)


def open_runtime(
    checkpoint: Checkpoint, device: str = "auto", runtime: str | None = None
) -> Runtime:
    """Load a checkpoint into the software that its layout is for.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        runtime: None or "torch".

    Raises:
        CannotDoHere: no such device or runtime here.
        BadInput: the software refuses the checkpoint.
    """
    if runtime not in (None, "torch"):
        raise CannotDoHere(
            f"The runtime {runtime!r} does not run this checkpoint here.",
            where=f"{checkpoint.source.given} ({checkpoint.layout} layout)",
            do="Leave --runtime out, or use torch.",
        )
    import torch

    where = resolve_device(device)
    lens = installed("transformer-lens")
    try:
        if checkpoint.layout == "hf":
            model = hf_model(checkpoint, where)
            name = type(model).__name__
            return Library("transformers", name, installed("transformers"), where, model)
        if checkpoint.layout == "hooked" and has_hooked_transformer():
            model = hooked_model(checkpoint, where, torch.float32)
            return Library("transformer_lens", "HookedTransformer", lens, where, model)
        if checkpoint.layout == "bridge" and has_bridge():
            model = bridge_model(checkpoint, where, torch.float32)
            return Library("transformer_lens", "TransformerBridge", lens, where, model)
    except NeoconvertError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AssertionError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"The software that this layout is for refuses the checkpoint: {reason}",
            where=f"{checkpoint.source.given} ({checkpoint.layout} layout)",
            do="Compare the config beside the weights with the one they came with.",
        ) from error
    what = f"neoconvert's own forward (transformer-lens {lens} cannot run this layout)"
    return OwnForward("neoconvert", what, installed("neoconvert"), where, checkpoint)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products in float32: no TF32, no bfloat16."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
