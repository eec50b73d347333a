"""To the hub, through huggingface_hub: all of an artifact's files in one commit, or none.

As with OUTPUT, what is replaced in a repository is what neoconvert wrote there: the neoconvert.json in
it lists those files with their digests. Where there is more, nothing is pushed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint import hub
from converter.checkpoint.record import bears_seal, sha256_of, survey
from converter.checkpoint.source import PROVENANCE
from converter.choices import of_kind, place
from converter.errors import BadInput, CannotDoHere, HubUnreachable, OutputExists, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NOT_OURS_TO_MIND = (".gitattributes",)
"""The hub makes it for each repository."""


@dataclass(frozen=True)
class Repository:
    """A place on the hub that may be pushed to, as it was when that was found out."""

    name: str
    """owner/name."""
    branch: str
    head: str | None
    """The branch's commit; None: there is no such branch yet."""
    exists: bool
    """Whether there is such a repository."""
    ours: frozenset[str] = frozenset()
    """Files there that neoconvert wrote, and that a push replaces."""


@dataclass(frozen=True)
class Pushed:
    """What a push made."""

    repository: str
    branch: str
    commit: str
    url: str

    def to_json(self) -> dict[str, str]:
        return dict(vars(self))


def push(directory: str | Path, repository: str, *, overwrite: bool = False) -> Pushed:
    """Push a directory that neoconvert wrote to the hub, in one commit.

    Args:
        repository: owner/name, or owner/name@branch; made where there is none, with the owner's default
            visibility.
        overwrite: replace what neoconvert wrote there before.

    Raises:
        BadInput: the directory holds other files than neoconvert wrote.
        UsageError, OutputExists, CannotDoHere, HubUnreachable: see `aim`.
    """
    return deliver(
        place(directory, "DIRECTORY", "Name what neoconvert wrote."),
        aim(repository, overwrite=overwrite),
    )


def aim(repository: str, *, overwrite: bool) -> Repository:
    """Find out whether a repository may be pushed to, before an hour's work. Nothing is changed there.

    Raises:
        UsageError: no such name can be.
        CannotDoHere: no token of someone who may write there.
        OutputExists: it has files of neoconvert's and `overwrite` is not set, or files of others.
        HubUnreachable: the hub gives no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    of_kind(repository, str, "--push-to", "Write it as owner/name.")
    meant = hub.named(repository)
    if meant is None or "/" not in meant[0]:
        raise UsageError(
            "This is no name of a repository on the hub.",
            where=f"--push-to {repository}",
            do="Write it as owner/name, or owner/name@branch.",
        )
    name, branch = meant[0], meant[1] or "main"
    api = HfApi()
    with _asking(name):
        api.whoami()
        try:
            head = api.model_info(name, revision=branch).sha
        except (RevisionNotFoundError, RepositoryNotFoundError) as error:
            return Repository(name, branch, None, isinstance(error, RevisionNotFoundError))
        ours, foreign = _there(api, name, head)
    if foreign or (ours and not overwrite):
        few = ", ".join(foreign[:4] or sorted(ours)[:4])
        raise OutputExists(
            "The repository has files that neoconvert did not write, or that were changed since."
            if foreign
            else "The repository has an artifact already.",
            where=f"{name}, branch {branch}: {few}",
            do=f"Push to another branch: --push-to {name}@neoconvert"
            if foreign
            else "Add --overwrite to replace it.",
        )
    return Repository(name, branch, head, True, frozenset(ours))


def deliver(directory: Path, to: Repository) -> Pushed:
    """Push a directory's files: what neoconvert wrote there before is replaced or removed.

    Raises: see `push`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    found = survey(directory, deep=False)
    if found.foreign or PROVENANCE not in found.ours:
        raise BadInput(
            "Only what neoconvert wrote is pushed, and there is more in this directory."
            if PROVENANCE in found.ours
            else "neoconvert did not write this directory.",
            where=f"{directory}: {', '.join(found.foreign[:4]) or 'empty'}",
            do="Move the other files out. Or push all of it: hf upload OWNER/NAME DIRECTORY",
        )
    document = json.loads((directory / PROVENANCE).read_text("utf-8"))
    api, did = HfApi(), document.get("options", {}).get("command", document.get("route"))
    operations: list[Any] = [
        CommitOperationAdd(name, str(directory / name)) for name in sorted(found.ours)
    ]
    operations += [CommitOperationDelete(name) for name in sorted(to.ours - found.ours.keys())]
    with _asking(to.name, directory):
        if not to.exists:
            api.create_repo(to.name)
        if to.head is None and to.branch != "main":
            # From the first commit, which holds nothing: main's weights are not to lie beside ours.
            first = api.list_repo_commits(to.name)[-1].commit_id
            api.create_branch(to.name, branch=to.branch, revision=first)
        commit = api.create_commit(
            to.name, operations, revision=to.branch, parent_commit=to.head,
            commit_message=f"neoconvert {did}: {document['source']['given']}",
        )  # fmt: skip
    return Pushed(to.name, to.branch, str(commit.oid), str(commit.repo_url))


def _there(api: HfApi, name: str, head: str | None) -> tuple[set[str], list[str]]:
    """A repository's files: neoconvert's, and others."""
    from huggingface_hub.hf_api import RepoFile

    def fetched(file: str) -> Path:
        return Path(api.hf_hub_download(name, file, revision=head)).resolve()  # a link in the cache

    files = [f for f in api.list_repo_tree(name, recursive=True, revision=head) if isinstance(f, RepoFile)]  # fmt: skip
    entries = {f.path: f for f in files if f.path not in _NOT_OURS_TO_MIND}
    record: dict[str, Any] = {}
    if PROVENANCE in entries and bears_seal(fetched(PROVENANCE)):
        record = json.loads(fetched(PROVENANCE).read_text("utf-8")).get("files", {})
    ours, foreign = set(), []
    for path, entry in sorted(entries.items()):
        said = record.get(path, {}).get("sha256")
        if (path == PROVENANCE and record) or (
            said and said == (entry.lfs.sha256 if entry.lfs else sha256_of(fetched(path)))
        ):
            ours.add(path)
        else:
            foreign.append(f"{path} (changed since)" if said else path)
    return ours, foreign


@contextmanager
def _asking(name: str, directory: Path | None = None) -> Iterator[None]:
    """What goes wrong between here and the hub, as what it means. `directory`: what is published here
    already."""
    try:
        yield
    except Exception as error:
        if not hub.is_of_the_hub(error):
            raise
        here = f" {directory} is complete here." if directory else " Nothing was written."
        if hub.may_pass(error):
            raise HubUnreachable(
                f"The hub could not be asked: {hub.reason(error)}.{here}",
                where=f"--push-to {name}",
                do=f"Run again later: hf upload {name} {directory}"
                if directory
                else "Check the network and run again, or leave --push-to out.",
            ) from error
        raise CannotDoHere(
            f"The hub refuses: {hub.reason(error)}.{here}",
            where=f"--push-to {name}",
            do="Log in with a token that may write there: hf auth login",
        ) from error
