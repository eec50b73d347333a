"""Running a checkpoint, in float32, in the software its users run it in."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from converter.checkpoint import Checkpoint
from converter.errors import BadInput, CannotDoHere, Fault, NeoconvertError, classified
from converter.layout import LAYOUTS
from converter.verification.evidence import NotComparable
from converter.verification.libraries import bridge_model, hf_model, hooked_model
from converter.verification.loading import (
    OWN,
    has_software,
    installed,
    resolve_device,
)
from converter.verification.probes import Probe
from converter.verification.quiet import quiet

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass
class Runtime(ABC):
    """A loaded model. `logits` gives float32 [batch, pos, v] on `device`."""

    name: str
    """ "transformers", "transformer_lens", "onnxruntime" or "neoconvert"."""
    what: str
    """For people: which class runs it."""
    version: str
    device: torch.device

    def runs(self, probe: Probe) -> bool:
        """Whether this software has what the probe needs."""
        return probe.prefill is None

    @abstractmethod
    def logits(self, probe: Probe) -> Tensor: ...

    def runs_exactly(self, probe: Probe) -> bool:
        """Whether `exact_logits` has what the probe needs."""
        return self.runs(probe)

    def exact_logits(self, probe: Probe) -> Tensor:
        """What the same program computes from the same weights in float64 [batch, pos, v].

        Raises:
            NotComparable: there is no way to run it so.
        """
        raise NotComparable(f"{self.what} does not run in float64 here")

    def streams(self, probe: Probe) -> dict[str, Tensor]:
        """The residual stream [batch, pos, d] after "embed" and each "block i", as far as the
        software shows it."""
        return {}


@dataclass
class Library(Runtime):
    """A module of transformers or TransformerLens, in float32."""

    model: Any
    in_float64: Callable[[], Any] | None = None
    """Loads it in float64, where it is stored so: float32 rounds such weights. None: the model has
    the stored numbers."""

    def runs(self, probe: Probe) -> bool:
        # HookedTransformer takes no position ids.
        return super().runs(probe) and not (probe.start and self._hooked)

    def logits(self, probe: Probe) -> Tensor:
        import torch

        with torch.inference_mode(), exact_float32():
            result, _ = self._step(probe, 0, probe.tokens.shape[1])
        assert result.dtype is torch.float32, f"{self.what} computed in {result.dtype}"
        return result

    def runs_exactly(self, probe: Probe) -> bool:
        return self.runs(replace(probe, prefill=None))

    def exact_logits(self, probe: Probe) -> Tensor:
        import torch

        from converter.verification.lifted import casts_lifted

        length, wide = probe.tokens.shape[1], self._wide
        ends = [length] if probe.prefill is None else [*range(probe.prefill, length), length]
        cache, pieces = wide._empty_cache(probe), []
        with torch.inference_mode(), casts_lifted():
            for start, end in zip([0, *ends], ends, strict=False):
                logits, cache = wide._step(probe, start, end, cache)
                pieces.append(logits)
        if any(piece.dtype is not torch.float64 for piece in pieces):
            raise NotComparable(f"{self.what} gives {pieces[0].dtype} whatever it is asked for")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def streams(self, probe: Probe) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        blocks = self.model.blocks if hasattr(self.model, "blocks") else self.model.transformer.h
        handles = [blocks[0].register_forward_pre_hook(_keep_input(found), with_kwargs=True)]
        for layer, block in enumerate(blocks):
            handles.append(block.register_forward_hook(_keep_output(found, f"block {layer}")))
        try:
            self.logits(probe)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @cached_property
    def _wide(self) -> Library:
        """The same with the numbers that are stored."""
        if self.in_float64 is None:
            return self
        return replace(self, model=self.in_float64(), in_float64=None)

    @property
    def _hooked(self) -> bool:
        return self.what == "HookedTransformer"

    def _empty_cache(self, probe: Probe) -> Any:
        """HookedTransformer wants a cache to fill; the others make one when asked to."""
        if probe.prefill is None or not self._hooked:
            return None
        import transformer_lens

        # 3.0 gave it another name.
        names = ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache")
        kind = next(getattr(transformer_lens, n) for n in names if hasattr(transformer_lens, n))
        return kind.init_cache(self.model.cfg, self.device, probe.tokens.shape[0])

    @quiet()
    def _step(self, probe: Probe, start: int, end: int, cache: Any = None) -> tuple[Tensor, Any]:
        """The logits of a probe's positions from `start` to before `end`, and the cache after."""
        import torch

        tokens = torch.from_numpy(probe.tokens[:, start:end]).to(self.device)
        cached = (probe.prefill is not None and cache is not None) or end < probe.tokens.shape[1]
        mask = probe.mask
        if cached and mask is None:
            mask = np.ones_like(probe.tokens, bool)
        named: dict[str, Any] = {}
        if mask is not None:
            # HookedTransformer's cache remembers the mask of what it holds.
            seen = mask[:, start if self._hooked else 0 : end]
            named["attention_mask"] = torch.from_numpy(seen).long().to(self.device)
        if not self._hooked and (probe.mask is not None or probe.start or cached):
            # HF does not derive positions from the mask for GPT-Neo.
            positions = torch.from_numpy(probe.positions[:, start:end])
            named["position_ids"] = positions.to(self.device)
        if not cached:
            out = self.model(tokens, **named)
            return getattr(out, "logits", out), None
        if self._hooked:
            return self.model(tokens, past_kv_cache=cache, **named), cache
        held = self._cache_name
        named |= {held: cache, "use_cache": True}
        if self.what == "TransformerBridge":
            logits, cache = self.model(tokens, return_type="logits_and_cache", **named)
            return logits, cache
        out = self.model(tokens, **named)
        return out.logits, getattr(out, held)

    @cached_property
    def _cache_name(self) -> str:
        """transformers 5.24 gave it another name."""
        taken = inspect.signature(self.model.forward).parameters
        return "cache" if "cache" in taken else "past_key_values"


def _keep_input(found: dict[str, Tensor]) -> Callable[..., None]:
    def hook(_module: Any, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        found["embed"] = arguments[0] if arguments else named["hidden_states"]

    return hook


def _keep_output(found: dict[str, Tensor], unit: str) -> Callable[..., None]:
    def hook(_module: Any, _arguments: Any, output: Any) -> None:
        found[unit] = output[0] if isinstance(output, tuple) else output

    return hook


@dataclass
class OwnForward(Runtime):
    """`converter.verification.reference` in float32, where no library runs the layout."""

    checkpoint: Checkpoint

    def exact_logits(self, probe: Probe) -> Tensor:
        raise NotComparable(
            "no software there runs this layout, and the reference is not compared with itself"
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
