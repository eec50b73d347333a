"""A GPT-Neo in whatever people saved it in: found, said, verified, and bit for bit the same."""

from __future__ import annotations

import argparse
import collections
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file, save_model

from converter import verify
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.cli import main
from converter.convert import bake, export_onnx, hf_to_tl, tl_to_hf
from converter.errors import BadInput, ConfigError, TensorMismatch, UnknownTensor
from tests.checkpoints import read_all, same
from tests.marks import needs_hooked
from tests.models import random_hf

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hf(tmp_path_factory.mktemp("neo") / "hf")


def _state(hf: Path) -> State:
    return load_file(hf / "model.safetensors")


def _with(hf: Path, directory: Path, state: State) -> Path:
    """A directory of these tensors, with the model's config."""
    directory.mkdir()
    shutil.copy(hf / "config.json", directory)
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _comes_back(source: Checkpoint, hf: Path, out: Path, *, check: bool = True) -> tuple[str, ...]:
    """Converted, verified and brought back with the same bits; what was said about it."""
    done = hf_to_tl(source, out / "tl", layout="bridge", check=check, effort="quick")
    tl_to_hf(out / "tl", out / "back", check=False)
    assert same(read_all(out / "back"), read_all(hf))
    kept = json.loads((out / "tl/neoconvert.json").read_text())
    assert kept["notes"] == list(source.notes)
    assert done.to_json()["notes"] == list(source.notes)
    return source.notes


PREFIXES = [
    "module.", "_orig_mod.", "model.", "base_model.model.", "_forward_module.", "backbone.",
    "pretrained_model.", "language_model.", "transformer.", "0.auto_model.", "a.b.c.d.e.",
    "module._orig_mod.model.", "h.3.", "wte.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(prefix: str, hf: Path, tmp_path: Path) -> None:
    state = {prefix + name: tensor for name, tensor in _state(hf).items()}
    source = open_checkpoint(_with(hf, tmp_path / "wrapped", state))
    notes = _comes_back(source, hf, tmp_path, check=prefix in PREFIXES[:3])
    assert any(f"without {prefix} in front" in note for note in notes)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("h.0.", "h.0._orig_mod."),
        ("h.1.", "h.1._checkpoint_wrapped_module."),
        ("attn.attention", "attn._fsdp_wrapped_module.attention"),
        ("transformer.", "transformer.module."),
        ("h.0.", "h.0.block."),
        ("q_proj.", "q_proj.base_layer."),
        (".h.", ".inner.h."),
        ("ln_f.", "_orig_mod.ln_f."),
    ],
)
def test_wrappers_in_the_middle(old: str, new: str, hf: Path, tmp_path: Path) -> None:
    state = {name.replace(old, new): tensor for name, tensor in _state(hf).items()}
    assert state.keys() != _state(hf).keys()
    source = open_checkpoint(_with(hf, tmp_path / "wrapped", state))
    notes = _comes_back(source, hf, tmp_path)
    assert any("the names are read" in note for note in notes)


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
def test_prefixed_transformer_lens(layout: Any, hf: Path, tmp_path: Path) -> None:
    hf_to_tl(hf, tmp_path / "tl", layout=layout, check=False)
    path = tmp_path / "tl/model.safetensors"
    save_file({f"policy.model.{n}": t for n, t in load_file(path).items()}, path)
    tl_to_hf(tmp_path / "tl", tmp_path / "back", effort="quick")
    assert same(read_all(tmp_path / "back"), read_all(hf))


def _adam(state: State) -> dict[str, Any]:
    states = {
        i: {"step": torch.tensor(1.0), "exp_avg": t + 1} for i, t in enumerate(state.values())
    }
    return {"state": states, "param_groups": [{"lr": 1e-3, "params": list(range(len(state)))}]}


def _prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _tree(state: State) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        at = tree
        for key in path:
            at = at.setdefault(key, {})
        at[leaf] = tensor
    return tree


BUNDLES: dict[str, tuple[Callable[[State], Any], str]] = {
    "training loop": (lambda s: {"model": s, "optimizer": _adam(s), "step": 3}, "['model'] in the file, beside optimizer, step"),
    "DPO": (lambda s: {"step_idx": 1, "state": s, "metrics": {"loss": 1.0}}, "['state']"),
    "only model": (lambda s: {"model": s}, "['model']"),
    "Lightning": (lambda s: {"state_dict": _prefixed(s, "model."), "optimizer_states": [_adam(s)], "epoch": 1,
                             "hyper_parameters": {"lr": 1e-4}}, "without model. in front"),
    "DeepSpeed": (lambda s: {"module": _prefixed(s, "module."), "dp_world_size": 2}, "['module']"),
    "nanoGPT-like": (lambda s: {"model": _prefixed(s, "_orig_mod."), "model_args": {"n_layer": 2}, "iter_num": 1}, "['model']"),
    "nested": (lambda s: {"a": {"b": {"weights": s}}, "c": 1}, "['a']['b']['weights']"),
    "list": (lambda s: [1, "x", s], "[2]"),
    "namespace": (lambda s: {"args": argparse.Namespace(lr=1), "model": s}, "['model']"),
    "path and defaultdict": (lambda s: {"out": Path("x"), "log": collections.defaultdict(list, a=[1]), "model": s}, "['model']"),
    "tree": (lambda s: {"params": _tree(s), "step": 1}, "['params']"),
    "with its metrics": (lambda s: {"state_dict": {**_prefixed(s, "net."), "auroc.thresholds": torch.ones(3)}}, "without net. in front"),
    "parameters": (lambda s: {"model": {n: torch.nn.Parameter(t) for n, t in s.items()}}, "['model']"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BUNDLES)
def test_bundles(kind: str, hf: Path, tmp_path: Path) -> None:
    make, said = BUNDLES[kind]
    path = tmp_path / "last.ckpt"
    torch.save(make(_state(hf)), path)
    shutil.copy(hf / "config.json", tmp_path)
    notes = _comes_back(open_checkpoint(path, allow_pickle=True), hf, tmp_path)
    assert any(said in note for note in notes), notes


def test_a_bundle_as_the_directorys_own_file(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save({"model": _state(hf), "step": 1}, tmp_path / "m/pytorch_model.bin")
    _comes_back(open_checkpoint(tmp_path / "m", allow_pickle=True), hf, tmp_path)


CONFIGS: dict[str, Callable[[dict[str, Any], State], Any]] = {
    "HF config and state": lambda c, s: {"config": c, "state_dict": s},
    "pair": lambda c, s: (c, s),
    "namespace": lambda c, s: {"args": argparse.Namespace(**c), "model": s},
    "JSON text": lambda c, s: {"config": json.dumps(c), "model": s},
    "deeper": lambda c, s: {"hyper_parameters": {"model": {"config": c}}, "state_dict": s},
    "no model_type": lambda c, s: {"cfg": {k: v for k, v in c.items() if k != "model_type"}, "model": s},
    "the nearer of two": lambda c, s: {
        "student": {"config": c, "model": s}, "teacher": {"config": {**c, "window_size": 3}},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_config_in_the_same_file(kind: str, hf: Path, tmp_path: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    torch.save(CONFIGS[kind](config, _state(hf)), tmp_path / "m.pt")
    # One beside it, of another model, is not asked.
    (tmp_path / "config.json").write_text(json.dumps({**config, "window_size": 4}))
    source = open_checkpoint(tmp_path / "m.pt", allow_pickle=True)
    assert source.config.window_size == config["window_size"]
    _comes_back(source, hf, tmp_path)


def test_pickled_config_objects_are_read_by_their_fields(hf: Path, tmp_path: Path) -> None:
    """A stand-in takes the fields; the class itself is not imported, and none of its code runs."""
    from transformers import GPTNeoConfig

    config = GPTNeoConfig.from_pretrained(hf)
    torch.save({"config": config, "model": _state(hf)}, tmp_path / "m.pt")
    source = open_checkpoint(tmp_path / "m.pt", allow_pickle=True)
    assert source.config == open_checkpoint(hf).config
    _comes_back(source, hf, tmp_path)
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert not [name for name in written if name.startswith("_")]


@needs_hooked
def test_a_pickled_hooked_config(hf: Path, tmp_path: Path) -> None:
    from transformer_lens import HookedTransformerConfig

    hf_to_tl(hf, tmp_path / "tl", layout="hooked", check=False)
    cfg = json.loads((tmp_path / "tl/cfg.json").read_text()) | {"dtype": torch.float32}
    pair = HookedTransformerConfig.from_dict(cfg), load_file(tmp_path / "tl/model.safetensors")
    torch.save(pair, tmp_path / "m.pt")
    tl_to_hf(open_checkpoint(tmp_path / "m.pt", allow_pickle=True), tmp_path / "back", check=False)
    assert same(read_all(tmp_path / "back"), read_all(hf))


def test_a_pickled_bridge_config_is_not_read(hf: Path, tmp_path: Path) -> None:
    bridge = _bridge(hf)
    torch.save(
        (bridge.cfg, {n: t.clone() for n, t in bridge.state_dict().items()}), tmp_path / "m.pt"
    )
    with pytest.raises(ConfigError, match="TransformerBridge's own"):
        open_checkpoint(tmp_path / "m.pt", allow_pickle=True)


def test_two_configs_that_differ(hf: Path, tmp_path: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    bundle = {"old": config, "new": {**config, "window_size": 3}, "model": _state(hf)}
    torch.save(bundle, tmp_path / "m.pt")
    with pytest.raises(ConfigError, match="old, new") as raised:
        open_checkpoint(tmp_path / "m.pt", allow_pickle=True)
    assert "--cfg" in raised.value.do
    open_checkpoint(tmp_path / "m.pt", cfg=hf / "config.json", allow_pickle=True)


def _other(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


TWO: dict[str, tuple[Callable[[State], Any], str, str]] = {
    "policy and reference": (lambda s: {"policy": s, "reference": _other(s)}, "['policy']", "['reference']"),
    "ema": (lambda s: {"model": s, "ema": _other(s), "step": 1}, "['model']", "['ema']"),
    "prefixes in one dict": (lambda s: {"state_dict": {**_prefixed(s, "policy."), **_prefixed(_other(s), "ref.")}}, "policy.", "ref."),
    "one inside the other": (lambda s: {**_prefixed(s, "model."), **_prefixed(_other(s), "model.ema.")}, "model.", "model.ema."),
    "with and without": (lambda s: {**s, **_prefixed(_other(s), "module.")}, "without a prefix", "module."),
}  # fmt: skip


def _follow(do: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """Run the command that a message ends in, and open what it wrote with the options it names."""
    told, _, command = do.partition(": ")
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(command)[2], {})
    words = shlex.split(told)
    file, cfg = words[words.index("give") + 1], Path(words[words.index("--cfg") + 1])
    return open_checkpoint(file, cfg=cfg, allow_pickle="--allow-pickle" in words)


@pytest.mark.parametrize("kind", TWO)
def test_two_models_are_never_chosen_between(
    kind: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the message says to do, works."""
    make, *names = TWO[kind]
    torch.save(make(_state(hf)), tmp_path / "two.pt")
    shutil.copy(hf / "config.json", tmp_path)
    with pytest.raises(UnknownTensor) as raised:
        open_checkpoint(tmp_path / "two.pt", allow_pickle=True)
    assert all(name in raised.value.what for name in names)
    one = _follow(raised.value.do, tmp_path, monkeypatch)
    _comes_back(one, hf, tmp_path)


def test_two_models_in_safetensors(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = _state(hf)
    _with(hf, tmp_path / "m", {**_prefixed(state, "a."), **_prefixed(_other(state), "b.")})
    with pytest.raises(UnknownTensor, match=r"'a\.' and 'b\.'") as raised:
        open_checkpoint(tmp_path / "m")
    _comes_back(_follow(raised.value.do, tmp_path, monkeypatch), hf, tmp_path)


def test_what_a_peft_model_keeps_beside_a_weight(hf: Path, tmp_path: Path) -> None:
    state = _prefixed(_state(hf), "base_model.model.")
    wte = "base_model.model.transformer.wte"
    state[f"{wte}.original_module.weight"] = state.pop(f"{wte}.weight")
    state[f"{wte}.modules_to_save.default.weight"] = torch.ones(37, 16)
    with pytest.raises(UnknownTensor, match="not merged"):
        open_checkpoint(_with(hf, tmp_path / "m", state))


@pytest.mark.parametrize("bundled", [True, False])
def test_what_has_no_place_is_taken_out_as_told(
    bundled: bool, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained head of any name, and a module inside a block: the command leaves the model."""
    added = ("fc.0.weight", "transformer.h.1.adapter.down.weight", "transformer.extra")
    state = _state(hf) | dict.fromkeys(added, torch.ones(2))
    if bundled:
        beside = {"args": argparse.Namespace(lr=1), "net": state, "best": np.float64(1)}
        torch.save(beside, tmp_path / "m.pt")
        shutil.copy(hf / "config.json", tmp_path)
    place = tmp_path / "m.pt" if bundled else _with(hf, tmp_path / "m", state)
    with pytest.raises(UnknownTensor, match=r"3 tensor\(s\) have no place") as raised:
        open_checkpoint(place, allow_pickle=True)
    _comes_back(_follow(raised.value.do, tmp_path, monkeypatch), hf, tmp_path)


def test_two_models_in_two_layouts(hf: Path, tmp_path: Path) -> None:
    hf_to_tl(hf, tmp_path / "tl", check=False)
    hooked = load_file(tmp_path / "tl/model.safetensors")
    torch.save({"a": _state(hf), "b": hooked}, tmp_path / "two.pt")
    with pytest.raises(UnknownTensor, match=r"\['a'\]"):
        open_checkpoint(tmp_path / "two.pt", cfg=hf / "config.json", allow_pickle=True)


def test_the_same_model_twice_is_one(hf: Path, tmp_path: Path) -> None:
    state = _state(hf)
    source = open_checkpoint(_with(hf, tmp_path / "m", {**state, **_prefixed(state, "module.")}))
    assert any("the same bits" in note for note in _comes_back(source, hf, tmp_path))
    one = {**state, **_prefixed(state, "module.")}
    one["module.transformer.ln_f.bias"] = one["module.transformer.ln_f.bias"] + 1
    with pytest.raises(UnknownTensor, match="cannot be told"):
        open_checkpoint(_with(hf, tmp_path / "n", one))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("head", ["score.weight", "v_head.summary.weight", "qa_outputs.bias"])
def test_other_heads_are_left_out_and_said(
    head: str, prefix: str, hf: Path, tmp_path: Path
) -> None:
    state = _prefixed(_state(hf), prefix) | {prefix + head: torch.ones(3, 16)}
    source = open_checkpoint(_with(hf, tmp_path / "m", state))
    assert "head" in source.dropped[prefix + head]
    _comes_back(source, hf, tmp_path)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "m")])
    assert head in result.output


def test_what_lies_outside_a_wrapper_is_no_part_of_it(hf: Path, tmp_path: Path) -> None:
    state = _prefixed(_state(hf), "model.") | {"frozen_head.0.weight": torch.ones(2)}
    source = open_checkpoint(_with(hf, tmp_path / "m", state))
    assert list(source.dropped) == ["frozen_head.0.weight"]
    _comes_back(source, hf, tmp_path)
    with pytest.raises(UnknownTensor, match=r"model\.extra\.weight"):
        open_checkpoint(_with(hf, tmp_path / "n", state | {"model.extra.weight": torch.ones(2)}))


class Tied(torch.nn.Module):
    """Names as a tied model has them, one parameter under two."""

    def __init__(self, state: State, embedding: str, head: str) -> None:
        super().__init__()
        for name, tensor in state.items():
            self._put(name, torch.nn.Parameter(tensor))
        self._put(head, self.get_parameter(embedding))

    def _put(self, name: str, parameter: torch.nn.Parameter) -> None:
        *path, leaf = name.split(".")
        at: torch.nn.Module = self
        for key in path:
            if not hasattr(at, key):
                at.add_module(key, torch.nn.Module())
            at = getattr(at, key)
        at.register_parameter(leaf, parameter)


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_tied_file_that_kept_the_head(prefix: str, noted: bool, hf: Path, tmp_path: Path) -> None:
    """safetensors.torch.save_model drops one of the tied names, and notes it in the metadata."""
    shutil.copytree(hf, tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    module = Tied(_prefixed(_state(hf), prefix), f"{prefix}transformer.wte.weight", f"{prefix}lm_head.weight")  # fmt: skip
    save_model(module, str(file))
    assert f"{prefix}transformer.wte.weight" not in load_file(file)
    if not noted:
        save_file(load_file(file), file)
    source = open_checkpoint(tmp_path / "m")
    assert source.tied
    _comes_back(source, hf, tmp_path)


def test_a_tied_file_that_kept_the_head_in_shards(hf: Path, tmp_path: Path) -> None:
    state = _state(hf)
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    names = sorted(state)
    (tmp_path / "m").mkdir()
    shutil.copy(hf / "config.json", tmp_path / "m")
    weight_map: dict[str, str] = {}
    for i, mine in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: state[n] for n in mine}, tmp_path / "m" / file)
        weight_map |= dict.fromkeys(mine, file)
    index = tmp_path / "m/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _comes_back(open_checkpoint(tmp_path / "m"), hf, tmp_path)
    index.unlink()  # lost: the shards' names say that they are all there
    source = open_checkpoint(tmp_path / "m")
    shutil.rmtree(tmp_path / "tl")
    shutil.rmtree(tmp_path / "back")
    assert "is lost" in _comes_back(source, hf, tmp_path)[0]
    (tmp_path / "m/model-00001-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="model-00001-of-00002"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_index_that_lists_the_tied_head(prefix: str, hf: Path, tmp_path: Path) -> None:
    state = _prefixed(_state(hf), prefix)
    source = _with(hf, tmp_path / "m", state)
    names = [*state, f"{prefix}lm_head.weight"]
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    index = source / "model.safetensors.index.json"

    def write(names: list[str]) -> None:
        weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    write(names)
    assert "which no shard holds" in _comes_back(open_checkpoint(source), hf, tmp_path)[0]
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(BadInput, match=r"missing: lm_head\.weight"):
        open_checkpoint(source)
    write([*names, f"{prefix}transformer.wpe.bias"])
    with pytest.raises(BadInput, match="The index says"):
        open_checkpoint(source)


def test_an_untied_file_without_its_embedding(tmp_path: Path) -> None:
    random_hf(tmp_path / "hf", tied=False)
    state = load_file(tmp_path / "hf/model.safetensors")
    del state["transformer.wte.weight"]
    with pytest.raises(BadInput, match=r"transformer\.wte\.weight"):
        open_checkpoint(_with(tmp_path / "hf", tmp_path / "m", state))


@pytest.mark.parametrize("kept", ["embed.weight", "unembed.weight"])
def test_a_bridge_file_that_kept_one_of_the_tied(kept: str, hf: Path, tmp_path: Path) -> None:
    hf_to_tl(hf, tmp_path / "tl", layout="bridge", check=False)
    path = tmp_path / "tl/model.safetensors"
    drop = ({"embed.weight", "unembed.weight"} - {kept}).pop()
    save_file({n: t for n, t in load_file(path).items() if n != drop}, path)
    tl_to_hf(tmp_path / "tl", tmp_path / "back", effort="quick")
    assert same(read_all(tmp_path / "back"), read_all(hf))


def _missing(directory: Path) -> set[str]:
    """What stock transformers does not find, and fills in at random; the head is tied."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    return set(loaded[1]["missing_keys"]) - {"lm_head.weight"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", "model."),
        ("", "base_model.model."),
        ("h.0.", "h.0._orig_mod."),
        ("transformer.", "transformer.transformer.transformer."),
    ],
)
def test_a_wrapped_artifact_that_transformers_would_not_find(
    old: str, new: str, hf: Path, tmp_path: Path
) -> None:
    """As a source it is read all the same. A pipeline loads what was verified."""
    state = {name.replace(old, new, 1): tensor for name, tensor in _state(hf).items()}
    directory = _with(hf, tmp_path / "m", state)
    result = verify(hf, directory, effort="quick")
    assert not result.passed
    (problem,) = result.problems
    assert "from_pretrained would fill them in at random" in problem
    lost = _missing(directory)
    assert problem.startswith(f"{len(lost)} of its tensors")
    (weights,) = (e for e in result.evidence if e.link == "weights")
    assert weights.where in lost
    for given, checks in ((directory, "function"), (directory / "model.safetensors", "weights")):
        told = verify(hf, given, checks=checks, effort="quick")
        assert told.passed
        assert "names that transformers looks for" in told.remarks[0]


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("transformer."),
        lambda name: f"transformer.{name}",
        lambda name: name.replace("transformer.wte", "lm_head"),
    ],
)
def test_an_artifact_whose_names_transformers_knows(
    rename: Callable[[str], str], hf: Path, tmp_path: Path
) -> None:
    state = {rename(name): tensor for name, tensor in _state(hf).items()}
    directory = _with(hf, tmp_path / "m", state)
    assert not _missing(directory)
    result = verify(hf, directory, effort="quick")
    assert result.passed, result.problems
    assert not result.remarks


def test_artifacts_of_which_transformers_finds_no_file(hf: Path, tmp_path: Path) -> None:
    other = _with(hf, tmp_path / "m", _state(hf)) / "other.safetensors"
    (tmp_path / "m/model.safetensors").rename(other)
    told = verify(hf, other, checks="weights")
    assert told.passed
    assert told.remarks == ("from_pretrained does not look for a file called other.safetensors.",)
    other.rename(tmp_path / "m/model-00001-of-00001.safetensors")
    found = verify(hf, tmp_path / "m", checks="weights")
    assert found.problems == ("from_pretrained does not look for shards without their index.",)
    (tmp_path / "m/model-00001-of-00001.safetensors").unlink()
    torch.save({"model": _state(hf), "step": 1}, tmp_path / "m/pytorch_model.bin")
    bundle = open_checkpoint(tmp_path / "m", allow_pickle=True)
    assert "at random" in verify(hf, bundle, checks="weights").problems[0]


def _bridge(hf: Path) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(hf), dtype=torch.float32, device="cpu")


def _plain_state(model: torch.nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_model_inside_a_bridge(suffix: str, hf: Path, tmp_path: Path) -> None:
    state = _plain_state(_bridge(hf).original_model)
    path = tmp_path / f"m{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    source = open_checkpoint(path, cfg=hf / "config.json", allow_pickle=True)
    assert source.layout == "bridge"
    assert any("original_model" in note for note in source.notes)
    tl_to_hf(source, tmp_path / "back", effort="quick")
    assert same(read_all(tmp_path / "back"), read_all(hf))


FORKED = ["lm_head.bias", "transformer.h.1.attn.attention.q_proj.bias"]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", FORKED)
def test_biases_that_gpt_neo_has_not_make_no_bridge(
    name: str, value: float, prefix: str, hf: Path, tmp_path: Path
) -> None:
    """As of a fork: transformers opens such a directory, and computes without them."""
    state = _state(hf)
    shape = (37,) if name.startswith("lm_head") else (16,)
    forked = _prefixed({**state, name: torch.full(shape, value)}, prefix)
    source = open_checkpoint(_with(hf, tmp_path / "m", forked))
    assert source.layout == "hf"
    assert source.dropped[name].startswith("not zero" if value else "zero")
    _comes_back(source, hf, tmp_path)
    result = CliRunner().invoke(main, ["bake", str(tmp_path / "m"), str(tmp_path / "o"), "--no-verify"])  # fmt: skip
    assert result.exit_code == 0
    assert f"left out {name}" in result.output
    assert ("transformers ignores it" in result.output) == bool(value)


def test_biases_of_another_shape_have_no_place(hf: Path, tmp_path: Path) -> None:
    state = _state(hf) | {FORKED[0]: torch.ones(38)}
    with pytest.raises(UnknownTensor, match=r"lm_head\.bias"):
        open_checkpoint(_with(hf, tmp_path / "m", state))


def test_a_bridges_own_cfg_is_not_read(hf: Path, tmp_path: Path) -> None:
    bridge = _bridge(hf)
    pair = bridge.cfg.to_dict(), {n: t.clone() for n, t in bridge.state_dict().items()}
    torch.save(pair, tmp_path / "b.pt")
    with pytest.raises(ConfigError, match="TransformerBridge's own") as raised:
        open_checkpoint(tmp_path / "b.pt", allow_pickle=True)
    bridge.original_model.config.to_json_file(tmp_path / "written.json")  # as the message says
    assert "original_model.config.to_json_file" in raised.value.do
    assert "--cfg config.json" in raised.value.do
    for cfg in (hf / "config.json", tmp_path / "written.json"):
        source = open_checkpoint(tmp_path / "b.pt", cfg=cfg, allow_pickle=True)
        assert source.config.attn_types == ("global", "local")
    shutil.copy(hf / "config.json", tmp_path)  # beside it: reliable, unlike the cfg inside
    source = open_checkpoint(tmp_path / "b.pt", allow_pickle=True)
    tl_to_hf(source, tmp_path / "back", effort="quick")
    assert same(read_all(tmp_path / "back"), read_all(hf))
    assert source.original_tl_config is None


def test_a_vocabulary_that_grew(hf: Path, tmp_path: Path) -> None:
    state = _state(hf)
    state["transformer.wte.weight"] = torch.cat(
        [state["transformer.wte.weight"], torch.ones(3, 16)]
    )
    directory = _with(hf, tmp_path / "m", state)
    with pytest.raises(TensorMismatch, match=r"\[40, 16\].*\[37, 16\]") as raised:
        open_checkpoint(directory)
    assert "vocab_size must be 40" in raised.value.do
    config = json.loads((hf / "config.json").read_text()) | {"vocab_size": 40}  # as it says
    (directory / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(directory).config.d_vocab == 40


def test_nan_is_named(hf: Path, tmp_path: Path) -> None:
    state = _state(hf)
    state["transformer.h.1.mlp.c_fc.weight"][3, 3] = torch.nan
    done = hf_to_tl(_with(hf, tmp_path / "m", state), tmp_path / "tl", check=False)
    (said,) = [remark for remark in done.to_json()["remarks"] if "NaN" in remark]
    assert "transformer.h.1.mlp.c_fc.weight (1 elements)" in said
    assert not hf_to_tl(hf, tmp_path / "fine", layout="bridge", check=False).remarks


def test_every_command_takes_a_wrapped_model(hf: Path, tmp_path: Path) -> None:
    directory = _with(hf, tmp_path / "m", _prefixed(_state(hf), "module."))
    bake(directory, tmp_path / "plain", process="none", effort="quick")
    assert same(read_all(tmp_path / "plain"), read_all(hf))
    bake(directory, tmp_path / "baked", process="default", effort="quick")
    export_onnx(directory, tmp_path / "onnx", effort="quick")
    added = export_onnx(directory, effort="quick")
    assert added.verification is not None
    assert added.verification.passed
    for arguments in (["explain", str(directory), str(tmp_path / "plain")],
                      ["verify", str(directory), str(tmp_path / "plain"), "--effort", "quick"]):  # fmt: skip
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
