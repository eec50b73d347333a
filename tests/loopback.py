"""As much of the hub as downloads ask for, on this machine: one model, many revisions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlparse


def commit(name: str) -> str:
    """The commit of a branch, while it has not moved."""
    return hashlib.sha1(name.encode()).hexdigest()


@dataclass
class Hub:
    """`me/neo`, with a directory of files for each branch."""

    branches: dict[str, Path]
    port: int = 0
    moved: dict[str, str] = field(default_factory=dict)
    """Branches that have another commit than at first."""
    asked: list[str] = field(default_factory=list)
    status: int = 200
    """What it answers to everything; 200: as it should."""

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        }

    @property
    def downloads(self) -> list[str]:
        return [Path(path).name for path in self.asked if "/resolve/" in path]

    def commits(self) -> dict[str, Path]:
        """Directories by branch and by commit."""
        named = {self.moved.get(n, commit(n)): path for n, path in self.branches.items()}
        return self.branches | named

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        if self.status != 200:
            return self.status, b"{}", {}
        parts = path.strip("/").split("/")
        if parts[:4] == ["api", "models", "me", "neo"]:
            return self._about(parts[4:])
        if parts[:3] == ["me", "neo", "resolve"] and len(parts) == 5:
            file = self.commits().get(parts[3], Path("/none")) / parts[4]
            if file.is_file():
                body = file.read_bytes()
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                return 200, body, {"ETag": etag, "X-Repo-Commit": self._commit(parts[3])}
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}

    def _commit(self, revision: str) -> str:
        named = revision in self.branches
        return self.moved.get(revision, commit(revision)) if named else revision

    def _about(self, rest: list[str]) -> tuple[int, bytes, dict[str, str]]:
        if rest == ["refs"]:
            refs = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": self._commit(n)}
                for n in self.branches
            ]
            return _json({"branches": refs, "converts": [], "tags": []})
        revision = rest[1] if len(rest) > 1 else "main"
        root = self.commits().get(revision)
        if root is None:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        if rest[:1] == ["tree"]:
            return _json(
                [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                    for p in sorted(root.iterdir())
                ]
            )
        files = [{"rfilename": p.name} for p in sorted(root.iterdir())]
        return _json(
            {"id": "me/neo", "modelId": "me/neo", "sha": self._commit(revision), "siblings": files,
             "tags": [], "private": False, "downloads": 0, "likes": 0}
        )  # fmt: skip


def _json(document: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(document).encode(), {"Content-Type": "application/json"}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answer on a port of this machine while the block runs."""

    def answer(method: str, path: str, _: bytes) -> tuple[int, bytes, dict[str, str]]:
        if method == "GET":
            hub.asked.append(path)
        return hub.answer(path)

    with answering(answer) as port:
        hub.port = port
        yield hub


@contextmanager
def answering(
    answer: Callable[[str, str, bytes], tuple[int, bytes, dict[str, str]]],
) -> Iterator[int]:
    """A server's port, while the block runs. `answer`: status, body and headers, by method, path and
    what is sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body, headers = answer(self.command, unquote(urlparse(self.path).path), sent)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """For a process that is to ask this hub, with a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    return {**kept, **hub.environment, "HF_HUB_CACHE": str(cache)}
