"""A model of transformers or TransformerLens, as a runtime of verification."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from converter.verification.evidence import NotComparable
from converter.verification.probes import Probe
from converter.verification.quiet import quiet
from converter.verification.runtime import Runtime, exact_float32

if TYPE_CHECKING:
    from torch import Tensor


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
