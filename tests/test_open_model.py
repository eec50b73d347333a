"""A live model is a checkpoint: read where it is, refused where it is none, and left as it was."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import converter
from converter.checkpoint.reader import TorchReader
from converter.errors import (
    BadInput,
    CannotUndo,
    ConfigError,
    MissingTensor,
    TensorMismatch,
    UnknownTensor,
    UsageError,
)
from tests.checkpoints import read_all, same
from tests.lively import bits, bridge, distance, hooked, neo
from tests.marks import needs_hooked

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_live_model_converts_as_its_directory_does(
    dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    model = neo(dtype, tied=tied)
    converter.hf_to_tl(model, tmp_path / "first", layout="bridge", check=False)
    model.save_pretrained(tmp_path / "hf")  # which brings the config's dtype up to date
    stated = json.loads((tmp_path / "first/config.json").read_text())["dtype"]
    assert f"torch.{stated}" == str(dtype)
    for name, source in (("live", model), ("file", tmp_path / "hf")):
        for layout in ("hooked", "bridge"):
            output = tmp_path / f"{name}-{layout}"
            converter.hf_to_tl(source, output, layout=layout, check=False)
        converter.tl_to_hf(tmp_path / f"{name}-hooked", tmp_path / f"{name}-hf", check=False)
    for layout in ("hooked", "bridge", "hf"):
        a, b = tmp_path / f"live-{layout}", tmp_path / f"file-{layout}"
        assert same(read_all(a), read_all(b))
    for name in ("config.json", "generation_config.json"):
        a, b = tmp_path / "live-hf" / name, tmp_path / "file-hf" / name
        assert json.loads(a.read_text()) == json.loads(b.read_text())


def test_it_is_taken_wherever_a_path_is(tmp_path: Path) -> None:
    model = neo()
    done = converter.hf_to_tl(model, tmp_path / "tl", process="default", effort="quick")
    assert isinstance(done, converter.Conversion)
    assert done.verification is not None
    assert done.verification.passed
    assert converter.verify(model, tmp_path / "tl", effort="quick").passed
    assert converter.verify(model, model, effort="quick").passed
    assert converter.explain(model, tmp_path / "tl").verdict == "same-function"
    converter.bake(model, tmp_path / "baked", check=False)
    converter.export_onnx(model, tmp_path / "onnx", effort="quick")
    assert (tmp_path / "onnx/model.onnx").is_file()
    facts = converter.Inspection(converter.open_model(model)).to_json()
    assert facts["layout"] == "hf"
    assert facts["head"] == "tied"
    assert json.dumps(facts)
    with pytest.raises(UsageError, match="Another interpreter"):
        converter.verify(model, model, pythons=[Path(sys.executable)], effort="quick")
    with pytest.raises(UsageError, match="no directory"):
        converter.export_onnx(model)
    assert converter.hf_to_tl(model, tmp_path / "no", dry_run=True).plan.n_params > 0
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_proj.bias += 0.1
    assert not converter.verify(model, broken, effort="quick").passed


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = neo().train()
    calls: list[int] = []
    model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    before, config = bits(model.state_dict()), model.config.to_dict()
    seed = torch.get_rng_state()
    converter.hf_to_tl(model, tmp_path / "tl", process="all", ledger="exact", effort="quick")
    converter.to_hf_model(model, process="default", dtype=torch.float16)
    converter.to_bridge(model, process="default")
    assert bits(model.state_dict()) == before
    assert model.config.to_dict() == config
    assert model.training
    assert not calls
    assert torch.equal(torch.get_rng_state(), seed)


def test_weights_are_read_where_they_are_and_cannot_be_written() -> None:
    model = neo()
    (reader,) = converter.open_model(model).source.readers
    assert isinstance(reader, TorchReader)
    weight = model.transformer.h[0].mlp.c_fc.weight
    array = reader.read("transformer.h.0.mlp.c_fc.weight")
    assert np.shares_memory(array, weight.detach().numpy())
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_an_edit_made_after_opening_is_converted() -> None:
    model = neo()
    opened = converter.open_model(model)
    with torch.no_grad():
        model.transformer.h[1].ln_1.weight[3] = -2.0
    assert distance(converter.to_hf_model(opened), model) == 0


def test_a_tie_is_what_the_parameters_say() -> None:
    untied = neo(tied=True)  # its config says that it is tied
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach() * 1.5)
    assert not converter.open_model(untied).tied
    tied = neo(tied=False)  # and the other way round
    tied.lm_head.weight = tied.transformer.wte.weight
    assert converter.open_model(tied).tied
    twice = neo(tied=True)
    twice.lm_head.weight = torch.nn.Parameter(twice.lm_head.weight.detach().clone())
    assert converter.open_model(twice).tied
    for model, is_tied in ((untied, False), (tied, True), (twice, True)):
        built = converter.to_hf_model(model)
        assert (built.lm_head.weight is built.transformer.wte.weight) == is_tied
        assert built.config.tie_word_embeddings == is_tied
        assert distance(built, model) == 0
        assert converter.verify(model, built, effort="quick").passed


@pytest.mark.parametrize(
    "wrap", [torch.compile, torch.nn.DataParallel], ids=["compile", "parallel"]
)
def test_wrappers_are_seen_through(wrap: Any) -> None:
    model = neo()
    assert distance(converter.to_hf_model(wrap(model)), model) == 0


def _state(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def test_a_state_dict_with_its_config() -> None:
    model = neo()
    expected = converter.to_state_dict(model, layout="hooked")
    for config in (model.config, model.config.to_dict(), json.loads(model.config.to_json_string())):
        opened = converter.open_model(_state(model), config)
        assert bits(converter.to_state_dict(opened, layout="hooked")) == bits(expected)
    back = converter.open_model(expected, json.loads(model.config.to_json_string()))
    assert distance(converter.to_hf_model(back), model) == 0


@needs_hooked
def test_a_state_dict_with_a_transformer_lens_config() -> None:
    model = neo()
    there = hooked(model, eps=np.float64(1e-5))
    for config in (there.cfg, there.cfg.to_dict()):
        opened = converter.open_model(there.state_dict(), config)
        assert opened.config.eps == 1e-5
        assert distance(converter.to_hf_model(opened), model) == 0


def _meta() -> Any:
    return neo().to("meta")


def _sparse() -> Any:
    model = neo()
    return {**_state(model), "transformer.wpe.weight": model.transformer.wpe.weight.to_sparse()}


class PeftModel(torch.nn.Module):
    __module__ = "peft.peft_model"


REFUSED: list[tuple[str, Any, Any, type[Exception], str]] = [
    ("meta", _meta, None, MissingTensor, "meta device"),
    ("sparse", _sparse, "model", TensorMismatch, "sparse"),
    ("no config", lambda: _state(neo()), None, UsageError, "does not say"),
    ("not tensors", lambda: {"model": 3}, "model", BadInput, "not a tensor"),
    ("config", lambda: _state(neo()), 3, ConfigError, "no config"),
    ("another config", lambda: _state(neo()), {"model_type": "gptj"}, ConfigError, "gptj"),
    ("object", lambda: 3, None, BadInput, "no model"),
    ("module", lambda: torch.nn.Linear(2, 2), None, BadInput, "no model"),
    ("adapter", PeftModel, None, BadInput, "PEFT"),
    ("extra", lambda: {**_state(neo()), "probe.weight": torch.ones(1)}, "model", UnknownTensor, "probe"),
    ("int8", lambda: {**_state(neo()), "transformer.wpe.weight": torch.ones(32, 16, dtype=torch.int8)}, "model", UnknownTensor, "int8"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "config", "kind", "said"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_what_is_none_is_refused(make: Any, config: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said) as raised:
        converter.open_model(make(), neo().config if config == "model" else config)
    assert isinstance(raised.value, converter.NeoconvertError)
    assert all(raised.value.lines())


def test_a_state_dict_alone_is_told_what_to_do() -> None:
    with pytest.raises(UsageError) as raised:
        converter.to_hf_model(_state(neo()))  # type: ignore[arg-type]
    assert "open_model(state_dict, config)" in raised.value.do


@needs_hooked
@pytest.mark.parametrize("process", ["raw", "in place", "no refactoring", "all"])
def test_a_hooked_transformer_comes_back_with_its_function(process: str, tmp_path: Path) -> None:
    model = hooked(neo(scale=1.5))
    if process == "in place":
        model.process_weights_()
    elif process != "raw":
        state = model.state_dict()
        model.load_and_process_state_dict(state, refactor_factored_attn_matrices=process == "all")
    torch.manual_seed(1)
    with torch.no_grad():  # edited, and trained a little
        model.blocks[1].attn.W_O[2] = 0
        for name, parameter in model.named_parameters():
            if "attn.b_" not in name or process != "raw":
                parameter += 0.02 * torch.randn_like(parameter)
    model.add_hook("blocks.0.hook_resid_post", _triple)
    before = bits(model.state_dict())
    back = converter.to_hf_model(model)
    assert bits(model.state_dict()) == before
    assert len(model.hook_dict["blocks.0.hook_resid_post"].fwd_hooks) == 1
    model.reset_hooks()
    assert distance(back, model) < 1e-4
    assert converter.verify(model, back, checks=["function"], effort="quick").passed
    done = converter.tl_to_hf(model, tmp_path / "hf", effort="quick")
    assert done.verification is not None
    assert done.verification.passed
    with pytest.raises(CannotUndo, match="ledger"):
        converter.to_hf_model(model, reverse="exact")


def _triple(x: torch.Tensor, hook: object) -> torch.Tensor:  # noqa: ARG001 - called by name
    return x * 3


@needs_hooked
def test_a_hooked_transformer_may_keep_hf_fields() -> None:
    model = neo(eos_token_id=5, bos_token_id=3)
    there = hooked(model)
    assert converter.to_hf_model(there).config.eos_token_id is None
    back = converter.to_hf_model(converter.open_model(there, model.config))
    assert (back.config.eos_token_id, back.config.bos_token_id) == (5, 3)
    assert distance(back, model) == 0


@needs_hooked
def test_scaled_scores_are_absorbed() -> None:
    model = hooked(neo(), use_attn_scale=True)
    assert distance(converter.to_hf_model(model), model) < 1e-4
    assert distance(converter.to_hooked(model), model) < 1e-4


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_bridge_comes_back_with_its_function(compatible: bool, tied: bool) -> None:
    model = bridge(neo(tied=tied))
    if compatible:
        model.enable_compatibility_mode()
    with torch.no_grad():
        state = model.state_dict()
        state["blocks.1.attn.o.weight"][:, 4:8] = 0
        state["blocks.0.mlp.in.bias"] += 0.3
        if compatible:
            state["blocks.0.attn.q.bias"] += 0.3
    before = bits(model.state_dict())
    back = converter.to_hf_model(model)
    assert bits(model.state_dict()) == before
    assert distance(back, model) < 1e-4
    assert back.config.tie_word_embeddings == (tied and not compatible)
    again = converter.to_bridge(model)
    assert bits(again.state_dict()) == before
    assert distance(again, model) < 1e-5


@pytest.mark.parametrize("compatible", [False, True])
def test_the_model_inside_a_bridge_is_read_or_the_bridge_is_asked_for(compatible: bool) -> None:
    model = bridge(neo())
    if compatible:
        model.enable_compatibility_mode()
    refused = ""
    try:
        found = converter.to_hf_model(model.original_model)
    except BadInput as error:
        refused, found = error.do, converter.to_hf_model(model)
    assert not refused or "bridge itself" in refused
    assert distance(found, model) < 1e-4


def test_a_bridges_own_cfg_is_not_asked() -> None:
    model = bridge(neo())
    model.cfg.window_size, model.cfg.attn_types = 1, ["global", "global"]
    opened = converter.open_model(model)
    assert (opened.config.window_size, opened.config.attn_types) == (5, ("global", "local"))
    assert opened.config.score_divisors == ()


def test_a_tokenizer_that_is_given_is_written(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from converter.demo import MODEL

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    model = converter.to_hf_model(MODEL)
    converter.hf_to_tl(model, tmp_path / "without", check=False)
    assert not list(tmp_path.glob("without/tokenizer*"))
    opened = converter.open_model(model, tokenizer=tokenizer)
    converter.hf_to_tl(opened, tmp_path / "with", check=False)
    written: Any = AutoTokenizer.from_pretrained(tmp_path / "with")
    assert written("def f(x):").input_ids == tokenizer("def f(x):").input_ids
    there = converter.to_bridge(opened)
    assert there.tokenizer is not None
    converter.tl_to_hf(there, tmp_path / "back", check=False)  # made to prepend a token by now
    assert not list(tmp_path.glob("back/tokenizer*"))
    assert converter.to_bridge(model).tokenizer is None
