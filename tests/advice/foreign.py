"""converter/checkpoint/foreign_*: what other programs write, and pickles."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from converter.checkpoint import foreign_files, pickles
from tests.advice.making import Q, changed, convert, hf, lora, prepared, run_command, wrong
from tests.advice.opening import SOUND, WEIGHTS
from tests.advice.row import Asked, Row, again, command, instead, run, shell, write

State = dict[str, torch.Tensor]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 526014904\n"
CONFIG = ["--cfg", "config.json"]


def state(name: str = "m") -> State:
    return load_file(f"{name}/model.safetensors")


def saved(make: Callable[[State], State], **config: Any) -> Callable[[], list[str]]:
    """The model with other tensors, and its config changed."""

    def change() -> None:
        made = {name: tensor.clone() for name, tensor in make(state()).items()}
        save_file(made, WEIGHTS)
        changed("m/config.json", **config)

    return wrong(change)


def folder(*files: str, weights: str = "", source: str = "d") -> Callable[[], list[str]]:
    """A directory of files that are none of ours, and the weights in one of a name of its own."""

    def ask() -> list[str]:
        hf("m")
        shutil.copy("m/config.json", ".")
        Path("d").mkdir()
        for name in files:
            write(f"d/{name}", "x")
        if weights:
            file = Path("d", weights)
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy("m/config.json", file.parent)
            if file.suffix == ".safetensors":
                shutil.copy(WEIGHTS, file)
            else:
                torch.save(state(), file)
        return convert(source=source)

    return ask


def pickled(make: Callable[[State], Any]) -> Callable[[], list[str]]:
    def ask() -> list[str]:
        hf()
        shutil.copy("m/config.json", ".")
        torch.save(make(state()), "m.pt")
        return convert("--allow-pickle", *CONFIG, source="m.pt")

    return ask


def _here(source: str = "d") -> Callable[[str, Asked], Asked]:
    """The model itself is put there, as the advice says to get it."""

    def follow(_: str, asked: Asked) -> Asked:
        shutil.rmtree(source)
        hf(source)
        return asked

    return follow


def _saved_again(_do: str, asked: Asked) -> Asked:
    torch.save(state(), "m.pt")
    return asked


def _in_python(do: str, asked: Asked) -> Asked:
    """The code of the advice, where the file was made."""
    code = do[do.index("torch.save(") :].rstrip(".")
    parts: Any = state()
    arrays = {name: tensor.numpy() for name, tensor in parts.items()}
    model = mock.Mock()
    model.state_dict.return_value = parts
    exec(code, {"torch": torch, "state": parts, "arrays": arrays, "model": model, "FILE": "m.pt"})
    return asked


def _put_together(do: str, _asked: Asked) -> Asked:
    """A command, the file that it names, and the options to read that with."""
    told, _, line = do.partition("json: ")
    shell(line)
    words = shlex.split(f"{told}json")
    options = words[words.index("with") + 1 :]
    return convert(
        *[word for word in options if word != "and"], source=words[words.index("with") - 1]
    )


def _rename(old: str) -> Callable[[str, Asked], Asked]:
    def follow(do: str, _: Asked) -> Asked:
        better = do.removeprefix("Rename it to ").rstrip(".")
        os.rename(old, better)
        return convert("--allow-pickle", *CONFIG, source=better)

    return follow


def _renamed(name: str, write_it: Callable[[str], object]) -> Callable[[], list[str]]:
    def ask() -> list[str]:
        hf()
        shutil.copy("m/config.json", ".")
        write_it(name)
        return convert("--allow-pickle", *CONFIG, source=name)

    return ask


def _tar() -> None:
    with tarfile.open("m.pt", "w") as archive:
        archive.add("m")


def _unpacked(do: str, _: Asked) -> Asked:
    assert "Unpack it" in do
    with tarfile.open("m.pt") as archive:
        archive.extractall("unpacked", filter="data")
    return convert(source="unpacked/m")


def _snapshot() -> list[str]:
    hf()
    blob = write(f"models--me--neo/blobs/{'4d' * 32}", Path(WEIGHTS).read_bytes())
    snapshot = Path("models--me--neo/snapshots/abc")
    snapshot.mkdir(parents=True)
    shutil.copy("m/config.json", snapshot)
    (snapshot / "model.safetensors").symlink_to(blob.resolve())
    return convert(source=str(blob))


def _cache(*models: str) -> Callable[[], list[str]]:
    def ask() -> list[str]:
        for model in models:
            hf(f"d/models--{model}/snapshots/abc")
        return convert(source="d")

    return ask


def _of_a_cache(inner: str) -> Callable[[], Asked]:
    return prepared(convert(source=f"d/{inner}"), lambda: hf(f"d/{inner}/snapshots/abc"))


def _distributed(source: str) -> Callable[[], list[str]]:
    def ask() -> list[str]:
        from torch.distributed.checkpoint.state_dict_saver import save

        hf("m")
        shutil.copy("m/config.json", ".")
        save({"model": state()}, checkpoint_id="d/pytorch_model_fsdp_0")
        return convert(source=source)

    return ask


SCRIPT = """import shutil, sys, torch
from pathlib import Path
from safetensors.torch import load_file
Path(sys.argv[2]).mkdir()
torch.save(load_file("m/model.safetensors"), Path(sys.argv[2], "pytorch_model.bin"))
"""


def _zero() -> list[str]:
    asked = folder("latest", "g/zero_pp_rank_0_mp_rank_00_optim_states.pt")()
    write("d/zero_to_fp32.py", SCRIPT)
    return asked


def _zero_put_together(do: str, _: Asked) -> Asked:
    command()(do, [])
    return convert("--allow-pickle", *CONFIG, source="OUT")


def _arrays() -> list[str]:
    hf()
    shutil.copy("m/config.json", ".")
    arrays: Any = {name: tensor.numpy() for name, tensor in state().items()}
    np.savez("weights.npz", **arrays)
    return convert(source="weights.npz")


def _arrays_saved(do: str, _: Asked) -> Asked:
    shell(do.partition("transformers: ")[2].rpartition("; then")[0])
    return convert(*CONFIG, source="model.safetensors")


def _beside_adapter() -> list[str]:
    hf()
    lora()
    return convert(source="adapter")


def _with_base(do: str, _: Asked) -> None:
    run_command(do)


def _parts(suffix: str) -> Callable[[], list[str]]:
    def ask() -> list[str]:
        hf()
        shutil.copy("m/config.json", ".")
        Path("d").mkdir()
        for i in (0, 1):
            half = {n: state()[n] for n in sorted(state())[i::2]}
            (save_file if suffix == "safetensors" else torch.save)(
                half, f"d/neo_0000{i + 1}-of-00002.{suffix}"
            )
        return convert(source="d")

    return ask


def _graph_alone() -> list[str]:
    hf()
    run(["export-onnx", "m", "--weights", "inline", "--no-verify"])
    Path("d").mkdir()
    shutil.copy("m/model.onnx", "d")
    return convert(source="d")


def _pipe() -> list[str]:
    hf()
    os.mkfifo("p.safetensors")
    return convert(source="p.safetensors")


def _from_the_pipe(do: str, _: Asked) -> Asked:
    assert "to a file" in do
    shutil.copy(WEIGHTS, "n.safetensors")
    return convert("--cfg", "m/config.json", source="n.safetensors")


def _other(weights: State) -> State:
    return {name: tensor + 1 for name, tensor in weights.items()}


def _kept(do: str, _asked: Asked) -> Asked:
    """The command keeps one; what is said to give, with the options, opens."""
    told, _, line = do.partition(": ")
    shell(line)
    words = shlex.split(told)
    return convert(*words[words.index("with") + 1 :], source=words[words.index("give") + 1])


def _with_lora(weights: State) -> State:
    base = {n.replace("q_proj.", "q_proj.base_layer."): t for n, t in weights.items()}
    return {
        f"base_model.model.{n}": t
        for n, t in (
            base | {f"{Q}.lora_{x}.default.weight": torch.ones(16, 16) for x in "AB"}
        ).items()
    }


def _quantised(weights: State) -> State:
    name = "transformer.h.0.mlp.c_fc"
    return weights | {
        f"{name}.weight": weights[f"{name}.weight"].to(torch.int8),
        f"{name}.SCB": torch.ones(24),
    }


def _pruned(weights: State) -> State:
    name = "transformer.h.0.mlp.c_fc.weight"
    rest = {n: t for n, t in weights.items() if n != name}
    return rest | {f"{name}_orig": weights[name], f"{name}_mask": torch.ones(24, 16)}


def _tokenizer(make: Callable[[Path], object]) -> Callable[[], list[str]]:
    return wrong(lambda: make(Path("m/tokenizer.json")))


def _large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(foreign_files._LARGEST + 1)


def _link(path: Path) -> None:
    path.symlink_to(write("else where/tokenizer.json", "{}").resolve())


def _linked_folder() -> None:
    there = write("else where/tool_use.jinja", "").resolve().parent
    Path("m/additional_chat_templates").symlink_to(there)


def _copied(do: str, asked: Asked) -> Asked:
    subprocess.run(do.partition(": ")[2], shell=True, check=True)
    return asked


def _removed(do: str, asked: Asked) -> Asked:
    assert "take it out" in do
    Path("m/tokenizer.json").unlink()
    return asked


FILES, FOLDERS, WEIGHING, PICKLES = (
    f"checkpoint/{name}.py"
    for name in ("foreign_files", "foreign_folders", "foreign_weights", "pickles")
)
LIBRARY = "needs a library that is not installed here; the lines name its command"
ANOTHER = "the model is another one; no advice makes it a GPT-Neo"

ROWS = [
    Row(FILES, "This is a pipe", _pipe, _from_the_pipe),
    Row(FILES, "The file is a Git LFS pointer", wrong(lambda: write(WEIGHTS, LFS)), SOUND, "git lfs pull"),
    Row(FILES, "refuse_foreign", wrong(lambda: write(WEIGHTS, "<!DOCTYPE html>")), SOUND, "Download it again"),
    Row(FILES, "refuse_foreign", wrong(lambda: write(WEIGHTS, "")), SOUND, "Download or save it again"),
    Row(FILES, "refuse_foreign", _renamed("m.bin", lambda n: shutil.copy(WEIGHTS, n)), _rename("m.bin")),
    Row(FILES, "refuse_foreign", _renamed("n.safetensors", lambda n: torch.save(state(), n)), _rename("n.safetensors")),
    Row(FILES, "refuse_foreign", _renamed("m.pt", lambda _: _tar()), _unpacked),
    Row(FILES, "not_weights", _renamed("o.pkl", lambda n: torch.save(state(), n)), _rename("o.pkl")),
    Row(FILES, "not_weights", prepared(convert(source="m/config.json")), instead("m/config.json")),
    Row(FILES, "refuse_foreign", _snapshot, instead(f"models--me--neo/blobs/{'4d' * 32}")),
    Row(FILES, "not_weights", _distributed("d/pytorch_model_fsdp_0/__0_0.distcp"), _put_together),
    Row(FILES, "not_weights", _arrays, _arrays_saved),
    Row(FILES, "not_weights", _renamed("tf_model.h5", lambda n: write(n, "x")), instead("tf_model.h5", "m"), "the checkpoint that it was made from"),
    Row(FILES, "not_weights", _renamed("flax_model.msgpack", lambda n: write(n, "x")), why=LIBRARY, advice="FlaxGPTNeoForCausalLM"),
    Row(FILES, "not_weights", _renamed("model.ckpt-4.index", lambda n: write(n, "x")), why=LIBRARY, advice="convert_gpt_neo_mesh_tf_to_pytorch"),
    Row(FILES, " bytes large, as no tokenizer's", _tokenizer(_large), _removed),
    Row(FILES, " is a link to a file elsewhere", _tokenizer(_link), command(convert())),
    Row(FILES, " is a link to a folder elsewhere", wrong(_linked_folder), _copied),
    Row(FOLDERS, "The directory holds no model.safetensors", folder(), instead("d", "m")),
    Row(FOLDERS, "nothing_here", folder(weights="model.fp16.safetensors"), instead("d")),
    Row(FOLDERS, "nothing_here", folder(weights="policy.pt"), instead("d")),
    Row(FOLDERS, "nothing_here", folder(weights="checkpoint-500/model.safetensors"), instead("d")),
    Row(FOLDERS, "nothing_here", folder("version_0/hparams.yaml", weights="version_0/checkpoints/e.ckpt"), instead("d")),
    Row(FOLDERS, "nothing_here", folder("token", weights="hub/models--me--neo/snapshots/a/model.safetensors"), instead("d")),
    Row(FOLDERS, "nothing_here", _cache("me--neo", "me--new"), instead("d"), "snapshot"),
    Row(FOLDERS, "nothing_here", _of_a_cache("models--me--neo"), instead("d/models--me--neo")),
    Row(FOLDERS, "nothing_here", _beside_adapter, _with_base),
    Row(FOLDERS, "nothing_here", _zero, _zero_put_together),
    Row(FOLDERS, "nothing_here", _distributed("d"), _put_together),
    Row(FOLDERS, "nothing_here", _parts("safetensors"), _put_together),
    Row(FOLDERS, "nothing_here", _parts("pt"), _put_together),
    Row(FOLDERS, "nothing_here", _graph_alone, lambda do, _: (["inspect", "d"] if "`inspect`" in do else None)),
    Row(FOLDERS, "nothing_here", folder("optimizer.pt"), _here(), "Name the directory"),
    Row(FOLDERS, "nothing_here", folder("config.json"), _here(), "hf download"),
    Row(FOLDERS, "nothing_here", folder("model.safetensors.incomplete"), _here(), "hf download"),
    Row(FOLDERS, "nothing_here", folder("model.safetensors.dvc"), _here(), "dvc pull"),
    Row(WEIGHING, "The weights are Flax's", saved(lambda s: {n.replace("wte.weight", "wte.embedding"): t for n, t in s.items()}), why=LIBRARY),
    Row(WEIGHING, "The tensors have the names of ", saved(lambda s: {n.replace("mlp.c_fc", "mlp.fc_in"): t for n, t in s.items()}), why=ANOTHER),
    Row(WEIGHING, "This is GPT-J", saved(dict, rotary=True, rotary_dim=4), why=ANOTHER),
    Row(WEIGHING, "The weights are quantised", saved(_quantised, quantization_config={"quant_method": "gptq"}), SOUND, "quantised from"),
    Row(WEIGHING, "config.json has a quantization_config", saved(dict, quantization_config={"load_in_8bit": True}), again(lambda: changed("m/config.json", quantization_config=...)), "remove quantization_config"),
    Row(WEIGHING, "The tensors are an adapter's", saved(lambda s: {n: t for n, t in _with_lora(s).items() if "lora" in n}), lambda do, _: run_command(do, made=lambda: (lora("DIR"), hf("BASE")))),
    Row(WEIGHING, "The weights are those of a model with an adapter", saved(_with_lora), SOUND, "merge_and_unload"),
    Row(WEIGHING, "_stored_otherwise", saved(_pruned), SOUND, "torch.nn.utils.prune.remove"),
    Row(WEIGHING, "_stored_otherwise", saved(lambda _: {"_flat_param": torch.ones(9)}), SOUND, "FULL_STATE_DICT"),
    Row(WEIGHING, " weights are empty", saved(lambda s: dict.fromkeys(s, torch.zeros(0))), why="needs DeepSpeed and a GPU's run; the command is that of its own script", advice="zero_to_fp32 FOLDER OUT"),
    Row(WEIGHING, "The tensors are an optimizer's", saved(lambda _: {"state.0.exp_avg": torch.ones(3)}), SOUND, "the model's own file"),
    Row(PICKLES, "Two tensors in the file", pickled(lambda _: {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}), _in_python),
    Row(PICKLES, " of which the file holds", pickled(lambda s: {**s, "transformer.wpe.weight": torch.zeros(1).expand(32, 16)}), _in_python),
    Row(PICKLES, " cannot read pickle files safely", lambda: _old_torch(), lambda *_: pickled(dict)(), "2.10 or later"),
    Row(PICKLES, "_refusal", pickled(lambda s: {"model": s, "trainer": Trainer()}), _in_python),
    Row(PICKLES, "_refusal", pickled(lambda s: {n: t.numpy() for n, t in s.items()}), _in_python, "torch.from_numpy"),
    Row(PICKLES, "The file is not one that torch.save wrote", _renamed("m.pt", lambda n: write(n, b"junk\0\1" * 99)), _saved_again),
    Row(PICKLES, "The file is a TorchScript program", _renamed("m.pt", lambda n: torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), n)), _in_python),
    Row(PICKLES, "The archive's entries are compressed", _renamed("m.pt", lambda n: _compressed(n)), _saved_again, "a source you trust"),
    Row("checkpoint/recognise.py", "No GPT-Neo embedding", saved(lambda _: {"weight": torch.ones(3)}), SOUND),
    Row("checkpoint/recognise.py", "; which is meant cannot be told", pickled(lambda s: {"model": s, "ema": _other(s)}), _kept),
    Row("checkpoint/recognise.py", " tensor(s) have no place in a GPT-Neo", pickled(lambda s: {"net": {**s, "transformer.extra": torch.ones(2)}, "args": argparse.Namespace(lr=1)}), _kept),
    Row("checkpoint/recognise.py", " tensor(s) have no place in a GPT-Neo", saved(lambda s: {**s, "transformer.extra": torch.ones(2)}), _kept),
]  # fmt: skip


class Trainer:
    """What a training script leaves in its checkpoint."""


def _old_torch() -> Asked:
    asked = pickled(dict)()

    def call() -> None:
        with mock.patch.object(torch, "__version__", "2.9.1"):
            pickles.load("m.pt")

    return call if asked else asked


def _compressed(name: str) -> None:
    torch.save(state(), "whole.pt")
    with (
        zipfile.ZipFile("whole.pt") as whole,
        zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for entry in whole.namelist():
            other.writestr(entry, whole.read(entry))
