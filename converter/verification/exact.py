"""What a run is compared with: the float64 reference's log-probabilities at some positions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from converter.verification.probes import Probe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.verification.logits import Tensors


@dataclass(frozen=True)
class Exact:
    """Some rows of the reference: log-probabilities [rows, k] and what is derived from them."""

    rows: Tensor
    """Indices into the flattened [batch · pos]."""
    logp: Tensor
    p: Tensor
    scale: Tensor
    """Largest |logit| or |logsumexp| [rows]."""
    top: Tensor
    """The most likely token [rows]."""
    lead: Tensor
    """How far it is ahead of the next."""
    following: Tensor
    """The token that comes next, or -1 [rows]."""
    nll: Tensor
    """-log p(next token) [rows]; of no meaning where there is none."""
    columns: Tensor | None = None
    """Which tokens of the vocabulary `logp` is of [rows, k]; None: all."""
    weights: Tensor | None = None
    """For how many tokens each stands [rows, k]."""

    @staticmethod
    def of(rows: Tensor, logits: Tensor, following: Tensor) -> Exact:
        """logits: float64 [rows, v]."""
        import torch

        normaliser = logits.logsumexp(-1, keepdim=True)
        logp = logits - normaliser
        sizes = torch.stack([logits.amax(-1), logits.amin(-1), normaliser[:, 0]])
        best, top = logp.max(-1)
        rest = logp.scatter(-1, top[:, None], -math.inf).amax(-1)
        return Exact(
            rows=rows,
            logp=logp,
            p=logp.exp(),
            scale=sizes.abs().where(sizes.isfinite(), 0.0).amax(0),
            top=top,
            lead=best - rest,
            following=following,
            nll=nll(logp, following),
        )


def nll(logp: Tensor, following: Tensor) -> Tensor:
    """-log p(next token) [rows]."""
    return -logp.gather(-1, following.clamp(min=0)[:, None])[:, 0]


class Truth(Protocol):
    """What the reference says of some probes: a forward pass, or what is recorded of one."""

    @property
    def probes(self) -> Sequence[Probe]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def source(self) -> Tensors:
        """The weights that it is of."""

    def rows(self, index: int) -> Iterator[tuple[Tensor, Tensor | Exact]]:
        """A probe's positions, padding left out, in order, some at a time: their indices into the
        flattened [batch · pos], and their logits [rows, v] or what is known of them."""

    def part(self, few: Mapping[int, Probe]) -> Truth:
        """Of some probes, as far as they go."""
