"""Hook points as outputs: TransformerLens's names, shapes and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.errors import UsageError
from converter.onnx import Session, export, hook_names, past_of
from converter.verification.libraries import bridge_model, hooked_model
from tests.marks import needs_hooked
from tests.models import write_as
from tests.onnx_.running import tokens_of

Write = Callable[[Checkpoint, Path], Any]


def raw(layout: str) -> Write:
    return lambda checkpoint, path: write_as(checkpoint, path, layout)  # type: ignore[arg-type]


def processed(layout: str, steps: str) -> Write:
    return lambda checkpoint, path: converter.hf_to_tl(
        checkpoint,
        path,
        layout=layout,  # type: ignore[arg-type]
        process=steps,
        check=False,
    )


def require_equal(outputs: dict[str, np.ndarray], cache: Any, names: tuple[str, ...]) -> None:
    for name in names:
        theirs = cache[name].numpy()
        assert outputs[name].shape == theirs.shape, name
        finite = np.isfinite(theirs)
        assert (np.isfinite(outputs[name]) == finite).all(), name
        np.testing.assert_array_equal(outputs[name][~finite], theirs[~finite], err_msg=name)
        scale = max(1.0, float(np.abs(theirs[finite]).max()))
        np.testing.assert_allclose(
            outputs[name][finite], theirs[finite], atol=1e-3 * scale, rtol=0, err_msg=name
        )


@needs_hooked
@pytest.mark.parametrize("mode", ["shared", "external"])
@pytest.mark.parametrize(
    "write", [raw("hooked"), processed("hooked", "default"), processed("hooked", "all")]
)
def test_every_hook_equals_hooked_transformers(
    tiny: Checkpoint, tmp_path: Path, write: Write, mode: Any
) -> None:
    write(tiny, tmp_path / "tl")
    there = open_checkpoint(tmp_path / "tl")
    output = None if mode == "shared" else tmp_path / "out"
    result = export(there, output, weights=mode, with_past=False, hooks=["*"])
    onnx.checker.check_model(str(result.path), full_check=True)
    tokens = tokens_of(there, 2, 20)
    _, cache = hooked_model(there, torch.device("cpu")).run_with_cache(torch.from_numpy(tokens))
    assert result.hooks == hook_names(there.config)
    # All that HookedTransformer has, but for the unembedding's own, which are no activations.
    assert set(result.hooks) == {n for n in cache if not n.startswith("unembed.")}
    require_equal(Session(result.path)(tokens), cache, result.hooks)


@pytest.mark.parametrize(
    "write", [raw("bridge"), processed("bridge", "default"), processed("bridge", "all")]
)
def test_every_hook_equals_the_bridges(tiny: Checkpoint, tmp_path: Path, write: Write) -> None:
    write(tiny, tmp_path / "tl")
    there = open_checkpoint(tmp_path / "tl")
    result = export(there, with_past=False, hooks=["*"])
    tokens = tokens_of(there, 2, 20)
    _, cache = bridge_model(there, torch.device("cpu")).run_with_cache(torch.from_numpy(tokens))
    outputs = Session(result.path)(tokens)
    # The bridge's hook_attn_scores holds the pattern, the softmax of what the graph has there
    # (TransformerLens 3.9 and 4.3).
    for name in (n for n in result.hooks if n.endswith("hook_attn_scores")):
        outputs[name] = torch.from_numpy(outputs[name]).softmax(-1).numpy()
    require_equal(outputs, cache, result.hooks)


def test_an_hf_model_has_the_same_hooks(tiny: Checkpoint, tmp_path: Path) -> None:
    bridge = open_checkpoint(write_as(tiny, tmp_path / "b", "bridge"))
    tokens = tokens_of(tiny, 2, 20)
    mine, theirs = (
        Session(export(c, hooks=["*"], with_past=False).path)(tokens) for c in (tiny, bridge)
    )
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_hooks_with_a_cache(tiny: Checkpoint) -> None:
    """New positions only, but for scores and pattern, which have all keys."""
    result = export(tiny, hooks=["blocks.1.attn.*", "blocks.*.hook_resid_post"])
    graph, tokens = Session(result.path), tokens_of(tiny, 1, 12)
    whole, first = graph(tokens), graph(tokens[:, :9])
    rest = graph(tokens[:, 9:], None, past_of(first))
    for name in result.hooks:
        here = whole[name]
        by_query = here[:, :, 9:] if here.shape[1] == tiny.config.n_heads else here[:, 9:]
        np.testing.assert_allclose(rest[name], by_query, atol=2e-3, err_msg=name)


def test_outputs_come_in_order(tiny: Checkpoint) -> None:
    result = export(tiny, hooks=["blocks.1.hook_mlp_out", "*.hook_pattern", "hook_embed"])
    layers = range(tiny.config.n_layers)
    patterns = [f"blocks.{i}.attn.hook_pattern" for i in layers]
    presents = [f"present.{i}.{what}" for i in layers for what in ("key", "value")]
    hooks = ["hook_embed", *patterns[:2], "blocks.1.hook_mlp_out", *patterns[2:]]
    assert list(Session(result.path).outputs) == ["logits", *presents, *hooks]
    assert list(result.hooks) == hooks


def test_hooks_change_no_logit_that_matters(tiny: Checkpoint) -> None:
    tokens = tokens_of(tiny, 2, 20)
    plain = Session(export(tiny, file_name="plain.onnx").path)(tokens)["logits"]
    full = Session(export(tiny, file_name="full.onnx", hooks=["*"]).path)(tokens)["logits"]
    np.testing.assert_allclose(full, plain, atol=2e-3)


@pytest.mark.parametrize(
    ("pattern", "close"),
    [
        ("blocks.*.hook_resid_pst", "blocks.*.hook_resid_post"),
        ("block.0.hook_q", "blocks.0.attn.hook_q"),
        ("resid_post", "blocks.*.hook_resid_post"),
        ("blocks.9.hook_mlp_out", "blocks.*.hook_mlp_out"),
        ("hook_embedding", "hook_embed"),
    ],
)
def test_an_unknown_hook_is_an_error_with_close_names(
    tiny: Checkpoint, pattern: str, close: str
) -> None:
    with pytest.raises(UsageError) as caught:
        export(tiny, hooks=["blocks.*.hook_resid_pre", pattern])
    assert pattern in caught.value.what
    assert close in caught.value.details["close"]
    assert close in caught.value.do
    assert not (tiny.directory / "model.onnx").exists()


def test_an_unknown_hook_that_is_close_to_none(tiny: Checkpoint) -> None:
    with pytest.raises(UsageError, match="xyzzy") as caught:
        export(tiny, hooks=["xyzzy"])
    assert caught.value.details["close"] == []
