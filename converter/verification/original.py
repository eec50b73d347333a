"""The original, and what running it shows: kept, so that each further artifact costs its own part
alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.checkpoint import Checkpoint
from converter.choices import Effort
from converter.opening import Given, open_artifact
from converter.progress import Progress
from converter.route import Route
from converter.routing import between
from converter.verification.evidence import Evidence
from converter.verification.probes import Probe, standard_probes, text_probes
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

    here = True
    """Whether its weights can be read."""
    effort: Effort = "standard"
    """How much is run where nothing else is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._known: tuple[object, Pass] | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences: what a reader of a verification should know of it."""
        return ()

    def probes(
        self,
        artifact: Checkpoint,
        seed: int,
        effort: Effort,
        text: Path | None = None,
        given: Sequence[Probe] | None = None,
    ) -> list[Probe]:
        """What is run: the standard probes, or those given, and a user's text.

        Raises:
            BadInput: the text cannot be read.
        """
        config, places = self.checkpoint.config, (self.checkpoint.source, artifact.source)
        tokenizer = next((place.path for place in places if place.tokenizer_files()), None)
        found = standard_probes(config, tokenizer, seed, effort) if given is None else list(given)
        return found + (text_probes(config, tokenizer, text) if text is not None else [])

    def route(self, artifact: Checkpoint) -> Route:
        """The route that an artifact says it took, or shows."""
        return between(self.checkpoint, artifact)

    def judged_as_stored(self, artifact: Checkpoint) -> tuple[str, ...] | None:
        """None: it is held to what the route makes. Otherwise that is not known, and it is judged as
        it is stored: the steps that its weights show."""
        return None

    def examined(self, artifact: Checkpoint) -> Evidence | None:
        """The route link, where it was examined before."""
        return None

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


def original_of(given: Given) -> Original:
    """What is given as an original: a checkpoint, a graph, or the reference file of one.

    Raises: see `open_artifact` and `converter.recorded.Recorded`.
    """
    from converter.recorded import Recorded
    from converter.recorded.file import is_reference

    if isinstance(given, (str, Path)):
        path = Path(os.path.expanduser(given))
        if is_reference(path):
            return Recorded(path)
    return Original(open_artifact(given))
