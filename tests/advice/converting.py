"""What a conversion refuses: options, places, directions, ledgers, values; and the Python API."""

from __future__ import annotations

import copy
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import converter
from tests.advice.making import convert, edited, hf, lora, prepared, run_command, tl, wrong
from tests.advice.opening import WEIGHTS
from tests.advice.row import Asked, Row, instead, less, plus, run, write

EXACT = ["tl-to-hf", "tl", "out", "--no-verify", "--reverse", "exact"]


def odd(value: Any) -> Any:
    """What no type checker would let pass."""
    return value


def request(*words: str) -> Callable[[], list[str]]:
    return wrong(lambda: None, list(words))


def call(function: Callable[[], Any]) -> Callable[[], Asked]:
    """A call of the Python API, with the sound model there."""
    return prepared(function)


def then(function: Callable[[], Any], says: str = "") -> Callable[[str, Asked], Asked]:
    def follow(do: str, _: Asked) -> Asked:
        assert says in do, do
        return function

    return follow


def quick(*options: str) -> list[str]:
    return ["verify", "m", "m", "--effort", "quick", "--check", "weights", *options]


def _fixed() -> list[str]:
    hf()
    run(convert())
    shutil.copytree("m", "sub/m")
    Path("out").rename("here")
    return [
        "hf-to-tl",
        str(Path("m").resolve()),
        str(Path("here").resolve()),
        "--layout",
        "bridge",
        "--no-verify",
        "--overwrite",
    ]


def _standing() -> Asked:
    asked = _fixed()

    def inside() -> None:
        before = Path.cwd()
        os.chdir("here")
        try:
            run_raising(asked)
        finally:
            os.chdir(before)

    return inside


def run_raising(asked: list[str]) -> None:
    converter.hf_to_tl(asked[1], asked[2], layout="bridge", check=False, overwrite=True)


def _elsewhere(do: str, _: Asked) -> Asked:
    assert "Go to another directory" in do
    return ["hf-to-tl", "m", "here", "--layout", "bridge", "--no-verify", "--overwrite"]


def project(text: str) -> Callable[[], Asked]:
    """Defaults that are wrong."""
    return wrong(lambda: write("pyproject.toml", f"[tool.neoconvert]\n{text}\n"), convert())


def mended(old: str, new: str = "", *, says: str = "") -> Callable[[str, Asked], Asked]:
    """The file holds what the advice names, or what follows `says` there, instead."""

    def follow(do: str, asked: Asked) -> Asked:
        assert says in do
        file = Path("pyproject.toml")
        right = new or do.partition(says)[2].partition("?")[0]
        file.write_text(file.read_text().replace(old, right))
        return asked

    return follow


def _foreign(change: Callable[[], object]) -> Callable[[], list[str]]:
    def ask() -> list[str]:
        hf()
        run(convert())
        change()
        return convert("--overwrite")

    return ask


def _moved(*names: str) -> Callable[[str, Asked], Asked]:
    def follow(do: str, asked: Asked) -> Asked:
        assert "Move" in do
        Path("aside").mkdir()
        for name in names:
            os.rename(name, f"aside/{Path(name).name}")
        return asked

    return follow


def _graph(change: Callable[[], object] = lambda: None, *options: str) -> Callable[[], list[str]]:
    def ask() -> list[str]:
        hf()
        run(["export-onnx", "m", "--no-verify"])
        change()
        return ["export-onnx", "m", "--no-verify", *options]

    return ask


def _ledger(kind: str, change: Callable[[], object], *options: str) -> Callable[[], list[str]]:
    def ask() -> list[str]:
        tl("tl", "--process", "default", "--ledger", kind)
        change()
        return ["tl-to-hf", "tl", "out", "--no-verify", *options]

    return ask


def _without_ledger(do: str, asked: Asked) -> Asked:
    assert "with no ledger.safetensors there" in do
    Path("tl/ledger.safetensors").unlink()
    return asked


def _ledger_again(_do: str, asked: Asked) -> Asked:
    tl("again", "--process", "default", "--ledger", "exact")
    shutil.copy("again/ledger.safetensors", "tl")
    return asked


def _ledger_of_another() -> None:
    hf("n", hidden_size=32)
    run(["hf-to-tl", "n", "other", "--process", "default", "--no-verify"])
    shutil.copy("other/ledger.safetensors", "tl")


def _ledger_json(change: Callable[[dict[str, Any]], object]) -> None:
    import json

    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = "tl/ledger.safetensors"
    with safe_open(path, framework="numpy") as file:
        meta = json.loads(file.metadata()["ledger"])
    change(meta)
    save_file(load_file(path), path, metadata={"ledger": json.dumps(meta)})


def _nan_in_heads() -> list[str]:
    hf()
    edited(WEIGHTS, lambda t: t["transformer.h.0.attn.attention.q_proj.weight"].fill(np.nan))
    return ["hf-to-tl", "m", "out", "--no-verify", "--process", "all"]


def _with_default(do: str, _: Asked) -> Asked:
    assert "--process default" in do
    return ["hf-to-tl", "m", "out", "--no-verify", "--process", "default"]


def _large_weight() -> list[str]:
    hf()
    edited(WEIGHTS, lambda t: t["transformer.wpe.weight"].fill(1e6))
    return convert("--dtype", "float16")


def _no_room() -> Asked:
    hf()
    full = mock.Mock(total=10**9, free=10)

    def ask() -> None:
        with mock.patch("shutil.disk_usage", return_value=full):
            converter.hf_to_tl("m", "out", layout="bridge", check=False)

    return ask


def _refused_by_the_system(error: BaseException) -> Callable[[], list[str]]:
    """The command line around what the system says."""

    def ask() -> list[str]:
        hf()
        FAILING.append(mock.patch("converter.convert.run", side_effect=error))
        FAILING[-1].start()
        return convert()

    return ask


FAILING: list[Any] = []


def _passed(says: str, *options: str) -> Callable[[str, Asked], Asked]:
    def follow(do: str, asked: Asked) -> Asked:
        assert says in do, do
        assert isinstance(asked, list)
        FAILING.pop().stop()
        return [*asked, *options]

    return follow


def _faulty() -> list[str]:
    asked = _refused_by_the_system(ZeroDivisionError("a fault"))()
    return asked


def _debug(do: str, asked: Asked) -> Asked | None:
    from click.testing import CliRunner

    from converter.cli import main

    assert isinstance(asked, list)
    assert "--debug" in do
    result = CliRunner().invoke(main, [*asked, "--debug"])
    FAILING.pop().stop()
    assert "Traceback" in result.stderr
    return None


def _meanwhile() -> Asked:
    hf()

    def ask() -> None:
        def progress(what: str, done: int = 0, total: int = 0) -> None:  # noqa: ARG001
            write("out/mine.txt", "mine")

        converter.hf_to_tl("m", "out", layout="bridge", check=False, progress=progress)

    return ask


def neo() -> Any:
    from transformers import GPTNeoForCausalLM

    hf()
    return GPTNeoForCausalLM.from_pretrained("m")


def model_of(
    make: Callable[[Any], Any], config: Callable[[Any], Any] | None = None
) -> Callable[[], Asked]:
    def ask() -> Asked:
        model = neo()
        made = make(model)
        said = config(model) if config else None
        return lambda: converter.open_model(made, said)

    return ask


def opened(
    make: Callable[[Any], Any], says: str = "", config: bool = False
) -> Callable[[str, Asked], Asked]:
    def follow(do: str, _: Asked) -> Asked:
        assert says in do, do
        model = neo()
        return lambda: converter.open_model(make(model), model.config if config else None)

    return follow


def state(model: Any) -> dict[str, Any]:
    return dict(model.state_dict())


def same(model: Any) -> Any:
    return model


def peft_model(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


def _inside_a_bridge() -> Asked:
    """A part of its weights: all of them are read."""
    hf()
    made = converter.to_bridge("m")
    KEPT.append(made)
    kept: dict[str, Any] = made.original_model.state_dict()
    part = {name: tensor for name, tensor in kept.items() if ".0." in name or "wte" in name}
    config = made.original_model.config
    return lambda: converter.open_model(part, config)


KEPT: list[Any] = []


def _a_bridge_of_another() -> Asked:
    hf()
    made = converter.to_bridge("m")
    made.original_model.config = None
    return lambda: converter.open_model(made)


def _live_graph() -> Asked:
    model = neo()
    return lambda: converter.export_onnx(model)


def named_output(do: str, asked: Asked) -> Asked:
    assert "Name an OUTPUT directory" in do
    assert isinstance(asked, list)
    return [*asked[:2], "out", *asked[2:]]


def _by_the_command(*request: str) -> Callable[[str, Asked], Asked | None]:
    """What is named at the end is run, and this is asked for then."""

    def follow(do: str, _: Asked) -> Asked | None:
        run_command(do)
        return list(request) or None

    return follow


CONVERTER = ("convert.py", "exporting.py", "request.py", "routing.py", "streaming.py", "models.py")
CONVERT, EXPORTING, REQUEST, ROUTING, STREAMING, MODELS = CONVERTER
LIVE, REPLACEABLE, ERRORS = "checkpoint/live.py", "checkpoint/replaceable.py", "errors.py"
EXPORT = ["export-onnx", "m", "--no-verify"]

ROWS = [
    Row("choices.py", " is no value of ", call(lambda: converter.hf_to_tl("m", "out", layout=odd("brigde"), check=False)), then(lambda: converter.hf_to_tl("m", "out", layout="bridge", check=False), "Did you mean bridge")),
    Row("choices.py", ", of type ", call(lambda: converter.hf_to_tl("m", "out", layout="bridge", check=odd("no"))), then(lambda: converter.hf_to_tl("m", "out", layout="bridge", check=False), "False")),
    Row("choices.py", ", which names no place", call(lambda: converter.hf_to_tl("m", "", check=False)), then(lambda: converter.hf_to_tl("m", "out", layout="bridge", check=False), "Name a directory")),
    Row("choices.py", "seed is ", call(lambda: converter.verify("m", "m", seed=-1)), then(lambda: converter.verify("m", "m", seed=0, checks="weights"), "0 or more")),
    Row("cli_defaults.py", "_refused", project("efort = 'quick'"), mended("efort", says="Did you mean ")),
    Row("cli_defaults.py", "_refused", project("effort = 'qick'"), mended("qick", "quick"), advice="Change effort"),
    Row("cli_defaults.py", "_refused", project("process = ['fold_ln']"), mended("process = ['fold_ln']", says="in quotes: ")),
    Row("cli_defaults.py", "_refused", project("[tool.neoconvert.hf-to-lt]\ndtype = 'keep'"), mended("hf-to-lt", says="Did you mean ")),
    Row("cli_defaults.py", "_refused", project("[tool.neoconvert.hf-to-tl]\nreverse = 'auto'"), mended("reverse = 'auto'", "\n"), advice="Take reverse out"),
    Row("cli_defaults.py", "_refused", project("effort ="), mended("effort =", "effort = 'quick'"), advice="Mend it"),
    Row("cli_verify.py", "A report is of one", request(*quick("m", "--report", "r.html")), lambda *_: quick("m", "--json")),
    Row("cli_running.py", "require_report", request(*convert("--report", "no/r.html")[:-3], "--report", "no/r.html"), instead("no/r.html", "r.html")),
    Row("cli_running.py", "There is no verification", request(*convert("--report", "r.html")), less("--no-verify")),
    Row("cli_running.py", "What is pushed is a whole directory", request("export-onnx", "m", "--push-to", "me/neo", "--no-verify"), lambda do, asked: less("--push-to", "me/neo")(do, named_output(do, asked))),
    Row("convert.py", "A card is about a whole directory", request("export-onnx", "m", "--model-card", "--no-verify"), named_output),
    Row("pushing.py", "This is no name of a repository", request(*convert("--push-to", "neo")), lambda do, asked: less("--push-to", "neo")(do, asked), advice="owner/name"),
    Row("cli_running.py", " says what an ONNX graph", request(*convert("--no-past")), plus("--format", "onnx")),
    Row(CONVERT, "The weights that are there are not merged", prepared([*EXPORT, "--adapter", "adapter"], lora), named_output),
    Row(CONVERT, "The weights stay as they are", request(*EXPORT, "--dtype", "float16"), named_output),
    Row(EXPORTING, "A graph in the folder onnx/", request(*EXPORT, "out", "--for", "transformers-js", "--weights", "shared"), instead("shared", "external")),
    Row(EXPORTING, "This writes more than a graph", request(*EXPORT, "--for", "transformers-js"), less("--for", "transformers-js")),
    Row(EXPORTING, "This writes more than a graph", request(*EXPORT, "--weights", "external"), named_output),
    Row(REQUEST, "SOURCE is in Hugging Face's layout", request("tl-to-hf", "m", "out", "--no-verify"), _by_the_command()),
    Row(REQUEST, "SOURCE is a TransformerLens checkpoint", prepared(convert(source="tl"), tl), _by_the_command(*convert(source="DIR"))),
    Row(REQUEST, "SOURCE is a TransformerLens checkpoint", prepared(["bake", "tl", "out", "--no-verify"], tl), _by_the_command("bake", "DIR", "out", "--no-verify")),
    Row(ROUTING, "--reverse exact returns", _ledger("exact", lambda: None, "--reverse", "exact", "--dtype", "float16"), less("--dtype", "float16")),
    Row(ROUTING, "The original bits cannot", _ledger("compact", lambda: None, "--reverse", "exact"), instead("exact", "auto")),
    Row(ROUTING, "A weight file that is named itself", prepared(["tl-to-hf", "tl/model.safetensors", "back", "--no-verify", "--reverse", "exact"], lambda: tl("tl", "--process", "default", "--ledger", "exact")), instead("tl/model.safetensors")),
    Row(ROUTING, "The original bits cannot", _ledger("none", lambda: None, "--reverse", "exact"), instead("exact", "functional")),
    Row(STREAMING, " too large for ", _large_weight, instead("float16", "bfloat16")),
    Row(STREAMING, "The ledger does not give back", _ledger("exact", lambda: _ledger_json(lambda meta: meta["original"].update({"transformer.wte.weight": "0" * 64})), "--reverse", "exact"), _ledger_again),
    Row("checkpoint/ledger_file.py", "The ledger cannot be read", _ledger("exact", lambda: write("tl/ledger.safetensors", "x" * 99)), _without_ledger),
    Row("checkpoint/ledger_file.py", "The ledger cannot be read", _ledger("exact", lambda: write("tl/ledger.safetensors", "x" * 99), "--reverse", "exact"), _ledger_again),
    Row("checkpoint/ledger_file.py", "The ledger does not fit the weights", _ledger("exact", _ledger_of_another), _without_ledger),
    Row("processing/unit_ledger.py", "The ledger does not fit itself", _ledger("exact", lambda: edited_ledger()), _ledger_again),
    Row("processing/steps.py", " is not a processing step", request("hf-to-tl", "m", "out", "--no-verify", "--process", "fold_lm"), instead("fold_lm", "fold_ln"), "fold_ln"),
    Row("processing/steps.py", " stands alone", request("hf-to-tl", "m", "out", "--no-verify", "--process", "default,fold_ln"), instead("default,fold_ln", "default"), "Leave the others out"),
    Row("processing/refactor_factored_attn_matrices.py", "NaN or infinity", _nan_in_heads, _with_default),
    Row("opening.py", "There is no such ONNX file", prepared(["inspect", "m/modle.onnx"], _graph()), instead("m/modle.onnx", "m/model.onnx")),
    Row("checkpoint/publish.py", "There is too little space", _no_room, then(lambda: converter.hf_to_tl("m", "out", layout="bridge", check=False), "Free some")),
    Row("checkpoint/publish.py", "OUTPUT was made or changed", _meanwhile, then(lambda: converter.hf_to_tl("m", "other", layout="bridge", check=False), "another OUTPUT")),
    Row(REPLACEABLE, "OUTPUT is the same place", request(*convert(out="m")), lambda *_: convert()),
    Row(REPLACEABLE, "OUTPUT is inside SOURCE", request(*convert(out="m/out")), lambda *_: convert()),
    Row(REPLACEABLE, "OUTPUT exists and is not", wrong(lambda: write("out", "mine"), convert()), instead("out", "other")),
    Row(REPLACEABLE, "OUTPUT exists already", prepared(convert(), lambda: run(convert())), plus("--overwrite")),
    Row(REPLACEABLE, "OUTPUT cannot be replaced whole", _standing, _elsewhere),
    Row(REPLACEABLE, "OUTPUT holds what neoconvert", _foreign(lambda: write("out/mine.txt", "mine")), _moved("out/mine.txt")),
    Row(REPLACEABLE, "Nothing in OUTPUT is", wrong(lambda: write("out/mine.txt", "mine"), convert("--overwrite")), _moved("out/mine.txt")),
    Row(REPLACEABLE, " already.", _graph(), plus("--overwrite")),
    Row(REPLACEABLE, "not a file of this kind", _graph(lambda: write("m/model.onnx", "mine"), "--overwrite"), _moved("m/model.onnx")),
    Row(REPLACEABLE, "not a file of this kind", prepared(quick("--report", "m/model.onnx"), _graph()), instead("m/model.onnx", "r.html"), "name another file"),
    Row(ERRORS, "The system refused", _refused_by_the_system(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out")), _passed("Free some space")),
    Row(ERRORS, "The system refused", _refused_by_the_system(OSError(errno.EFBIG, os.strerror(errno.EFBIG), "out")), _passed("--max-shard-size 1GB", "--max-shard-size", "1GB")),
    Row(ERRORS, "There is not enough memory", _refused_by_the_system(MemoryError()), _passed("--effort quick", "--effort", "quick")),
    Row(ERRORS, "A library is installed here", _refused_by_the_system(ImportError("no ABI", name="numpy")), _passed("Install that library again")),
    Row(ERRORS, "A fault of neoconvert", _faulty, _debug),
    Row(MODELS, "Processing is undone on the way", call(lambda: converter.to_state_dict("m", layout="bridge", reverse="exact")), then(lambda: converter.to_state_dict("m", layout="bridge"), "Leave reverse out")),
    Row("checkpoint/source.py", "A model in memory", _live_graph, lambda *_: (lambda: converter.export_onnx(neo(), "out", check=False))),
    Row(LIVE, "A state dict does not say", model_of(state), opened(state, "open_model(state_dict, config)", config=True)),
    Row(LIVE, "These are the weights of a model inside", _inside_a_bridge, lambda *_: (lambda: converter.open_model(KEPT.pop()))),
    Row(LIVE, "There is no ", call(lambda: converter.open_model(neo(), ledger="m")), then(lambda: converter.open_model(neo()), "leave ledger out")),
    Row(LIVE, "The model is wrapped in a PEFT", model_of(peft_model), opened(lambda m: copy.deepcopy(peft_model(m)).merge_and_unload(), "copy.deepcopy(model).merge_and_unload()")),
    Row(LIVE, " is no model that", model_of(lambda _: torch.nn.Linear(2, 2)), opened(same, "GPTNeoForCausalLM")),
    Row(LIVE, " is no config", model_of(state, lambda _: 3), opened(state, "GPTNeoConfig", config=True)),
    Row(LIVE, "The model around these weights", _a_bridge_of_another, lambda *_: (lambda: converter.open_model(converter.to_bridge("m")))),
    Row(LIVE, ", not a tensor", model_of(lambda _: {"model": 3}, lambda m: m.config), opened(state, "names to torch tensors", config=True)),
    Row(LIVE, " is on the meta device", model_of(lambda m: m.to("meta")), opened(same)),
    Row(LIVE, ", not a plain tensor", model_of(lambda m: {**state(m), "transformer.wpe.weight": m.transformer.wpe.weight.to_sparse()}, lambda m: m.config), opened(state, config=True)),
]  # fmt: skip


def edited_ledger() -> None:
    _ledger_json(lambda meta: next(iter(meta["units"].values()))["tensors"].update(nothing={}))
