"""Memory is bounded by one unit, whatever the model's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from converter.checkpoint.hf_config import from_hf
from converter.layout import expand
from tests.checkpoints import Recipe

PROGRAM = """
import json, resource, sys
from converter.checkpoint import open_checkpoint
from converter.pipeline import convert
from converter.request import Checking
from converter.routing import plain
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, big, out, layout = sys.argv[1:]
convert(plain(open_checkpoint(small)), __import__('pathlib').Path(out + '-small'), layout, checking=Checking(False))
before = peak()
done = convert(plain(open_checkpoint(big)), __import__('pathlib').Path(out), layout, checking=Checking(False))
print(json.dumps({'grown': peak() - before, 'model': done.plan.nbytes}))
"""


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
def test_peak_memory(layout: str, tmp_path: Path) -> None:
    for name, recipe in {
        "small": Recipe(),
        "big": Recipe(
            d_head=64, n_heads=4, attention=("global", "local") * 12, n_ctx=64, d_vocab=256
        ),
    }.items():
        config = from_hf(recipe.config)
        slots = expand("hf", config.sizes, config.n_layers).values()
        tensors = {
            s.name: np.zeros(s.shape, np.float32)
            for s in slots
            if s.name and s.key != "unembed.W_U"
        }
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(recipe.config))
    places = [str(tmp_path / name) for name in ("small", "big", "out")]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *places, layout], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    block = 12 * 256**2 * 4
    assert measured["model"] > 70e6
    assert measured["grown"] < 2 * block, measured
