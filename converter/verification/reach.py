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
    runtime: str | None = None
    """The one that was given no more than this, where another was."""

    def __str__(self) -> str:
        tokens = _part(self.tokens, self.vocabulary, "token")
        positions = _part(self.positions, self.context, "position")
        fewest = f" in {self.runtime}, and more elsewhere" if self.runtime else ""
        return f"The probes reach {tokens} and {positions}{fewest}."


def reach_of(
    config: NeoConfig, probes: Sequence[Probe], ran: Sequence[tuple[str, str]]
) -> Reach | None:
    """What every runtime was given; None where none was given anything.

    Args:
        ran: runtimes, each with the name of a probe that it ran.
    """
    if not ran:
        return None
    given: dict[str, np.ndarray] = {}
    for runtime, name in ran:
        reached = given.setdefault(runtime, np.zeros(config.d_vocab + config.n_ctx, bool))
        for probe in probes:
            if probe.name == name:
                real = np.ones(probe.tokens.shape, bool) if probe.mask is None else probe.mask
                reached[probe.tokens[real]] = True
                reached[config.d_vocab + probe.positions[real]] = True
    every = np.logical_and.reduce(list(given.values()))
    fewest = [runtime for runtime, own in given.items() if np.array_equal(own, every)]
    return Reach(
        int(every[: config.d_vocab].sum()),
        config.d_vocab,
        int(every[config.d_vocab :].sum()),
        config.n_ctx,
        fewest[0] if 0 < len(fewest) < len(given) else None,
    )


def _part(some: int, all_: int, what: str) -> str:
    if some == all_:
        return f"every {what}"
    return f"{some:,} of {all_:,} {what}s"
