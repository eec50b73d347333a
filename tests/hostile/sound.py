"""Sound files, made once, to be damaged."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import converter
from converter.convert import export_onnx, hf_to_tl
from converter.exporting import Graph
from converter.verification import verify
from converter.verification.report import write_report
from tests.checkpoints import Recipe, write_hf
from tests.models import random_hf

HF = "<hf>"
"""In a command: the sound HF directory."""


def filled(command: list[str]) -> list[str]:
    return [str(hf()) if word == HF else word for word in command]


@functools.cache
def _root() -> Path:
    root = tempfile.mkdtemp(prefix="sound-")
    atexit.register(shutil.rmtree, root, True)
    return Path(root)


@functools.cache
def hf() -> Path:
    return random_hf(_root() / "hf", gain_decades=0.2)


@functools.cache
def hooked() -> Path:
    hf_to_tl(hf(), _root() / "hooked", check=False)
    return _root() / "hooked"


@functools.cache
def processed() -> Path:
    """With an exact ledger."""
    hf_to_tl(hf(), _root() / "processed", process="default", ledger="exact", check=False)
    return _root() / "processed"


@functools.cache
def sharded() -> Path:
    write_hf(_root() / "sharded", Recipe(shards=2, finite=True))
    return _root() / "sharded"


@functools.cache
def graph() -> Path:
    """A folder with a graph, its data in a file beside it."""
    export_onnx(hf(), _root() / "graph", graph=Graph(weights="external"), check=False)
    return _root() / "graph"


@functools.cache
def beside() -> Path:
    """HF, with a graph that shares its weights."""
    export_onnx(copied(hf, _root() / "beside"), None, check=False)
    return _root() / "beside"


@functools.cache
def report() -> Path:
    """One of ours, of something else."""
    path = _root() / "report.html"
    write_report(verify(hf(), hooked(), checks="weights").to_json(), path, title="before")
    return path


@functools.cache
def reference() -> Path:
    """A folder with a reference file of `hf`."""
    folder = _root() / "reference"
    folder.mkdir()
    converter.reference(hf(), folder / "neo.reference", effort="quick", device="cpu")
    return folder


@functools.cache
def adapter() -> Path:
    path = _root() / "adapter"
    path.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(2):
        name = f"base_model.model.transformer.h.{layer}.attn.attention.q_proj"
        tensors[f"{name}.lora_A.weight"] = rng.normal(size=(2, 16)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(size=(16, 2)).astype(np.float32)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def copied(of: Callable[[], Path], to: Path) -> Path:
    shutil.copytree(of(), to)
    return to
