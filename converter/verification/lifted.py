"""Library code in float64, unmodified: every cast to a narrower dtype lifted, every narrower tensor
widened where it is used.

Nothing of the model is changed. While `casts_lifted` is in force, each call of a torch function
passes through it:

- asked for float32 (or a 16-bit dtype), positionally or by name, torch gives float64;
- a stored weight or buffer, float32 or 16-bit, is widened, exactly, for that one call, so that
  memory stays near that of the stored weights; what only moves elements (views, indexing, an
  embedding) is left to move the narrow ones;
- the head is multiplied in blocks of the vocabulary.

So whatever of a module a library reads in its forward pass, parameters of other modules and
buffers included, it reads in float64, and what is left of its error is float64's rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_TYPES = {
    f"{module}.{kind}Tensor": f"{module}.DoubleTensor"
    for module in ("torch", "torch.cuda")
    for kind in ("Float", "Half", "BFloat16")
}
_CASTS = frozenset({Tensor.float, Tensor.half, Tensor.bfloat16})
_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
_MOVES: frozenset[Any] = frozenset(
    {
        functional.embedding, torch.embedding,
        Tensor.__getitem__, Tensor.detach, Tensor.contiguous, Tensor.flatten, Tensor.narrow,
        Tensor.permute, Tensor.reshape, Tensor.transpose, Tensor.unsqueeze, Tensor.squeeze,
        Tensor.view, Tensor.expand, Tensor.t, Tensor.split, Tensor.chunk, Tensor.unbind,
        Tensor.index_select, Tensor.swapaxes, Tensor.movedim, Tensor.unflatten, Tensor.repeat,
        torch.detach, torch.flatten, torch.narrow, torch.permute, torch.reshape, torch.transpose,
        torch.unsqueeze, torch.squeeze, torch.t, torch.split, torch.chunk, torch.unbind,
        torch.index_select, torch.swapaxes, torch.movedim,
        Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point,
        Tensor.is_contiguous, torch.is_floating_point, torch.numel, torch.is_tensor,
    }
)  # fmt: skip
_BLOCK = 2**22
"""Elements of a matrix that are widened at a time."""


@contextlib.contextmanager
def casts_lifted() -> Iterator[None]:
    """All torch code within computes in float64. See the module."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Lifted():
            yield
    finally:
        torch.set_default_dtype(before)


class _Lifted(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # of a property, which computes nothing
            found = func(*args, **named)
            return torch.float64 if func == _DTYPE and found in _NARROW else found
        if func in _MOVES:
            return func(*args, **named)
        if func in _CASTS:
            return _wide(args[0]) if _narrow(args[0]) else args[0].double()
        if (big := _in_blocks(func, args, named)) is not None:
            return big
        # What is changed in place is not a stored weight's copy.
        kept = 1 if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" else 0
        args = (*args[:kept], *map(_lift, args[kept:]))
        return func(*args, **{k: v if k == "out" else _lift(v) for k, v in named.items()})


def _lift(value: Any) -> Any:
    """An argument of a torch function, as it is in a world of float64."""
    if isinstance(value, Tensor):
        return _wide(value) if _narrow(value) else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    if isinstance(value, (str, type(torch.FloatTensor))):  # of Tensor.type
        return _TYPES.get(_type_name(value), value)
    if type(value) in (list, tuple):
        return type(value)(map(_lift, value))
    return value


def _narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _NARROW


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.float64)


def _type_name(value: Any) -> str:
    return value if isinstance(value, str) else f"{value.__module__}.{value.__name__}"


def _in_blocks(
    func: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]
) -> Tensor | None:
    """x W + b for a matrix that is too large to be widened whole; None: it is not that."""
    if func is functional.linear:
        x, weight, bias = _three(args, named, ("input", "weight", "bias"))
    elif func is torch.addmm and not set(named) - {"input", "mat1", "mat2"}:
        bias, x, weight = _three(args, named, ("input", "mat1", "mat2"))
        weight = weight.t()
    else:
        return None
    if not _narrow(weight) or weight.numel() <= _BLOCK:
        return None
    x = _lift(x)
    out: Tensor = x.new_empty(*x.shape[:-1], weight.shape[0])
    step = max(1, _BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        block = functional.linear(x, _wide(weight[rows]))
        out[..., rows] = block if bias is None else block + _lift(bias)[..., rows]
    return out


def _three(args: tuple[Any, ...], named: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | dict(named)
    return [given.get(name) for name in names]
