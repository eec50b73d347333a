"""Everything a checkpoint may come as."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from converter import bake, explain, export_onnx, piecewise, verify
from converter.checkpoint import open_checkpoint
from converter.cli import main
from converter.convert import hf_to_tl, tl_to_hf
from converter.dtypes import same_bits
from converter.errors import BadInput, ConfigError, MissingTensor, PickleRefused, UnsafeReference
from converter.inspection import Inspection, inspect
from converter.layout import Layout
from tests.checkpoints import Recipe, Tensors, read_all, same, write_hf

RECIPE = Recipe(attention=("local", "global"), d_mlp=5)


@pytest.fixture
def hooked(tmp_path: Path) -> tuple[Tensors, Path]:
    """HF tensors, and the same model as a hooked directory."""
    tensors = write_hf(tmp_path / "hf", RECIPE)
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", check=False)
    return tensors, tmp_path / "tl"


def _torch(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array.copy()) for name, array in tensors.items()}


def _cfg(directory: Path) -> dict[str, object]:
    """As `model.cfg.to_dict()` has it: a real dtype, fields of any kind."""
    cfg = json.loads((directory / "cfg.json").read_text())
    return {**cfg, "dtype": torch.float32, "device": "cpu", "seed": None, "n_params": 123}


@pytest.mark.parametrize("kind", ["tuple", "reversed", "dict"])
def test_saved_pair_of_cfg_and_state_dict(
    kind: str, hooked: tuple[Tensors, Path], tmp_path: Path
) -> None:
    tensors, directory = hooked
    pair = (_cfg(directory), _torch(read_all(directory)))
    saved = {"tuple": pair, "reversed": pair[::-1], "dict": {"cfg": pair[0], "state_dict": pair[1]}}
    torch.save(saved[kind], tmp_path / "model.pt")
    source = open_checkpoint(tmp_path / "model.pt", allow_pickle=True)
    tl_to_hf(source, tmp_path / "back", check=False)
    assert same(read_all(tmp_path / "back"), tensors)


@pytest.mark.parametrize("version", ["2.x", "3.x"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_bare_state_dict(
    suffix: str, version: str, hooked: tuple[Tensors, Path], tmp_path: Path
) -> None:
    """`torch.save(model.state_dict())`, with the buffers that TL 2 and TL 3 leave in it."""
    tensors, directory = hooked
    state = _torch(read_all(directory))
    size = 9 if version == "2.x" else 0
    for layer in range(2):
        state[f"blocks.{layer}.attn.mask"] = torch.ones(size, size, dtype=torch.bool)
        state[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-torch.inf)
    (tmp_path / "bare").mkdir()
    file = tmp_path / f"bare/model{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file as save_torch

        save_torch(state, file)
    else:
        torch.save(state, file)
    with pytest.raises(ConfigError, match="--cfg"):
        open_checkpoint(file, allow_pickle=True)
    source = open_checkpoint(file, cfg=directory / "cfg.json", allow_pickle=True)
    assert list(source.dropped) == [
        f"blocks.{i}.attn.{b}" for i in range(2) for b in ("IGNORE", "mask")
    ]
    done = tl_to_hf(source, tmp_path / "back", check=False)
    assert same(read_all(tmp_path / "back"), tensors)
    assert done.plan.dropped["blocks.0.attn.IGNORE"] == "a buffer, not a weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hf_pickles(dtype: torch.dtype, tmp_path: Path) -> None:
    """pytorch_model.bin with the mask buffers of old transformers."""
    state = {n: t.to(dtype) for n, t in _torch(write_hf(tmp_path / "hf", RECIPE)).items()}
    buffers = {"transformer.h.0.attn.attention.bias": torch.ones(1, 1, 9, 9, dtype=torch.uint8),
               "transformer.h.0.attn.attention.masked_bias": torch.tensor(-1e9)}  # fmt: skip
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(state | buffers, tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(PickleRefused):
        open_checkpoint(tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf", allow_pickle=True)
    hf_to_tl(source, tmp_path / "tl", check=False)
    tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    from safetensors.torch import load_file

    back = load_file(tmp_path / "back/model.safetensors")
    assert set(back) == set(state)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert all(torch.equal(back[n].view(integer), state[n].view(integer)) for n in state)


def _edit(directory: Path, cfg: dict[str, object], tensors: Tensors) -> None:
    path = directory / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **cfg}))
    save_file({**read_all(directory), **tensors}, directory / "model.safetensors")


def test_scaled_attention_is_absorbed(hooked: tuple[Tensors, Path], tmp_path: Path) -> None:
    _, directory = hooked
    weight = np.random.default_rng(0).normal(size=(2, 4, 2)).astype(np.float32)
    _edit(directory, {"use_attn_scale": True}, {"blocks.1.attn.W_Q": weight})
    done = tl_to_hf(directory, tmp_path / "back", check=False)
    assert "absorbed" in done.route.remarks[0]
    found = read_all(tmp_path / "back")["transformer.h.1.attn.attention.q_proj.weight"]
    expected = (weight.astype(np.float64) / 2**0.5).astype(np.float32)
    assert np.array_equal(found, expected.transpose(0, 2, 1).reshape(4, 4))


def test_half_a_layernorm_is_an_error(hooked: tuple[Tensors, Path]) -> None:
    _, directory = hooked
    tensors = {n: t for n, t in read_all(directory).items() if n != "blocks.0.ln1.w"}
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(MissingTensor, match=r"blocks\.0\.ln1\.w"):
        open_checkpoint(directory)


@pytest.mark.parametrize("key", ["blocks.0.ln1.w", "blocks.1.ln2.b", "ln_final.w"])
def test_a_gain_that_lnpre_ignores_is_an_error(
    key: str, hooked: tuple[Tensors, Path], tmp_path: Path
) -> None:
    """Raw weights with a processed model's cfg. Identity norms, which some versions leave, are none."""
    _, directory = hooked
    cfg = json.loads((directory / "cfg.json").read_text()) | {"normalization_type": "LNPre"}
    (directory / "cfg.json").write_text(json.dumps(cfg))
    tensors = read_all(directory)
    for name, tensor in tensors.items():
        if name.split(".")[-2] in ("ln1", "ln2", "ln_final"):
            tensors[name] = np.full_like(tensor, name.endswith(".w"))
    save_file(tensors, directory / "model.safetensors")
    assert open_checkpoint(directory).config.folded
    tensors[key] = tensors[key] + np.eye(1, tensors[key].size, 1, dtype=tensors[key].dtype)[0]
    save_file(tensors, directory / "model.safetensors")
    for words in (["inspect"], ["tl-to-hf", "o"], ["explain", "."], ["export-onnx", "o"]):
        asked = [words[0], str(directory), *(str(tmp_path / "hf" / word) for word in words[1:])]
        result = CliRunner().invoke(main, asked)
        assert result.exit_code == 3
        assert f"{key} is not" in result.stderr


def test_only_tokenizer_files_are_copied(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", RECIPE)
    for name in ("tokenizer.json", "merges.txt", "training_args.json", "optimizer.pt", "README.md"):
        (tmp_path / "hf" / name).write_text(name)
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", layout="bridge", check=False)
    tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    assert {p.name for p in (tmp_path / "tl").iterdir()} == {
        "model.safetensors", "config.json", "neoconvert.json", "neoconvert.intoto.jsonl",
        "tokenizer.json", "merges.txt",
    }  # fmt: skip
    assert {p.name for p in (tmp_path / "back").iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "neoconvert.json",
        "neoconvert.intoto.jsonl", "tokenizer.json", "merges.txt",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "sentencepiece.bpe.model"])
def test_every_kind_of_tokenizer_comes_along(name: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", RECIPE)
    (tmp_path / "hf" / name).write_bytes(b"[PAD]\n[UNK]\n")
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", check=False)
    tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    assert (tmp_path / "back" / name).read_bytes() == b"[PAD]\n[UNK]\n"


@pytest.mark.parametrize(
    ("name", "text", "fits"),
    [
        ("tokenizer.json", {"model": {"vocab": {"a": 6}}, "added_tokens": []}, True),
        ("tokenizer.json", {"model": {"vocab": {"a": 7}}, "added_tokens": []}, False),
        ("tokenizer.json", {"model": {"vocab": [["a", -1.0]] * 8}}, False),
        ("tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [{"id": 9}]}, False),
        ("tokenizer.json", {"model": 3, "added_tokens": "x"}, True),
        ("tokenizer.json", ["no object"], False),
        ("vocab.json", {"a": 0, "b": 7}, False),
        ("added_tokens.json", {"<pad>": 7}, False),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_said(
    name: str, text: object, fits: bool, tmp_path: Path
) -> None:
    write_hf(tmp_path / "hf", RECIPE)
    (tmp_path / "hf" / name).write_text(json.dumps(text))
    notes = [note for note in open_checkpoint(tmp_path / "hf").notes if name in note]
    assert len(notes) == (0 if fits else 1)


def _names_other_weights(hf: Path) -> None:
    """Which only transformers 5 loads."""
    (hf / "model.safetensors").rename(hf / "alt.safetensors")
    write_hf(hf, replace(RECIPE, seed=RECIPE.seed + 1))
    config = json.loads((hf / "config.json").read_text())
    config |= {"transformers_weights": "alt.safetensors"}
    (hf / "config.json").write_text(json.dumps(config))


def _adapter_beside(hf: Path) -> None:
    (hf / "adapter_config.json").write_text("{}")


def _second_set(hf: Path) -> None:
    shutil.copy(hf / "model.safetensors", hf / "shard-00000-model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_names_other_weights, r"names other weights, 'alt\.safetensors', than model\.safetensors"),
        (_adapter_beside, r"An adapter .* beside"),
        (_second_set, r"model\.safetensors and shard-"),
    ],
)
def test_other_weights_than_those_that_transformers_loads(
    spoil: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    write_hf(tmp_path / "hf", RECIPE)
    shutil.copytree(tmp_path / "hf", tmp_path / "sound")
    spoil(tmp_path / "hf")
    commands: tuple[Callable[[Path], object], ...] = (
        lambda hf: hf_to_tl(hf, tmp_path / "tl", check=False),
        lambda hf: bake(hf, tmp_path / "baked", check=False),
        lambda hf: export_onnx(hf, tmp_path / "onnx", check=False),
        lambda hf: explain(hf, tmp_path / "sound"),
        lambda hf: explain(tmp_path / "sound", hf),
        lambda hf: verify(tmp_path / "sound", hf, checks="weights"),
        lambda hf: verify(hf, tmp_path / "sound", checks="weights"),
        inspect,
    )
    for command in commands:
        with pytest.raises(BadInput, match=said):
            command(tmp_path / "hf")


def test_the_file_that_the_config_names_may_be_given(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", RECIPE)
    _names_other_weights(tmp_path / "hf")
    bake(tmp_path / "hf/alt.safetensors", tmp_path / "out", process="none", check=False)
    assert same(read_all(tmp_path / "out"), tensors)
    assert "transformers_weights" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_config_may_name_the_weights_that_are_loaded_anyway(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", RECIPE)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    for shards, name in ((1, "model.safetensors"), (2, "model.safetensors.index.json")):
        shutil.rmtree(tmp_path / "hf")
        write_hf(tmp_path / "hf", replace(RECIPE, shards=shards))
        named = json.dumps(config | {"transformers_weights": name})
        (tmp_path / "hf/config.json").write_text(named)
        hf_to_tl(tmp_path / "hf", tmp_path / f"tl{shards}", check=False)
        tl_to_hf(tmp_path / f"tl{shards}", tmp_path / f"back{shards}", check=False)
        assert same(read_all(tmp_path / f"back{shards}"), tensors)
        back = json.loads((tmp_path / f"back{shards}/config.json").read_text())
        assert back == config


def test_an_adapter_beside_weights_of_another_layout_is_nobodys(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", RECIPE)
    for layout in ("hooked", "bridge"):
        hf_to_tl(tmp_path / "hf", tmp_path / layout, layout=layout, check=False)
        _adapter_beside(tmp_path / layout)
        open_checkpoint(tmp_path / layout)


@pytest.mark.parametrize("said", [{"do_sample": True, "top_k": 50}, {}])
def test_generation_config_survives(said: dict[str, Any], tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", RECIPE)
    text = json.dumps(said)
    (tmp_path / "hf/generation_config.json").write_text(text)
    for layout in ("hooked", "bridge"):
        hf_to_tl(tmp_path / "hf", tmp_path / layout, layout=layout, check=False)
        tl_to_hf(tmp_path / layout, tmp_path / f"{layout}-back", check=False)
        kept = (tmp_path / f"{layout}-back/generation_config.json").read_text()
        assert json.loads(kept) == json.loads(text)


def test_symlinked_source_as_in_the_hub_cache(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "blobs", RECIPE)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    hf_to_tl(tmp_path / "snapshot", tmp_path / "tl", check=False)
    tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    assert same(read_all(tmp_path / "back"), tensors)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "generation_config.json"])
def test_what_links_elsewhere_is_not_copied(name: str, tmp_path: Path) -> None:
    """A model's folder from a stranger must not bring a file of one's own into what is published."""
    write_hf(tmp_path / "hf", RECIPE)
    (tmp_path / "secret").write_text('{"a": 1}')
    link = tmp_path / "hf" / name
    link.unlink(missing_ok=True)
    link.symlink_to("../secret")
    with pytest.raises(UnsafeReference, match=name) as caught:
        hf_to_tl(tmp_path / "hf", tmp_path / "tl", check=False)
    assert not (tmp_path / "tl").exists()
    # the advice works
    subprocess.run(caught.value.do.partition(": ")[2], shell=True, check=True)
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", check=False)
    assert not link.is_symlink()


def test_further_chat_templates_come_along(tmp_path: Path) -> None:
    """transformers 4.53 and later write those that have a name to a folder."""
    write_hf(tmp_path / "hf", RECIPE)
    folder = tmp_path / "hf/additional_chat_templates"
    folder.mkdir()
    for name in ("tool_use.jinja", "rag.jinja", "notes.txt"):
        (folder / name).write_text(name)
    (folder / "a.jinja").mkdir()
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", check=False)
    tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    for there in ("tl", "back"):
        copied = list((tmp_path / there / folder.name).iterdir())
        assert {p.name: p.read_text() for p in copied} == {n: n for n in ("tool_use.jinja", "rag.jinja")}  # fmt: skip
    listed = Inspection(open_checkpoint(tmp_path / "back")).to_json()["tokenizer_files"]
    assert listed == [f"{folder.name}/rag.jinja", f"{folder.name}/tool_use.jinja"]
    tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False, overwrite=True)
    for i in range(100):
        (folder / f"t{i:02}.jinja").write_text("")
    assert any("3 of the tokenizer's" in note for note in open_checkpoint(tmp_path / "hf").notes)


@pytest.mark.parametrize("link", ["", "/tool_use.jinja"])
def test_chat_templates_that_link_elsewhere_are_not_copied(link: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", RECIPE)
    (tmp_path / "private").mkdir()
    (tmp_path / "private/tool_use.jinja").write_text("secret")
    place = tmp_path / "hf/additional_chat_templates"
    place = place if not link else place / link[1:]
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(os.path.relpath(f"{tmp_path}/private{link}", place.parent))
    with pytest.raises(UnsafeReference, match=place.name) as caught:
        hf_to_tl(tmp_path / "hf", tmp_path / "tl", check=False)
    subprocess.run(caught.value.do.partition(": ")[2], shell=True, check=True)
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", check=False)
    assert (tmp_path / "tl/additional_chat_templates/tool_use.jinja").read_text() == "secret"


@pytest.mark.parametrize(
    ("name", "classes", "code"),
    [
        ("tokenizer_config.json", {"AutoTokenizer": [None, "tokenization_neo.NeoTok"]}, "tokenization_neo.py"),
        ("tokenizer_config.json", ["tokenization_neo.NeoTok", None], "tokenization_neo.py"),
        ("config.json", {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "config_x.C"}, "config_x.py, modeling_x.py"),
        ("config.json", {"AutoModelForCausalLM": "me/other--modeling_x.X"}, None),
        ("tokenizer_config.json", 3, None),
    ],
)  # fmt: skip
def test_code_that_is_not_copied_is_said(
    name: str, classes: object, code: str | None, tmp_path: Path
) -> None:
    write_hf(tmp_path / "hf", RECIPE)
    path = tmp_path / "hf" / name
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | {"auto_map": classes}))
    notes = [note for note in open_checkpoint(tmp_path / "hf").notes if "code of its own" in note]
    assert len(notes) == (code is not None)
    assert all(f"{name} names code of its own, {code}" in note for note in notes)


@pytest.mark.parametrize("inside", [True, False])
def test_links_that_stay_are_followed(inside: bool, tmp_path: Path) -> None:
    """Within the directory, or as the hub's cache has them."""
    cache = tmp_path / "models--a--b"
    source = cache / "snapshots/0123"
    write_hf(source, RECIPE)
    place = source / ".git/annex" if inside else cache / "blobs"
    place.mkdir(parents=True)
    (place / "abc").write_text("{}")
    (source / "vocab.json").symlink_to(os.path.relpath(place / "abc", source))
    hf_to_tl(source, tmp_path / "tl", check=False)
    assert (tmp_path / "tl/vocab.json").read_text() == "{}"
    assert not (tmp_path / "tl/vocab.json").is_symlink()


def test_inspection(hooked: tuple[Tensors, Path]) -> None:
    _, directory = hooked
    facts = Inspection(open_checkpoint(directory)).to_json()
    assert (facts["layout"], facts["steps"]) == ("hooked", [])
    assert facts["n_params"] == sum(t.size for t in read_all(directory).values())
    assert facts["config"]["attn_types"] == ["local", "global"]
    assert {t["name"] for t in facts["tensors"]} == set(read_all(directory))


def test_what_runs_no_model_imports_no_library_that_does(
    hooked: tuple[Tensors, Path], tmp_path: Path
) -> None:
    _, directory = hooked
    converting = ["tl-to-hf", str(directory), str(tmp_path / "out"), "--no-verify"]
    for arguments in (
        ["--help"], ["hf-to-tl", "--help"], ["inspect", str(directory), "--json"], converting,
    ):  # fmt: skip
        program = (
            "import sys\n"
            "from converter.cli import main\n"
            "try: main(sys.argv[1:])\n"
            "except SystemExit as end: code = end.code\n"
            "heavy = {'torch', 'transformers', 'transformer_lens', 'onnxruntime', 'onnx', 'onnx_ir', 'sympy'}\n"
            "heavy &= set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "sys.exit(code)"
        )
        result = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr


def test_what_was_filled_in_is_said_and_kept(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", RECIPE)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    del config["layer_norm_epsilon"]
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    source = open_checkpoint(tmp_path / "hf")
    (note,) = source.notes
    assert "layer_norm_epsilon=1e-05" in note
    assert Inspection(source).to_json()["notes"] == [note]
    assert hf_to_tl(source, tmp_path / "tl", check=False).to_json()["notes"] == [note]
    assert json.loads((tmp_path / "tl/neoconvert.json").read_text())["notes"] == [note]
    assert open_checkpoint(tmp_path / "tl").notes == ()


def test_a_cfg_of_something_else_beside_the_weights(tmp_path: Path) -> None:
    """Such as a sparse autoencoder's."""
    write_hf(tmp_path / "hf", RECIPE)
    plain = open_checkpoint(tmp_path / "hf")
    (tmp_path / "hf/cfg.json").write_text(json.dumps({"d_in": 16, "d_sae": 64}))
    source = open_checkpoint(tmp_path / "hf")
    assert source.config == plain.config
    assert source.notes == ("the cfg.json beside the weights is not theirs, and was not used",)
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {"num_layers": 0}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as raised:
        open_checkpoint(tmp_path / "hf")
    assert raised.value.where == str(tmp_path / "hf/config.json")


def test_every_byte_of_a_source_is_in_the_record(tmp_path: Path) -> None:
    """Buffers that are left out, the header, config and tokenizer: one bit more, another record."""
    write_hf(tmp_path / "hf", Recipe(buffers=True, d_vocab=2, attention=("local",)))
    (tmp_path / "hf/tokenizer.json").write_text("{}")

    def record(name: str) -> tuple[Any, Any]:
        hf_to_tl(tmp_path / "hf", tmp_path / name, check=False)
        document = json.loads((tmp_path / name / "neoconvert.json").read_text())
        assert document["options"]["check"] is None
        source = document["source"]
        return source["tensors"], source["files"]

    before = record("before")
    assert set(before[1]) == {"config.json", "model.safetensors", "tokenizer.json"}
    weights = tmp_path / "hf/model.safetensors"
    data = weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = {header + i for i in range(0, len(data) - header, 131)} | {len(data) - 1}
    for place in (*sorted(places), data.index(b'"pt"') + 1):
        weights.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert record(f"at {place}") != before
    weights.write_bytes(data)
    assert record("again") == before
    for name in ("config.json", "tokenizer.json"):
        with open(tmp_path / "hf" / name, "a") as file:
            file.write("\n")
        assert record(f"after {name}") != before


@pytest.mark.parametrize("layout", ["hooked", "bridge", "hf"])
@pytest.mark.parametrize("bit", ["", "first", "last"])
def test_a_tie_is_compared_to_the_last_bit(
    layout: Layout, bit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece at a time, whichever way the head lies in the file."""
    monkeypatch.setattr(piecewise, "PIECE", 64)
    write_hf(tmp_path / "hf", Recipe(tied=True))
    there = tmp_path / ("hf" if layout == "hf" else "there")
    if layout != "hf":
        hf_to_tl(tmp_path / "hf", there, layout=layout, check=False)
    file = next(there.glob("*.safetensors"))
    tensors = load_file(file)
    names = {"hooked": "unembed.W_U", "bridge": "unembed.weight", "hf": "lm_head.weight"}
    head, embedding = names[layout], {"hf": "transformer.wte.weight", "hooked": "embed.W_E", "bridge": "embed.weight"}[layout]  # fmt: skip
    tensors[head] = (tensors[embedding].T if layout == "hooked" else tensors[embedding]).copy()
    if bit:
        whole = tensors[head].reshape(-1).view(np.uint32)
        whole[{"first": 0, "last": -1}[bit]] ^= 1
    save_file(tensors, file)
    assert open_checkpoint(there).tied is (not bit)


def test_rows_of_a_tensor(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Recipe())
    for reader in open_checkpoint(tmp_path / "hf").source.readers:
        for name in reader.tensors:
            whole = reader.read(name)
            for start, stop in ((0, 1), (1, 3), (2, 10**6), (5, 5)):
                assert same_bits(reader.rows(name, start, stop), whole[start:stop]), name
