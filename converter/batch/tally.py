"""What came of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from converter.batch.job import Outcome

TRY_AGAIN = 75
"""The exit code where a failure may pass: sysexits' EX_TEMPFAIL."""
_WORST = (70, 1, 3, 4, 2)
"""The exit codes of failures that stay, the one that says most first."""


@dataclass
class Tally:
    """Counts, and which sources have the same weights."""

    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("converted", "there", "planned", "transient", "permanent"), 0
        )
    )
    _codes: set[int] = field(default_factory=set)
    _sources: dict[str, list[str]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> str | None:
        """Count it. Returns an earlier source that has the same weights, if there is one."""
        failure = "transient" if outcome.transient else "permanent"
        self.counts[failure if outcome.status == "failed" else outcome.status] += 1
        if outcome.status == "failed" and not outcome.transient:
            self._codes.add(outcome.exit_code)
        if outcome.source_sha256 is None:
            return None
        known = self._sources.setdefault(outcome.source_sha256, [])
        if outcome.job.given not in known:
            known.append(outcome.job.given)
        return known[0] if known[0] != outcome.job.given else None

    @property
    def equal(self) -> list[list[str]]:
        """Sources that have the same weights, in groups."""
        return [group for group in self._sources.values() if len(group) > 1]

    @property
    def exit_code(self) -> int:
        """0: all is there. 75: the same command may do some of what is left. Else that of the
        worst failure, as of a command of its own."""
        if self.counts["transient"]:
            return TRY_AGAIN
        return next((code for code in _WORST if code in self._codes), 0)

    def to_json(self) -> dict[str, Any]:
        """The last line that `--json` prints."""
        failed = {kind: self.counts[kind] for kind in ("transient", "permanent")}
        done = {kind: self.counts[kind] for kind in ("converted", "there", "planned")}
        return {"summary": {**done, "failed": failed, "same_weights": self.equal}}
