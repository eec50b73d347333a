"""The float64 reference at some columns of the vocabulary: enough of them to stand for all.

Of each position the most likely tokens are kept, and of the others every n-th, beginning one
further at each position, so that over the positions every token is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from converter.errors import NotRepresentable
from converter.verification.exact import Exact
from converter.verification.measuring import CACHE
from converter.verification.probes import Probe, wholes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.verification.logits import Forward, Tensors

Array = NDArray[Any]
LIKELIEST = 16
_VALUES = 900_000
"""Log-probabilities kept of all probes together: 7 MB in float64."""
_FEWEST = 48
"""Columns of each position, however many positions there are."""


@dataclass(frozen=True)
class Table:
    """What is kept of one probe: of each position that is no padding, in order."""

    logp: Array
    """float64 [rows, k]: of the likeliest tokens, then of every n-th."""
    top: Array
    """The likeliest tokens, the first first [rows, at most LIKELIEST]."""
    facts: Array
    """float64 [rows, 3]: the largest |logit| or |logsumexp|; how far the likeliest token is ahead
    of the next; -log p(next token)."""
    first: int
    """The number of its first position among those of all probes."""
    d_vocab: int

    @cached_property
    def columns(self) -> tuple[Array, Array]:
        """Which tokens `logp` is of, and for how many tokens each stands, [rows, k] both."""
        return columns_of(self.top, self.first, self.d_vocab, self.logp.shape[1])

    @staticmethod
    def of(forward: Forward, index: int, first: int, columns: int) -> Table:
        """
        Raises:
            NotRepresentable: a log-probability that is not finite.
        """
        import torch

        following = torch.from_numpy(forward.probes[index].tokens).roll(-1, 1).flatten()
        pieces: list[tuple[Tensor, ...]] = []
        v = forward.head.shape[1]
        at = first
        for rows, logits in forward.rows(index):
            exact = Exact.of(rows, logits, following[rows].to(logits.device))
            if not bool(exact.logp.isfinite().all()):
                raise NotRepresentable(
                    "The original's log-probabilities are not all finite: there is nothing to compare with.",
                    where=f"probe {forward.probes[index].name!r}",
                    do="Verify with the original itself, which says where they are.",
                )
            top = exact.logp.topk(min(LIKELIEST, v), -1).indices
            chosen, _ = columns_of(top.cpu().numpy(), at, v, columns)
            some = exact.logp.gather(-1, torch.from_numpy(chosen).to(logits.device))
            pieces.append((some, top, torch.stack([exact.scale, exact.lead, exact.nll], -1)))
            at += len(rows)
        logp, likely, facts = (torch.cat(part).cpu().numpy() for part in zip(*pieces, strict=True))
        return Table(logp, likely, facts, first, v)


def columns_of(top: Array, first: int, d_vocab: int, count: int) -> tuple[Array, Array]:
    """See `Table.columns`. What stands for no token is of weight 0: it is among the likeliest, or
    there is no such token."""
    likely = top.shape[1]
    step = -(-d_vocab // max(count - likely, 1))
    start = (first + np.arange(len(top))) % step
    others = start[:, None] + step * np.arange(count - likely)
    counts = others < d_vocab
    others = np.minimum(others, d_vocab - 1)
    for column in top.T:
        counts &= others != column[:, None]
    share = (d_vocab - likely) / np.maximum(counts.sum(1), 1)
    weights = np.concatenate([np.ones(top.shape), counts * share[:, None]], 1)
    return np.concatenate([top, others], 1).astype(np.int64), weights


def tables_of(forward: Forward) -> dict[int, Table]:
    """Of a pass, a table for each probe that no other begins with."""
    own = sorted(set(forward.wholes))
    counts = [int(unpadded(forward.probes[index]).sum()) for index in own]
    v = forward.head.shape[1]
    others = min(v, max(_FEWEST, _VALUES // max(sum(counts), 1) - LIKELIEST))
    columns = min(LIKELIEST, v) + others
    firsts = np.cumsum([0, *counts])
    return {
        index: Table.of(forward, index, int(first), columns)
        for index, first in zip(own, firsts, strict=False)
    }


def unpadded(probe: Probe) -> Array:
    """bool [batch, pos]."""
    return np.ones(probe.tokens.shape, bool) if probe.mask is None else probe.mask


@dataclass(frozen=True)
class Sampled:
    """A `Truth`, as far as tables know it."""

    probes: Sequence[Probe]
    tables: Sequence[Table]
    """For each probe, the one that it is in."""
    places: Sequence[Array]
    """For each probe [batch, pos], which row of its table; -1 at padding."""
    following: Sequence[Array]
    """For each probe [batch, pos], the token that comes next; of no meaning at the end."""
    device: torch.device
    known: Tensors | None = None
    """The weights that it is of, where they are known."""

    @staticmethod
    def of(probes: Sequence[Probe], tables: Mapping[int, Table], device: torch.device) -> Sampled:
        found, places, following = [], [], []
        for probe, whole in zip(probes, wholes(probes), strict=True):
            mask, (batch, length) = unpadded(probes[whole]), probe.tokens.shape
            place = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, -1)
            found.append(tables[whole])
            places.append(place[:batch, :length])
            following.append(np.roll(probes[whole].tokens, -1, 1)[:batch, :length])
        return Sampled(probes, found, places, following, device)

    @property
    def source(self) -> Tensors:
        from converter.verification.evidence import NotComparable

        if self.known is None:
            raise NotComparable("the weights that it is of are not here")
        return self.known

    def part(self, few: Mapping[int, Probe]) -> Sampled:
        """See `Truth`."""

        def cut(arrays: Sequence[Array]) -> list[Array]:
            shapes = {index: probe.tokens.shape for index, probe in few.items()}
            return [arrays[i][:batch, :length] for i, (batch, length) in shapes.items()]

        tables = [self.tables[index] for index in few]
        places, following = cut(self.places), cut(self.following)
        return Sampled(list(few.values()), tables, places, following, self.device, self.known)

    def rows(self, index: int) -> Iterator[tuple[Tensor, Exact]]:
        """See `Truth`."""
        import torch

        table, places = self.tables[index], self.places[index].reshape(-1)
        following = self.following[index].reshape(-1)
        columns, weights = table.columns
        (wanted,) = np.nonzero(places >= 0)
        step = max(1, CACHE // table.d_vocab)

        def tensor(array: Array) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

        for start in range(0, len(wanted), step):
            rows = wanted[start : start + step]
            at = places[rows]
            logp, facts = tensor(table.logp[at]), tensor(table.facts[at])
            yield torch.from_numpy(rows), Exact(
                torch.from_numpy(rows), logp, logp.exp(), facts[:, 0], tensor(table.top[at, 0]),
                facts[:, 1], tensor(following[rows]), facts[:, 2],
                tensor(columns[at]), tensor(weights[at]),
            )  # fmt: skip
