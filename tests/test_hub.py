"""A hub id: downloaded through huggingface_hub, then found in its cache without a network."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlparse

import pytest

from converter.checkpoint.hub import named
from tests.checkpoints import Recipe, read_all, same, write_hf

COMMIT = "c0ffee" * 6 + "abcd"


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub as a snapshot download asks for: one model, one commit."""

    root: Path
    asked: list[str]

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(path)
        files = [{"rfilename": p.name} for p in sorted(self.root.iterdir())]
        if path.startswith("/api/models/me/neo") and path.split("/")[-1] in (
            "neo",
            "main",
            "v1",
            COMMIT,
        ):
            if "/tree/" in path:
                tree = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                        for p in sorted(self.root.iterdir())]  # fmt: skip
                self._answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                return
            info = {"id": "me/neo", "modelId": "me/neo", "sha": COMMIT, "siblings": files, "tags": [],
                    "private": False, "downloads": 0, "likes": 0}  # fmt: skip
            self._answer(200, json.dumps(info).encode(), Content_Type="application/json")
            return
        parts = path.split("/")
        name = parts[-1]
        if path.startswith("/me/neo/resolve/") and (self.root / name).is_file():
            body = (self.root / name).read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            self._answer(200, body, ETag=etag, X_Repo_Commit=COMMIT)
            return
        self._answer(404, b"{}", X_Error_Code="RepoNotFound", Content_Type="application/json")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Path, list[str], dict[str, str]]]:
    root = tmp_path / "served"
    root.mkdir()
    asked: list[str] = []
    handler = type("Hub", (_Hub,), {"root": root, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    environment.pop("HF_TOKEN", None)
    yield root, asked, environment
    server.shutdown()


def _run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "converter", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_download_then_offline(hub: tuple[Path, list[str], dict[str, str]], tmp_path: Path) -> None:
    root, asked, environment = hub
    tensors = write_hf(root, Recipe(shards=2))
    for name, content in {
        "tokenizer.json": "{}",
        "README.md": "# Theirs",
        "notes.md": "",
        "x.py": "",
        "pytorch_model.bin": "x",
    }.items():
        (root / name).write_text(content)
    out = str(tmp_path / "tl")
    first = _run(environment, "hf-to-tl", "me/neo", out, "--revision", "v1", "--no-verify")
    assert first.returncode == 0, first.stderr
    fetched = {path.split("/")[-1] for path in asked if "/resolve/" in path}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= fetched
    assert not fetched & {"notes.md", "x.py", "pytorch_model.bin"}
    assert not (tmp_path / "tl/README.md").exists()
    assert (tmp_path / "tl/tokenizer.json").read_text() == "{}"
    source = json.loads((tmp_path / "tl/neoconvert.json").read_text())["source"]
    assert (source["given"], source["revision"]) == ("me/neo", COMMIT)

    asked.clear()
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    again = _run(
        offline, "hf-to-tl", "me/neo", out, "--revision", "v1", "--overwrite", "--no-verify"
    )
    assert again.returncode == 0, again.stderr
    assert not asked
    back = _run(offline, "tl-to-hf", out, str(tmp_path / "back"), "--no-verify")
    assert back.returncode == 0, back.stderr
    assert same(read_all(tmp_path / "back"), tensors)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("EleutherAI/gpt-neo-125m", ("EleutherAI/gpt-neo-125m", None)),
        ("gpt2", ("gpt2", None)),
        ("me/neo@v1", ("me/neo", "v1")),
        ("me/neo@refs/pr/2", ("me/neo", "refs/pr/2")),
        ("https://huggingface.co/me/neo", ("me/neo", None)),
        ("https://huggingface.co/me/neo/", ("me/neo", None)),
        ("https://huggingface.co/me/neo/tree/v1", ("me/neo", "v1")),
        ("https://huggingface.co/me/neo/tree/refs%2Fpr%2F2", ("me/neo", "refs/pr/2")),
        ("https://hf.co/me/neo/blob/main/model.safetensors?download=true", ("me/neo", "main")),
        ("huggingface.co/me/neo/discussions/4", ("me/neo", None)),
        ("hf://me/neo@v1", ("me/neo", "v1")),
        ("hf://models/me/neo", ("me/neo", None)),
        ("https://hub.example/me/neo/commit/abc#top", ("me/neo", "abc")),
        ("me/neo@", None),
        ("@v1", None),
        ("me/neo/more", None),
        ("https://huggingface.co/datasets/me/neo", None),
        ("https://example.com/me/neo", None),
        ("./me/neo", None),
        ("model.safetensors", None),
    ],
)
def test_what_is_meant(given: str, meant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    assert named(given) == meant


def test_a_revision_in_the_name(
    hub: tuple[Path, list[str], dict[str, str]], tmp_path: Path
) -> None:
    root, asked, environment = hub
    write_hf(root, Recipe())
    endpoint = environment["HF_ENDPOINT"]
    for i, given in enumerate(("me/neo@v1", f"{endpoint}/me/neo/tree/v1")):
        out = tmp_path / f"tl{i}"
        done = _run(environment, "hf-to-tl", given, str(out), "--no-verify")
        assert done.returncode == 0, done.stderr
        assert any("/revision/v1" in path for path in asked), asked
        source = json.loads((out / "neoconvert.json").read_text())["source"]
        assert (source["given"], source["revision"]) == ("me/neo", COMMIT)
        assert json.loads((out / "cfg.json").read_text())["model_name"] == "neo"
        asked.clear()
        shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_no_such_model(offline: str, hub: tuple[Path, list[str], dict[str, str]]) -> None:
    _, _, environment = hub
    result = _run(environment | {"HF_HUB_OFFLINE": offline}, "inspect", "me/other")
    assert result.returncode == 3
    assert len(result.stderr.splitlines()) == 3, result.stderr
    assert "me/other" in result.stderr
