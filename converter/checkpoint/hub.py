"""The hub, through huggingface_hub: its cache, its token, its endpoint, its offline mode."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from converter.checkpoint.listing import meant_beside
from converter.checkpoint.standard import PICKLES
from converter.errors import HubUnreachable, SourceNotFound

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PLACES = (
    "https://huggingface.co", "https://hf.co", "huggingface.co", "hf.co", "hf://models", "hf:/",
)  # fmt: skip
_PAGES = ("tree", "blob", "resolve", "commit", "raw")
"""Of a model, that name a revision."""
_FILES = (".safetensors", ".onnx", ".json", *PICKLES)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LATER = (408, 425, 429)
"""HTTP's answers, beside those from 500 on, that mean: try again."""
_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "requests", "urllib3")
"""Whose exceptions are about the network: huggingface_hub has changed its client twice."""


def named(given: str) -> tuple[str, str | None] | None:
    """The model's id and the revision that `owner/name`, `owner/name@revision` or the address of a
    page of the model means. None: it cannot be a model on the hub."""
    name, of_page = _page(given)
    model, at, revision = name.partition("@")
    if (at and not revision) or not _ID.fullmatch(model) or model.endswith(_FILES):
        return None
    return model, revision or of_page or None


def _page(given: str) -> tuple[str, str]:
    """Name and revision of an address such as https://huggingface.co/owner/name/tree/v1; what is no
    address is a name."""
    own = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    for place in (own, *_PLACES):
        if place and given.startswith(f"{place}/"):
            path = re.split(r"[?#]", given.removeprefix(f"{place}/"))[0]
            owner, name, kind, revision, *_ = [*map(unquote, path.split("/")), "", "", ""]
            if owner not in ("datasets", "spaces"):
                return f"{owner}/{name}", revision if kind in _PAGES else ""
    return given, ""


def fetch(
    given: str, revision: str | None, wanted: list[str], cache: Path | None = None
) -> tuple[Path, str]:
    """Download, or find in the cache when offline.

    Args:
        wanted: patterns of file names. Pickles are fetched where there is no safetensors file.
        cache: another directory than huggingface_hub's own.

    Returns: the directory, and the commit.

    Raises:
        SourceNotFound: the hub has no such model. HubUnreachable: it does not say.
        OSError: a full disk, say.
    """
    from huggingface_hub import snapshot_download

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(given, revision=revision, allow_patterns=patterns, cache_dir=cache)
        )

    with _asking(given, revision):
        found = download([*wanted, "*.safetensors"])
        if not any(found.glob("*.safetensors")):
            found = download([*wanted, "*.bin"])
    return found, found.name


def commit_of(given: str, revision: str | None) -> str | None:
    """The commit that a revision is now; None where the hub cannot be asked.

    Raises:
        SourceNotFound: the hub has no such model, or no such revision.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        with _asking(given, revision):
            commit: str | None = HfApi().model_info(given, revision=revision).sha
            return commit
    except HubUnreachable:
        return None


def revisions(given: str) -> list[str]:
    """Names of a model's branches and tags.

    Raises: see `fetch`.
    """
    from huggingface_hub import HfApi

    with _asking(given, None):
        refs = HfApi().list_repo_refs(given)
    return [ref.name for ref in (*refs.branches, *refs.tags)]


@contextmanager
def _asking(given: str, revision: str | None) -> Iterator[None]:
    """What goes wrong between here and the hub, as what it means."""
    try:
        yield
    except Exception as error:
        if not is_of_the_hub(error):
            raise
        said = reason(error)
        where = given + (f" at revision {revision}" if revision else "")
        which = given + (f" --revision {revision}" if revision else "")
        if may_pass(error):
            raise HubUnreachable(
                f"There is no such local path, and the hub could not be asked: {said}",
                where=where,
                do=f"{meant_beside(given)}Check the network and run again; without one, run hf download {which} where there is"
                " one, or give a local directory.",
            ) from error
        raise SourceNotFound(
            f"There is no such local path, and the hub gave no such model: {said}",
            where=where,
            do=f"{meant_beside(given)}Check the name, and whether you may read it (hf auth login); or give a local directory.",
        ) from error


def is_of_the_hub(error: Exception) -> bool:
    """Whether it is the network, or the hub's answer, and not our disk."""
    if type(error).__module__.partition(".")[0] in _CLIENTS:
        return True
    network = isinstance(error, (ConnectionError, TimeoutError))
    return isinstance(error, OSError) and (network or not error.errno)


def reason(error: Exception) -> str:
    """The first line of what it says, without a full stop and without the name of a class."""
    lines = str(error).strip().splitlines()
    said = re.sub(r"^Got: \w+: ", "", lines[0]).rstrip(".") if lines else ""
    return said or type(error).__name__


def may_pass(error: BaseException) -> bool:
    """Whether asking again may help: no answer, or one that says so."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status in _LATER or status >= 500
        if isinstance(cause, (HFValidationError, LocalTokenNotFoundError)):
            return False
        cause = cause.__cause__ or cause.__context__
    return True
