"""--adapter on every command: converted, verified, and the same function as peft computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import converter
from converter.cli import main
from converter.verification.probes import Probe
from converter.verification.reference import forward
from tests.adapter.making import Recipe, by_peft, logits, write

TOKENS = (np.arange(28)[None] * 5) % 37
MOST: dict[str, Any] = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"],
    "rank_pattern": {"c_fc": 3},
    "bias": "all",
}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def logp(checkpoint: Any) -> np.ndarray:
    """Of our float64 reference, normalised."""
    found = forward(checkpoint, [Probe("28 tokens", TOKENS)], dtype=torch.float64).logits(0)
    result: np.ndarray = found.log_softmax(-1).numpy()
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    root = tmp_path_factory.mktemp("adapter")
    write(root, Recipe(MOST))
    true = torch.from_numpy(logits(by_peft(root))).log_softmax(-1).numpy()
    return root, true


@pytest.mark.parametrize(
    "command",
    [
        ["hf-to-tl", "--layout", "hooked"],
        ["hf-to-tl", "--layout", "bridge", "--process", "default"],
        ["bake"],
        ["export-onnx", "--weights", "external"],
        ["export-onnx"],
    ],
    ids=" ".join,
)
def test_converted_and_verified(
    command: list[str], made: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    root, true = made
    name, *options = command
    out = tmp_path / "out"
    done = run(name, root / "base", out, "--adapter", root / "adapter", "--effort", "quick", *options)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert np.abs(logp(converter.open_artifact(out)) - true).max() < 2e-4
    assert np.abs(logp(converter.open_checkpoint(root / "base")) - true).max() > 1e-2
    kept = json.loads((out / "neoconvert.json").read_text())["source"]["adapter"]
    assert kept["config"]["r"] == 4
    again = run("verify", root / "base", out, "--adapter", root / "adapter", "--effort", "quick")
    assert again.exit_code == 0, again.output
    without = run("verify", root / "base", out, "--effort", "quick")
    assert without.exit_code == 1, without.output


def test_a_transformer_lens_base_takes_it_too(
    made: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    root, true = made
    assert run("hf-to-tl", root / "base", tmp_path / "tl", "--layout", "hooked", "--no-verify").exit_code == 0  # fmt: skip
    back = run("tl-to-hf", tmp_path / "tl", tmp_path / "back", "--adapter", root / "adapter", "--effort", "quick")  # fmt: skip
    assert back.exit_code == 0, back.output
    assert np.abs(logp(converter.open_checkpoint(tmp_path / "back")) - true).max() < 2e-4
    assert run("hf-to-tl", root / "base", tmp_path / "p", "--process", "default", "--no-verify").exit_code == 0  # fmt: skip
    refused = run("tl-to-hf", tmp_path / "p", tmp_path / "no", "--adapter", root / "adapter")
    assert refused.exit_code == 3
    assert "Bring the base back first" in refused.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"r": 0}, "r"),
        ({"r": -3}, "r"),
        ({"r": [4]}, "r"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"alpha_pattern": 3}, "alpha_pattern"),
        ({"target_modules": ["q_proj"]}, "which its config does not name"),
        ({"target_modules": [*MOST["target_modules"], "wte"]}, "The adapter has no A and no B"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused(
    change: dict[str, Any], says: str, made: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    root, _ = made
    bad = tmp_path / "adapter"
    bad.mkdir()
    for path in (root / "adapter").iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    config = bad / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refused = run("hf-to-tl", root / "base", tmp_path / "out", "--adapter", bad, "--no-verify")
    assert refused.exit_code == 3, refused.output
    assert len(refused.stderr.splitlines()) == 3
    assert says in refused.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base(made: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    root, _ = made
    write(tmp_path, Recipe({"target_modules": ["q_proj"]}))
    from tests.models import random_hf

    other = random_hf(tmp_path / "wide", hidden_size=24)
    refused = run("hf-to-tl", other, tmp_path / "out", "--adapter", root / "adapter")
    assert refused.exit_code == 3
    assert "transformer.h.0" in refused.stderr
    nothing = run("hf-to-tl", other, tmp_path / "out", "--adapter", tmp_path / "nowhere")
    assert nothing.exit_code == 3
