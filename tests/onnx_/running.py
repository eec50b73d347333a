"""Judging an exported graph as verification does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from converter.checkpoint import Checkpoint
from converter.onnx import Session
from converter.verification.judge import Floor, pooled_floor
from converter.verification.libraries import hf_model
from converter.verification.logits import Forward, Tensors
from converter.verification.measuring import Errors, measure
from converter.verification.probes import Probe
from converter.verification.reference import forward
from converter.verification.runtime import exact_float32

Array = NDArray[Any]
LIMIT = 4.0
"""Errors may be this many times what float32 costs the original: half of what the judge allows.
2.4 was measured (onnxruntime 1.21 to 1.26, bfloat16 weights, two tokens); with 1.27, below 2."""


def tokens_of(checkpoint: Checkpoint, batch: int, length: int, seed: int = 0) -> Array:
    rng = np.random.default_rng([seed, batch, length])
    return rng.integers(0, checkpoint.config.d_vocab, (batch, length))


def probes_of(checkpoint: Checkpoint) -> list[Probe]:
    """Every length at which something changes, a batch of three, and left padding."""
    config = checkpoint.config
    window, context = config.window_size, config.n_ctx
    lengths = {1, 2, 16, window - 1, window, window + 1, 2 * window + 3, context}
    probes = [Probe(f"length {n}", tokens_of(checkpoint, 2, n)) for n in sorted(lengths)]
    probes.append(Probe("batch 3", tokens_of(checkpoint, 3, 16)))
    padded = np.ones((3, context - 1), dtype=bool)
    padded[0, : window + 3], padded[1, :1] = False, False
    probes.append(Probe("left padding", tokens_of(checkpoint, *padded.shape), padded))
    return probes


class Judge:
    """The original's true logits on some probes, and what float32 costs it on each."""

    def __init__(
        self, original: Checkpoint, probes: Sequence[Probe], *, hf: bool = True, draws: int = 4
    ) -> None:
        self.probes = probes
        self.true: Forward = forward(original, probes, dtype=torch.float64)
        runs = _jittered(original, probes, self.true, draws)
        if hf:
            for index, theirs in enumerate(transformers_logits(original, probes)):
                runs[index] += measure(self.true, index, [theirs])
        self.floors: list[Floor] = [pooled_floor(errors) for errors in runs]

    def ratio(self, index: int, logits: Array) -> tuple[float, Errors]:
        run = torch.from_numpy(np.asarray(logits, np.float32))
        margin = 2 * self.floors[index].max_abs
        errors = measure(self.true, index, [run], margin=margin)[0]
        return errors.ratio(self.floors[index]), errors

    def ratios(self, graph: Session) -> dict[str, float]:
        """For each probe, the error in units of the noise floor; infinite if the top token differs."""
        found: dict[str, float] = {}
        for index, probe in enumerate(self.probes):
            ratio, errors = self.ratio(index, graph(probe.tokens, probe.mask)["logits"])
            found[probe.name] = ratio if errors.top1_agreement == 1 else np.inf
        return found


def _jittered(
    original: Tensors, probes: Sequence[Probe], true: Forward, draws: int
) -> list[list[Errors]]:
    many = [probe for _ in range(draws) for probe in probes]
    with exact_float32():
        runs = forward(original, many, dtype=torch.float32, jitter=list(range(len(many))))
        return [
            measure(true, i, [partial(runs.at, j) for j in range(i, len(many), len(probes))])
            for i in range(len(probes))
        ]


def transformers_logits(original: Checkpoint, probes: Sequence[Probe]) -> list[torch.Tensor]:
    model = hf_model(original, torch.device("cpu"))
    results = []
    with torch.inference_mode():
        for probe in probes:
            mask = None if probe.mask is None else torch.from_numpy(probe.mask.astype(np.int64))
            positions = torch.from_numpy(probe.positions)
            found = model(
                torch.from_numpy(probe.tokens), attention_mask=mask, position_ids=positions
            )
            results.append(found.logits)
    return results
