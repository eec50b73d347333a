"""One question, greedy generation from a directory, put to every library that opens it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from converter.verification.quiet import quiet

Array = NDArray[Any]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Prompt:
    """Left-padded rows of tokens."""

    tokens: Array
    mask: Array
    new_tokens: int


@dataclass(frozen=True)
class Answer:
    tokens: Array
    """[batch, pos]: the prompt and what was generated after it, step by step with a cache."""
    logits: Array
    """[batch, pos, v]: of one pass over these tokens."""
    real: Array
    """bool [batch, pos]: what is no padding. The others' logits mean nothing."""

    @property
    def margin(self) -> float:
        """How far the first choice is ahead of the second, at least."""
        best = np.sort(self.logits[self.real], axis=-1)[:, -2:]
        return float((best[:, 1] - best[:, 0]).min())


Client = Callable[[Path, Prompt], Answer]


def transformers(directory: Path, prompt: Prompt) -> Answer:
    from transformers import AutoModelForCausalLM

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens, mask = torch.from_numpy(prompt.tokens), torch.from_numpy(prompt.mask)
    found = model.generate(
        tokens, attention_mask=mask, max_new_tokens=prompt.new_tokens, do_sample=False
    )
    whole = _extend(prompt.mask, found.shape[1])
    with torch.inference_mode():
        # GPT-Neo's own forward does not derive positions from the mask; generate() does.
        logits = model(
            found,
            attention_mask=torch.from_numpy(whole),
            position_ids=torch.from_numpy(_positions(whole)),
        ).logits
    return Answer(found.numpy(), logits.numpy(), whole.astype(bool))


def bridge(directory: Path, prompt: Prompt) -> Answer:
    """TransformerBridge. Prompts without padding only."""
    from transformer_lens.model_bridge import TransformerBridge

    assert prompt.mask.all()
    with quiet():
        model = TransformerBridge.boot_transformers(str(directory))
        found = model.generate(
            torch.from_numpy(prompt.tokens),
            max_new_tokens=prompt.new_tokens,
            do_sample=False,
            stop_at_eos=False,
            prepend_bos=False,
            return_type="tokens",
            verbose=False,
        )
    with torch.inference_mode():
        logits = model(found).numpy()
    return Answer(found.numpy(), logits, np.ones(found.shape, bool))


def plain_onnxruntime(directory: Path, prompt: Prompt) -> Answer:
    """onnxruntime and nothing else."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(directory / "model.onnx", options)
    names = [output.name for output in session.get_outputs()]
    empty = {
        i.name: np.zeros((len(prompt.tokens), i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }

    def run(tokens: Array, mask: Array, past: dict[str, Array]) -> dict[str, Array]:
        positions = _positions(mask)[:, -tokens.shape[1] :]
        feeds = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions} | past
        return dict(zip(names, session.run(names, feeds), strict=True))

    tokens, mask = prompt.tokens, prompt.mask
    outputs = run(tokens, mask, empty)
    for _ in range(prompt.new_tokens):
        latest = outputs["logits"][:, -1:].argmax(-1)
        tokens = np.concatenate([tokens, latest], axis=1)
        mask = _extend(mask, tokens.shape[1])
        past = {
            name.replace("present", "past_key_values"): value
            for name, value in outputs.items()
            if name.startswith("present.")
        }
        outputs = run(latest, mask, past)
    return Answer(tokens, run(tokens, mask, empty)["logits"], mask.astype(bool))


class Process:
    """A client in an environment of its own: it reads a request a line, and writes an answer."""

    def __init__(self, command: Sequence[str | Path], directory: Path) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, directory: Path, prompt: Prompt, **options: Any) -> Answer:
        """`options`: further ones for the client's `from_pretrained`."""
        request = {
            "directory": str(directory),
            "tokens": prompt.tokens.tolist(),
            "mask": prompt.mask.tolist(),
            "new_tokens": prompt.new_tokens,
            "options": options,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the client died; its own message is on stderr"
        answer = json.loads(line)
        tokens = np.array(answer["tokens"])
        real = _extend(prompt.mask, tokens.shape[1]).astype(bool)
        return Answer(tokens, np.array(answer["logits"], np.float32), real)

    def close(self) -> None:
        self._process.communicate()


def _extend(mask: Array, length: int) -> Array:
    """The mask of a sequence that grew to `length`."""
    grown: Array = np.pad(mask, ((0, 0), (0, length - mask.shape[1])), constant_values=1)
    return grown


def _positions(mask: Array) -> Array:
    positions: Array = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return positions
