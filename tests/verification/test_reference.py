"""The reference is GPT-Neo: against a naive second writing, and against HookedTransformer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.errors import ConfigError
from converter.route import Expected
from converter.routing import plain
from converter.verification import Probe
from converter.verification import logits as logits_module
from converter.verification.activations import activation_named
from converter.verification.libraries import hooked_model
from converter.verification.reference import forward
from tests.marks import needs_hooked
from tests.models import random_hf, write_as
from tests.verification import naive

LONG = 23
"""Beyond two windows of five, and beyond where attention of a layer above could reach back."""


def random_probe(checkpoint: Checkpoint, length: int = LONG, batch: int = 2) -> Probe:
    rng = np.random.default_rng(0)
    return Probe("random", rng.integers(0, checkpoint.config.d_vocab, (batch, length)))


def biased(checkpoint: Checkpoint, directory: Path, **config: object) -> Checkpoint:
    """A `hooked` checkpoint with everything that HF has no place for."""
    rng = np.random.default_rng(5)

    def edit(key: str, value: np.ndarray) -> np.ndarray:
        absent = key.endswith((".b_Q", ".b_K", ".b_V", ".b_U"))
        return rng.standard_normal(value.shape).astype(value.dtype) if absent else value

    return open_checkpoint(
        write_as(checkpoint, directory, "hooked", edit=edit, config=dict(config))
    )


def folded(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """A `hooked` checkpoint without LayerNorm weights, as TransformerLens's folding leaves it."""
    write_as(checkpoint, directory, "hooked", config={"normalization_type": "LNPre"})
    weights = load_file(directory / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if ".ln" not in k and not k.startswith("ln_final")},
        directory / "model.safetensors",
    )
    return open_checkpoint(directory)


def reference(checkpoint: Checkpoint, probe: Probe) -> np.ndarray:
    result: np.ndarray = forward(checkpoint, [probe], dtype=torch.float64).logits(0).numpy()
    return result


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Within 1e-10 of the largest logit: float64's rounding, amplified by sharp attention."""
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_naive_forward(tmp_path: Path, seed: int) -> None:
    checkpoint = open_checkpoint(random_hf(tmp_path / "m", seed=seed, scale=2, num_layers=3))
    probe = random_probe(checkpoint)
    found = reference(checkpoint, probe)
    for row, tokens in zip(found, probe.tokens.tolist(), strict=True):
        assert_close(row, naive.logits(checkpoint, tokens))


def test_equals_a_naive_forward_with_all_that_hf_lacks(original: Checkpoint, there: Path) -> None:
    scaled = {"use_attn_scale": True, "attn_scale": 1.7, "scale_attn_by_inverse_layer_idx": True}
    checkpoint = biased(original, there, **scaled)
    assert checkpoint.config.score_divisors == (1.7, 3.4)
    probe = random_probe(checkpoint)
    expected = naive.logits(checkpoint, probe.tokens[0].tolist())
    assert_close(reference(checkpoint, probe)[0], expected)


def test_equals_a_naive_forward_without_layer_norm_weights(
    original: Checkpoint, there: Path
) -> None:
    checkpoint = folded(original, there)
    assert checkpoint.config.folded
    probe = random_probe(checkpoint)
    expected = naive.logits(checkpoint, probe.tokens[0].tolist())
    assert_close(reference(checkpoint, probe)[0], expected)


def test_left_padding_changes_nothing_for_real_tokens(original: Checkpoint) -> None:
    tokens = random_probe(original).tokens
    mask = np.ones_like(tokens, dtype=bool)
    mask[1, :9] = False
    found = reference(original, Probe("padded", tokens, mask))
    assert np.isfinite(found).all()
    assert_close(found[0], naive.logits(original, tokens[0].tolist()))
    assert_close(found[1, 9:], naive.logits(original, tokens[1].tolist(), first=9))


@needs_hooked
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_attn_scale": True},
        {"use_attn_scale": True, "attn_scale": 3.0},
        {"scale_attn_by_inverse_layer_idx": True},
        {"act_fn": "gelu"},
        {"act_fn": "gelu_fast"},
        {"act_fn": "silu"},
    ],
    ids=str,
)
def test_equals_hooked_transformer_in_float64(
    original: Checkpoint, there: Path, config: dict[str, object]
) -> None:
    checkpoint = biased(original, there, **config)
    probe = random_probe(checkpoint)
    model = hooked_model(checkpoint, torch.device("cpu"), torch.float64)
    with torch.inference_mode():
        expected = model(torch.from_numpy(probe.tokens)).numpy()
    assert expected.dtype == np.float64
    assert_close(reference(checkpoint, probe), expected)


@needs_hooked
def test_equals_hooked_transformer_when_folded(original: Checkpoint, there: Path) -> None:
    checkpoint = folded(original, there)
    probe = random_probe(checkpoint)
    model = hooked_model(checkpoint, torch.device("cpu"), torch.float64)
    with torch.inference_mode():
        expected = model(torch.from_numpy(probe.tokens)).numpy()
    assert_close(reference(checkpoint, probe), expected)


@pytest.mark.parametrize("code", ["F16", "BF16"])
@pytest.mark.parametrize("scaled", [False, True])
def test_storage_rounds_weights_as_an_artifact_does(
    original: Checkpoint, tmp_path: Path, code: str, scaled: bool
) -> None:
    source = biased(original, tmp_path / "source", use_attn_scale=scaled)
    name = {"F16": "float16", "BF16": "bfloat16"}[code]
    artifact = open_checkpoint(write_as(source, tmp_path / "rounded", "hooked", dtype=name))
    assert not artifact.config.score_divisors
    probe = random_probe(source)
    expected = Expected(plain(source), code)
    found = forward(expected, [probe], dtype=torch.float64).logits(0)
    assert torch.equal(found, forward(artifact, [probe], dtype=torch.float64).logits(0))


def test_rows_are_the_logits_without_padding(original: Checkpoint) -> None:
    probe = random_probe(original)
    mask = np.ones_like(probe.tokens, dtype=bool)
    mask[0, :4] = False
    run = forward(original, [Probe("padded", probe.tokens, mask)], dtype=torch.float64)
    rows, values = zip(*run.rows(0), strict=True)
    assert torch.cat(rows).tolist() == np.flatnonzero(mask).tolist()
    expected = run.logits(0).flatten(0, 1)[torch.cat(rows)]
    torch.testing.assert_close(torch.cat(values), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("room", [0, 2**28])
def test_several_draws_at_once_are_each_by_itself(
    original: Checkpoint, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits_module, "_KEPT_BYTES", room)
    probe = random_probe(original, 7, batch=6)
    run = forward(original, [probe], dtype=torch.float64)
    alone = run.logits(0).flatten(0, 1)
    rows = torch.tensor([3, 9])
    for draw, logits in enumerate(run.each(0, 3)):
        found = logits(rows) if callable(logits) else logits.flatten(0, 1)[rows]
        assert callable(logits) == (room == 0)
        torch.testing.assert_close(found, alone[rows + draw * 14], rtol=1e-13, atol=1e-13)


def test_each_of_a_repeated_probe_is_moved_by_itself(original: Checkpoint) -> None:
    few = random_probe(original, 7)
    masked = replace(few, mask=np.arange(7) > np.array([[2], [-1]]))
    for probe in (few, masked):
        run = forward(original, [probe, probe.repeated(3)], dtype=torch.float64, jitter=[None, 1])
        found = run.final[1].view(3, *run.final[0].shape)
        real = slice(None) if probe.mask is None else torch.from_numpy(probe.mask)
        for one in found:
            torch.testing.assert_close(one[real], run.final[0][real], rtol=1e-9, atol=1e-9)
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[1], found[2])


def test_probes_advance_together_and_are_watched(original: Checkpoint) -> None:
    seen: list[tuple[str, int]] = []
    probes = [random_probe(original, length) for length in (1, 4)]
    forward(
        original, probes, dtype=torch.float64,
        watch=lambda unit, residuals: seen.append((unit, len(residuals))),
    )  # fmt: skip
    assert seen == [("embed", 2), ("block 0", 2), ("block 1", 2), ("final", 2)]


def test_jitter_moves_last_bits_only(original: Checkpoint) -> None:
    probe = random_probe(original)
    runs = forward(original, [probe] * 3, dtype=torch.float32, jitter=[None, 1, 2])
    plain, one, two = (runs.logits(i) for i in range(3))
    assert not torch.equal(plain, one)
    assert not torch.equal(one, two)
    assert (plain - one).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("gelu", lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_new", lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("gelu_pytorch_tanh", lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("gelu_fast", lambda x: x / 2 * (1 + math.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))),
        ("relu", lambda x: max(x, 0.0)),
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("quick_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("mish", lambda x: x * math.tanh(math.log1p(math.exp(x)))),
        ("gelu_10", lambda x: min(10.0, max(-10.0, x / 2 * (1 + math.erf(x / math.sqrt(2)))))),
    ],
)  # fmt: skip
def test_activations_are_computed_in_float64(name: str, exact: object) -> None:
    points = np.linspace(-12, 12, 97)
    found = activation_named(name, torch.float64)(torch.from_numpy(points))
    assert found.dtype is torch.float64
    expected = [exact(x) for x in points.tolist()]  # type: ignore[operator]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-13, atol=1e-14)


def test_unknown_activation_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no activation 'nonsense'"):
        activation_named("nonsense", torch.float64)


def test_cfg_fields_survive(original: Checkpoint, there: Path) -> None:
    """`biased` is what it says: the edit reached the file."""
    checkpoint = biased(original, there, eps=1e-3)
    assert checkpoint.biased
    assert checkpoint.config.eps == 1e-3
    assert json.loads((there / "cfg.json").read_text())["eps"] == 1e-3
    assert np.any(checkpoint.tensor("unembed.b_U"))
