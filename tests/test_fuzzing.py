"""A moment of the fuzzing of `scripts/fuzz`, with the inputs that were findings once, and that its
checks can fail."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from converter import cli_manifest, strict_json
from converter.checkpoint import files, hf_config, legacy_pickles, tl_config
from converter.errors import CorruptFile, Fault, NeoconvertError
from converter.onnx import reading
from converter.processing import unit_ledger
from tests.fuzzing import TARGETS, target
from tests.fuzzing.target import Finding, Target, Trial

KEPT = Path(__file__).parent / "fuzzing/kept"
FINDINGS = [(path.parent.name, path.name) for path in sorted(KEPT.glob("*/*"))]
COUNT = 60
Ready = Callable[[str], Trial]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    found: dict[str, Trial] = {}

    def trial(name: str) -> Trial:
        if name not in found:
            found[name] = Trial(TARGETS[name], tmp_path_factory.mktemp("fuzzed"))
        return found[name]

    return trial


@pytest.fixture
def ready(made: Ready, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ready:
    """A target's trial; the working directory is that of the trial, and afterwards what it was."""
    monkeypatch.chdir(tmp_path)

    def trial(name: str) -> Trial:
        one = made(name)
        monkeypatch.chdir(one.place)
        return one

    return trial


def inputs(trial: Trial, count: int) -> Iterator[bytes]:
    """Changed ones, the same every time."""
    return (trial.chosen(random.Random(seed)) for seed in range(count))


@pytest.mark.parametrize("name", TARGETS)
def test_a_few(name: str, ready: Ready) -> None:
    trial = ready(name)
    accepted = sum(map(trial, inputs(trial, COUNT)))
    assert 0 < accepted < COUNT if trial.target.codes else accepted == COUNT


@pytest.mark.parametrize(("name", "finding"), FINDINGS)
def test_what_was_found(name: str, finding: str, ready: Ready) -> None:
    ready(name)((KEPT / name / finding).read_bytes())


def _nothing(*_: object) -> None:
    pass


def _true(*_: object) -> bool:
    return True


def _as_torch_has_it(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


FAULTS: list[tuple[str, Any, str, Any]] = [
    ("config.json", hf_config, "_require_expandable", _nothing),
    ("config.json", hf_config, "_require_optional", _nothing),
    ("cfg.json", tl_config, "is_finite", _true),
    ("model.safetensors.index.json", files, "_plain_file_name", _true),
    ("model.safetensors.index.json", files.Files, "_check", _nothing),
    ("ledger.safetensors", unit_ledger, "expect", lambda value, *_: value),
    ("ledger.safetensors", unit_ledger, "_as_expected", lambda array, *_: array),
    ("neoconvert.json", strict_json, "_without_nan", lambda value: value),
    ("manifest", cli_manifest, "_text", lambda _, value: str(value)),
    ("pickles", legacy_pickles, "load", _as_torch_has_it),
    ("ONNX graph", reading, "check_inline", _nothing),
    ("ONNX graph", reading, "_check_texts", _nothing),
]


@pytest.mark.parametrize(
    ("name", "where", "what", "fault"), FAULTS, ids=lambda value: value if isinstance(value, str) else ""
)  # fmt: skip
def test_faults_are_found(
    name: str, where: Any, what: str, fault: Any, ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = ready(name)
    kept = [path.read_bytes() for path in sorted((KEPT / name).glob("*"))]
    monkeypatch.setattr(where, what, fault)
    for data in itertools.chain(kept, inputs(trial, 2000)):
        try:
            trial(data)
        except BaseException:
            return
    pytest.fail("2000 inputs show nothing")


def _wasteful(_data: bytes, _place: Path) -> None:
    np.ones(2**26)  # 512 MiB


def _slow(_data: bytes, _place: Path) -> None:
    for _ in range(10**7):
        pass


def _random(_data: bytes, _place: Path) -> float:
    return random.random()


def _raising(error: Exception) -> Callable[[bytes, Path], object]:
    def read(_data: bytes, _place: Path) -> None:
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (_wasteful, "MiB"),
        (_slow, "processor time"),
        (_random, "something else"),
        (_raising(Fault("what", where="where", do="do")), "exit code 70"),
        (_raising(NeoconvertError("what", where="where", do="")), "three lines"),
        (_raising(KeyError("what")), "what"),
    ],
)
def test_the_checks_can_fail(
    read: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if says == "processor time":
        monkeypatch.setattr(target, "SECONDS", 0.05)
    trial = Trial(Target("x", list, lambda data, _: data, read), tmp_path)
    with pytest.raises((Finding, KeyError), match=says):
        trial(b"")


def test_a_refusal_is_right(tmp_path: Path) -> None:
    error = CorruptFile("what", where="where", do="do")
    assert not Trial(Target("x", list, lambda d, _: d, _raising(error)), tmp_path)(b"")


def test_json_that_is_read() -> None:
    assert strict_json.loads("[" * 60 + "]" * 60)
    for deep in ("[" * 70 + "]" * 70, "[" * 10**5 + "]" * 10**5, '{"a":' * 70 + "1" + "}" * 70):
        with pytest.raises(ValueError, match="too deeply"):
            strict_json.loads(deep)


def test_json_that_is_written() -> None:
    odd = {"a": [float("nan"), 1.0, (float("inf"),)], "b": "NaN"}
    assert strict_json.dumps(odd) == '{"a": [null, 1.0, [null]], "b": "NaN"}'
