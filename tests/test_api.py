"""The Python API is as careful as the command line: what it does not know is refused, and named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import converter
from converter import convert, errors
from converter.cli import main
from converter.errors import UsageError
from tests.checkpoints import Recipe, read_all, write_hf

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("hf_to_tl", {"process": "default", "ledger": "exakt"}, "exact"),
    ("hf_to_tl", {"dtype": "fp16"}, "float16"),
    ("hf_to_tl", {"dtype": torch.int8}, "keep"),
    ("hf_to_tl", {"layout": "hook"}, "hooked"),
    ("hf_to_tl", {"layout": "hf"}, "bridge"),
    ("hf_to_tl", {"layout": None}, "hooked"),
    ("hf_to_tl", {"process": "fold"}, "fold_ln"),
    ("hf_to_tl", {"effort": "fast"}, "quick"),
    ("hf_to_tl", {"runtime": "onnx"}, "onnxruntime"),
    ("hf_to_tl", {"max_shard_size": "big"}, "5GB"),
    ("hf_to_tl", {"max_shard_size": 2.5}, "5GB"),
    ("hf_to_tl", {"max_shard_size": None}, "5GB"),
    ("hf_to_tl", {"max_shard_size": "0"}, "5GB"),
    ("hf_to_tl", {"max_shard_size": "-5GB"}, "5GB"),
    ("hf_to_tl", {"progress": 3}, "function"),
    ("hf_to_tl", {"process": None}, "commas"),
    ("hf_to_tl", {"process": ["fold_ln"]}, "commas"),
    ("hf_to_tl", {"device": "gpu"}, "cpu"),
    ("hf_to_tl", {"overwrite": "no"}, "False"),
    ("hf_to_tl", {"dry_run": 1}, "False"),
    ("hf_to_tl", {"layers": None}, "False"),
    ("hf_to_tl", {"graph": True}, "Graph"),
    ("hf_to_tl", {"graph": "model.onnx"}, "Graph"),
    ("hf_to_tl", {"ledger": None}, "none"),
    ("hf_to_tl", {"layout": "BRIDGE"}, "Did you mean bridge"),
    ("export_onnx", {"graph": converter.Graph(hooks=["blocks.9.hook_resid_post"])}, "blocks"),
    ("bake", {"ledger": ""}, "compact"),
    ("tl_to_hf", {"reverse": "functionl"}, "functional"),
    ("export_onnx", {"dtype": "half"}, "float16"),
]
UNKNOWN = [
    (name, option)
    for name in ("hf_to_tl", "tl_to_hf", "bake", "export_onnx")
    for option in ("nonsense", "verbose")
]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_hf(tmp_path / "hf", Recipe(finite=True))
    return tmp_path / "hf"


@pytest.mark.parametrize(("name", "options", "nearest"), WRONG)
def test_a_wrong_value_is_refused_with_the_nearest(
    name: str, options: dict[str, Any], nearest: str, hf: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as raised:
        getattr(converter, name)(hf, tmp_path / "out", check=False, **options)
    assert nearest in raised.value.do
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(("name", "option"), UNKNOWN)
def test_an_unknown_keyword_is_refused(name: str, option: str, hf: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=option):
        getattr(converter, name)(hf, tmp_path / "out", **{option: 3})
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "exteral"},
        {"client": "transformersjs", "weights": "external"},
        {"client": "transformers-js"},
        {"with_past": "no"},
        {"hooks": 3},
        {"hooks": [3]},
    ],
)
def test_a_graph_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"no value|cannot share|of type (str|int)"):
        converter.Graph(**options)


def test_one_hook_may_stand_alone() -> None:
    assert converter.Graph(hooks="blocks.*").hooks == converter.Graph(hooks=["blocks.*"]).hooks


def test_numbers_are_sizes(hf: Path, tmp_path: Path) -> None:
    done = converter.hf_to_tl(hf, tmp_path / "out", max_shard_size=400, check=False)
    assert isinstance(done, converter.Conversion)
    assert len(done.plan.shards) > 1


def test_torch_dtypes_are_dtypes(hf: Path, tmp_path: Path) -> None:
    converter.hf_to_tl(hf, tmp_path / "out", dtype=torch.bfloat16, check=False)
    assert {t.dtype.name for t in read_all(tmp_path / "out").values()} == {"bfloat16"}


@pytest.mark.parametrize("name", ["hf_to_tl", "tl_to_hf", "bake", "export_onnx"])
def test_every_option_has_a_name(name: str) -> None:
    parameters = inspect.signature(getattr(convert, name)).parameters.values()
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)


@pytest.mark.parametrize(
    "command", ["hf-to-tl", "tl-to-hf", "bake", "export-onnx", "verify", "reference"]
)
def test_options_and_keywords_have_the_same_defaults(command: str) -> None:
    keywords = inspect.signature(getattr(converter, command.replace("-", "_"))).parameters
    given = main.commands[command].make_context(command, ["a", "b"], resilient_parsing=True).params
    both = given.keys() & keywords.keys() - {"source", "output", "original"}
    assert len(both) > 3
    for name in both:
        said = None if given[name] == "keep" else given[name]
        assert said == keywords[name].default, name


def test_dir_shows_what_there_is() -> None:
    assert set(converter.__all__) <= set(dir(converter))
    for name in converter.__all__:
        getattr(converter, name)
    named = {n: v for n, v in vars(errors).items() if isinstance(v, type)}
    faults = {name for name, value in named.items() if issubclass(value, Exception)}
    assert faults <= set(converter.__all__)


def test_explain_takes_paths(hf: Path, tmp_path: Path) -> None:
    converter.hf_to_tl(hf, str(tmp_path / "tl"), process="fold_ln", check=False)
    found = converter.explain(str(hf), tmp_path / "tl")
    assert found.verdict == "same-function"
    assert "fold_ln" in repr(found)


def test_verify_takes_one_check_by_name(hf: Path) -> None:
    assert not converter.verify(hf, hf, checks="weights").probes
    with pytest.raises(UsageError, match="Nothing to check: weight"):
        converter.verify(hf, hf, checks="weight")
    with pytest.raises(UsageError, match="max_ratio"):
        converter.verify(hf, hf, max_ratio="8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"seed": "x"}, {"layers": "no"}, {"checks": None}, {"checks": []}, {"text": 3}]
)
def test_verify_says_what_is_wrong(options: dict[str, Any], hf: Path) -> None:
    with pytest.raises(UsageError):
        converter.verify(hf, hf, **options)


@pytest.mark.parametrize("given", [3, {}, b"x", "", "a\0b"])
def test_what_names_no_place(given: Any, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty name, as of a variable that was never set, is not the current directory."""
    monkeypatch.chdir(hf)
    calls: list[Callable[[], Any]] = [
        lambda: converter.hf_to_tl(hf, given),
        lambda: converter.tl_to_hf(hf, given),
        lambda: converter.bake(hf, given),
        lambda: converter.export_onnx(hf, given),
        lambda: converter.hf_to_tl(hf, "out", adapter=given),
        lambda: converter.open_checkpoint(given),
        lambda: converter.open_checkpoint(hf, cfg=given),
        lambda: converter.open_checkpoint(hf, cache=given),
        lambda: converter.reference(hf, given),
        lambda: converter.reference(hf, "r", text=given),
        lambda: converter.verify(hf, hf, text=given),
        lambda: converter.verify(hf, hf, pythons=[given]),
        lambda: converter.push(given, "me/neo"),
        lambda: converter.load_bridge(given),
    ]
    if isinstance(given, str):  # else it is a model, of a kind that is not known
        calls += [lambda: converter.verify(given, hf), lambda: converter.inspect(given)]
        calls += [lambda: converter.hf_to_tl(given, "out")]
    for call in calls:
        with pytest.raises(UsageError):
            call()
    assert sorted(path.name for path in hf.iterdir()) == ["config.json", "model.safetensors"]


def test_home_on_both_sides(hf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    converter.hf_to_tl("~/hf", "~/tl", check=False)
    converter.reference("~/hf", "~/r", effort="quick", seed=np.int64(3))  # type: ignore[arg-type]
    assert converter.verify("~/r", Path("~/tl"), effort="quick", checks="weights").passed
    said = converter.hf_to_tl(hf, Path("~/again"), check=False).to_json()
    assert said["output"] == str(tmp_path / "again")
    assert list(Path().iterdir()) == []
    with pytest.raises(errors.SourceNotFound):
        converter.inspect("~nobody-of-this-name/hf")


@pytest.mark.parametrize("seed", [-1, 2**63, 0.5, True, "3", None])
def test_a_seed_that_is_none(seed: Any, hf: Path, tmp_path: Path) -> None:
    for call in (
        lambda: converter.reference(hf, tmp_path / "r", seed=seed),
        lambda: converter.verify(hf, hf, seed=seed),
    ):
        with pytest.raises(UsageError, match="seed"):
            call()


def test_opening_is_as_careful(hf: Path) -> None:
    cfg = str(hf / "config.json")
    opened = converter.open_checkpoint(hf / "model.safetensors", cfg=cfg)
    assert opened.config == converter.open_checkpoint(hf).config
    more: list[dict[str, Any]] = [{"allow_pickle": "no"}, {"revision": 3}]
    for given, options in ((3, {}), (None, {}), *((hf, options) for options in more)):
        with pytest.raises(UsageError):
            converter.open_checkpoint(given, **options)  # type: ignore[arg-type]


def test_inspect_takes_a_path(hf: Path) -> None:
    assert converter.inspect(str(hf)).to_json()["layout"] == "hf"


@pytest.mark.parametrize("option", ["effort", "runtime"])
def test_verify_refuses_what_it_does_not_know(option: str, hf: Path) -> None:
    with pytest.raises(UsageError, match=f"no value of {option}"):
        converter.verify(hf, hf, **{option: "fast"})  # type: ignore[arg-type]


def test_results_are_short_to_look_at(hf: Path, tmp_path: Path) -> None:
    results: list[Any] = [
        converter.hf_to_tl(hf, tmp_path / "tl", check=False),
        converter.hf_to_tl(hf, tmp_path / "no", dry_run=True),
        converter.export_onnx(hf, check=False),
        converter.open_checkpoint(hf),
        converter.verify(hf, tmp_path / "tl", checks=["weights"]),
    ]
    plans = [results[0].plan, results[0].route, results[3].source]
    for result in (*results, *plans, converter.Inspection(results[3])):
        assert len(repr(result)) < 1000, result
        assert any(word in repr(result) for word in ("hf", "tl", "hooked"))
