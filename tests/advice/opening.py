"""converter/checkpoint: files that are missing, damaged, or that no config fits."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import save_file

import converter
from converter.checkpoint import files, pickles
from tests.advice.making import CONVERT, changed, convert, edited, hf, lora, prepared, tl, wrong
from tests.advice.row import Asked, Row, again, instead, less, plus, run, write
from tests.checkpoints import Recipe, read_all, write_hf
from tests.loopback import Hub, environment, serving

WEIGHTS, CONFIG, INDEX = "m/model.safetensors", "m/config.json", "m/model.safetensors.index.json"
PICKLE = "m/pytorch_model.bin"
SECOND = "m/model-00002-of-00002.safetensors"
SOUND = again(lambda: hf())  # the same files, downloaded or saved again


def config(**fields: Any) -> Callable[[], list[str]]:
    return wrong(lambda: changed(CONFIG, **fields))


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[], list[str]]:
    return wrong(lambda: edited(WEIGHTS, change))


def sharded() -> None:
    shutil.rmtree("m", ignore_errors=True)
    write_hf(Path("m"), Recipe(shards=2, finite=True))


def shards(*changes: Callable[[], object]) -> Callable[[], Asked]:
    return prepared(CONVERT, sharded, *changes)


def indexed(name: str) -> None:
    index = json.loads(Path(INDEX).read_text())
    changed(INDEX, weight_map=index["weight_map"] | {"transformer.wte.weight": name})


def _two_shards_of_one() -> None:
    first = "m/model-00001-of-00002.safetensors"
    both = read_all(Path("m"))
    save_file(both, first, metadata={"format": "pt"})


def _stale() -> None:
    shutil.copytree("m", "n")
    edited(SECOND, lambda t: t.pop(next(iter(t))))


WHOLE = again(sharded)
BACK = ["tl-to-hf", "tl", "out", "--no-verify"]


def _lnpre() -> None:
    changed("tl/cfg.json", normalization_type="LNPre")


def _without_norms() -> None:
    def norms(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if n.split(".")[-2] in ("ln1", "ln2", "ln_final")]:
            del tensors[name]

    edited("tl/model.safetensors", norms)


SHARD = "m/shard-00000-model-00001-of-00001.safetensors"


def _named_elsewhere() -> None:
    shutil.copy(WEIGHTS, "m/alt.safetensors")
    changed(CONFIG, transformers_weights="alt.safetensors")


def _adapted() -> list[str]:
    hf()
    for path in lora().iterdir():
        path.rename(Path("m") / path.name)
    return CONVERT


def _moved(do: str, asked: Asked) -> Asked:
    assert isinstance(asked, list)
    subprocess.run(do.rpartition(": ")[2], shell=True, check=True)
    return [*asked, "--adapter", "m/adapter"]


def _single(do: str, asked: Asked) -> Asked:
    assert isinstance(asked, list)
    return [asked[0], do.rpartition(": ")[2].strip("'"), *asked[2:]]


def _pickled() -> list[str]:
    hf()
    torch.save({n: torch.from_numpy(a) for n, a in read_all(Path("m")).items()}, PICKLE)
    Path(WEIGHTS).unlink()
    return CONVERT


def _with_int() -> Callable[[], list[str]]:
    return tensors(
        lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"].astype(np.int64)})
    )


def _given_config(do: str, asked: Asked) -> Asked:
    """What the advice says is written where the model is, and given with --cfg."""
    from transformers import GPTNeoForCausalLM

    code = do.partition("this writes it: ")[2]
    model: Any = GPTNeoForCausalLM.from_pretrained("sound")
    exec(code, {"model": model, "json": json, "open": open})
    assert isinstance(asked, list)
    assert "--cfg config.json" in do
    return [*asked, "--cfg", "config.json"]


def _legacy() -> None:
    """As torch 1.5 wrote it."""
    torch.save(_weights(), PICKLE, _use_new_zipfile_serialization=False)


def _lacking() -> None:
    """Its last tensor is not in the list of those whose bytes follow."""
    Path(WEIGHTS).unlink()
    state = _weights()
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    keys = sorted(str(t.untyped_storage()._cdata) for t in state.values())
    whole, some = (pickle.dumps(each, 2) for each in (keys, keys[:-1]))
    assert buffer.getvalue().count(whole) == 1
    write(PICKLE, buffer.getvalue().replace(whole, some))


def _weights() -> dict[str, Any]:
    return {n: torch.from_numpy(a) for n, a in read_all(hf("sound")).items()}


def pickled(content: Callable[[], Any], **how: Any) -> Callable[[], list[str]]:
    """The model's only weight file is a pickle of this."""

    def change() -> None:
        Path(WEIGHTS).unlink()
        torch.save(content(), PICKLE, **how)

    return wrong(change, convert("--allow-pickle"))


def _with_many_values() -> dict[str, Any]:
    """Few bytes: lists that hold one another twice."""
    value: list[Any] = []
    for _ in range(10):
        value = [value, value, value, value]
    return {"model": _weights(), "history": [value] * 3}


def _saved_alone(do: str, asked: Asked) -> Asked:
    from transformers import GPTNeoForCausalLM

    model: Any = GPTNeoForCausalLM.from_pretrained("sound")
    exec(
        do.partition("save the weights alone: ")[2],
        {"torch": torch, "model": model, "FILE": PICKLE},
    )
    return asked


def _no_config() -> list[str]:
    hf("sound")
    hf()
    Path(CONFIG).unlink()
    return CONVERT


def _no_cfg() -> list[str]:
    tl()
    Path("tl/cfg.json").unlink()
    return ["tl-to-hf", "tl", "out", "--no-verify"]


def _given_cfg(do: str, asked: Asked) -> Asked:
    code = do.partition("this writes it: ")[2]
    tl("again")
    model = mock.Mock()  # TransformerLens 4 has none
    model.cfg.to_dict.return_value = json.loads(Path("again/cfg.json").read_text()) | {
        "dtype": torch.float32
    }
    exec(code, {"model": model, "json": json, "open": open})
    assert isinstance(asked, list)
    assert "--cfg cfg.json" in do
    return [*asked, "--cfg", "cfg.json"]


def _bridge_cfg() -> list[str]:
    hf("sound")
    run(convert(source="sound", out="b"))
    Path("b/config.json").unlink()
    write(
        "b/cfg.json",
        json.dumps(
            {
                "n_layers": 2,
                "d_model": 16,
                "n_ctx": 32,
                "d_head": 4,
                "architecture": "GPTNeoForCausalLM",
            }
        ),
    )
    return ["tl-to-hf", "b", "out", "--no-verify"]


def _bridge_config(do: str, asked: Asked) -> Asked:
    from transformers import GPTNeoForCausalLM

    bridge = type("Bridge", (), {})()
    bridge.original_model = GPTNeoForCausalLM.from_pretrained("sound")
    exec(
        do.partition("this writes it: ")[2],
        {"bridge": bridge, "model": bridge, "json": json, "open": open},
    )
    assert isinstance(asked, list)
    assert "--cfg config.json" in do
    return [*asked, "--cfg", "config.json"]


def _once(do: str, _: Asked) -> Asked:
    """The name without its revision: here, of a directory."""
    return convert(source=do.rpartition(": ")[2])


def _two_configs() -> list[str]:
    hf()
    state = {n: torch.from_numpy(a) for n, a in read_all(Path("m")).items()}
    said = json.loads(Path(CONFIG).read_text())
    torch.save({"old": said | {"window_size": 3}, "new": said, "model": state}, "m.pt")
    return convert("--allow-pickle", source="m.pt")


def _more_tokens() -> list[str]:
    hf(vocab_size=40)
    changed(CONFIG, vocab_size=37)
    return CONVERT


def _as_it_must_be(do: str, asked: Asked) -> Asked:
    words = do.split()
    changed(
        CONFIG, **{words[words.index("must") - 1]: int(words[words.index("be") + 1].rstrip(","))}
    )
    return asked


def _ended() -> Asked:
    hf()
    source = converter.open_checkpoint("m")
    whole = Path(WEIGHTS).read_bytes()
    write(WEIGHTS, whole[:5000])
    return lambda: source.tensor("unembed.W_U").sum()


def _changing() -> Asked:
    hf()
    source = converter.open_checkpoint("m")
    hf(seed=1)
    return lambda: converter.hf_to_tl(source, "out", check=False)


def _opened_again(_do: str, _: Asked) -> Asked:
    hf()
    return lambda: converter.hf_to_tl("m", "out", check=False, layout="bridge")


def _offline() -> Asked:
    def call() -> None:
        with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
            converter.open_checkpoint("me/neo", cache="cache")

    return call


def _downloaded(do: str, asked: Asked) -> Asked:
    """From a hub on this machine, by the command as it is written."""
    line = do.partition("run ")[2].partition("run ")[2].partition(" where")[0]
    with serving(Hub({"main": hf("hub")})) as here:
        words = [str(Path(sys.executable).with_name("hf")), *line.split()[1:]]
        subprocess.run(words, env=environment(here, Path("cache")), check=True, capture_output=True)
    return asked


ROWS = [
    Row("checkpoint/files.py", "The index has no weight_map", shards(lambda: write(INDEX, "{}")), WHOLE),
    Row("checkpoint/files.py", " as a shard, which is not a plain", shards(lambda: indexed("../x.safetensors")), WHOLE, "Do not use"),
    Row("checkpoint/files.py", "The index names ", shards(lambda: Path(SECOND).unlink()), WHOLE, "Download model-00002"),
    Row("checkpoint/files.py", "The index names ", shards(lambda: Path(SECOND).unlink(), lambda: save_file({}, "m/x.safetensors")), WHOLE),
    Row("checkpoint/files.py", "The file is one of ", prepared(convert(source=SECOND), sharded), instead(SECOND), "Give the directory"),
    Row("checkpoint/files.py", "These shards have no index", shards(lambda: os.remove(INDEX), lambda: os.remove(SECOND)), WHOLE, "Download the missing shards"),
    Row("checkpoint/files.py", "This is a pickle file", _pickled, plus("--allow-pickle")),
    Row("checkpoint/files.py", "The JSON file is over", wrong(lambda: write(CONFIG, b" " * (files._MAX_JSON_BYTES + 2))), SOUND),
    Row("checkpoint/files.py", "The file cannot be read as JSON", wrong(lambda: write(CONFIG, "{")), SOUND),
    Row("checkpoint/files.py", "The file holds no JSON object", wrong(lambda: write(CONFIG, "[]")), SOUND),
    Row("checkpoint/files.py", "The index says that ", shards(_stale), WHOLE),
    Row("checkpoint/files.py", " is in two shards", shards(_two_shards_of_one), WHOLE),
    Row("checkpoint/reader.py", "The file ended inside", _ended, again(lambda: hf())),
    Row("checkpoint/reader.py", " has dtype ", wrong(lambda: write(WEIGHTS, _odd_dtype())), SOUND),
    Row("checkpoint/reader.py", "The file is not a sound safetensors", wrong(lambda: write(WEIGHTS, Path(WEIGHTS).read_bytes()[:-3])), SOUND),
    Row("checkpoint/opening.py", " tensor(s) are no plain floats", _with_int(), SOUND),
    Row("checkpoint/matching.py", " have no place in this GPT-Neo", config(num_layers=1, attention_types=[[["global"], 1]]), again(lambda: changed(CONFIG, num_layers=2, attention_types=[[["global", "local"], 1]])), "number of layers"),
    Row("checkpoint/matching.py", " of the model are missing", tensors(lambda t: t.pop("transformer.h.1.ln_2.bias")), SOUND, "incomplete"),
    Row("checkpoint/matching.py", " of the model are missing", config(tie_word_embeddings=False), again(lambda: changed(CONFIG, tie_word_embeddings=True)), "set it to true"),
    Row("checkpoint/matching.py", "normalization_type is LNPre", prepared(BACK, tl, _lnpre), again(lambda: changed("tl/cfg.json", normalization_type="LN")), '"normalization_type": "LN"'),
    Row("checkpoint/matching.py", "normalization_type is LNPre", prepared(BACK, tl, _lnpre), again(_without_norms), "save them without ln1, ln2 and ln_final"),
    Row("checkpoint/config.py", "fail", config(num_heads=3), again(lambda: changed(CONFIG, num_heads=4)), "Check the config"),
    Row("checkpoint/config.py", "fail", config(model_type="gpt2"), SOUND, "Name a GPT-Neo"),
    Row("checkpoint/config.py", "fail", config(attention_dropout="much"), again(lambda: changed(CONFIG, attention_dropout=...)), "or remove it"),
    Row("checkpoint/config.py", "fail", prepared(BACK, tl, lambda: changed("tl/cfg.json", act_fn=...)), again(lambda: changed("tl/cfg.json", act_fn="gelu_new")), '"act_fn": "gelu_new"'),
    Row("checkpoint/config.py", "fail", config(sliding_window=8), again(lambda: changed(CONFIG, sliding_window=...)), "Remove sliding_window"),
    Row("checkpoint/beside.py", "The config names other weights", config(transformers_weights="a.safetensors"), again(lambda: changed(CONFIG, transformers_weights=...)), "remove transformers_weights"),
    Row("checkpoint/beside.py", "The config names other weights", wrong(_named_elsewhere), instead("m"), "give that file"),
    Row("checkpoint/beside.py", "An adapter (PEFT) lies beside", _adapted, _moved, "--adapter"),
    Row("checkpoint/beside.py", "Two sets of weights are here", wrong(lambda: shutil.copy(WEIGHTS, SHARD)), again(lambda: Path(SHARD).unlink()), "move the files shard-* away"),
    Row("checkpoint/fitting.py", "mismatch", _more_tokens, _as_it_must_be),
    Row("checkpoint/fitting.py", "mismatch", tensors(lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"].T.copy()})), SOUND),
    Row("checkpoint/fitting.py", "The config says ", config(num_layers=1000, attention_types=[[["global"], 1000]]), SOUND),
    Row("checkpoint/fitting.py", "The file holds several configs", _two_configs, plus("--cfg", "m/config.json")),
    Row("checkpoint/fitting.py", "The cfg is a TransformerBridge's own", _bridge_cfg, _bridge_config),
    Row("checkpoint/fitting.py", " beside the weights, and shapes alone", _no_config, _given_config),
    Row("checkpoint/fitting.py", " beside the weights, and shapes alone", _no_cfg, _given_cfg),
    Row("checkpoint/pickles.py", "The pickle holds more than tensors", pickled(_weights, pickle_protocol=4), _saved_alone),
    Row("checkpoint/pickles.py", "The archive's pickle is larger", pickled(lambda: {"model": _weights(), "log": "x" * (pickles._LONGEST_PICKLE + 1)}), _saved_alone),
    Row("checkpoint/pickles.py", " values, of which a model has none", pickled(_with_many_values), _saved_alone),
    Row("checkpoint/legacy_pickles.py", "The file does not hold the bytes", wrong(_lacking, convert("--allow-pickle")), again(_legacy), "save it again"),
    Row("checkpoint/source.py", "There is no such file or directory", prepared(convert(source="./nowhere")), instead("./nowhere", "m"), "hub id"),
    Row("checkpoint/source.py", "--revision names a commit", prepared(convert("--revision", "main")), less("--revision", "main")),
    Row("checkpoint/source.py", "This is a link that leads to nothing", prepared(convert(source="ln"), lambda: Path("ln").symlink_to("gone")), instead("ln", "m"), "the place that it should lead to"),
    Row("checkpoint/source.py", "The revision is named twice", prepared(convert("--revision", "main", source="m@v1")), _once, "Leave one of the two out"),
    Row("checkpoint/source.py", "SOURCE changed while", _changing, _opened_again),
    Row("checkpoint/hub.py", "the hub could not be asked", _offline, _downloaded),
    Row("checkpoint/hub.py", "the hub gave no such model", prepared(convert(source="a..b/neo")), instead("a..b/neo", "m"), "a local directory"),
    Row("checkpoint/source.py", "There is no such file or directory", prepared(convert(source="n.safetensors")), instead("n.safetensors", "m"), "hub id"),
    Row("checkpoint/tl_config.py", " cannot be expressed by GPT-Neo", prepared(BACK, tl, lambda: changed("tl/cfg.json", positional_embedding_type="rotary")), again(lambda: changed("tl/cfg.json", positional_embedding_type="standard")), "GPT-Neo's architecture"),
    Row("checkpoint/tl_config.py", " no activation ", prepared(["hf-to-tl", "m", "out", "--no-verify"], lambda: hf(activation_function="quick_gelu")), plus("--layout", "bridge")),
    Row("checkpoint/plan.py", " is not a size", prepared(convert("--max-shard-size", "big")), instead("big", "500MB"), "500MB"),
]  # fmt: skip


def _odd_dtype() -> bytes:
    head = json.dumps(
        {"transformer.wte.weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    ).encode()
    return len(head).to_bytes(8, "little") + head + b"\0"
