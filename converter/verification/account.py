"""What an artifact's weights are beside the original's, whatever its provenance says.

What TransformerLens processed has no provenance, and differs from ours in rounding; a file that was
processed, trained or scaled in place has the provenance of what it was before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from converter.checkpoint import Checkpoint
from converter.dtypes import CODES
from converter.explaining.explanation import Explanation
from converter.explaining.judging import explain
from converter.processing import in_order
from converter.progress import Progress, silent
from converter.route import Route
from converter.routing import processing, unprocessed

_MANY = 0.5
"""TransformerLens's float32 gives other last bits than ours in nearly every tensor."""


@dataclass(frozen=True)
class Account:
    """The steps between an original and an artifact, and what they leave."""

    explanation: Explanation
    route: Route
    """From the original by these steps, in our arithmetic. Where they were undone instead, or there
    are none, the weights as they are."""

    @property
    def steps(self) -> tuple[str, ...]:
        return self.explanation.steps

    @property
    def left(self) -> frozenset[str]:
        """Names of the tensors that differ by more than the rounding of TransformerLens's float32
        and of storage."""
        return frozenset(self.explanation.unexplained)

    def ours(self, differing: int, *, claims: bool) -> bool:
        """Whether so few tensors differ from what `route` makes, bit for bit, that it made them:
        then these were edited, and rounding is no excuse.

        Few may differ in TransformerLens's own work too: its means over a power of two are nearly
        exact. So few are an edit only where the artifact `claims` to be neoconvert's; and never in 16
        bits, where the rounding of float32 seldom shows.
        """
        found = self.explanation
        if differing == 0 or not claims:
            return differing == 0
        narrow = CODES[found.cast.after].itemsize < 4 if found.cast else self.route.source.coarse
        if narrow and not found.coarse:
            return False
        changed = sum(bool(t.steps) or t.cast for t in found.tensors)
        return differing < _MANY * changed

    @property
    def remark(self) -> str:
        """A sentence or two for a report."""
        found = self.explanation
        done = [step for step in found.steps if step not in found.undone]
        changes = ["after " + ", ".join(done)] if done else []
        changes += ["without its " + ", ".join(found.undone)] if found.undone else []
        rest = ", but for what is named above" if self.left else ", beyond rounding"
        return (
            f"By its weights the artifact is the original {' and '.join(changes)}; nothing else"
            f" differs{rest}."
        )


def account(
    original: Checkpoint, artifact: Checkpoint, progress: Progress = silent
) -> Account | None:
    """The steps of TransformerLens's that separate two checkpoints, judged by the weights alone;
    None where there are none, or they do not make the two one model.

    Single tensors may be left over: `Account.left` has them.
    """
    found = explain(original, artifact, progress=progress)
    if not found.steps or found.reasons:
        return None
    if (cast := found.cast) and not cast.exact and cast.stored != cast.after:
        return None  # a loss that storage does not account for
    if found.verdict == "different-model" and not found.unexplained:
        return None
    done = [step for step in found.steps if step not in found.undone]
    if found.undone or not done:
        return Account(found, unprocessed(original, artifact))
    route = processing(original, in_order(done), artifact.layout)
    return Account(found, replace(route, scale=artifact.config.score_divisors))
