"""The original, and what running it shows: kept, so that each further artifact costs its own part
alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.checkpoint import Checkpoint
from converter.progress import Progress
from converter.verification.probes import Probe
from converter.verification.result import RuntimeInfo

if TYPE_CHECKING:
    from converter.verification.exact import Truth
    from converter.verification.measuring import Errors


@dataclass(frozen=True)
class Pass:
    """What some probes showed of the original."""

    true: Truth
    """Our own forward pass, in float64."""
    own: Sequence[Errors | None]
    """Its float32 run in its own software; None where that cannot run a probe."""
    noise: Sequence[Sequence[Errors]]
    """Our own float32 runs with jittered embeddings."""
    info: RuntimeInfo
    strange: tuple[float, str] | None
    """If its software runs it otherwise than its file says, by how much, and a sentence."""


class Original:
    """A checkpoint that artifacts are compared with. Its last pass is kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._known: tuple[object, Pass] | None = None

    def run(self, probes: Sequence[Probe], device: str, seed: int, say: Progress) -> Pass:
        """
        Raises: see `converter.verification.verify`.
        """
        from converter.verification.passes import run_original

        key = (device, seed, *map(_asked, probes))
        if self._known is None or self._known[0] != key:
            self._known = None
            self._known = key, run_original(self.checkpoint, probes, device, seed, say)
        return self._known[1]


def _asked(probe: Probe) -> tuple[object, ...]:
    """All that tells one probe from another."""
    mask = None if probe.mask is None else probe.mask.tobytes()
    tokens = probe.tokens.shape, probe.tokens.tobytes()
    return probe.name, *tokens, mask, probe.start, probe.prefill, probe.text
