"""What holds no GPT-Neo that can be read is told what it is, and what to do."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from converter.checkpoint import open_checkpoint
from converter.cli import main
from converter.convert import hf_to_tl
from converter.errors import BadInput, CorruptFile, PickleRefused
from tests.models import random_hf

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 526014904\n"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_hf(tmp_path_factory.mktemp("neo") / "hf")


def _told(path: Path, *arguments: str) -> tuple[str, str, str]:
    """The three lines of a refusal: exit code 3, no traceback, no library's own advice."""
    result = CliRunner().invoke(main, ["inspect", str(path), "--allow-pickle", *arguments])
    assert result.exit_code == 3, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 3, result.stderr
    assert "False" not in lines[2]
    assert "weights_only=" not in result.stderr
    return lines[0], lines[1], lines[2]


W = "WEIGHTS"  # stands for a sound weight file
FOLDERS: dict[str, tuple[dict[str, str], str, str]] = {
    "flax": ({"flax_model.msgpack": "x"}, "Flax", "load_flax_weights_in_pytorch_model"),
    "tensorflow": ({"tf_model.h5": "x"}, "TensorFlow", "made from"),
    "mesh": ({"model.ckpt-400000.index": "x", "model.ckpt-400000.data-00000-of-00064": "x"}, "Mesh", "convert_gpt_neo_mesh_tf_to_pytorch"),
    "gguf": ({"m.gguf": "x"}, "m.gguf", "made from"),
    "adapter": ({"adapter_config.json": '{"base_model_name_or_path": "me/base"}', "adapter_model.safetensors": "x"}, "adapter", "neoconvert hf-to-tl me/base OUT --adapter"),
    "adapter of no name": ({"adapter_config.json": "{", "adapter_model.bin": "x"}, "adapter", "hf-to-tl BASE OUT --adapter"),
    "variant": ({"model.fp16.safetensors": W}, "variant", "model.fp16.safetensors"),
    "sharded variant": ({"model.safetensors.index.fp16.json": "{}", "model-00001-of-00002.fp16.safetensors": W}, "variant", "model.safetensors.index.fp16.json"),
    "deepspeed": ({"latest": "g", "zero_to_fp32.py": "x", "g/zero_pp_rank_0_mp_rank_00_optim_states.pt": "x"}, "DeepSpeed", "zero_to_fp32.py"),
    "deepspeed without its script": ({"g/zero_pp_rank_0_mp_rank_00_optim_states.pt": "x"}, "DeepSpeed", "-m deepspeed.utils.zero_to_fp32"),
    "inside deepspeed's folder": ({"zero_pp_rank_0_mp_rank_00_optim_states.pt": "x", "mp_rank_00_model_states.pt": "x"}, "DeepSpeed", "-m deepspeed.utils.zero_to_fp32"),
    "distributed": ({"fsdp_0/.metadata": "x", "fsdp_0/__0_0.distcp": "x"}, "distributed checkpoint", "dcp_to_torch"),
    "run": ({"checkpoint-500/model.safetensors": W, "checkpoint-1500/model.safetensors": W}, "checkpoint-500, checkpoint-1500", "checkpoint-1500"),
    "run of four": ({f"checkpoint-{n}/model.safetensors": W for n in (1, 2, 3, 10)}, "below: checkpoint-1, checkpoint-2, checkpoint-3, checkpoint-10.", "checkpoint-10"),
    "long run": ({f"checkpoint-{n}/model.safetensors": W for n in range(1, 13)}, "below, 12 in all, the last of them checkpoint-10, checkpoint-11, checkpoint-12.", "checkpoint-12"),
    "hub cache of a model": ({"refs/main": "b", "snapshots/a/model.safetensors": W, "snapshots/b/model.safetensors": W}, "cache", "snapshots/b"),
    "hub cache": ({"models--EleutherAI--gpt-neo-125m/refs/main": "x"}, "cache", "EleutherAI/gpt-neo-125m"),
    "one folder down": ({"0_Transformer/pytorch_model.bin": W}, "one folder down", "0_Transformer"),
    "another name": ({"policy.pt": W}, "policy.pt", "policy.pt' --allow-pickle"),
    "consolidated": ({"consolidated.safetensors": W}, "consolidated.safetensors", "consolidated.safetensors"),
    "optimizer alone": ({"optimizer.pt": "x", "scheduler.pt": "x"}, "optimizer.pt", "holds its"),
    "download broken off": ({"model.safetensors.incomplete": "x"}, "not complete", "hf download"),
    "deepspeed in a run": ({"checkpoint-9/g/zero_pp_rank_0_mp_rank_00_optim_states.pt": "x", "checkpoint-10/zero_to_fp32.py": "x", "checkpoint-10/latest": "g"}, "DeepSpeed", "checkpoint-10/zero_to_fp32.py"),
    "deepspeed without ZeRO": ({"latest": "g", "g/mp_rank_00_model_states.pt": W}, "mp_rank_00_model_states.pt", "g/mp_rank_00_model_states.pt' --allow-pickle"),
    "deepspeed universal": ({"latest_universal": "g", "g/zero/transformer.wte.weight/fp32.pt": "x"}, "universal", "zero_to_fp32"),
    "distributed, with its optimizer": ({"optimizer_0/__0_0.distcp": "x", "pytorch_model_fsdp_0/__0_0.distcp": "x"}, "distributed", "pytorch_model_fsdp_0' model.pt"),
    "lightning run": ({"version_0/hparams.yaml": "x", "version_0/checkpoints/epoch=1.ckpt": W}, "epoch=1.ckpt", "checkpoints/epoch=1.ckpt' --allow-pickle"),
    "dpo run": ({"LATEST/optimizer.pt": "x", "LATEST/policy.pt": W}, "policy.pt", "LATEST/policy.pt' --allow-pickle"),
    "run of adapters": ({"checkpoint-5/adapter_config.json": '{"base_model_name_or_path": "me/base"}', "checkpoint-5/adapter_model.safetensors": "x"}, "adapter", "hf-to-tl me/base OUT --adapter"),
    "far down": ({"src/main.py": "x", "models/neo/model.safetensors": W}, "some folders down: models/neo", "models/neo"),
    "huggingface's home": ({"hub/models--me--neo/snapshots/a/model.safetensors": W, "token": "x"}, "cache", "snapshots/a"),
    "hub cache of nothing": ({"models--me--neo/refs/main": "x"}, "me/neo", "me/neo"),
    "shards of another name": ({"neo-00001-of-00002.bin": "x", "neo-00002-of-00002.bin": "x", "neo.bin.index.json": "{}"}, "neo.bin.index.json", "neo.bin.index.json' --allow-pickle"),
    "parts": ({"hf_model_0001_1.pt": "x", "hf_model_0002_1.pt": "x"}, "in parts", "one.pt"),
    "openvino": ({"openvino_model.xml": "x", "openvino_model.bin": "x"}, "OpenVINO", "made from"),
    "archive": ({"neo.tar.gz": "x"}, "archive", "Unpack"),
    "dvc": ({"model.safetensors.dvc": "x"}, "DVC", "dvc pull"),
    "config alone": ({"config.json": "{}"}, "a model's config", "hf download"),
    "a folder by a file's name": ({"model.safetensors/x": "x"}, "no model.safetensors", "Name the directory"),
    "empty": ({}, "no model.safetensors", "Name the directory"),
}  # fmt: skip


def _fill(directory: Path, files: dict[str, str], hf: Path) -> Path:
    directory.mkdir()
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text == W and path.suffix == ".safetensors":
            shutil.copy(hf / "model.safetensors", path)
        elif text == W:
            torch.save(load_file(hf / "model.safetensors"), path)
        else:
            path.write_text(text)
        if text == W:
            shutil.copy(hf / "config.json", path.parent)
    return directory


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind: str, hf: Path, tmp_path: Path) -> None:
    files, what, do = FOLDERS[kind]
    told = _told(_fill(tmp_path / "a b", files, hf))
    assert what in told[0]
    assert do in told[2]


@pytest.mark.parametrize(
    "kind",
    [
        "variant", "run", "hub cache of a model", "one folder down", "another name", "consolidated",
        "lightning run", "dpo run", "far down", "huggingface's home", "deepspeed without ZeRO",
    ],
)  # fmt: skip
def test_the_place_that_is_named_opens(kind: str, hf: Path, tmp_path: Path) -> None:
    do = _told(_fill(tmp_path / "d", FOLDERS[kind][0], hf))[2]
    named, *flags = shlex.split(do.rpartition(": ")[2])
    source = open_checkpoint(named, allow_pickle=flags == ["--allow-pickle"])
    hf_to_tl(source, tmp_path / "tl", layout="bridge", effort="quick")


def test_a_distributed_checkpoint_put_together_as_told(hf: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    run = tmp_path / "run"
    save({"model": load_file(hf / "model.safetensors")}, checkpoint_id=run / "pytorch_model_fsdp_0")
    command = shlex.split(_told(run)[2].partition("json: ")[2])[1:]
    command[-1] = str(tmp_path / "model.pt")
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    source = open_checkpoint(tmp_path / "model.pt", cfg=hf / "config.json", allow_pickle=True)
    hf_to_tl(source, tmp_path / "tl", layout="bridge", effort="quick")


def _halves(hf: Path, directory: Path, names: tuple[str, str]) -> Path:
    """The weights in two shards of these names."""
    directory.mkdir()
    shutil.copy(hf / "config.json", directory)
    state = load_file(hf / "model.safetensors")
    for i, name in enumerate(names):
        half = {n: state[n] for n in sorted(state)[i::2]}
        write = save_file if name.endswith("safetensors") else torch.save
        write(half, directory / name)
    return directory


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_by_their_index(suffix: str, hf: Path, tmp_path: Path) -> None:
    """An index of any name is a SOURCE; a shard is none."""
    names = (f"neo-00001-of-00002.{suffix}", f"neo-00002-of-00002.{suffix}")
    directory = _halves(hf, tmp_path / "m", names)
    state = load_file(hf / "model.safetensors")
    weight_map = {n: names[i % 2] for i, n in enumerate(sorted(state))}
    (directory / f"neo.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for given in (directory, directory / names[1]):
        named, *flags = shlex.split(_told(given)[2].rpartition(": ")[2])
        assert named == str(directory / f"neo.{suffix}.index.json")
        assert flags == ["--allow-pickle"] * (suffix == "bin" and given == directory)
    source = open_checkpoint(named, allow_pickle=True)
    hf_to_tl(source, tmp_path / "tl", layout="bridge", effort="quick")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_parts_put_together_as_told(
    suffix: str, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (f"neo_00001-of-00002.{suffix}", f"neo_00002-of-00002.{suffix}")
    told, _, command = _told(_halves(hf, tmp_path / "m", names))[2].partition("json: ")
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(command)[2], {})
    name = told.partition("convert ")[2].split()[0]
    open_checkpoint(name, cfg=hf / "config.json", allow_pickle=suffix == "pt")


def test_a_file_of_the_hubs_cache(hf: Path, tmp_path: Path) -> None:
    blob, snapshot = tmp_path / "blobs" / ("4d" * 32), tmp_path / "snapshots/abc"
    for path in (blob.parent, snapshot):
        path.mkdir(parents=True)
    shutil.copy(hf / "model.safetensors", blob)
    shutil.copy(hf / "config.json", snapshot)
    (snapshot / "model.safetensors").symlink_to(blob)
    open_checkpoint(_told(blob)[2].rpartition(": ")[2])


def test_a_models_place_in_the_cache_without_its_files(tmp_path: Path) -> None:
    (tmp_path / "models--me--neo/refs").mkdir(parents=True)
    told = _told(tmp_path / "models--me--neo")
    assert "none of its files" in told[0]
    assert "hf download me/neo" in told[2]


def test_a_file_beside_the_weights(hf: Path) -> None:
    open_checkpoint(_told(hf / "config.json")[2].rpartition(": ")[2])


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "merges.txt", "spiece.model"],
)  # fmt: skip
def test_git_lfs_pointers(name: str, hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "m")
    if name == "pytorch_model.bin":
        (tmp_path / "m/model.safetensors").unlink()
    (tmp_path / "m" / name).write_text(LFS)
    told = _told(tmp_path / "m")
    assert "Git LFS pointer" in told[0]
    assert "git lfs pull" in told[2]


def _zipped(name: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, b"x")
    return content.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "page.bin": (b"<!DOCTYPE html><html>", "web page"),
    "m.bin": (b"GGUF\3\0\0\0", "GGUF"),
    "tf.bin": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "junk.pt": (b"junk\0\1" * 99, "not one that torch.save wrote"),
    "weights.h5": (b"x", "TensorFlow"),
    "flax_model.msgpack": (b"x", "Flax"),
    "model.ckpt-4.index": (b"x", "Mesh"),
    "__0_0.distcp": (b"x", "distributed"),
    "notes.txt": (b"x", ".txt"),
    "empty.bin": (b"", "empty"),
    "said.safetensors": (b"Entry not found", "'Entry not found'"),
    "m.safetensors": (b"\x1f\x8b\x08" + b"\1" * 99, "compressed archive"),
    "tar.pt": (b"x" * 257 + b"ustar\0" + b"\1" * 99, "tar archive"),
    "ggml.bin": (b"lmgg\1\0\0\0", "ggml"),
    "dumped.pkl": (b"\x80\x04}.", "Python's own"),
    "weights.npz": (b"PK\5\6", "NumPy"),
    **dict.fromkeys(
        ("a.bin", "a.pkl"), (_zipped("wte.npy"), "NumPy's (.npz), whatever its name says")
    ),
    **dict.fromkeys(("b.bin", "b.pkl"), (_zipped("wte.txt"), "The file is a zip archive")),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    content, what = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert what in _told(tmp_path / name)[0]


def test_a_file_under_anothers_suffix(hf: Path, tmp_path: Path) -> None:
    shutil.copy(hf / "model.safetensors", tmp_path / "m.bin")
    torch.save(load_file(hf / "model.safetensors"), tmp_path / "n.safetensors")
    torch.save(load_file(hf / "model.safetensors"), tmp_path / "o.pkl")
    for name in ("m.bin", "n.safetensors", "o.pkl"):
        do = _told(tmp_path / name)[2]
        better = tmp_path / do.rpartition("to ")[2].rstrip(".")
        (tmp_path / name).rename(better)
        open_checkpoint(better, cfg=hf / "config.json", allow_pickle=True)


def _lora(state: State) -> State:
    name = "transformer.h.0.attn.attention.q_proj"
    base = {n.replace("q_proj.", "q_proj.base_layer."): t for n, t in state.items()}
    lora = {f"{name}.lora_{x}.default.weight": torch.ones(16, 16) for x in "AB"}
    return {f"base_model.model.{n}": t for n, t in (base | lora).items()}


def _int8(state: State) -> State:
    name = "transformer.h.0.mlp.c_fc"
    return {
        **state,
        f"{name}.weight": state[f"{name}.weight"].to(torch.int8),
        f"{name}.SCB": torch.ones(24),
    }


def _gptq(state: State) -> State:
    name = "transformer.h.0.mlp.c_fc"
    packed = {
        f"{name}.qweight": torch.ones(2, 24, dtype=torch.int32),
        f"{name}.scales": torch.ones(1, 24),
    }
    return {n: t for n, t in state.items() if n != f"{name}.weight"} | packed


def _pruned(state: State) -> State:
    name = "transformer.h.0.mlp.c_fc.weight"
    rest = {n: t for n, t in state.items() if n != name}
    return rest | {f"{name}_orig": state[name], f"{name}_mask": torch.ones(24, 16)}


def _gptj(state: State) -> State:
    kept = {n: t for n, t in state.items() if "wpe" not in n and "ln_2" not in n}
    return kept | {
        "lm_head.weight": state["transformer.wte.weight"].clone(),
        "lm_head.bias": torch.ones(37),
    }


def _renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


TENSORS: dict[str, tuple[Callable[[State], State], dict[str, Any], str]] = {
    "ZeRO-3": (lambda s: dict.fromkeys(s, torch.zeros(0)), {}, "ZeRO-3"),
    "ZeRO-3 in part": (lambda s: {**s, "transformer.wte.weight": torch.zeros(0)}, {}, "1 of 30 weights are empty"),
    "int8": (_int8, {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised by bitsandbytes"),
    "int8 without saying": (_int8, {}, "quantised"),
    "GPTQ": (_gptq, {"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
    "said quantised": (dict, {"quantization_config": {"quant_method": "awq"}}, "has a quantization_config"),
    "LoRA in the model": (_lora, {}, "not merged"),
    "LoRA alone": (lambda s: {n: t for n, t in _lora(s).items() if "lora" in n}, {}, "without the model"),
    "pruned": (_pruned, {}, "pruning"),
    "FSDP": (lambda _: {"_fsdp_wrapped_module._flat_param": torch.ones(99)}, {}, "FSDP"),
    "GPT-J by its config": (dict, {"rotary": True, "rotary_dim": 4}, "rotary=True"),
    "GPT-J by its names": (_gptj, {}, "no wpe and no ln_2"),
    "GPT-J": (_renamed("mlp.c_fc", "mlp.fc_in"), {}, "GPT-J"),
    "GPT-2": (_renamed("attn.attention.q_proj", "attn.c_attn"), {}, "GPT-2"),
    "Pythia": (_renamed("transformer.h.", "gpt_neox.layers."), {}, "GPT-NeoX"),
    "LLaMA": (_renamed("transformer.h.0.attn.attention.", "model.layers.0.self_attn."), {}, "LLaMA"),
    "Flax": (lambda s: {n.replace("wte.weight", "wte.embedding"): t for n, t in s.items()}, {}, "Flax"),
    "CodeGen": (_renamed("attn.attention.q_proj", "attn.qkv_proj"), {}, "CodeGen"),
    "optimizer": (lambda _: {"state.0.exp_avg": torch.ones(3)}, {}, "an optimizer's state"),
    "MLX": (lambda s: {**s, "transformer.h.0.mlp.c_fc.scales": torch.ones(3)}, {}, "quantised"),
    "nothing known": (lambda _: {"weight": torch.ones(3)}, {}, "No GPT-Neo embedding"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors(kind: str, hf: Path, tmp_path: Path) -> None:
    make, config, what = TENSORS[kind]
    (tmp_path / "m").mkdir()
    old = json.loads((hf / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(old | config))
    state = {name: t.clone() for name, t in make(load_file(hf / "model.safetensors")).items()}
    save_file(state, tmp_path / "m/model.safetensors")
    told = _told(tmp_path / "m")
    assert what in told[0]


def test_quantization_config_taken_out_as_told(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "m")
    config = json.loads((hf / "config.json").read_text())
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(config | {"quantization_config": {"load_in_8bit": True}}))
    assert "remove quantization_config" in _told(tmp_path / "m")[2]
    path.write_text(json.dumps(config))
    open_checkpoint(tmp_path / "m")


def test_a_link_to_nothing(hf: Path, tmp_path: Path) -> None:
    shutil.copytree(hf, tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    (tmp_path / "m/model.safetensors").symlink_to("../blobs/gone")
    assert "model.safetensors is a link" in _told(tmp_path / "m")[0]


class Loose:
    """What a training script leaves in its checkpoint."""


class LooseConfig(Loose):
    pass


def test_pickled_objects_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    kinds: dict[str, Any] = {
        "tests.test_naming.Loose,": {"model": {}, "trainer": Loose()},
        "holds print,": {"f": print},
        "whole pickled model (torch.nn.modules.linear.Linear)": torch.nn.Linear(1, 1),
    }
    for what, content in kinds.items():
        torch.save(content, path)
        with pytest.raises(PickleRefused, match=re.escape(what)) as raised:
            open_checkpoint(path, allow_pickle=True)
        assert "torch.save(model.state_dict()" in raised.value.do
    torch.save((LooseConfig(), {}), path)
    with pytest.raises(PickleRefused) as raised:
        open_checkpoint(path, allow_pickle=True)
    assert "LooseConfig.to_dict()" in raised.value.do


@pytest.mark.parametrize(
    ("name", "what", "do"),
    [
        ("deepspeed.runtime.zero.config.ZeroStageEnum", "The file is DeepSpeed's", "zero_to_fp32"),
        ("fsdp.parts.ShardedTensor", "one process's part", "full_state_dict=True"),
        ("peft.modeling_peft.Model", "a whole pickled model", "torch.save(model.state_dict(), FILE)"),
        ("numpy.elsewhere.Array", "holds NumPy arrays", "torch.save({n: torch.from_numpy(a) for"),
    ],
)  # fmt: skip
def test_objects_of_libraries_are_named(
    name: str, what: str, do: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, last = name.rpartition(".")
    kind = type(last, (), {"__module__": module})
    packages = module.split(".")
    for n in range(1, len(packages) + 1):
        package = ".".join(packages[:n])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setattr(sys.modules[module], last, kind, raising=False)
    torch.save(kind(), tmp_path / "m.pt")
    with pytest.raises(PickleRefused, match=re.escape(what)) as raised:
        open_checkpoint(tmp_path / "m.pt", allow_pickle=True)
    assert name in raised.value.what
    assert do in raised.value.do


def test_a_program_is_no_state_dict(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "m.pt"))
    with pytest.raises(CorruptFile, match="TorchScript"):
        open_checkpoint(tmp_path / "m.pt", allow_pickle=True)


@pytest.mark.parametrize("kind", ["sparse", "meta", "nested", "quantised", "complex"])
def test_tensors_without_plain_values(kind: str, hf: Path, tmp_path: Path) -> None:
    state = load_file(hf / "model.safetensors")
    name = "transformer.h.0.ln_1.weight"
    plain = state[name]
    odd = {
        "sparse": lambda: plain.to_sparse(), "meta": lambda: plain.to("meta"),
        "nested": lambda: torch.nested.nested_tensor([plain, plain]),
        "quantised": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "complex": lambda: plain.to(torch.complex64),
    }  # fmt: skip
    torch.save({**state, name: odd[kind]()}, tmp_path / "m.pt")
    shutil.copy(hf / "config.json", tmp_path)
    with pytest.raises(BadInput, match=re.escape(name)):
        open_checkpoint(tmp_path / "m.pt", allow_pickle=True)


def test_a_negated_view_has_values(hf: Path, tmp_path: Path) -> None:
    state = load_file(hf / "model.safetensors")
    name = "transformer.h.0.ln_1.weight"
    torch.save({**state, name: torch._neg_view(state[name])}, tmp_path / "m.pt")
    source = open_checkpoint(tmp_path / "m.pt", cfg=hf / "config.json", allow_pickle=True)
    assert torch.equal(torch.from_numpy(source.tensor("blocks.0.ln1.w").copy()), -state[name])
