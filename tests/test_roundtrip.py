"""HF -> TL -> HF returns every byte, every name and every config field."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from converter.checkpoint import open_checkpoint
from converter.choices import LedgerOption
from converter.convert import bake, hf_to_tl, tl_to_hf
from converter.errors import CorruptFile
from converter.exporting import Graph
from converter.layout import Layout
from converter.pipeline import convert
from converter.request import Checking, Writing
from converter.routing import plain
from converter.verification import verify
from tests.checkpoints import Recipe, read_all, recipes, same, tensors_of, write_hf
from tests.models import random_hf

UNCHECKED = Checking(check=False)
layouts = st.sampled_from(["hooked", "bridge"])
shard_sizes = st.sampled_from(["5GB", "300", "2KB"])


@given(recipes, layouts, shard_sizes, shard_sizes)
@example(Recipe(d_vocab=1, window=1, tied=False), "hooked", "300", "5GB")
@example(Recipe(attention=("local",) * 3, window=64, dtype="BF16"), "bridge", "5GB", "300")
@settings(max_examples=80, deadline=None)
def test_there_and_back(recipe: Recipe, layout: Layout, shards: str, shards_back: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        tensors = write_hf(root / "hf", recipe)
        hf_to_tl(root / "hf", root / "tl", layout=layout, max_shard_size=shards, check=False)
        tl_to_hf(root / "tl", root / "back", max_shard_size=shards_back, check=False)
        assert same(read_all(root / "back"), tensors)
        assert json.loads((root / "back/config.json").read_text()) == recipe.config


@given(recipes)
@settings(max_examples=25, deadline=None)
def test_hooked_and_bridge_are_one_model(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_hf(root / "hf", recipe)
        hf_to_tl(root / "hf", root / "bridge", layout="bridge", check=False)
        hf_to_tl(root / "hf", root / "hooked", check=False)
        convert(plain(open_checkpoint(root / "bridge")), root / "h", "hooked", checking=UNCHECKED)
        convert(plain(open_checkpoint(root / "hooked")), root / "b", "bridge", checking=UNCHECKED)
        assert same(read_all(root / "h"), read_all(root / "hooked"))
        assert same(read_all(root / "b"), read_all(root / "bridge"))


def test_names_and_orientation(tmp_path: Path) -> None:
    """Each tensor where TL's own names put it, written out by hand: no table is trusted here."""
    recipe = Recipe(d_head=2, n_heads=3, attention=("local",), d_mlp=5)
    hf = write_hf(tmp_path / "hf", recipe)
    hf_to_tl(tmp_path / "hf", tmp_path / "hooked", check=False)
    hooked = read_all(tmp_path / "hooked")
    block = "transformer.h.0."
    q = hf[block + "attn.attention.q_proj.weight"]
    o = hf[block + "attn.attention.out_proj.weight"]
    expected = {
        "blocks.0.attn.W_Q": np.stack([q[2 * n : 2 * n + 2].T for n in range(3)]),
        "blocks.0.attn.W_O": np.stack([o[:, 2 * n : 2 * n + 2].T for n in range(3)]),
        "blocks.0.mlp.W_in": hf[block + "mlp.c_fc.weight"].T,
        "blocks.0.mlp.W_out": hf[block + "mlp.c_proj.weight"].T,
        "unembed.W_U": hf["transformer.wte.weight"].T,
        "embed.W_E": hf["transformer.wte.weight"],
        "unembed.b_U": np.zeros(7, np.float32),
        "blocks.0.attn.b_K": np.zeros((3, 2), np.float32),
    }
    assert same({name: hooked[name] for name in expected}, expected)
    assert len(hooked) == 2 + 16 + 4


def test_headless_gets_its_prefix_and_tied_head(tmp_path: Path) -> None:
    recipe = Recipe(headless=True)
    tensors = write_hf(tmp_path / "hf", recipe)
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", check=False)
    tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    back = read_all(tmp_path / "back")
    assert same(back, {f"transformer.{name}": t for name, t in tensors.items()})
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["architectures"] == ["GPTNeoForCausalLM"]


def _rewrite(path: Path, **changes: np.ndarray) -> None:
    tensors = read_all(path)
    assert set(changes) <= set(tensors)
    save_file({**tensors, **changes}, path / "model.safetensors", metadata={"format": "pt"})


def test_an_edited_head_is_untied(tmp_path: Path) -> None:
    """Once embedding and head differ, writing one of them would lose the other."""
    write_hf(tmp_path / "hf", Recipe())
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", check=False)
    head = read_all(tmp_path / "tl")["unembed.W_U"].copy()
    head[0, 0] = 17
    _rewrite(tmp_path / "tl", **{"unembed.W_U": head})
    tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    assert json.loads((tmp_path / "back/config.json").read_text())["tie_word_embeddings"] is False
    assert read_all(tmp_path / "back")["lm_head.weight"].tobytes() == head.T.tobytes()


def test_a_tied_head_stored_twice_is_written_once(tmp_path: Path) -> None:
    recipe = Recipe()
    tensors = write_hf(tmp_path / "hf", recipe)
    both = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}
    save_file(both, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", layout="bridge", check=False)
    done = tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    assert same(read_all(tmp_path / "back"), tensors)
    assert done.plan.dropped["unembed.weight"] == "the embedding again"


@pytest.mark.parametrize("stated", ["float32", "float16", None])
def test_weights_of_several_dtypes_open_as_before(stated: str | None, tmp_path: Path) -> None:
    """As a frozen or quantised-for-training embedding is kept: it is 16-bit, the rest is not."""
    source = random_hf(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].astype(np.float16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": stated}
    (source / "config.json").write_text(json.dumps(config))

    def said(directory: Path) -> str | None:
        name = "cfg.json" if (directory / "cfg.json").exists() else "config.json"
        found: str | None = json.loads((directory / name).read_text()).get("dtype")
        return found

    for layout in ("hooked", "bridge"):
        there, back = tmp_path / layout, tmp_path / f"{layout}-back"
        hf_to_tl(source, there, layout=layout, effort="quick")
        tl_to_hf(there, back, check=False)
        assert same(read_all(back), tensors)
        # TransformerLens's own config rounds nothing.
        assert said(there) == ("float32" if layout == "hooked" else stated)
        assert said(back) == (stated if layout == "bridge" or stated is None else "float32")
    bake(source, tmp_path / "baked", effort="quick")
    bake(source, tmp_path / "same", process="none", graph=Graph(), effort="quick")
    assert said(tmp_path / "baked") == said(tmp_path / "same") == stated
    bake(source, tmp_path / "half", process="none", dtype="bfloat16", check=False)
    assert said(tmp_path / "half") == "bfloat16"


@pytest.mark.parametrize("ledger", ["compact", "exact"])
@pytest.mark.parametrize("wide", ["ln_", "wte"])
def test_processing_weights_of_several_dtypes_is_undone(
    wide: str, ledger: LedgerOption, tmp_path: Path
) -> None:
    """What 16 bits cost those that were stored in them is not held against undoing."""
    source = random_hf(tmp_path / "hf")
    tensors = {
        name: tensor if wide in name else tensor.astype(np.float16)
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_tl(source, tmp_path / "tl", process="default", ledger=ledger, effort="quick")
    tl_to_hf(tmp_path / "tl", tmp_path / "back", effort="quick")
    assert (ledger == "exact") <= same(read_all(tmp_path / "back"), tensors)


def test_without_provenance_the_config_is_rebuilt(tmp_path: Path) -> None:
    recipe = Recipe(d_mlp=5, attention=("global", "local") * 2, tied=False)
    tensors = write_hf(tmp_path / "hf", recipe)
    hf_to_tl(tmp_path / "hf", tmp_path / "tl", check=False)
    (tmp_path / "tl/neoconvert.json").unlink()
    tl_to_hf(tmp_path / "tl", tmp_path / "back", check=False)
    assert same(read_all(tmp_path / "back"), tensors)
    config = json.loads((tmp_path / "back/config.json").read_text())
    architecture = {k: v for k, v in recipe.config.items() if k in config and "dropout" not in k}
    architecture |= {"attention_types": [[["global", "local"], 2]]}
    assert config | architecture | {"bos_token_id": None, "eos_token_id": None} == config


def test_the_plan_is_what_is_written(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Recipe(buffers=True, shards=2))
    source = open_checkpoint(tmp_path / "hf")
    writing = Writing(max_shard_size="400")
    done = convert(plain(source), tmp_path / "tl", "hooked", writing, UNCHECKED)
    written = read_all(tmp_path / "tl")
    assert {t.name: t.shape for t in done.plan.tensors} == {n: t.shape for n, t in written.items()}
    assert sum(t.nbytes for t in written.values()) == done.plan.nbytes
    index = json.loads((tmp_path / "tl/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.plan.nbytes
    assert set(index["weight_map"]) == set(written)
    assert len(done.plan.shards) > 2
    files = {p.name for p in (tmp_path / "tl").iterdir()}
    assert files == {
        *done.plan.shards,
        "model.safetensors.index.json",
        "cfg.json",
        "neoconvert.json",
        "neoconvert.intoto.jsonl",
    }
    kept = json.loads((tmp_path / "tl/neoconvert.json").read_text())
    assert len(kept["dropped"]) == 4
    assert set(kept["source"]["tensors"]) == set(tensors_of(Recipe()))


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
def test_a_model_of_nothing_but_nan_is_verified_by_its_weights(
    layout: Layout, tmp_path: Path
) -> None:
    tensors = write_hf(tmp_path / "hf", Recipe())
    there = hf_to_tl(tmp_path / "hf", tmp_path / "tl", layout=layout)
    assert there.verification is not None
    assert not any(probe.compared for probe in there.verification.probes)
    tl_to_hf(tmp_path / "tl", tmp_path / "back")
    assert same(read_all(tmp_path / "back"), tensors)
    alone = verify(
        open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "tl"), checks=["function"]
    )
    assert not alone.passed


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("process", ["none", "default"])
@pytest.mark.parametrize("layout", ["hooked", "bridge"])
def test_recorded_digests_are_of_the_bytes(
    layout: Layout, process: str, dtype: str | None, tmp_path: Path
) -> None:
    """Of tensors that are moved, cast and computed alike."""

    def digests(directory: Path) -> dict[str, str]:
        tensors = load_file(directory / "model.safetensors")
        return {
            name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in tensors.items()
        }

    write_hf(tmp_path / "hf", Recipe(finite=True))
    hf_to_tl(
        tmp_path / "hf", tmp_path / "tl", layout=layout, process=process, dtype=dtype, check=False
    )
    kept = json.loads((tmp_path / "tl/neoconvert.json").read_text())
    for side, directory in (("source", tmp_path / "hf"), ("output", tmp_path / "tl")):
        true = digests(directory)
        recorded = {name: each["sha256"] for name, each in kept[side]["tensors"].items()}
        assert recorded == {name: true[name] for name in recorded}
        assert len(recorded) > 25


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Recipe())
    source, file = open_checkpoint(tmp_path / "hf"), tmp_path / "hf/model.safetensors"
    with open(file, "r+b") as cut:
        cut.truncate(file.stat().st_size - 1)
    with pytest.raises(CorruptFile, match="ended inside") as caught:
        [source.tensor(key) for key in source.stored]
    assert caught.value.where == str(file)


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
def test_weights_that_are_not_finite_are_counted(layout: Layout, tmp_path: Path) -> None:
    """Whether they are moved, turned or copied piece by piece."""
    tensors = {n: np.ones_like(a) for n, a in write_hf(tmp_path / "hf", Recipe()).items()}
    wrong = {"transformer.wte.weight": 3, "transformer.h.0.mlp.c_fc.weight": 2, "transformer.ln_f.bias": 1}  # fmt: skip
    for name, count in wrong.items():
        tensors[name].reshape(-1)[:count] = np.nan
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    done = hf_to_tl(tmp_path / "hf", tmp_path / "tl", layout=layout, check=False)
    (remark,) = [line for line in done.remarks if "NaN" in line]
    for name, count in wrong.items():
        assert f"{name} ({count} elements)" in remark
