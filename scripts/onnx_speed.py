"""Speed of GPT-Neo graphs in onnxruntime, beside transformers itself.

All in one process, in turns, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import inspect
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from converter.onnx import past_of
from converter.verification.quiet import quiet

LENGTHS = (128, 512)
PAUSE = 0.05
"""Seconds between turns, in which the threads of the one before go to sleep."""
EAGER = "transformers"

Array = NDArray[Any]
Run = Callable[[], dict[str, Array]]
"""One forward pass, from inputs that are ready to outputs by name."""
Samples = Mapping[str, list[float]]


class Graph:
    """An ONNX file in onnxruntime: default options, a thread for each core."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options)
        self._inputs = {i.name: i.shape for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        self.has_cache = any(name.startswith("past_key_values.") for name in self._inputs)

    def prefill(self, tokens: Array) -> Run:
        past = {
            name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
            for name, shape in self._inputs.items()
            if name.startswith("past_key_values.")
        }
        return self._run(tokens, 0, past)

    def decode(self, tokens: Array) -> Run:
        """The last token, given the cache of those before."""
        past = past_of(self.prefill(tokens[:, :-1])())
        return self._run(tokens[:, -1:], tokens.shape[1] - 1, past)

    def _run(self, tokens: Array, before: int, past: dict[str, Array]) -> Run:
        total = before + tokens.shape[1]
        feeds = past | {
            "input_ids": tokens,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(before, total)[None],
        }
        feeds = {name: feed for name, feed in feeds.items() if name in self._inputs}
        return lambda: dict(zip(self._outputs, self._session.run(None, feeds), strict=True))


class Eager:
    """transformers with its cache of keys and values."""

    has_cache = True

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(os.cpu_count() or 1)
        with quiet():
            self._model: Any = AutoModelForCausalLM.from_pretrained(directory)
        # transformers 5.24 gave it another name.
        taken = inspect.signature(self._model.forward).parameters
        self._cache = "cache" if "cache" in taken else "past_key_values"

    def prefill(self, tokens: Array) -> Run:
        return lambda: {"logits": self._forward(tokens).logits.numpy()}

    def decode(self, tokens: Array) -> Run:
        cache = self._forward(tokens[:, :-1])[self._cache]

        def run() -> dict[str, Array]:
            logits = self._forward(tokens[:, -1:], **{self._cache: cache}).logits.numpy()
            cache.crop(-1)  # a view: takes no time
            return {"logits": logits}

        return run

    @torch.inference_mode()
    def _forward(self, tokens: Array, **past: Any) -> Any:
        return self._model(torch.from_numpy(tokens), use_cache=True, **past)


def in_turns(runs: Mapping[str, Run], rounds: int, repeats: int) -> Samples:
    """Milliseconds of each run. In each round everyone has a turn: one run to warm up, and then
    `repeats` that count."""
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(PAUSE)
            run()
            for _ in range(repeats):
                start = time.perf_counter()
                run()
                samples[name].append(1000 * (time.perf_counter() - start))
    return samples


def measure_speed(
    graphs: Mapping[str, Path], directory: Path, rounds: int
) -> tuple[dict[str, Samples], dict[str, float]]:
    """Milliseconds by task, and how far logits are from those of `transformers` at most.

    Args:
        graphs: by name.
        directory: the HF model.
    """
    models: dict[str, Graph | Eager] = {name: Graph(path) for name, path in graphs.items()}
    models[EAGER] = Eager(directory)
    cached = {name: model for name, model in models.items() if model.has_cache}
    rng = np.random.default_rng(0)
    results: dict[str, Samples] = {}
    errors: dict[str, float] = defaultdict(float)
    for length in LENGTHS:
        tokens = rng.integers(0, 50257, (1, length + 1))
        tasks = {
            f"prefill of {length}": (2, {n: m.prefill(tokens[:, :-1]) for n, m in models.items()}),
            f"a token after {length}": (10, {n: m.decode(tokens) for n, m in cached.items()}),
        }
        for task, (repeats, runs) in tasks.items():
            true = runs[EAGER]()["logits"]
            for name in (n for n in runs if n != EAGER):
                error = float(np.abs(runs[name]()["logits"] - true).max())
                errors[name] = max(errors[name], error)
            results[task] = in_turns(runs, rounds, repeats)
    return results, errors
