"""Activation functions, computed in the dtype they are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from converter.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Activation = Callable[["Tensor"], "Tensor"]


def activation_named(name: str, dtype: torch.dtype) -> Activation:
    """An activation by its name in transformers, computed in `dtype` throughout.

    Raises:
        ConfigError: transformers knows no such activation.
    """
    import torch
    from torch.nn import functional

    gelu_tanh = partial(functional.gelu, approximate="tanh")

    def gelu_fast(x: Tensor) -> Tensor:
        """The same, x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), with √(2/π) in ten digits."""
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))

    own: dict[str, Activation] = {
        "gelu_new": gelu_tanh,
        "gelu_pytorch_tanh": gelu_tanh,
        "gelu_fast": gelu_fast,
        "gelu": functional.gelu,
        "relu": functional.relu,
        "silu": functional.silu,
    }
    if name in own:
        return own[name]
    from transformers.activations import ACT2FN

    try:
        function = ACT2FN[name]
    except KeyError:
        raise ConfigError(
            f"There is no activation {name!r} in transformers.",
            where="config.json: activation_function",
            do="Check the config against the checkpoint it came with.",
        ) from None
    result: Activation = function.to(dtype)
    return result
