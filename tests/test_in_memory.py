"""What a conversion gives in memory is what its files would hold, and nothing is written."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import converter
from converter.errors import CannotDoHere, NotRepresentable, SourceNotFound, UsageError
from converter.layout import LAYOUTS, Layout
from converter.pipeline import convert
from converter.processing import STEPS, parse
from converter.request import Checking, Writing
from converter.routing import plain, processing, reversing
from converter.verification.loading import has_hooked_transformer
from tests.checkpoints import Recipe, recipes, write_hf
from tests.lively import bits, distance, hooked, log_probs, neo
from tests.marks import needs_hooked

UNCHECKED = Checking(check=False)
MODELS = ["hf", "bridge", *(["hooked"] if has_hooked_transformer() else [])]
dtypes = st.sampled_from([None, "float32", "float16", "bfloat16", "float64"])
steps = st.lists(st.sampled_from([step.name for step in STEPS]), max_size=5).map(
    lambda names: ",".join(names) or "none"
)


def build(source: Any, layout: str, **options: Any) -> Any:
    name = "hf_model" if layout == "hf" else layout
    return getattr(converter, f"to_{name}")(source, **options)


@given(recipes, st.sampled_from(list(LAYOUTS)), dtypes)
@settings(max_examples=60, deadline=None)
def test_moved_bits_are_those_of_the_files(
    recipe: Recipe, layout: Layout, dtype: str | None
) -> None:
    """Any bits: NaN payloads, infinities, denormals."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_hf(root / "hf", recipe)
        source = converter.open_checkpoint(root / "hf")
        try:
            convert(plain(source), root / "out", layout, Writing(dtype), UNCHECKED)
        except NotRepresentable:  # too large for 16 bits
            with pytest.raises(NotRepresentable):
                converter.to_state_dict(source, layout=layout, dtype=dtype)
            return
        found = converter.to_state_dict(source, layout=layout, dtype=dtype)
        assert bits(found) == bits(load_file(root / "out/model.safetensors"))


@given(recipes, st.sampled_from(list(LAYOUTS)), dtypes, steps)
@settings(max_examples=40, deadline=None)
def test_processed_weights_are_those_of_the_files(
    recipe: Recipe, layout: Layout, dtype: str | None, process: str
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_hf(root / "hf", replace(recipe, finite=True))
        source = converter.open_checkpoint(root / "hf")
        chosen = parse(process)
        try:
            route = processing(source, chosen, layout)
            convert(route, root / "out", layout, Writing(dtype, "none"), UNCHECKED)
        except NotRepresentable:
            with pytest.raises(NotRepresentable):
                converter.to_state_dict(source, layout=layout, process=process, dtype=dtype)
            return
        found = converter.to_state_dict(source, layout=layout, process=process, dtype=dtype)
        assert bits(found) == bits(load_file(root / "out/model.safetensors"))
        back = reversing(converter.open_checkpoint(root / "out"))
        convert(back, root / "back", "hf", Writing(), UNCHECKED)
        undone = converter.to_state_dict(root / "out", layout="hf")
        assert bits(undone) == bits(load_file(root / "back/model.safetensors"))


@pytest.mark.parametrize("layout", MODELS)
@pytest.mark.parametrize("process", ["none", "default"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_models_hold_exactly_these_weights(layout: Layout, process: str, dtype: str) -> None:
    source = neo()
    model = build(source, layout, process=process, dtype=dtype)
    held = model.state_dict()
    expected = converter.to_state_dict(source, layout=layout, process=process, dtype=dtype)
    assert bits({name: held[name] for name in expected}) == bits(expected)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    error = distance(model, source)
    assert error < {"float32": 1e-4, "float64": 1e-4, "float16": 0.2, "bfloat16": 2}[dtype]


@pytest.mark.parametrize("layout", MODELS)
@pytest.mark.parametrize("process", ["none", "fold_ln", "center_unembed", "default", "all"])
def test_function_and_ties(layout: Layout, process: str) -> None:
    """In the model, and back in transformers."""
    source = neo(scale=1.5)
    model = build(source, layout, process=process)
    assert distance(model, source) < 1e-4
    back = converter.to_hf_model(model)
    assert distance(back, source) < 1e-4
    head, embedding = back.lm_head.weight, back.transformer.wte.weight
    assert (head is embedding) == back.config.tie_word_embeddings == (process == "none")
    assert back.config.max_position_embeddings == source.config.max_position_embeddings


@given(st.sampled_from(MODELS), steps, st.sampled_from(["float32", "float64"]), st.data())
@settings(max_examples=25, deadline=None)
def test_any_edit_of_a_live_model_comes_back(
    layout: Layout, process: str, dtype: str, data: st.DataObject
) -> None:
    """Some rows of one tensor, or of all, overwritten where they are."""
    model = build(neo(), layout, process=process, dtype=dtype)
    names = list(converter.to_state_dict(model, layout=layout))
    edited = data.draw(st.sampled_from([None, *names]))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    with torch.no_grad():
        held = model.state_dict()
        for name in names if edited is None else [edited]:
            row = data.draw(st.integers(0, len(held[name]) - 1)) if edited else slice(1, 4)
            noise = torch.randn(held[name][row].shape, generator=rng).to(held[name].dtype)
            held[name][row] += (0.1 if edited is None else 1.0) * noise
    assert distance(converter.to_hf_model(model), model) < 2e-4
    assert distance(converter.to_bridge(model), model) < 2e-4


@needs_hooked
@pytest.mark.parametrize("refactor", [False, True])
def test_processing_is_transformer_lenss_own(refactor: bool) -> None:
    """The same function as a HookedTransformer that TransformerLens itself has processed."""
    source = neo()
    theirs = hooked(source)
    theirs.process_weights_(refactor_factored_attn_matrices=refactor)
    ours = converter.to_hooked(source, process="all" if refactor else "default")
    assert ours.cfg.normalization_type == theirs.cfg.normalization_type == "LNPre"
    assert distance(ours, theirs) < 1e-4
    if not refactor:  # refactoring leaves a basis open
        a, b = ours.state_dict(), theirs.state_dict()
        for name in converter.to_state_dict(ours, layout="hooked"):
            assert torch.allclose(a[name], b[name], atol=1e-5), name
    tokens = torch.arange(20)[None]
    _, cache = ours.run_with_cache(tokens)
    assert torch.allclose(cache["resid_post", 1].mean(-1), torch.zeros(1, 20), atol=1e-4)


def test_every_way_between_live_models() -> None:
    source = neo(tied=False)
    for process in ("none", "default"):
        models = [build(source, layout, process=process) for layout in MODELS]
        for model in models:
            for layout in MODELS:
                assert distance(build(model, layout), source) < 1e-4


def test_the_result_has_memory_of_its_own() -> None:
    source = neo()
    before = bits(source.state_dict())
    state = converter.to_state_dict(source, layout="hf")
    for tensor in state.values():
        tensor.zero_()
    for layout in MODELS:
        model = build(source, layout)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    assert bits(source.state_dict()) == before


@pytest.mark.parametrize("layout", MODELS)
def test_what_is_built_can_be_trained_and_brought_back(layout: Layout, tmp_path: Path) -> None:
    model = build(neo(), layout, process="default")
    untrained = bits(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tokens = torch.arange(24)[None]
    for _ in range(2):
        out = model(tokens)
        logits = getattr(out, "logits", out)
        loss: Any = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
        loss.backward()
        optimizer.step()
    assert bits(model.state_dict()) != untrained
    back = converter.to_hf_model(model)
    assert distance(back, model) < 2e-4
    back.save_pretrained(tmp_path / "back")
    again = type(back).from_pretrained(tmp_path / "back").eval()
    assert bits(again.state_dict()) == bits(back.state_dict())


def test_generation_config_and_further_fields_come_along() -> None:
    source = neo(bos_token_id=3, eos_token_id=5, resid_dropout=0.125)
    source.generation_config.max_new_tokens = 7
    built = converter.to_hf_model(source)
    assert built.generation_config.max_new_tokens == 7
    assert built.config.resid_dropout == 0.125
    assert built.config.eos_token_id == 5
    tokens = torch.tensor([[1, 2]])
    ours, theirs = (m.generate(tokens, do_sample=False) for m in (built, source))
    assert torch.equal(ours, theirs)


def test_mixed_dtypes_are_kept_by_the_widest() -> None:
    source = neo(torch.float16)
    source.transformer.ln_f.to(torch.bfloat16)
    built = converter.to_hf_model(source)
    assert built.dtype == torch.float32
    for name, tensor in source.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor.float())
    assert (
        converter.to_state_dict(source, layout="hf")["transformer.ln_f.bias"].dtype
        == torch.bfloat16
    )


WRITING: list[str] = []
"""Files opened for writing, and directories made, while `recording`."""
recording = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not recording:
        return
    if event == "open":
        path, mode, flags = arguments
        if set(mode or "") & set("wax+") or (flags or 0) & 0o3:
            WRITING.append(str(path))
    elif event in ("os.mkdir", "os.rename", "os.link", "shutil.copyfile", "tempfile.mkstemp"):
        WRITING.append(f"{event} {arguments}")


def test_nothing_is_written(tmp_path: Path) -> None:
    global recording
    sys.addaudithook(_audit)
    source = neo()
    write_hf(tmp_path / "hf", Recipe(finite=True))
    for warm in (False, True):  # the first time, Python writes its .pyc files
        recording = warm
        try:
            for layout in MODELS:
                for process in ("none", "default"):
                    build(source, layout, process=process)
                converter.to_state_dict(tmp_path / "hf", layout=layout)  # type: ignore[arg-type]
                converter.to_hf_model(build(source, layout))
            converter.explain(source, source)
            converter.verify(source, source, effort="quick")
            if warm:
                (tmp_path / "witness").write_text("the hook sees writing")
        finally:
            recording = False
    assert [str(tmp_path / "witness")] == WRITING


def test_reverse_belongs_to_plain_hf() -> None:
    source = neo()
    with pytest.raises(UsageError, match="undone on the way"):
        converter.to_state_dict(source, layout="bridge", reverse="functional")
    with pytest.raises(UsageError, match="undone on the way"):
        converter.to_hf_model(source, process="default", reverse="exact")
    with pytest.raises(UsageError, match="hooked"):
        converter.to_state_dict(source, layout="hook")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="float16"):
        converter.to_hf_model(source, dtype="fp16")
    with pytest.raises(CannotDoHere, match="meta"):
        converter.to_hf_model(source, device="meta")


@pytest.mark.parametrize("ledger", ["compact", "exact"])
def test_a_ledger_beside_the_weights_is_used(ledger: Any, tmp_path: Path) -> None:
    source = neo()
    converter.hf_to_tl(source, tmp_path / "tl", process="default", ledger=ledger, check=False)
    back = converter.to_hf_model(tmp_path / "tl", reverse="auto")
    assert distance(back, source) < 1e-4
    assert back.config.tie_word_embeddings
    if ledger == "exact":
        state = converter.to_state_dict(tmp_path / "tl", layout="hf", reverse="exact")
        expected = converter.to_state_dict(source, layout="hf")
        assert bits(state) == bits(expected)
    free = converter.to_hf_model(tmp_path / "tl", reverse="functional")
    assert not free.config.tie_word_embeddings
    assert distance(free, source) < 1e-4


@pytest.mark.parametrize("layout", [name for name in MODELS if name != "hf"])
def test_a_live_model_may_name_the_ledger_it_was_loaded_with(layout: Any, tmp_path: Path) -> None:
    source = neo()
    saved = tmp_path / "tl"
    converter.hf_to_tl(source, saved, layout=layout, process="default", ledger="exact", check=False)
    load = converter.load_hooked if layout == "hooked" else converter.load_bridge
    model = load(saved)
    with pytest.raises(SourceNotFound, match="no ledger"):
        converter.open_model(model, ledger=tmp_path)
    opened = converter.open_model(model, ledger=saved)
    expected = bits(converter.to_state_dict(source, layout="hf"))
    assert bits(converter.to_state_dict(opened, layout="hf", reverse="exact")) == expected
    with torch.no_grad():
        name = "mlp.in.weight" if layout == "bridge" else "mlp.W_in"
        model.state_dict()[f"blocks.1.{name}"][3, 5] += 4
    back = converter.to_hf_model(opened)
    assert distance(back, model) < 1e-4
    assert distance(back, source) > 0.1
    found = bits(converter.to_state_dict(opened, layout="hf"))
    changed = {name for name, kept in found.items() if kept != expected[name]}
    assert "transformer.h.1.mlp.c_fc.weight" in changed
    assert changed <= {"transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.bias"}


@pytest.mark.skipif(has_hooked_transformer(), reason="there is a HookedTransformer")
def test_without_hooked_transformer_the_advice_works() -> None:
    source = neo()
    with pytest.raises(CannotDoHere) as raised:
        converter.to_hooked(source, process="default")
    assert "to_bridge" in raised.value.do
    model = converter.to_bridge(source, process="default")
    _, cache = model.run_with_cache(torch.arange(9)[None])
    assert "blocks.1.hook_resid_post" in cache
    assert torch.isfinite(log_probs(model)).all()
