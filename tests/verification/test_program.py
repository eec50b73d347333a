"""The program link: honest software is within float64's rounding, and no fault is."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.layout import LAYOUTS, Layout
from converter.onnx import export
from converter.opening import open_artifact
from converter.verification import Verification, twin, verify
from converter.verification.loading import has_hooked_transformer
from converter.verification.probes import Probe, standard_probes
from converter.verification.program import (
    MAX_TIMES,
    Program,
    Reference,
    compare_program,
    few_of,
)
from converter.verification.runtimes import open_runtime
from tests.marks import needs_hooked
from tests.models import random_hf, write_as
from tests.verification.graph import Graph, make
from tests.verification.graph_faults import GRAPH_FAULTS

WINDOW, LENGTH = 5, 13
TL: tuple[Layout, ...] = ("hooked", "bridge") if has_hooked_transformer() else ("bridge",)


def probes(d_vocab: int = 37) -> list[Probe]:
    """A batch beyond two windows, left padding, the last positions, steps with a cache."""
    rng = np.random.default_rng(5)

    def tokens(batch: int, length: int) -> np.ndarray:
        return rng.integers(0, d_vocab, (batch, length))

    mask = np.ones((2, LENGTH), bool)
    mask[0, :6] = False
    return [
        Probe("batch", tokens(2, LENGTH)),
        Probe("one token", tokens(1, 1)),
        Probe("left padding", tokens(2, LENGTH), mask),
        Probe("last positions", tokens(1, 9), start=20),
        Probe("cache", tokens(1, LENGTH), prefill=WINDOW - 2),
        Probe("cache and padding", tokens(2, LENGTH), mask, prefill=7),
    ]


def compared(artifact: Checkpoint, source: Checkpoint | None = None) -> Program:
    reference = Reference.of(source or artifact, probes(artifact.config.d_vocab))
    return compare_program(open_runtime(artifact, "cpu"), reference)


def require_same(
    artifact: Checkpoint, source: Checkpoint | None = None, *, cache: bool = True
) -> None:
    found = compared(artifact, source)
    assert found.evidence.outcome == "same", found.evidence
    assert all(probe.ratio < 16 for probe in found.probes), found.probes
    assert ("cache" in {probe.name for probe in found.probes}) == cache


@pytest.fixture(scope="module", params=["float64", "float32", "float16", "bfloat16"])
def hard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Gains over four decades, attention that is nearly one-hot."""
    name = str(request.param)
    path = tmp_path_factory.mktemp("hard") / name
    random_hf(path, seed=3, scale=2.5, gain_decades=2, tied=False, dtype=name, num_layers=3)
    return open_checkpoint(path)


def test_transformers_is_our_reference(hard: Checkpoint) -> None:
    require_same(hard)


@pytest.mark.parametrize("layout", TL)
@pytest.mark.parametrize("process", ["none", "all"])
def test_transformer_lens_is_our_reference(
    layout: Layout, process: str, hard: Checkpoint, tmp_path: Path
) -> None:
    converter.hf_to_tl(hard, tmp_path / "tl", layout=layout, process=process, check=False)
    require_same(open_checkpoint(tmp_path / "tl"))


@pytest.mark.parametrize("layout", ["hf", "hooked", "bridge"])
@pytest.mark.parametrize("past", [True, False])
def test_our_graphs_are_our_reference(
    layout: Layout, past: bool, hard: Checkpoint, tmp_path: Path
) -> None:
    source = hard
    if layout != "hf":
        converter.hf_to_tl(hard, tmp_path / "tl", layout=layout, process="default", check=False)
        source = open_checkpoint(tmp_path / "tl")
    path = export(source, tmp_path / "graph", weights="external", with_past=past).path
    require_same(open_artifact(path), source, cache=past)


@pytest.mark.parametrize("layout", ["hf", "hooked"])
def test_weights_that_are_widened_late(
    layout: Layout, hard: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "_LATE", 1)
    if layout == "hooked":
        converter.hf_to_tl(hard, tmp_path / "tl", layout=layout, check=False)
        hard = open_checkpoint(tmp_path / "tl")
    path = export(hard, tmp_path / "graph", weights="external").path
    require_same(open_artifact(path), hard)
    model = onnx.load_model(str(path), load_external_data=False)
    kinds = [node.op_type for node in twin.twin(model, hard.config).graph.node]
    assert ("Size" in kinds) == (hard.dtype == "F32")


@pytest.mark.parametrize("activation", ["gelu", "gelu_fast", "relu", "silu"])
def test_other_activations_in_a_graph(activation: str, tmp_path: Path) -> None:
    path = random_hf(tmp_path / "m", scale=2, activation_function=activation)
    require_same(open_artifact(export(open_checkpoint(path)).path))


def test_scores_divided_by_a_root(tmp_path: Path) -> None:
    """√h of h = 2 is no float32 number: a graph stands for the number it rounds."""
    path = random_hf(tmp_path / "m", scale=1.5, hidden_size=8)
    converter.hf_to_tl(path, tmp_path / "tl", layout="hooked", check=False)
    cfg = json.loads((tmp_path / "tl/cfg.json").read_text())
    cfg |= {"use_attn_scale": True, "attn_scale": 2**0.5}
    (tmp_path / "tl/cfg.json").write_text(json.dumps(cfg))
    scaled = open_checkpoint(tmp_path / "tl")
    assert scaled.config.score_divisors == (2**0.5,) * 2
    require_same(open_artifact(export(scaled, tmp_path / "g", weights="inline").path))
    if has_hooked_transformer():
        require_same(scaled)


def test_a_graph_of_torch(original: Checkpoint, tmp_path: Path) -> None:
    """Traced by torch's own exporter: transposed weights without names, Gelu in many nodes."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(original.directory)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits

    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "sequence"} for name in [*names, "logits"]}
    tokens = torch.arange(14).view(2, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits().eval(), (tokens, torch.ones_like(tokens)), str(tmp_path / "model.onnx"),
            dynamo=False, input_names=names, output_names=["logits"], dynamic_axes=axes,
        )  # fmt: skip
    shutil.copy(original.directory / "config.json", tmp_path)
    artifact = open_artifact(tmp_path / "model.onnx")
    assert not artifact.complete
    require_same(artifact, original, cache=False)


@needs_hooked
def test_what_no_software_runs_is_not_comparable_to_itself(original: Checkpoint) -> None:
    from converter.verification.runtimes import OwnForward

    own = OwnForward("neoconvert", "our own", "", torch.device("cpu"), original)
    found = compare_program(own, Reference.of(original, probes()))
    assert found.evidence.outcome == "not comparable"
    assert "itself" in str(found.evidence)


# Faults. None touches a stored weight: the reference is that of the original.


@pytest.fixture(scope="module")
def reference(original: Checkpoint) -> Reference:
    return Reference.of(original, probes())


def require_caught(found: Program, times: float = 10) -> None:
    assert found.evidence.outcome == "differs", found.evidence
    assert found.evidence.times is not None
    assert found.evidence.times > times, found.evidence


Spoil = Callable[[Any], None]


def _window(model: Any) -> None:
    attention = model.transformer.h[1].attn.attention
    attention.bias.copy_(attention.bias | torch.diag(torch.ones(32 - WINDOW), -WINDOW).bool())


def _act(model: Any) -> None:
    model.transformer.h[0].mlp.act = torch.nn.GELU()


def _eps(model: Any) -> None:
    model.transformer.h[1].ln_2.eps = 1.0001e-5


def _bias(model: Any) -> None:
    model.transformer.h[0].mlp.c_proj.bias.data[3] += 1e-6


def _ulp(model: Any) -> None:
    weight = model.transformer.h[1].attn.attention.q_proj.weight.data
    weight[2, 3] = torch.nextafter(weight[2, 3], torch.tensor(9.0))


def _cast(model: Any) -> None:
    """A weight that was stored in 16 bits on the way."""
    weight = model.transformer.wpe.weight
    weight.data = weight.data.bfloat16().float()


@pytest.mark.parametrize("spoil", [_window, _act, _eps, _bias, _ulp, _cast])
def test_a_fault_of_transformers(spoil: Spoil, original: Checkpoint, reference: Reference) -> None:
    runtime: Any = open_runtime(original, "cpu")
    assert compare_program(runtime, reference).evidence.outcome == "same"
    with torch.no_grad():
        spoil(runtime.model)
    require_caught(compare_program(runtime, reference))


@pytest.fixture(scope="module")
def lens(original: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lens")
    for layout in TL:
        converter.hf_to_tl(original, root / layout, layout=layout, check=False)
    return {layout: root / layout for layout in TL}


def _scale(model: Any) -> None:
    model.blocks[1].attn.attn_scale = 1 + 1e-6


def _hooked_window(model: Any) -> None:
    model.cfg.window_size += 1


@needs_hooked
@pytest.mark.parametrize("spoil", [_scale, _hooked_window])
def test_a_fault_of_hooked_transformer(
    spoil: Spoil, lens: dict[str, Path], reference: Reference
) -> None:
    runtime: Any = open_runtime(open_checkpoint(lens["hooked"]), "cpu")
    assert compare_program(runtime, reference).evidence.outcome == "same"
    spoil(runtime.model)
    require_caught(compare_program(runtime, reference))


@needs_hooked
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_buffer_in_the_file_that_hides_no_future(
    suffix: str, lens: dict[str, Path], reference: Reference, tmp_path: Path
) -> None:
    """load_state_dict loads it, so it is what users run."""
    spoiled = shutil.copytree(lens["hooked"], tmp_path / "spoiled")
    state = load_file(spoiled / "model.safetensors")
    (spoiled / "model.safetensors").unlink()
    state |= {f"blocks.{i}.attn.IGNORE": np.array(-np.inf, np.float32) for i in range(2)}
    for value in (-np.inf, 0.0):
        state["blocks.1.attn.IGNORE"] = np.array(value, np.float32)
        if suffix == ".bin":
            torch.save(
                {k: torch.from_numpy(v) for k, v in state.items()}, spoiled / "pytorch_model.bin"
            )
        else:
            save_file(state, spoiled / "model.safetensors")
        artifact = open_checkpoint(spoiled, allow_pickle=True)
        found = compare_program(open_runtime(artifact, "cpu"), reference)
        if value == 0:
            require_caught(found, 1e9)
        else:
            assert found.evidence.outcome == "same"


def _eps_bridge(model: Any) -> None:
    for module in model.modules():
        holders: tuple[Any, ...] = (module, getattr(module, "config", None))
        for holder in holders:
            if hasattr(holder, "eps"):
                holder.eps = 1.0001e-5


def test_a_fault_of_transformer_bridge(lens: dict[str, Path], reference: Reference) -> None:
    runtime: Any = open_runtime(open_checkpoint(lens["bridge"]), "cpu")
    assert compare_program(runtime, reference).evidence.outcome == "same"
    _eps_bridge(runtime.model)
    require_caught(compare_program(runtime, reference))


@contextlib.contextmanager
def edited(original: Checkpoint, directory: Path) -> Iterator[tuple[Graph, Path]]:
    """A graph of the original, with its weights inside, to be spoiled."""
    path = export(original, directory, weights="inline").path
    graph = Graph(onnx.load_model(str(path)))
    yield graph, path
    onnx.save_model(graph.model, str(path))


GraphEdit = Callable[[Graph], None]
B = "blocks.1"


def _graph_eps(graph: Graph) -> None:
    graph.attribute(f"{B}.ln1/LayerNormalization", epsilon=1.0001e-5)


def _graph_window(graph: Graph) -> None:
    graph.read("mask/Less", 1, graph.constant(np.array(WINDOW + 1)))


def _graph_bias(graph: Graph) -> None:
    """A bias of its own, beside the one that has its weight's name."""
    name = f"transformer.h.{1}.mlp.c_fc.bias"
    found = next(t for t in graph.model.graph.initializer if t.name == name)
    moved = onnx.numpy_helper.to_array(found).copy()
    moved[0] += 1e-6
    add = graph.node(f"{B}.mlp/Add")
    graph.read(add.name, list(add.input).index(name), graph.constant(moved))


def _graph_add(graph: Graph) -> None:
    graph.through(f"{B}/Add_2", "Add", graph.constant(np.float32(1e-7) * np.eye(16, dtype="f4")[0]))


def _graph_scale(graph: Graph) -> None:
    graph.through(f"{B}.attn/MatMul", "Mul", graph.constant(np.float32(1 + 1e-6)))


def _graph_half(graph: Graph) -> None:
    graph.through(f"{B}.ln2/LayerNormalization", "Cast", to=onnx.TensorProto.FLOAT16)
    name = f"{B}.ln2/LayerNormalization/Cast"
    graph.through(name, "Cast", to=onnx.TensorProto.FLOAT)


def _graph_gelu(graph: Graph) -> None:
    graph.attribute(f"{B}.mlp/Gelu", approximate="none")


@pytest.mark.parametrize(
    "edit",
    [_graph_eps, _graph_window, _graph_bias, _graph_add, _graph_scale, _graph_half, _graph_gelu],
)
def test_an_edited_graph(
    edit: GraphEdit, original: Checkpoint, reference: Reference, tmp_path: Path
) -> None:
    with edited(original, tmp_path) as (graph, path):
        edit(graph)
    require_caught(compare_program(open_runtime(open_artifact(path), "cpu"), reference))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Reference]:
    path = tmp_path_factory.mktemp("tied") / "m"
    model = open_checkpoint(random_hf(path, seed=1, scale=1.5, intermediate_size=16))
    return model, Reference.of(model, probes())


@pytest.mark.parametrize("fault", GRAPH_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_structure(
    fault: Any, tied: tuple[Checkpoint, Reference], tmp_path: Path
) -> None:
    model, reference = tied
    with edited(model, tmp_path) as (graph, path):
        fault.graph(graph)
    require_caught(compare_program(open_runtime(open_artifact(path), "cpu"), reference))


def test_nan_is_an_error(original: Checkpoint, reference: Reference, tmp_path: Path) -> None:
    with edited(original, tmp_path) as (graph, path):
        graph.through("unembed/Reshape", "Sqrt")
    require_caught(compare_program(open_runtime(open_artifact(path), "cpu"), reference))


# Graphs that say the same otherwise.


def _function(graph: Graph) -> None:
    """Gelu as a function of the model's own."""
    domain = "com.microsoft"
    body = [make("Gelu", ["x"], "y", approximate="tanh")]
    made = onnx.helper.make_function(
        domain, "Bend", ["x"], ["y"], body, [onnx.helper.make_opsetid("", 20)]
    )
    graph.model.functions.append(made)
    graph.model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    node = graph.node(f"{B}.mlp/Gelu")
    node.op_type, node.domain = "Bend", domain
    del node.attribute[:]


def _branches(graph: Graph, bias: float = 0.0) -> None:
    """Of two branches that read the weights outside, the one for short inputs adds a bias."""
    name, weight = f"{B}.mlp/Add_2", f"transformer.h.{1}.mlp.c_proj.bias"
    value = onnx.helper.make_tensor_value_info("", onnx.TensorProto.FLOAT, None)

    def branch(tag: str, constant: float) -> onnx.GraphProto:
        value.name = f"{tag}/out"
        given = onnx.numpy_helper.from_array(
            np.float32(constant) * np.eye(16, dtype="f4")[0], f"{tag}/bias"
        )
        nodes = [
            make("Sub", [f"{name}/before", weight], f"{tag}/without"),
            make("Add", [f"{tag}/without", weight], f"{tag}/with"),
            make("Add", [f"{tag}/with", f"{tag}/bias"], f"{tag}/out"),
        ]
        return onnx.helper.make_graph(nodes, tag, [], [value], [given])

    graph.through(name, "Identity")
    identity = graph.node(f"{name}/Identity")
    graph.after(
        name,
        make("Shape", [f"{name}/before"], "rows", start=0, end=1),
        make("Less", ["rows", graph.constant(np.array([3]))], "few?"),
        make("Squeeze", ["few?"], "few"),
    )
    identity.op_type = "If"
    identity.input[:] = ["few"]
    identity.attribute.extend(
        onnx.helper.make_attribute(f"{which}_branch", branch(which, constant))
        for which, constant in (("then", bias), ("else", 0.0))
    )


def _constants(graph: Graph) -> None:
    """Constant and ConstantOfShape instead of initializers, in float32."""
    first = graph.model.graph.node[0].name
    graph.after(
        first,
        onnx.helper.make_node("Constant", [], ["third"], name="c1", value_float=1 / 3),
        onnx.helper.make_node("Constant", [], ["thirds"], name="c2", value_floats=[1 / 3] * 16),
        make("ConstantOfShape", [graph.constant(np.array([16]))], "zeros"),
        make("Sub", ["third", "thirds"], "none"),
    )
    graph.through(f"{B}/Add_2", "Add", "none")
    graph.through(f"{B}/Add_2/Add", "Add", "zeros")


@pytest.mark.parametrize("edit", [_function, _branches, _constants])
def test_the_same_said_otherwise(
    edit: GraphEdit, original: Checkpoint, reference: Reference, tmp_path: Path
) -> None:
    with edited(original, tmp_path) as (graph, path):
        edit(graph)
    found = compare_program(open_runtime(open_artifact(path), "cpu"), reference)
    assert found.evidence.outcome == "same", found.evidence


def test_a_branch_that_is_wrong(original: Checkpoint, reference: Reference, tmp_path: Path) -> None:
    with edited(original, tmp_path) as (graph, path):
        _branches(graph, 1e-7)
    found = compare_program(open_runtime(open_artifact(path), "cpu"), reference)
    require_caught(found)
    far = {probe.name for probe in found.probes if probe.ratio > MAX_TIMES}
    assert far == {"one token", "cache", "cache and padding"}


def _random(graph: Graph) -> None:
    noise = onnx.helper.make_node("RandomNormal", [], ["noise"], name="noise", shape=[1], scale=0.0)
    graph.model.graph.node.insert(0, noise)
    graph.through(f"{B}/Add_2", "Add", "noise")


def _quantised(graph: Graph) -> None:
    step = [graph.constant(np.float32(1e-3)), graph.constant(np.uint8(128))]
    graph.through(f"{B}/Add_2", "QuantizeLinear", *step)
    graph.through(f"{B}/Add_2/QuantizeLinear", "DequantizeLinear", *step)


def _sixteen_bits(graph: Graph) -> None:
    name, kind = f"{B}/Add_2", onnx.TensorProto.FLOAT16
    graph.through(name, "Cast", to=kind)
    graph.through(f"{name}/Cast", "Add", graph.constant(np.float16(0)) + "")
    weight = graph.constant(np.ones(16, "f2"))
    graph.through(f"{name}/Cast/Add", "Mul", weight)
    graph.through(f"{name}/Cast/Add/Mul", "Cast", to=onnx.TensorProto.FLOAT)


@pytest.mark.parametrize(
    ("edit", "why"),
    [(_random, "random"), (_quantised, "quantised"), (_sixteen_bits, "16 bits")],
)
def test_what_float64_says_nothing_of_is_not_comparable(
    edit: GraphEdit, why: str, original: Checkpoint, reference: Reference, tmp_path: Path
) -> None:
    with edited(original, tmp_path) as (graph, path):
        edit(graph)
    found = compare_program(open_runtime(open_artifact(path), "cpu"), reference)
    assert found.evidence.outcome == "not comparable"
    assert why in str(found.evidence)


def test_the_float32_run_is_left_as_it_was(original: Checkpoint, tmp_path: Path) -> None:
    graph = open_artifact(export(original, tmp_path, weights="external").path)
    for artifact in (original, graph):
        runtime = open_runtime(artifact, "cpu")
        probe: Sequence[Probe] = probes()
        before = runtime.logits(probe[0])
        exact = runtime.exact_logits(probe[0])
        assert exact.dtype is torch.float64
        assert 0 < float((exact - before).abs().max()) < 1e-3
        assert torch.equal(runtime.logits(probe[0]), before)


# In a verification.


def test_what_float32_cannot_see_fails_a_verification(original: Checkpoint, tmp_path: Path) -> None:
    def epsilon(value: float) -> Verification:
        with edited(original, tmp_path / str(value)) as (graph, path):
            graph.attribute(f"{B}.ln1/LayerNormalization", epsilon=value)
        return verify(original, path, checks={"function"}, effort="quick")

    sound, wrong = epsilon(1e-5), epsilon(1.0001e-5)
    assert sound.passed
    assert [e.outcome for e in sound.evidence] == ["same"] * 3
    assert all(probe.passed for probe in wrong.probes)
    assert not wrong.passed
    (problem,) = wrong.problems
    assert "does not compute GPT-Neo" in problem
    assert problem in wrong.summary()
    (found,) = (e for e in wrong.to_json()["evidence"] if e["link"] == "program")
    assert found["outcome"] == "differs"
    assert found["times"] > 10


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
@pytest.mark.parametrize("process", ["none", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_verification_has_evidence_of_each_subject(
    layout: Layout, process: str, dtype: str, original: Checkpoint, tmp_path: Path
) -> None:
    converter.hf_to_tl(
        original, tmp_path / "tl", layout=layout, process=process, dtype=dtype, check=False
    )
    export(open_checkpoint(tmp_path / "tl"))
    found = verify(original, tmp_path / "tl", effort="quick")
    assert found.passed, found.summary()
    comparable = layout == "bridge" or has_hooked_transformer()
    links = {(e.subject.split()[0], e.link): e.outcome for e in found.evidence}
    software = next(r.what.split()[0] for r in found.runtimes if r.role == "artifact")
    assert links == {
        ("the", "weights"): "same",
        ("the", "route"): "same",
        (software, "program"): "same" if comparable else "not comparable",
        (software, "arithmetic"): "same",
        ("model.onnx", "weights"): "same",
        ("model.onnx", "structure"): "same",
        ("model.onnx", "program"): "same",
        ("model.onnx", "route"): "same",
        ("model.onnx", "arithmetic"): "same",
    }
    assert all(str(evidence) in found.summary() for evidence in found.evidence)


@pytest.fixture(scope="module", params=["all", "one block's"])
def precise(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights in float64 that float32 cannot hold: all of them, or one matrix."""
    path = random_hf(tmp_path_factory.mktemp("precise") / "m", dtype="float64")
    if request.param != "all":
        file = path / "model.safetensors"
        kept = "transformer.h.1.mlp.c_fc.weight"
        tensors = {
            name: tensor if name == kept else tensor.astype(np.float32)
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("process", ["none", "default"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_weights_are_verified_in_every_layout(
    layout: Layout, process: str, precise: Path, tmp_path: Path
) -> None:
    """To TransformerLens with a graph, and back; or processed in Hugging Face's own layout."""
    there, back = tmp_path / "there", tmp_path / "back"
    options: dict[str, Any] = {"process": process, "effort": "quick"}
    if layout == "hf":
        made = converter.bake(precise, there, **options)
    else:
        options |= {"ledger": "exact"} if process != "none" else {}
        made = converter.hf_to_tl(precise, there, layout=layout, graph=converter.Graph(), **options)  # fmt: skip
        undone = converter.tl_to_hf(there, back, effort="quick")
        assert undone.verification is not None
        assert undone.verification.passed
        before, after = (load_file(path / "model.safetensors") for path in (precise, back))
        assert all(np.array_equal(after[name], tensor) for name, tensor in before.items())
        if process != "none":
            functional = converter.tl_to_hf(there, tmp_path / "plain", reverse="functional", effort="quick")  # fmt: skip
            assert functional.verification is not None
            assert functional.verification.passed
    assert made.verification is not None
    assert made.verification.passed
    links = {(e.link, e.outcome) for e in made.verification.evidence}
    assert ("program", "same") in links or not has_hooked_transformer()


def test_float64_weights_in_memory_are_verified(precise: Path, tmp_path: Path) -> None:
    from transformers import GPTNeoForCausalLM

    kind: Any = GPTNeoForCausalLM
    model = kind.from_pretrained(precise, dtype=torch.float64)
    found = converter.verify(model, converter.bake(model, tmp_path / "o", process="none").output)
    assert found.passed, found.summary()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_bit_of_float64_is_seen(layout: Layout, precise: Path, tmp_path: Path) -> None:
    """By the weights, whatever software then runs them."""
    original = open_checkpoint(precise)

    def nudged(key: str, value: np.ndarray) -> np.ndarray:
        if key == "blocks.1.mlp.W_in":
            value = value.copy()
            value.reshape(-1).view(np.uint64)[5] ^= np.uint64(1)
        return value

    artifact = write_as(original, tmp_path / "o", layout, edit=nudged)
    found = verify(original, artifact, effort="quick")
    outcomes = {e.link: e.outcome for e in found.evidence}
    assert outcomes["weights"] == "differs", found.summary()
    assert outcomes["program"] != "differs", found.summary()


def test_few_probes_are_the_first_of_their_kinds_cut_short(original: Checkpoint) -> None:
    few = few_of(original.config, standard_probes(original.config))
    *firsts, every_token = few.values()
    kinds = [(p.mask is not None, p.prefill is not None) for p in firsts]
    assert kinds == [(False, False), (True, False), (False, True), (True, True)]
    assert np.unique(every_token.tokens).size == original.config.d_vocab
    for probe in few.values():
        if probe.prefill is not None:
            assert probe.prefill < WINDOW < probe.tokens.shape[1]
            assert probe.mask is None or probe.mask.shape == probe.tokens.shape
    large = replace(original.config, d_mlp=10**8)
    assert len(few_of(large, standard_probes(original.config))) == 2
    assert len(few_of(large, standard_probes(original.config, effort="quick"))) == 1
