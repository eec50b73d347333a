"""Faults of the software that runs an artifact: sound files, and a library that is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from converter.verification import runtimes
from tests.verification.fault import Artifact, Fault

Tamper = Callable[[Any], None]
"""Spoils a loaded model in place."""
_OPENERS: dict[Artifact, str] = {
    "hf": "hf_model",
    "hooked": "hooked_model",
    "bridge": "bridge_model",
}


@contextlib.contextmanager
def spoiled(artifact: Artifact, tamper: Tamper) -> Iterator[None]:
    """The library that runs such artifacts, and for "hf" the original too, is wrong meanwhile."""
    name = _OPENERS[artifact]
    sound = getattr(runtimes, name)

    def load(*arguments: Any, **named: Any) -> Any:
        model = sound(*arguments, **named)
        tamper(model)
        return model

    setattr(runtimes, name, load)
    try:
        yield
    finally:
        setattr(runtimes, name, sound)


def _fault(name: str, artifact: Artifact, unit: str | None, tamper: Tamper) -> Fault:
    software: Callable[[], AbstractContextManager[None]] = partial(spoiled, artifact, tamper)
    return Fault(f"software: {name}", (artifact,), unit, software=software)


def _hf_attention(model: Any) -> Any:
    return model.transformer.h[1].attn.attention


def _seeing(model: Any, band: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """transformers' own mask of block 1, bool [1, 1, context, context]."""
    attention = _hf_attention(model)
    attention.bias.copy_(band(torch.ones_like(attention.bias)))


def _window_lost(model: Any) -> None:
    _seeing(model, torch.tril)


def _future(model: Any) -> None:
    _seeing(model, partial(torch.tril, diagonal=1))


def _erf(model: Any) -> None:
    model.transformer.h[1].mlp.act = torch.nn.GELU()


def _half(model: Any, share: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.data += share * (parameter.data.half().float() - parameter.data)


def _scaled(model: Any, share: float = 1.0) -> None:
    for block in model.blocks:
        block.attn.attn_scale = 1 + share * (model.cfg.d_head**0.5 - 1)


def _global(model: Any) -> None:
    model.blocks[1].attn.attn_type = "global"


def _epsilon(model: Any, share: float = 1.0) -> None:
    for module in model.modules():  # TransformerBridge's own LayerNorm reads its config's
        if hasattr(getattr(module, "config", None), "eps"):
            module.config.eps += share * (1e-6 - module.config.eps)


SOFTWARE_FAULTS: tuple[Fault, ...] = (
    # transformers runs the original too, so that the original departs from its own file.
    _fault("transformers without the window", "hf", None, _window_lost),
    _fault("transformers sees the future", "hf", None, _future),
    _fault("transformers with another gelu", "hf", None, _erf),
    _fault("transformers in float16 weights", "hf", None, _half),
    _fault("HookedTransformer scales scores", "hooked", "block 0", _scaled),
    _fault("HookedTransformer without the window", "hooked", "block 1", _global),
    _fault("HookedTransformer in float16 weights", "hooked", "embed", _half),
    _fault("TransformerBridge with another epsilon", "bridge", None, _epsilon),
    _fault("TransformerBridge in float16 weights", "bridge", "embed", _half),
)

_GRADUAL: tuple[tuple[str, Artifact, Callable[..., None]], ...] = (
    ("transformers in float16 weights", "hf", _half),
    ("HookedTransformer scales scores", "hooked", _scaled),
    ("HookedTransformer in float16 weights", "hooked", _half),
    ("TransformerBridge with another epsilon", "bridge", _epsilon),
    ("TransformerBridge in float16 weights", "bridge", _half),
)


def smaller(name: str, share: float) -> Callable[[], AbstractContextManager[None]] | None:
    """The fault of this name at a share of its size; None where it is there or not."""
    for ours, artifact, tamper in _GRADUAL:
        if name == f"software: {ours}":
            return partial(spoiled, artifact, partial(tamper, share=share))
    return None
