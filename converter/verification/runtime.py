"""What a runtime is: software that a checkpoint runs in, in float32."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.verification.evidence import NotComparable
from converter.verification.probes import Probe

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
