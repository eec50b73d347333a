"""Casts lifted: whatever library code asks for, torch computes in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from converter.verification import lifted
from converter.verification.lifted import casts_lifted

THIRD = torch.tensor(1 / 3, dtype=torch.float64)
CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "to, positional": lambda x: x.to(torch.float32),
    "to, by name": lambda x: x.to(dtype=torch.float16),
    "to, with a device": lambda x: x.to("cpu", torch.bfloat16),
    "to another's dtype": lambda x: x.to(torch.zeros(1, dtype=torch.float32)),
    "type": lambda x: x.type(torch.float32),
    "type, of old": lambda x: x.type(torch.FloatTensor),  # type: ignore[call-overload]
    "type, by its name": lambda x: x.type("torch.HalfTensor"),
    "type_as": lambda x: x.type_as(torch.zeros(1, dtype=torch.float32)),
    "softmax": lambda x: x.view(1).log_softmax(0, dtype=torch.float32) + x,
    "softmax, functional": lambda x: functional.softmax(x.view(1), 0, dtype=torch.float32) * x,
    "sum": lambda x: x.sum(dtype=torch.float32),
    "full": lambda x: torch.full((), x.item(), dtype=torch.float32),
    "tensor": lambda x: torch.tensor(x.item(), dtype=torch.float32),
    "tensor, no dtype": lambda x: torch.tensor(x.item()),
    "empty, no dtype": lambda x: torch.empty(1).fill_(x),
    "new_full": lambda x: x.new_full((1,), x.item(), dtype=torch.float32),
    "full_like": lambda x: torch.full_like(x, x.item(), dtype=torch.float32),
    "arange": lambda x: torch.arange(1.0, 2.0, dtype=torch.float32) * x,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_no_cast_narrows(cast: Callable[[Tensor], Tensor]) -> None:
    with casts_lifted():
        found = cast(THIRD)
    assert found.dtype is torch.float64
    assert found.view(-1)[0] in (THIRD, 1 / 3)
    assert cast(THIRD).dtype is not torch.float64 or not bool((cast(THIRD) == THIRD).all())


class Odd(torch.nn.Module):
    """Reads weights in every way that libraries do: as a module, as a bare parameter, another
    module's, a buffer, through a view, by its dtype, changed in place."""

    def __init__(self, dtype: torch.dtype, cast: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cast = cast
        self.embed = torch.nn.Embedding(7, 6, dtype=dtype)
        self.norm = torch.nn.LayerNorm(6, dtype=dtype)
        self.linear = torch.nn.Linear(6, 9, dtype=dtype)
        self.bare = torch.nn.Parameter(torch.randn(3, 6, 2, dtype=dtype))
        self.ignore: Tensor
        self.register_buffer("ignore", torch.tensor(-0.3, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens) + self.embed.weight[tokens])
        assert x.dtype == self.bare.dtype
        x = x.to(self.embed.weight.dtype) + self.cast(x)
        heads = torch.einsum("bpd,ndh->bpnh", x, self.bare).flatten(2)
        heads = torch.where(heads > 0, heads, self.ignore)
        heads = torch.addmm(self.norm.bias, heads.view(-1, 6), self.linear.weight[:6].t())
        return functional.linear(heads.add_(self.norm.weight), self.linear.weight, self.linear.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [lifted._BLOCK, 10])
def test_a_module_computes_as_its_double_does(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifted, "_BLOCK", block)
    torch.manual_seed(0)
    narrow, tokens = Odd(dtype, Tensor.float), torch.arange(7).view(1, 7)
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    with torch.inference_mode(), casts_lifted():
        found = narrow(tokens)
    wide = Odd(torch.float64, Tensor.double)
    wide.load_state_dict({name: value.double() for name, value in before.items()})
    with torch.inference_mode():
        expected = wide(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    # Nothing of the model is changed, and nothing stays lifted.
    for name, value in narrow.state_dict().items():
        assert value.dtype is dtype
        assert torch.equal(value, before[name])
    assert torch.zeros(1).dtype is torch.float32
    assert THIRD.float().dtype is torch.float32


def test_it_ends_where_something_raises() -> None:
    def fail() -> Any:
        with casts_lifted():
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert torch.get_default_dtype() is torch.float32
