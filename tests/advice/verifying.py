"""converter/verification and converter/onnx: what is compared, what runs it, and graphs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
from onnx import helper

import converter
from converter.demo import MODEL
from converter.onnx import export, weights
from converter.verification import loading, probes
from converter.verification.remote import open_remote
from tests.advice.converting import call, named_output, then
from tests.advice.making import changed, convert, hf, prepared, run_command, tl
from tests.advice.opening import WEIGHTS, _pickled
from tests.advice.row import Asked, Row, again, command, instead, less, plus, run, write

QUICK = ["verify", "m", "m", "--effort", "quick"]
EXPORT = ["export-onnx", "m", "--no-verify"]
GRAPH = ["verify", "m", "m/model.onnx", "--effort", "quick"]
OF_GRAPH = ["verify", "m/model.onnx", "m", "--effort", "quick"]
INSPECT = ["inspect", "m/model.onnx"]


def verify(*options: str) -> Callable[[], Asked]:
    return prepared([*QUICK, *options])


def graph(change: Callable[[Any], object], asked: list[str] = INSPECT) -> Callable[[], Asked]:
    """A model.onnx beside the weights, with something changed in it."""

    def edit() -> None:
        run(EXPORT)
        model = onnx.load("m/model.onnx", load_external_data=False)
        change(model)
        write("m/model.onnx", model.SerializeToString())

    return prepared(asked, edit)


def exported_again(do: str, asked: Asked) -> Asked:
    """Removed, and exported by the command as it is written."""
    assert "remove it" in do.lower()
    hf()
    Path("m/model.onnx").unlink()
    run_command(do.replace("CHECKPOINT", "m"))
    return asked


def metadata(name: str, value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for entry in model.metadata_props:
            if entry.key == name:
                entry.value = value

    return change


def unsaid(model: Any) -> None:
    del model.metadata_props[:]
    Path("m/config.json").rename("kept.json")


def external(key: str, value: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return change


def _shorter() -> None:
    run(EXPORT)
    file = Path(WEIGHTS)
    file.write_bytes(file.read_bytes()[:-64])


def _linked(_: Any) -> None:
    Path("elsewhere").mkdir()
    shutil.move(WEIGHTS, "elsewhere/w")
    Path(WEIGHTS).symlink_to(Path("elsewhere/w").resolve())


def _copied(do: str, asked: Asked) -> Asked:
    assert "Copy the file itself" in do
    Path(WEIGHTS).unlink()
    shutil.copy("elsewhere/w", WEIGHTS)
    return asked


def _linked_weights() -> None:
    _linked(None)


def _inline_too_large() -> Asked:
    hf()

    def ask() -> None:
        with mock.patch.object(weights, "INLINE_LIMIT", 10):
            converter.export_onnx("m", graph=converter.Graph(weights="inline"), check=False)

    return ask


def _no_onnxruntime() -> Asked:
    hf()
    run(EXPORT)

    def ask() -> None:
        with mock.patch.dict(sys.modules, {"onnxruntime": None}):
            converter.verify("m", "m/model.onnx", effort="quick")

    return ask


def _text(content: bytes) -> Callable[[], Asked]:
    return prepared(
        ["verify", str(MODEL), str(MODEL), "--effort", "quick", "--text", "t"],
        lambda: write("t", content),
    )


def _part(do: str, _: Asked) -> None:
    """The command is run; a megabyte of text would then take minutes."""
    subprocess.run(do.partition(": ")[2], shell=True, check=True)
    assert Path("PART").stat().st_size == probes.MAX_TEXT_BYTES


def _tokenizer(do: str, asked: Asked) -> Asked:
    assert "Put the model's tokenizer.json" in do
    shutil.copy(MODEL / "tokenizer.json", "m")
    return asked


def _without_tokenizer() -> list[str]:
    shutil.copytree(MODEL, "m")
    Path("m/tokenizer.json").unlink()
    write("t", "Once upon a time")
    return [*QUICK, "--text", "t", "--check", "function"]


def _lens(major: int) -> Any:
    return mock.patch.object(loading, "_major", return_value=major)


def _hooked_in_4() -> Asked:
    tl()

    def ask() -> None:
        with _lens(4):
            converter.load_hooked("tl")

    return ask


def _without_docstrings() -> Asked:
    hf()

    def ask() -> None:
        with mock.patch.object(loading.require_docstrings, "__doc__", None):
            converter.hf_to_tl("m", "out", layout="bridge", effort="quick")

    return ask


def _without_a_model(do: str, _: Asked) -> Asked:
    """The files are written under the same -OO, and their weights verified."""
    assert "--no-verify" in do
    assert "--check weights" in do
    with mock.patch.object(loading.require_docstrings, "__doc__", None):
        run(convert())
        run(["verify", "m", "out", "--check", "weights"])
    return lambda: converter.verify("m", "out", effort="quick")


def _bridge_in_2() -> Asked:
    hf()

    def ask() -> None:
        with _lens(2):
            converter.to_bridge("m")

    return ask


def _interpreter(text: str) -> Callable[[], Asked]:
    def ask() -> Asked:
        hf()
        Path("python").write_text(text)
        os.chmod("python", 0o755)
        return [*QUICK, "--python", "python"]

    return ask


def _live_elsewhere() -> Asked:
    from transformers import GPTNeoForCausalLM

    hf()
    model = GPTNeoForCausalLM.from_pretrained("m")
    opened = converter.open_model(model)
    return lambda: open_remote(opened, Path(sys.executable))


def _broken_lens() -> Asked:
    tl()

    def ask() -> None:
        with mock.patch.dict(sys.modules, {"transformer_lens": None}):
            converter.verify("m", "tl", effort="quick")

    return ask


def _other_size() -> list[str]:
    hf("n", hidden_size=32)
    hf()
    return ["verify", "m", "n", "--effort", "quick"]


def _foreign(model: Any) -> None:
    model.graph.input[0].name = "pixels"


def _anew(_: str, asked: Asked) -> Asked:
    Path("m/model.onnx").unlink()
    run(EXPORT)
    return asked


def _of_no_operator(model: Any) -> None:
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Gelo"


def _huge(model: Any) -> None:
    """Next to nothing on disk, 4 GB when it runs."""
    size = helper.make_tensor("size", onnx.TensorProto.INT64, [2], [2**15, 2**15])
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["size"], ["huge"]))
    model.graph.initializer.append(size)
    model.graph.output.append(onnx.ValueInfoProto(name="huge"))


def _any_heads(model: Any) -> None:
    past = next(i for i in model.graph.input if i.name.startswith("past_key_values"))
    past.type.tensor_type.shape.dim[1].dim_param = "heads"


def _one_token_alone(model: Any) -> None:
    """It runs on one token, and on nothing longer."""
    shape = helper.make_tensor("one", onnx.TensorProto.INT64, [3], [1, 1, 37])
    model.graph.initializer.append(shape)
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("Reshape", ["before", "one"], ["logits"]))


def _unnamed(model: Any) -> None:
    """As another exporter might write it."""
    hf("n")
    model.CopyFrom(onnx.load("m/model.onnx"))
    names = {t.name: f"w{i}" for i, t in enumerate(model.graph.initializer)}
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    del model.metadata_props[:]


def _of_more_layers(model: Any) -> None:
    del model.metadata_props[:]
    changed("m/config.json", num_layers=1000, attention_types=[[["global"], 1000]])


def verify_with(activation: str) -> Callable[[], Asked]:
    return prepared(QUICK, lambda: changed("m/config.json", activation_function=activation))


def _untied_called_tied() -> list[str]:
    hf("m", tied=False)
    run(["hf-to-tl", "m", "b", "--layout", "bridge", "--no-verify"])
    changed("b/config.json", tie_word_embeddings=True)
    return ["verify", "m", "b", "--effort", "quick"]


def verify_refused() -> Callable[[], Asked]:
    def change() -> None:
        hf("n")
        changed("n/config.json", num_labels="two")

    return prepared(["verify", "m", "n", "--effort", "quick"], change)


def _onnx_alone() -> Callable[[], Asked]:
    return prepared([*QUICK, "--runtime", "onnxruntime"])


VERIFY, LOADING, REMOTE = (f"verification/{n}.py" for n in ("verify", "loading", "remote"))
TENSORS, OPENING, SESSION = (f"onnx/{n}.py" for n in ("tensor_data", "opening", "session"))

ROWS = [
    Row("verification/criterion.py", " is no limit", verify("--min-top1", "2"), instead("2", "0.9"), "0 to 1"),
    Row("verification/criterion.py", "Perplexity is of texts", prepared(["verify", str(MODEL), str(MODEL), "--effort", "quick", "--max-perplexity-ratio", "1.1"], lambda: write("t", "Once upon a time")), plus("--max-kl", "0.1", "--text", "t")),
    Row(VERIFY, " is no multiple", verify("--max-ratio", "0"), instead("0", "8"), "above 0"),
    Row(VERIFY, "Limits are for the function", verify("--max-kl", "1", "--check", "weights"), less("--check", "weights")),
    Row(VERIFY, "Nothing to check", call(lambda: converter.verify("m", "m", checks=())), then(lambda: converter.verify("m", "m", checks=("weights",)), "weights")),
    Row(VERIFY, "There is no probe", call(lambda: converter.verify("m", "m", probes=[])), then(lambda: converter.verify("m", "m", effort="quick"))),
    Row("verification/weights.py", " in the artifact and ", _other_size, instead("n", "m")),
    Row("verification/probes.py", "The text is longer than", _text(b"once upon a time " * 70_000), _part, "head -c"),
    Row("verification/probes.py", "The text cannot be read", _text(b"\xff\xfe\0once"), again(lambda: write("t", "Once upon a time"))),
    Row("verification/probes.py", "The text is empty", _text(b""), again(lambda: write("t", "Once upon a time"))),
    Row("verification/probes.py", "There is no tokenizer.json", _without_tokenizer, _tokenizer),
    Row(LOADING, "There is no device", verify("--device", "cuda:77"), instead("cuda:77", "cpu")),
    Row(LOADING, "HookedTransformer was removed", _hooked_in_4, then(lambda: converter.to_bridge("tl"), "converter.to_bridge(directory)")),
    Row(LOADING, "transformers cannot run models", _without_docstrings, _without_a_model),
    Row(LOADING, "TransformerBridge needs", _bridge_in_2, then(lambda: converter.to_bridge("m"), "Upgrade transformer-lens")),
    Row(LOADING, "This is a checkpoint in the", call(lambda: converter.load_bridge("m")), then(lambda: converter.to_bridge("m"), "converter.to_bridge(directory)")),
    Row(REMOTE, "The interpreter cannot be started", _interpreter("no program"), instead("python", sys.executable)),
    Row(REMOTE, "The other interpreter ended", _interpreter("#!/bin/sh\nexit 1\n"), instead("python", sys.executable)),
    Row(REMOTE, "Another interpreter does not see", _live_elsewhere, then(lambda: converter.verify("m", "m", effort="quick"), "Write it to a directory")),
    Row("verification/runtimes.py", "TransformerLens is installed here", _broken_lens, then(lambda: converter.verify("m", "m", effort="quick"), "Install it again")),
    Row("verification/subjects.py", "There is nothing here that", _onnx_alone(), command([*QUICK, "--runtime", "onnxruntime"])),
    Row("verification/subjects.py", "There is nothing here that", prepared(["verify", "m", "m/model.onnx", "--effort", "quick", "--runtime", "torch"], lambda: run(EXPORT)), less("--runtime", "torch")),
    Row("request.py", "There is no graph that onnxruntime", prepared(["bake", "m", "out", "--process", "none", "--effort", "quick", "--runtime", "onnxruntime"]), plus("--format", "onnx", "--format", "safetensors"), "--format onnx"),
    Row("request.py", "There are no weights that torch could run", prepared(["bake", "m", "out", "--process", "none", "--effort", "quick", "--runtime", "torch", "--format", "onnx", "--weights", "external"]), plus("--format", "safetensors"), "keep weight files too"),
    Row("verification/subjects.py", "Other interpreters run weights", prepared([*GRAPH, "--python", sys.executable], lambda: run(EXPORT)), less("--python", sys.executable), "Leave --python out."),
    Row("verification/subjects.py", "Other interpreters run weights", prepared([*QUICK, "--python", sys.executable, "--runtime", "onnxruntime"], lambda: run(EXPORT)), less("--runtime", "onnxruntime"), "or --runtime out"),
    Row("verification/verify.py", "Other interpreters run the function", verify("--check", "weights", "--python", sys.executable), less("--check", "weights")),
    Row("onnx/hooks.py", "No hook point of this model", prepared([*EXPORT, "--hook", "block.0.hook_resid_post"]), instead("block.0.hook_resid_post", "blocks.0.hook_resid_post"), "blocks.0.hook_resid_post"),
    Row("onnx/graph.py", "The activation ", prepared([*convert("--format", "onnx"), "--format", "safetensors"], lambda: hf(activation_function="quick_gelu")), less("--format", "onnx", "safetensors"), "without a graph"),
    Row("onnx/weights.py", "The weights are in a pickle", prepared([*EXPORT, "--allow-pickle"], _pickled), named_output),
    Row("onnx/weights.py", "The weights take ", _inline_too_large, then(lambda: converter.export_onnx("m", check=False), "Leave --weights out")),
    Row("onnx/export.py", "The weights cannot be shared: the weight file is a link", prepared(EXPORT, _linked_weights), named_output),
    Row("onnx/reading.py", "This is not a graph", graph(_foreign), _anew, "neoconvert or optimum wrote"),
    Row(TENSORS, "corrupt", prepared(INSPECT, lambda: write("m/model.onnx", b"\x08\xff" * 9)), exported_again),
    Row(TENSORS, "which is not a plain file name", graph(external("location", "../w")), _anew, "Do not use"),
    Row(TENSORS, "which is not there", graph(lambda _: Path(WEIGHTS).rename("w")), again(lambda: Path("w").rename(WEIGHTS))),
    Row(TENSORS, " is no file of this directory", graph(_linked), _copied),
    Row(TENSORS, " bytes; the graph gives it ", prepared(INSPECT, _shorter), exported_again),
    Row(TENSORS, "where the graph expects it", graph(lambda _: hf(vocab_size=60)), exported_again),
    Row(OPENING, " is no JSON", graph(metadata("neoconvert.config", "{")), exported_again),
    Row(OPENING, "The graph's config is malformed", graph(metadata("neoconvert.config", '{"n_layers": 2, "d_model": 16, "n_heads": 4, "d_mlp": 24, "n_ctx": 32, "d_vocab": 37, "window_size": 5}')), exported_again),
    Row(OPENING, "The graph does not say what", graph(unsaid), again(lambda: Path("kept.json").rename("m/config.json")), "config.json beside the graph"),
    Row(SESSION, "onnxruntime is not installed", _no_onnxruntime, then(lambda: converter.verify("m", "m/model.onnx", effort="quick"), "pip install onnxruntime")),
    Row(SESSION, "onnxruntime refuses the graph", graph(_of_no_operator, GRAPH), exported_again),
    Row(SESSION, ", and not [batch, heads", graph(_any_heads, OF_GRAPH), exported_again),
    Row("onnx/bounds.py", "The graph takes more than", graph(_huge, OF_GRAPH), _anew, "export it again"),
    Row("verification/passes.py", "_stopped", graph(_one_token_alone, OF_GRAPH), _anew, "export it again"),
    Row(VERIFY, "The original is a graph whose", graph(_unnamed, ["verify", "m/model.onnx", "n", "--effort", "quick"]), instead("m/model.onnx", "m"), "Give the checkpoint"),
    Row("verification/libraries.py", "TransformerBridge does not hold", _untied_called_tied, again(lambda: changed("b/config.json", tie_word_embeddings=False)), "tie_word_embeddings"),
    Row("verification/runtimes.py", "The software that this layout", verify_refused(), again(lambda: hf("n"))),
    Row("onnx/export.py", "There is a file of this name", prepared(lambda: export(converter.open_checkpoint("m")), lambda: run(EXPORT)), again(lambda: Path("m/model.onnx").unlink()), "Remove it first"),
    Row("onnx/export.py", "is not beside the graph", call(lambda: export(converter.open_checkpoint("m"), Path("other"))), then(lambda: export(converter.open_checkpoint("m"), Path("m")), "Export into m")),
    Row(OPENING, "The config says ", graph(_of_more_layers), again(lambda: hf()), "belongs to this graph"),
    Row("verification/activations.py", "There is no activation", verify_with("nonsense"), again(lambda: hf())),
]  # fmt: skip
