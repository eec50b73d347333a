"""The snippets for pipelines, run as far as they can be run here: on a sound model and a spoilt one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import converter
from tests.models import random_hf

ROOT = Path(__file__).parent.parent
SNIPPETS = ROOT / "scripts/pipelines"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    source = random_hf(root / "models/neo", seed=3, scale=1.5)
    converter.hf_to_tl(source, root / "models/neo-tl", process="default", check=False)
    return root


@pytest.fixture
def project(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models / "models", tmp_path / "models")
    return tmp_path


def spoil(project: Path) -> None:
    """One bit of one weight."""
    path = project / "models/neo-tl/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40
    path.write_bytes(data)


def run(command: str | list[str], project: Path, **environment: str) -> int:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    full = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"} | environment
    arguments = ["bash", "-e", "-c", command] if isinstance(command, str) else command
    return subprocess.run(arguments, cwd=project, env=full).returncode


def load(name: str) -> Any:
    return yaml.safe_load((SNIPPETS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(p.name for p in SNIPPETS.iterdir()))
def test_readme_shows_the_files_that_are_tested(name: str) -> None:
    assert (SNIPPETS / name).read_text(encoding="utf-8") in README


@pytest.mark.parametrize("sound", [True, False])
def test_github_actions(project: Path, sound: bool) -> None:
    if not sound:
        spoil(project)
    workflow = load("github-actions.yml")
    step = next(s for s in workflow["jobs"]["verify"]["steps"] if s.get("name") == "Verify")
    assert run(step["run"], project, **workflow["env"]) == (0 if sound else 1)
    # Both are kept as evidence, most of all where it failed.
    assert json.loads((project / "verification.json").read_text())["passed"] is sound
    assert "<html" in (project / "report.html").read_text()


@pytest.mark.parametrize("sound", [True, False])
def test_pre_commit(project: Path, sound: bool) -> None:
    if not sound:
        spoil(project)
    shutil.copy(SNIPPETS / "pre-commit-config.yaml", project / ".pre-commit-config.yaml")
    assert run("git init -q . && git add -A", project) == 0
    command = [sys.executable, "-m", "pre_commit", "run", "--all-files"]
    cache = str(project / ".cache")
    assert run(command, project, PRE_COMMIT_HOME=cache) == (0 if sound else 1)


def test_dvc(project: Path) -> None:
    """The stages' own commands, in order: dvc itself would only decide when to run them."""
    for stage in load("dvc.yaml")["stages"].values():
        assert all((project / needed).exists() for needed in stage["deps"])
        assert run(stage["cmd"], project) == 0
        made = [*stage.get("outs", ()), *stage.get("metrics", ())]
        made = [next(iter(one)) if isinstance(one, dict) else one for one in made]
        assert all((project / name).exists() for name in made)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make(project: Path) -> None:
    shutil.copy(SNIPPETS / "Makefile", project)
    goal = ["make", "verification.json"]
    assert run(goal, project) == 0
    assert run([*goal, "--question"], project) == 0  # nothing is left to do
    assert json.loads((project / "verification.json").read_text())["passed"] is True
