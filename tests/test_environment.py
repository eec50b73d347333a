"""`--version` and `env`: what a bug report needs, and nothing of where things are."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import converter
from converter import environment
from converter.cli import main


def described(**variables: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["env", "--json"], env=variables)
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_version_says_what_it_uses_and_imports_none_of_it() -> None:
    code = (
        "import sys; from converter.cli import main; main(['--version'], standalone_mode=False);"
        " print(sorted({'torch', 'numpy', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, used, imported = out.stdout.splitlines()
    assert first == f"neoconvert {converter.__version__}"
    for name, version in environment.versions().items():
        assert name == "neoconvert" or f"{name} {version}" in used
    assert imported == "[]"


def importable(name: str) -> bool:
    """Whether TransformerLens has a class, or says that it was removed."""
    for module in ("transformer_lens", "transformer_lens.model_bridge"):
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name) is not None
    return False


def test_env_is_of_this_machine() -> None:
    import torch

    document = described()
    assert document["problems"] == []
    assert document["libraries"]["torch"] == torch.__version__
    for name in ("HookedTransformer", "TransformerBridge"):
        assert (name in document["transformer_lens"]) == importable(name)
    assert len(document["devices"]) == 1 + torch.cuda.device_count()
    assert "CPUExecutionProvider" in document["onnxruntime"]


def test_no_place_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("/home/ada/env/lib/libtorch.so: cannot open C:\\Users\\ada\\torch.dll")

    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_cuda", broken)
    document = described(HF_HOME="/home/ada/hub", HF_TOKEN="hf_1", OMP_NUM_THREADS="1")
    assert document["variables"] == {"HF_HOME": "set", "HF_TOKEN": "set", "OMP_NUM_THREADS": "1"}
    assert document["problems"] == ["torch: OSError: libtorch.so: cannot open torch.dll"]
    assert document["devices"] == ["cpu"]
    text = json.dumps(document)
    for private in (str(Path.home()), str(Path(sys.prefix)), str(Path.cwd()), "ada", "hf_1"):
        assert private not in text
    assert not re.search(r"(?<![\w.])/\w+/", text)


def test_what_is_not_there_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    document = described()
    assert (document["transformer_lens"], document["problems"]) == ([], [])


def test_people_get_rows() -> None:
    result = CliRunner().invoke(main, ["env"])
    assert result.exit_code == 0
    for name, version in environment.versions().items():
        assert name == "neoconvert" or version in result.output
