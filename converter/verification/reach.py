"""What probes reach of a model, so that a reader knows what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from converter.checkpoint import NeoConfig
from converter.verification.probes import Probe


@dataclass(frozen=True)
class Reach:
    """How many of the vocabulary's tokens were given, at how many of the context's positions."""

    tokens: int
    vocabulary: int
    positions: int
    context: int

    def __str__(self) -> str:
        tokens = _part(self.tokens, self.vocabulary, "token")
        return f"The probes reach {tokens} and {_part(self.positions, self.context, 'position')}."


def reach_of(
    config: NeoConfig, probes: Sequence[Probe], ran: Sequence[tuple[str, str]]
) -> Reach | None:
    """What every runtime was given; None where none was given anything.

    Args:
        ran: runtimes, each with the name of a probe that it ran.
    """
    reached = np.ones(config.d_vocab, bool), np.ones(config.n_ctx, bool)
    for runtime in {runtime for runtime, _ in ran}:
        tokens, positions = (np.zeros_like(every) for every in reached)
        for probe in probes:
            if (runtime, probe.name) in ran:
                real = np.ones(probe.tokens.shape, bool) if probe.mask is None else probe.mask
                tokens[probe.tokens[real]] = True
                positions[probe.positions[real]] = True
        reached = reached[0] & tokens, reached[1] & positions
    count = [int(each.sum()) for each in reached]
    return Reach(count[0], config.d_vocab, count[1], config.n_ctx) if ran else None


def _part(some: int, all_: int, what: str) -> str:
    if some == all_:
        return f"every {what}"
    return f"{some:,} of {all_:,} {what}s"
