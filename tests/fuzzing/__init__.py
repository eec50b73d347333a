"""Fuzzing of each parser of our own: `scripts/fuzz` for as long as one likes, guided by what of our
code is reached; `tests/test_fuzzing.py` for a moment."""

from __future__ import annotations

from tests.fuzzing import graphs, others, settings, weights
from tests.fuzzing.target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (*weights.TARGETS, *settings.TARGETS, *graphs.TARGETS, *others.TARGETS)
}
