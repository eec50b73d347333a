"""The snippets for pipelines, run as far as they can be run here: on a sound model and a spoilt one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import converter
from tests.models import random_hf

ROOT = Path(__file__).parent.parent
SNIPPETS = ROOT / "scripts/pipelines"
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/pipelines.md").read_text(encoding="utf-8")


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
def test_the_page_shows_the_files_that_are_tested(name: str) -> None:
    assert (SNIPPETS / name).read_text(encoding="utf-8") in PAGE


def step(name: str) -> dict[str, Any]:
    """Of the action."""
    found: dict[str, Any] = next(s for s in ACTION["runs"]["steps"] if s.get("name") == name)
    return found


def filled(text: str, inputs: dict[str, str]) -> str:
    """Its expressions as a runner fills them in: only inputs are named, so that no text of a pull
    request becomes code."""
    return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: inputs[found[1]], text)


def act(project: Path, asked: dict[str, str]) -> int:
    """The action's own step, as a runner does it, with what a workflow gives it."""
    inputs = {name: given.get("default", "") for name, given in ACTION["inputs"].items()} | asked
    verify = step("Verify")
    assert "${{" not in verify["run"]
    environment = {name: filled(text, inputs) for name, text in verify["env"].items()}
    files = {name: str(project / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    return run(["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", verify["run"]], project, **files, **environment)  # fmt: skip


def asked_by_the_workflow() -> dict[str, str]:
    steps = load("github-actions.yml")["jobs"]["verify"]["steps"]
    given: dict[str, str] = next(s["with"] for s in steps if "neoconvert" in s["uses"])
    return given


@pytest.mark.parametrize("sound", [True, False])
def test_the_github_action(project: Path, sound: bool) -> None:
    if not sound:
        spoil(project)
    assert act(project, asked_by_the_workflow()) == (0 if sound else 1)
    assert (project / "GITHUB_OUTPUT").read_text() == f"passed={str(sound).lower()}\n"
    # All of it is kept as evidence, most of all where it failed.
    kept = project / filled(step("Keep the evidence")["with"]["path"], {"evidence": "neoconvert"})
    assert json.loads((kept / "verification.json").read_text())["passed"] is sound
    assert "<html" in (kept / "report.html").read_text()
    summary = (project / "GITHUB_STEP_SUMMARY").read_text()
    assert summary == (kept / "summary.md").read_text()
    assert "models/neo-tl against models/neo" in summary
    assert ("NOT VERIFIED" in summary) is not sound


def test_the_action_runs_nothing_that_it_is_given(project: Path) -> None:
    hostile = "$(touch hacked) `touch hacked`; touch hacked"
    asked = {"original": hostile, "artifact": hostile, "arguments": "; touch hacked *"}
    assert act(project, asked) == 2
    assert not (project / "hacked").exists()


def test_the_workflow_gives_what_the_action_takes() -> None:
    asked, takes = asked_by_the_workflow(), ACTION["inputs"]
    assert set(asked) <= set(takes)
    assert {name for name, given in takes.items() if given.get("required")} <= set(asked)
    assert re.search(r"pip install .*\$GITHUB_ACTION_PATH", step("Install")["run"])


@pytest.mark.skipif(
    find_spec("check_jsonschema") is None, reason="needs check-jsonschema (the dev extra)"
)
@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("github-actions", ROOT / "action.yml"),
        ("github-workflows", SNIPPETS / "github-actions.yml"),
    ],
)
def test_github_accepts_them(schema: str, path: Path, tmp_path: Path) -> None:
    def check(file: Path) -> int:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
        return run([*command, str(file)], tmp_path)

    assert check(path) == 0
    spoilt = tmp_path / "spoilt.yml"
    spoilt.write_text(path.read_text().replace("runs", "walks"))
    assert check(spoilt) == 1


@pytest.mark.parametrize("sound", [True, False])
def test_pre_commit(project: Path, sound: bool) -> None:
    """The hook comes from a repository at a revision, as for everyone; here one on this disk."""
    if not sound:
        spoil(project)
    hooks = project / "hooks"
    hooks.mkdir()
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    commit = "git -c user.name=x -c user.email=x@example.org commit -qm x"
    tag = load("pre-commit-config.yaml")["repos"][0]["rev"]
    assert run(f"git init -q . && git add -A && {commit} && git tag {tag}", hooks) == 0
    validate = [sys.executable, "-m", "pre_commit", "validate-manifest", ".pre-commit-hooks.yaml"]
    assert run(validate, hooks) == 0
    config = (SNIPPETS / "pre-commit-config.yaml").read_text(encoding="utf-8")
    config, times = re.subn(r"https://\S+/neoconvert", str(hooks), config)
    assert times == 1
    (project / ".pre-commit-config.yaml").write_text(config)
    assert run("git init -q . && git add .pre-commit-config.yaml models", project) == 0
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


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for i in range(3):
        random_hf(tmp_path / f"runs/checkpoint-{i}", seed=i)
    weights = tmp_path / "runs/checkpoint-1/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    return tmp_path


@pytest.mark.skipif(shutil.which("snakemake") is None, reason="snakemake is not installed")
def test_snakemake(runs: Path) -> None:
    shutil.copy(SNIPPETS / "Snakefile", runs)
    goal = ["snakemake", "--cores", "2", "--config", "per_job=2"]
    assert run(goal, runs) == 0
    lines = [json.loads(x) for p in runs.glob("sweep/*.jsonl") for x in p.read_text().splitlines()]
    status = {Path(line["source"]).name: line["status"] for line in lines if "status" in line}
    assert status == {
        "checkpoint-0": "converted", "checkpoint-1": "failed", "checkpoint-2": "converted",
    }  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in runs.glob("sweep/*.jsonl")}
    assert run(goal, runs) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.glob("sweep/*.jsonl")} == before


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_ray(runs: Path) -> None:
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(runs)}
    command = [sys.executable, str(SNIPPETS / "sweep_ray.py")]
    assert run(command, runs, **environment) == 0
    assert sorted(os.listdir(runs / "tl")) == ["checkpoint-0", "checkpoint-2"]
