"""Pushing to the hub: one commit, nothing of others' replaced, told before the work whether it can be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from converter.convert import hf_to_tl
from converter.demo import MODEL
from tests.uploads import Uploads, receiving


@pytest.fixture
def hub() -> Iterator[Uploads]:
    with receiving(Uploads()) as hub:
        yield hub


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "hf"))


def push(hub: Uploads, source: Path, *options: str, name: str = "out", exit_code: int = 0) -> Any:
    """Convert and push; the JSON document, or what was printed."""
    output = source.parent / name
    there = {**os.environ, **hub.environment, "HF_HOME": str(source.parent / "home")}
    ran = subprocess.run(
        [sys.executable, "-m", "converter", "hf-to-tl", str(source), str(output), "--no-verify", "--json", *options],
        capture_output=True, text=True, env=there,
    )  # fmt: skip
    assert ran.returncode == exit_code, ran.stderr
    return json.loads(ran.stdout)


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}  # fmt: skip


def test_a_new_repository_has_every_file(hub: Uploads, source: Path) -> None:
    said = push(hub, source, "--push-to", "me/neo", "--model-card")
    there = hub.repositories["me/neo"]["main"]
    assert there.pop(".gitattributes")
    assert there == files(source.parent / "out")
    assert {"README.md", "model.safetensors", "cfg.json", "neoconvert.json"} <= there.keys()
    assert hub.commits == ["neoconvert hf-to-tl: hf"]
    assert said["pushed"]["repository"] == "me/neo"
    there[".gitattributes"] = b"*.bin filter=lfs\n"
    assert said["pushed"]["commit"] == hub.head("me/neo", "main")


def test_a_branch(hub: Uploads, source: Path) -> None:
    push(hub, source, "--push-to", "me/neo@processed", "--process", "default")
    assert "ledger.safetensors" in hub.repositories["me/neo"]["processed"]
    assert hub.repositories["me/neo"]["main"].keys() == {".gitattributes"}


def test_a_new_branch_has_nothing_of_mains(hub: Uploads, source: Path) -> None:
    """Weights of others beside ours would be taken for ours."""
    theirs = {".gitattributes": b"", "pytorch_model.bin": b"theirs"}
    hub.repositories["me/neo"] = {"main": dict(theirs)}
    refused = push(hub, source, "--push-to", "me/neo", exit_code=2)
    _, _, advice = refused["error"]["do"].partition(": ")
    push(hub, source, *advice.split())
    assert hub.repositories["me/neo"]["main"] == theirs
    there = hub.repositories["me/neo"]["neoconvert"]
    assert {*there} - {".gitattributes"} == {*files(source.parent / "out")}


def test_what_was_pushed_before_is_replaced_whole(hub: Uploads, source: Path) -> None:
    push(hub, source, "--push-to", "me/neo", "--max-shard-size", "1MB", "--process", "default")
    before = dict(hub.repositories["me/neo"]["main"])
    refused = push(hub, source, "--push-to", "me/neo", name="again", exit_code=2)
    assert "--overwrite" in refused["error"]["do"], refused["error"]
    assert not (source.parent / "again").exists()
    assert hub.repositories["me/neo"]["main"] == before
    push(hub, source, "--push-to", "me/neo", "--overwrite", name="again")
    there = hub.repositories["me/neo"]["main"]
    assert {*there} - {".gitattributes"} == {*files(source.parent / "again")}
    assert len(hub.commits) == 2


@pytest.mark.parametrize("changed", ["README.md", "config of theirs.json", "cfg.json"])
def test_what_is_not_ours_stays(changed: str, hub: Uploads, source: Path) -> None:
    push(hub, source, "--push-to", "me/neo", "--model-card")
    there = hub.repositories["me/neo"]["main"]
    there[changed] = b"{} mine"
    before = dict(there)
    said = push(hub, source, "--push-to", "me/neo", "--overwrite", name="again", exit_code=2)
    assert changed in said["error"]["where"]
    assert hub.repositories["me/neo"]["main"] == before
    assert not (source.parent / "again").exists()


def test_nothing_is_converted_for_who_may_not_push(hub: Uploads, source: Path) -> None:
    hub.logged_in = False
    said = push(hub, source, "--push-to", "me/neo", exit_code=4)
    assert "hf auth login" in said["error"]["do"]
    assert not (source.parent / "out").exists()
    assert not hub.repositories


@pytest.mark.parametrize("refused", ["/lfs/", "/commit/", "/preupload/"])
def test_where_pushing_fails_the_output_is_there(refused: str, hub: Uploads, source: Path) -> None:
    hub.refused, hub.status = refused, 403
    said = push(hub, source, "--push-to", "me/neo", exit_code=4)
    assert "complete here" in said["error"]["what"]
    assert (source.parent / "out" / "model.safetensors").is_file()
    assert hub.repositories["me/neo"]["main"].keys() == {".gitattributes"}  # all or nothing
    assert not hub.commits


def test_a_dry_run_asks_and_pushes_nothing(hub: Uploads, source: Path) -> None:
    said = push(hub, source, "--push-to", "me/neo", "--dry-run")
    assert "pushed" not in said
    assert not hub.repositories


@pytest.mark.parametrize("name", ["neo", "a b/c", "me/neo/extra", ""])
def test_no_name_of_a_repository(name: str, hub: Uploads, source: Path) -> None:
    said = push(hub, source, "--push-to", name, exit_code=2)
    assert "owner/name" in said["error"]["do"]


def test_from_python(hub: Uploads, source: Path, tmp_path: Path) -> None:
    hf_to_tl(source, tmp_path / "tl", check=False)
    program = "import converter, sys; print(converter.push(sys.argv[1], 'me/neo').branch)"
    there = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home")}

    def ran() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, str(tmp_path / "tl")]
        return subprocess.run(command, capture_output=True, text=True, env=there)

    (tmp_path / "tl" / "notes.txt").write_text("mine")
    assert "notes.txt" in ran().stderr
    assert not hub.commits
    (tmp_path / "tl" / "notes.txt").unlink()
    assert ran().stdout == "main\n"
    assert hub.commits == ["neoconvert hf-to-tl: hf"]


def test_no_token_is_no_network() -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    from converter.checkpoint.hub import may_pass

    assert not may_pass(LocalTokenNotFoundError("Token is required"))
    assert may_pass(ConnectionError("no route"))
