"""No false claims: whatever the weights are like, an unedited pair is never called edited."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from converter.checkpoint import open_checkpoint
from converter.explaining import explain
from converter.layout import Layout
from converter.processing import STEPS, Step
from tests.explaining.artifacts import NAMES_OF, artifact, read, write
from tests.explaining.test_steps import traces
from tests.models import random_hf
from tests.processing.weights import SUBSETS

GAINS = {
    "ordinary": [],
    "zero": [0.0],
    "negative": [-1.3, -0.2],
    "small": [1e-3, -1e-6],
    "denormal": [1e-40, -3e-45],
    "huge": [1e6, -1e5],
    "mixed": [0.0, -0.0, -1.0, 1e-40, 1e4, 1e-4],
}


@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.sampled_from([(1, 8), (2, 4), (3, 4), (4, 8)]),
    decades=st.sampled_from([0.1, 1, 3]),
    gains=st.sampled_from(sorted(GAINS)),
    steps=st.sampled_from([(), *SUBSETS]),
    code=st.sampled_from(["F32", "BF16", "F64"]),
    layout=st.sampled_from(["hooked", "bridge", "hf"]),
    source=st.sampled_from(["F32", "BF16"]),
)
@example(0, (1, 8), 3, "denormal", STEPS[:2], "BF16", "hf", "F32")
@example(11175, (1, 8), 0.1, "mixed", STEPS[:4], "BF16", "hf", "F32")
@example(3032, (1, 8), 3, "denormal", (STEPS[0], STEPS[4]), "F32", "hooked", "F32")
@settings(max_examples=150, deadline=None)
def test_unedited_pairs(
    seed: int,
    heads: tuple[int, int],
    decades: float,
    gains: str,
    steps: tuple[Step, ...],
    code: str,
    layout: Layout,
    source: str,
) -> None:
    n, h = heads
    with TemporaryDirectory() as name:
        raw = open_checkpoint(
            random_hf(
                Path(name) / "raw", seed=seed, gain_decades=decades, hidden_size=n * h, num_heads=n
            )
        )
        weights, rng = read(raw), np.random.default_rng(seed)
        for key in weights:
            if key.endswith((".w",)) and GAINS[gains]:
                where = rng.choice(n * h, size=len(GAINS[gains]), replace=False)
                weights[key][where] = GAINS[gains]
        original = write(Path(name) / "a", weights, raw, "bridge", source)
        converted = artifact(Path(name) / "b", original, steps, layout, code)
        for found in (explain(original, converted), explain(converted, original)):
            assert found.unexplained == (), found.lines()
            assert found.verdict != "different-model"
            expected = traces(weights, steps)
            assert set(found.steps) <= set(expected)
            # What is not named is not there to be seen.
            assert set(expected) - set(found.steps) <= set(found.silence)
            assert json.loads(json.dumps(found.to_json(), allow_nan=False))
            assert found.headline()


@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.sampled_from([(), *SUBSETS]),
    code=st.sampled_from(["F32", "F16", "BF16"]),
    size=st.sampled_from([0.1, 0.5, 3.0]),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_edited_pairs(
    seed: int, steps: tuple[Step, ...], code: str, size: float, data: st.DataObject
) -> None:
    """One element of one weight, by a tenth of its tensor's largest or more. Gains are near one:
    behind a small one, an edit changes the function by less than a cast does."""
    with TemporaryDirectory() as name:
        original = open_checkpoint(
            random_hf(Path(name) / "a", seed=seed, hidden_size=32, gain_decades=0.1)
        )
        keys: list[str] = []

        def edit(weights: dict[str, np.ndarray]) -> None:
            live = [k for k in weights if weights[k].any() and not k.endswith((".w", ".b", "b_K"))]
            key = data.draw(st.sampled_from(live))
            at = tuple(data.draw(st.integers(0, n - 1)) for n in weights[key].shape)
            weights[key][at] += size * np.abs(weights[key]).max()
            keys.append(key)

        found = explain(original, artifact(Path(name) / "b", original, steps, "hooked", code, edit))
        assert found.verdict == "different-model"
        assert keys[0] in found.unexplained
        assert set(found.steps) == set(traces(read(original), steps))
        refactored = NAMES_OF[-1] in found.steps and ".attn." in keys[0]
        assert refactored or found.unexplained == (keys[0],)
