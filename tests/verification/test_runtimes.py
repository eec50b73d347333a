"""Each layout runs in the software its users run it in, in float32, and refuses what is unsound."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.utils import logging as library

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.errors import BadInput, CannotDoHere, ConfigError, TensorMismatch
from converter.layout import Layout
from converter.verification import load_bridge, load_hooked, loading, standard_probes
from converter.verification.judge import MAX_RATIO, pooled_floor
from converter.verification.library_runtime import Library
from converter.verification.loading import has_hooked_transformer
from converter.verification.measuring import measure
from converter.verification.probes import Probe
from converter.verification.reference import forward
from converter.verification.runtimes import open_runtime
from converter.verification.subjects import subjects_of
from tests.marks import needs_hooked
from tests.models import random_hf, write_as


def assert_runs(checkpoint: Checkpoint) -> None:
    """Its runtime agrees with the reference on every probe, left padding included."""
    probes = standard_probes(checkpoint.config)
    runtime = open_runtime(checkpoint, "cpu")
    exact = forward(checkpoint, probes, dtype=torch.float64)
    single = forward(checkpoint, probes * 4, dtype=torch.float32, jitter=range(4 * len(probes)))
    for index, probe in enumerate(probes):
        logits = runtime.logits(probe)
        assert logits.dtype is torch.float32
        assert logits.shape == (*probe.tokens.shape, checkpoint.config.d_vocab)
        noise = [single.logits(index + k * len(probes)) for k in range(4)]
        found, *floor = measure(exact, index, [logits, *noise])
        assert found.ratio(pooled_floor(floor)) < MAX_RATIO


@pytest.mark.parametrize("layout", ["hf", "hooked", "bridge"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_runs_every_layout_and_dtype_in_float32(
    original: Checkpoint, there: Path, layout: Layout, dtype: str
) -> None:
    artifact = open_checkpoint(write_as(original, there, layout, dtype=dtype))
    assert_runs(artifact)
    runtime = open_runtime(artifact, "cpu")
    hooked = "HookedTransformer" if has_hooked_transformer() else "neoconvert's own forward"
    what = {"hf": "GPTNeoForCausalLM", "hooked": hooked, "bridge": "TransformerBridge"}[layout]
    assert runtime.what.startswith(what)


@needs_hooked
def test_weights_stay_in_their_file_unless_the_model_is_the_users(
    original: Checkpoint, there: Path
) -> None:
    write_as(original, there, "hooked")

    def addresses() -> list[tuple[int, int]]:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        of_it = [
            line[0].split("-") for line in lines if line[-1] == str(there / "model.safetensors")
        ]
        return [(int(start, 16), int(end, 16)) for start, end in of_it]

    runtime, mine = open_runtime(open_checkpoint(there)), load_hooked(there)
    assert isinstance(runtime, Library)
    inside = [
        any(start <= model.blocks[0].mlp.W_in.data_ptr() < end for start, end in addresses())
        for model in (runtime.model, mine)
    ]
    assert inside == [True, False]


@pytest.mark.parametrize("layout", ["hf", "hooked", "bridge"])
def test_runs_a_bare_weight_file(original: Checkpoint, there: Path, layout: Layout) -> None:
    write_as(original, there, layout)
    config = next(there.glob("c*.json")).rename(there / "elsewhere.json")
    assert_runs(open_checkpoint(there / "model.safetensors", cfg=config))


@pytest.mark.parametrize("layout", ["hf", "hooked", "bridge"])
def test_runs_a_directory_with_the_config_that_is_given(
    original: Checkpoint, there: Path, layout: Layout
) -> None:
    write_as(original, there, layout)
    config = next(there.glob("c*.json"))
    given = config.rename(there.parent / "given.json")
    assert_runs(open_checkpoint(there, cfg=given))
    config.write_text("{}")  # not the one that is used
    assert_runs(open_checkpoint(there, cfg=given))


def test_a_cache_by_its_new_name(
    original: Checkpoint, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As of transformers 5.24. Whatever a library prints and warns of while it runs is not shown."""
    runtime = open_runtime(original, "cpu")
    assert isinstance(runtime, Library)
    probe = next(probe for probe in standard_probes(original.config) if probe.prefill)
    expected = runtime.exact_logits(probe)
    inner = runtime.model.forward
    old = "cache" if "cache" in inspect.signature(inner).parameters else "past_key_values"

    def forward(input_ids: Any, cache: Any = None, **named: Any) -> Any:
        assert "past_key_values" not in named
        print("printed")
        warnings.warn("deprecated", FutureWarning, stacklevel=2)
        library.get_logger("transformers").warning("logged")
        out = inner(input_ids, **{old: cache}, **named)
        return SimpleNamespace(logits=out.logits, cache=out[old])

    again = open_runtime(original, "cpu")
    assert isinstance(again, Library)
    monkeypatch.setattr(again.model, "forward", forward)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(again.exact_logits(probe), expected)
    assert not told
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tied", [False, True])
def test_runs_hf_tied_and_untied(tmp_path: Path, tied: bool) -> None:
    assert_runs(open_checkpoint(random_hf(tmp_path, seed=4, tied=tied)))


def test_runs_a_headless_model(tmp_path: Path) -> None:
    random_hf(tmp_path, seed=4)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    buffer = {"h.0.attn.attention.masked_bias": np.array(-1e9, np.float32)}
    save_file(bare | buffer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_runs(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"vocab_size": 1},
        {"max_position_embeddings": 1},
        {"window_size": 100},
        {"window_size": 1},
        {"attention_types": [[["global"], 2]]},
        {"num_heads": 1},
        {"activation_function": "relu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["hf", "hooked", "bridge"])
def test_runs_the_smallest_and_oddest(
    tmp_path: Path, config: dict[str, Any], layout: Layout
) -> None:
    source = open_checkpoint(random_hf(tmp_path / "m", seed=6, **config))
    assert_runs(open_checkpoint(write_as(source, tmp_path / "a", layout)))


def test_hf_with_a_missing_tensor_is_refused_not_filled_with_random(
    original: Checkpoint, there: Path
) -> None:
    write_as(original, there, "hf")
    checkpoint = open_checkpoint(there)
    weights = load_file(there / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, there / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TensorMismatch, match="misses 1 tensor"):
        open_runtime(checkpoint, "cpu")


def test_a_bridge_whose_config_ties_what_its_file_does_not_is_refused(
    original: Checkpoint, there: Path
) -> None:
    write_as(original, there, "bridge", config={"tie_word_embeddings": True})
    with pytest.raises(TensorMismatch, match=r"does not hold .* embed\.weight"):
        open_runtime(open_checkpoint(there), "cpu")


def test_what_a_library_refuses_is_a_typed_error(original: Checkpoint, there: Path) -> None:
    checkpoint = open_checkpoint(write_as(original, there, "hf"))
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"hidden_size": 15}))
    with pytest.raises(BadInput, match="refuses the checkpoint"):
        open_runtime(checkpoint, "cpu")


@pytest.mark.parametrize("layout", ["hf", "bridge"])
@pytest.mark.parametrize(
    "returned",
    [{"return_dict": False}, {"use_cache": False, "output_hidden_states": True, "output_attentions": True}],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_what_a_config_has_returned_beside_logits_changes_none(
    layout: Layout, returned: dict[str, bool], original: Checkpoint, there: Path
) -> None:
    runtime = open_runtime(open_checkpoint(write_as(original, there, layout, config=returned)), "cpu")  # fmt: skip
    probe = Probe("cache", np.arange(9)[None], np.arange(9)[None] > 1, prefill=4)
    exact = forward(original, [probe], dtype=torch.float64).logits(0)
    assert float((runtime.exact_logits(probe) - exact)[:, 2:].abs().max()) < 1e-10


@needs_hooked
def test_identity_norms_in_a_folded_file_are_accepted_and_others_are_not(
    original: Checkpoint, there: Path
) -> None:
    def identity(key: str, value: np.ndarray) -> np.ndarray:
        norm = key.split(".")[-2] in ("ln1", "ln2", "ln_final")
        return np.full_like(value, key.endswith(".w")) if norm else value

    write_as(original, there, "hooked", edit=identity, config={"normalization_type": "LNPre"})
    assert_runs(open_checkpoint(there))
    write_as(original, there, "hooked", config={"normalization_type": "LNPre"})
    with pytest.raises(TensorMismatch, match="HookedTransformer ignores it"):
        open_checkpoint(there)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "tpu", "nonsense"])
def test_a_device_that_is_not_there_is_exit_4(original: Checkpoint, device: str) -> None:
    with pytest.raises(CannotDoHere) as caught:
        open_runtime(original, device)
    assert caught.value.exit_code == 4


def test_a_runtime_that_has_nothing_to_run_is_exit_4(original: Checkpoint) -> None:
    with pytest.raises(CannotDoHere, match="onnxruntime"):
        subjects_of(original, "cpu", "onnxruntime")


@needs_hooked
def test_load_hooked(original: Checkpoint, there: Path) -> None:
    write_as(
        original, there, "hooked", dtype="float16", config={"tokenizer_name": "nobody/nothing"}
    )
    model = load_hooked(there, "cpu")
    assert model.cfg.dtype is torch.float16
    found = model.state_dict()["blocks.1.attn.W_Q"].float().numpy()
    assert np.array_equal(found, original.tensor("blocks.1.attn.W_Q", "F16").astype(np.float32))


@pytest.mark.skipif(has_hooked_transformer(), reason="this TransformerLens has it")
def test_load_hooked_says_what_to_do_where_it_is_gone(original: Checkpoint, there: Path) -> None:
    write_as(original, there, "hooked")
    with pytest.raises(CannotDoHere, match=r"TransformerLens 4") as caught:
        load_hooked(there)
    assert "tl-to-hf" in caught.value.do
    assert "TransformerBridge" in caught.value.do


def test_load_bridge(original: Checkpoint, there: Path) -> None:
    bridge = load_bridge(write_as(original, there, "bridge", dtype="float16"), "cpu")
    assert {p.dtype for p in bridge.parameters()} == {torch.float16}
    found = bridge.state_dict()["blocks.1.attn.q.weight"].float().numpy()
    stored = load_file(there / "model.safetensors")["blocks.1.attn.q.weight"]
    assert np.array_equal(found, stored.astype(np.float32))


def test_loaders_name_the_layout_they_got(original: Checkpoint, there: Path) -> None:
    write_as(original, there, "bridge")
    with pytest.raises(ConfigError, match="bridge layout, not hooked") as caught:
        load_hooked(there)
    assert "converter.to_hooked(directory)" in caught.value.do


@pytest.mark.parametrize(
    ("found", "layout", "other"),
    [
        ("2.16.1", "hooked", None), ("3.9.0", "hooked", None), ("4.3.0", "hooked", "to_bridge"),
        ("2.16.1", "bridge", "to_hooked"), ("3.9.0", "bridge", None), ("4.3.0", "bridge", None),
        ("", "hooked", None), ("", "bridge", None),
    ],
)  # fmt: skip
def test_a_layout_that_is_not_of_this_transformer_lens_is_said(
    found: str, layout: Layout, other: str | None, original: Checkpoint, there: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(loading, "installed", lambda _: found)
    done = converter.hf_to_tl(original, there, layout=layout, dry_run=True)
    assert len(done.remarks) == (1 if other else 0)
    assert all(f"converter.{other}" in remark and found in remark for remark in done.remarks)


def test_what_is_said_of_the_other_layout_works(original: Checkpoint, there: Path) -> None:
    write_as(original, there, "hooked")
    bridge = converter.to_bridge(there)
    found = bridge.state_dict()["blocks.1.mlp.in.weight"].T.numpy()
    assert np.array_equal(found, original.tensor("blocks.1.mlp.W_in"))


def test_loading_prints_nothing(
    original: Checkpoint, there: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for layout in ("hf", "hooked", "bridge"):
        open_runtime(open_checkpoint(write_as(original, there / layout, layout)), "cpu")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, converter.verification; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
