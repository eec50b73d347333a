"""Memory is bounded by one unit, whatever the number of layers."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.checkpoint.hf_config import from_hf
from converter.layout import expand
from converter.processing import DEFAULT
from converter.routing import processing
from tests.checkpoints import Recipe, write_hf

PROGRAM = """
import json, sys
from pathlib import Path
from converter.checkpoint import open_checkpoint
from converter.parallel import share_memory
from converter.pipeline import convert
from converter.processing import parse
from converter.request import Checking, Writing
from converter.routing import processing, reversing

share_memory()  # as the command does

def go(source, out):
    to = lambda route, layout, name: convert(
        route, Path(out + name), layout, Writing(ledger='exact'), Checking(False)).plan.nbytes
    size = to(processing(open_checkpoint(source), parse(process), layout), layout, '-there')
    if back:
        to(reversing(open_checkpoint(out + '-there')), 'hf', '-back')
    return size

# Not ru_maxrss: a child's begins with its parent's.
peak = lambda: 1024 * int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])
small, big, out, layout, process, back = sys.argv[1:]
back = back == 'back'
go(small, out + '-small')
before = peak()
size = go(big, out)
print(json.dumps({'grown': peak() - before, 'model': size}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("layout", "process", "back"),
    [
        ("hooked", "none", ""), ("bridge", "none", ""),
        ("hooked", "default", ""), ("hooked", "default", "back"), ("bridge", "default", "back"),
    ],
)  # fmt: skip
def test_peak_memory(layout: str, process: str, back: str, tmp_path: Path) -> None:
    for name, layers in {"small": 4, "big": 24}.items():
        attention = ("global", "local") * (layers // 2)
        recipe = Recipe(d_head=64, n_heads=4, attention=attention, n_ctx=64, d_vocab=256)
        _write_large(recipe, tmp_path / name)
    measured = _measure(tmp_path, layout, process, back)
    block = 12 * 256**2 * 4
    assert measured["model"] > 70e6
    assert measured["grown"] < 4 * block, measured


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("process", "times"), [("none", 1.5), ("default", 2.0)])
def test_one_embedding_is_in_memory_at_a_time(process: str, times: float, tmp_path: Path) -> None:
    """It is the largest tensor by far; the tied head is compared, coded and decoded in pieces."""
    for name, vocabulary in {"small": 100, "big": 60_000}.items():
        recipe = Recipe(d_head=64, n_heads=8, attention=("local",), n_ctx=64, d_vocab=vocabulary)
        _write_large(recipe, tmp_path / name)
    measured = _measure(tmp_path, "hooked", process, "back")
    assert measured["grown"] < times * 60_000 * 512 * 4, measured


def _write_large(recipe: Recipe, directory: Path) -> None:
    rng = np.random.default_rng(0)
    config = from_hf(recipe.config)
    slots = expand("hf", config.sizes, config.n_layers).values()
    tensors = {
        s.name: rng.normal(size=s.shape).astype(np.float32)
        for s in slots
        if s.name and s.key != "unembed.W_U"
    }
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(recipe.config))


def _measure(root: Path, *arguments: str) -> dict[str, int]:
    places = [str(root / name) for name in ("small", "big", "out")]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *places, *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    measured: dict[str, int] = json.loads(result.stdout)
    return measured


def test_a_unit_is_gone_before_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.tensor
    before: list[weakref.ref[np.ndarray]] = []
    unit: list[weakref.ref[np.ndarray]] = []

    def watched(self: Checkpoint, key: str, dtype: str | None = None) -> np.ndarray:
        assert not [ref for ref in before if ref() is not None], key
        array = read(self, key, dtype)
        unit.append(weakref.ref(array))
        return array

    write_hf(tmp_path / "hf", Recipe())
    route = processing(open_checkpoint(tmp_path / "hf"), DEFAULT, "hooked")
    monkeypatch.setattr(Checkpoint, "tensor", watched)
    for slots, tensors, made in route.run():
        assert len(unit) >= len(slots)
        before[:], unit[:] = unit, []
        del tensors, made
    assert before
