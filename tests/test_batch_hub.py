"""A sweep over a hub's revisions: fetched once, converted, removed where that was asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import converter
from tests.checkpoints import Recipe, Tensors, read_all, same, write_hf
from tests.loopback import Hub, commit, environment, serving

ROOT = str(Path(converter.__file__).parents[1])
STEPS = ("step1", "step2", "step10")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Tensors]]:
    root = tmp_path_factory.mktemp("served")
    branches = {name: root / name for name in ("main", *STEPS)}
    tensors = {n: write_hf(path, Recipe(seed=i)) for i, (n, path) in enumerate(branches.items())}
    return branches, tensors


@pytest.fixture
def hub(served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(Hub(served[0])) as hub:
        yield hub


def run(hub: Hub, *arguments: str, rows: list[dict[str, Any]] | None = None, code: int = 0) -> Any:
    row = {"command": "hf-to-tl", "source": "me/neo@step*", "output": "tl/{name}-{revision}"}
    text = "\n".join(json.dumps({**row, "verify": False, **more}) for more in rows or [{}])
    Path("m.jsonl").write_text(text)
    command = [sys.executable, "-m", "converter", "batch", "m.jsonl", "--json", *arguments]
    env = environment(hub, Path("cache").absolute()) | {"PYTHONPATH": ROOT}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr + done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_revisions(hub: Hub) -> None:
    lines = run(hub)
    assert [x["source"] for x in lines[:-1]] == [f"me/neo@{step}" for step in STEPS]
    for step in STEPS:
        record = json.loads(Path(f"tl/neo-{step}/neoconvert.json").read_text())
        assert record["source"]["given"] == "me/neo"
        assert record["source"]["revision"] == commit(step)
    hub.asked.clear()
    lines = run(hub)
    assert [x["status"] for x in lines[:-1]] == ["there"] * 3
    assert hub.downloads == []
    # A branch that moves is noticed, of its commit, though its files are the same.
    hub.moved["step2"] = "f" * 40
    lines = run(hub, code=2)
    assert [x["status"] for x in lines[:-1]] == ["there", "failed", "there"]
    assert f"me/neo@step2 is {'f' * 40} now" in lines[1]["error"]["what"]
    # Offline, the cache's commit counts.
    hub.status = 503
    assert [x["status"] for x in run(hub, rows=[{"source": "me/neo@step1"}])[:-1]] == ["there"]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_fetch_convert_delete(jobs: str, hub: Hub, served: Any) -> None:
    run(hub, "--delete-fetched", "--jobs", jobs)
    assert not list(Path("cache").glob("models--*"))
    assert sorted(os.listdir("tl")) == sorted(f"neo-{step}" for step in STEPS)
    back = {"command": "tl-to-hf", "source": "tl/neo-step2", "output": "back"}
    run(hub, rows=[back])
    assert same(read_all(Path("back")), served[1]["step2"])
    hub.asked.clear()
    lines = run(hub, "--delete-fetched", "--jobs", jobs)
    assert {x["status"] for x in lines[:-1]} == {"there"}
    assert hub.downloads == []


def test_a_kill_leaves_nothing_that_was_fetched(hub: Hub) -> None:
    program = (
        "import time\n"
        "import converter.batch.job as job\n"
        "job.run = lambda *a: (open('reached', 'w').close(), time.sleep(60))\n"
        "from converter.cli import main\n"
        "main(['batch', 'm.jsonl', '--delete-fetched'])"
    )
    row = {"command": "hf-to-tl", "source": "me/neo@step1", "output": "tl/{revision}"}
    Path("m.jsonl").write_text(json.dumps({**row, "verify": False}))
    env = environment(hub, Path("cache").absolute()) | {"PYTHONPATH": ROOT}
    with subprocess.Popen([sys.executable, "-c", program], env=env) as running:
        deadline = time.monotonic() + 60
        while not Path("reached").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGKILL)
    assert any(".partial" in name for name in os.listdir("tl"))
    run(hub, "--delete-fetched", rows=[{"source": "me/neo@step1", "output": "tl/{revision}"}])
    assert os.listdir("tl") == ["step1"]


@pytest.mark.parametrize(
    ("status", "source", "kind", "code"),
    [
        (503, "me/neo@step1", "HubUnreachable", 75),
        (429, "me/neo@step1", "HubUnreachable", 75),
        (0, "me/neo@step1", "HubUnreachable", 75),
        (200, "me/neo@step3", "SourceNotFound", 3),
        (200, "me/other@step1", "SourceNotFound", 3),
        (403, "me/neo@step1", "SourceNotFound", 3),
    ],
)
def test_what_may_pass_is_told_apart(
    status: int, source: str, kind: str, code: int, hub: Hub
) -> None:
    hub.status = status
    if not status:
        hub.port = 1  # nobody answers
    line, _ = run(hub, rows=[{"source": source}], code=code)
    assert line["error"]["type"] == kind, line["error"]
    assert line["transient"] is (code == 75)
    assert run(hub, "--delete-fetched", rows=[{"source": source}], code=code)[0]["status"] == "failed"  # fmt: skip
    assert not Path("tl").exists()


def test_no_revision_matches(hub: Hub) -> None:
    (line,) = run(hub, rows=[{"source": "me/neo@stp*"}], code=2)
    assert "Nothing matches" in line["error"]["what"]


def test_a_hub_that_is_down_stops_nothing_else(hub: Hub) -> None:
    write_hf(Path("here"), Recipe())
    hub.status = 503
    rows = [{}, {"source": "here", "output": "tl/here"}]
    lines = run(hub, rows=rows, code=75)
    assert [x["status"] for x in lines[:-1]] == ["failed", "converted"]
    assert lines[0]["source"] == "me/neo@step*"
    assert lines[0]["transient"] is True
