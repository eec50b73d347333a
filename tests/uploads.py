"""As much of the hub as uploads ask for, on this machine: repositories of `me`, whole in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.loopback import answering

LARGE = (".safetensors", ".onnx", ".onnx_data")
"""What the hub keeps as LFS objects."""
FIRST = {".gitattributes": b"*.bin filter=lfs\n"}
"""The files of a repository's first commit."""
Answer = tuple[int, Any, dict[str, str]]


@dataclass
class Uploads:
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Files by name, branch and path."""
    commits: list[str] = field(default_factory=list)
    """Messages of the commits that were made."""
    port: int = 0
    logged_in: bool = True
    refused: str = ""
    """A part of an address: what is sent there is answered with `status`."""
    status: int = 503
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_me",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip

    def head(self, name: str, branch: str) -> str:
        files = self.repositories[name][branch]
        described = sorted((path, hashlib.sha1(body).hexdigest()) for path, body in files.items())
        return hashlib.sha1(repr(described).encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if self.refused and self.refused in path:
            return self.status, {"error": "not now"}, {}
        if not self.logged_in:
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": []}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            name = f"me/{json.loads(body)['name']}"
            there = name in self.repositories
            self.repositories.setdefault(name, {"main": dict(FIRST)})
            return 409 if there else 200, {"url": f"http://127.0.0.1:{self.port}/{name}"}, {}
        if method == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.split("/")[-1]
            self.objects[path.split("/")[-1]] = body
            return 200, {}, {}
        if match := re.fullmatch(r"/(me/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self._action(o) for o in json.loads(body)["objects"]]}, {}  # fmt: skip
        if match := re.fullmatch(r"/(me/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        if match := re.fullmatch(r"/api/models/(me/[^/]+)/(\w+)/([^/]+)(?:/.*)?", path):
            return self._about(match[1], match[2], match[3], body)
        return 404, {}, {"X-Error-Code": "RepoNotFound"}

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        there = f"http://127.0.0.1:{self.port}/lfs/{asked['oid']}"
        return {**asked, "actions": {"upload": {"href": there, "header": {}}}}

    def _branch(self, name: str, revision: str) -> str | None:
        branches = self.repositories.get(name, {})
        known = (b for b in branches if revision in (b, self.head(name, b)))
        return next(known, None)

    def _file(self, name: str, revision: str, path: str) -> Answer:
        branch = self._branch(name, revision)
        body = self.repositories[name][branch].get(path) if branch else None
        if branch is None or body is None:
            return 404, {}, {"X-Error-Code": "EntryNotFound"}
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return 200, body, {"ETag": etag, "X-Repo-Commit": self.head(name, branch)}

    def _about(self, name: str, what: str, revision: str, body: bytes) -> Answer:
        if name not in self.repositories:
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        branches = self.repositories[name]
        if what == "branch":
            if revision in branches:
                return 409, {"error": "There is such a branch."}, {}
            start = json.loads(body).get("startingPoint", "main")
            branches[revision] = dict(FIRST if start == "first" else branches["main"])
            return 200, {}, {}
        if what == "commits":
            when = "2026-01-01T00:00:00.000Z"
            return 200, [{"id": i, "authors": [], "date": when, "title": i, "message": ""} for i in ("last", "first")], {}  # fmt: skip
        branch = self._branch(name, revision)
        if branch is None:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        files = self.repositories[name][branch]
        if what == "revision":
            return 200, {"id": name, "sha": self.head(name, branch), "siblings": [], "tags": []}, {}
        if what == "tree":
            return 200, [_entry(path, content) for path, content in files.items()], {}
        if what == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": modes}, {}
        assert what == "commit", what
        header, *operations = map(json.loads, body.splitlines())
        if header["value"].get("parentCommit", self.head(name, branch)) != self.head(name, branch):
            return 412, {"error": "The branch has moved."}, {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        self.commits.append(header["value"]["summary"])
        oid = self.head(name, branch)
        url = f"http://127.0.0.1:{self.port}/{name}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}, {}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"oid": digest, "size": len(content), "pointerSize": 130}
    entry = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
    return entry | ({"lfs": lfs} if path.endswith(LARGE) else {})


@contextmanager
def receiving(hub: Uploads) -> Iterator[Uploads]:
    """Answer on a port of this machine while the block runs."""

    def answer(method: str, path: str, sent: bytes) -> tuple[int, bytes, dict[str, str]]:
        status, said, headers = hub.answer(method, path, sent)
        return status, said if isinstance(said, bytes) else json.dumps(said).encode(), headers

    with answering(answer) as port:
        hub.port = port
        yield hub
