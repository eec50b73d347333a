"""All-or-nothing publishing: a sibling directory is filled, checked, synced and renamed once."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.checkpoint.files import WEIGHTS
from converter.checkpoint.source import PROVENANCE
from converter.errors import OutputExists, SamePlace

_OURS = (PROVENANCE, "config.json", "cfg.json", WEIGHTS, f"{WEIGHTS}.index.json")


def check_output(output: Path, source: Path | None, *, overwrite: bool) -> None:
    """Refuse an OUTPUT that would harm what is there. Nothing is read or written.

    Raises:
        SamePlace: OUTPUT is SOURCE, or a directory that holds it.
        OutputExists: it is there and may not be replaced.
    """
    target = Path(os.path.realpath(output))
    origin = Path(os.path.realpath(source)) if source is not None else None
    if origin is not None and target in (origin, *origin.parents):
        raise SamePlace(
            "OUTPUT is the same place as SOURCE, or holds it.",
            where=f"{output} and {source}",
            do="Name another OUTPUT directory.",
        )
    if not (output.exists() or output.is_symlink()):
        return
    if not target.is_dir():
        raise OutputExists(
            "OUTPUT exists and is not a directory.",
            where=str(output),
            do="Name another OUTPUT directory.",
        )
    entries = [entry.name for entry in target.iterdir()]
    if not entries:
        return
    if not overwrite:
        raise OutputExists(
            "OUTPUT exists already.",
            where=str(output),
            do="Name another directory, or add --overwrite to replace it whole.",
        )
    if not set(entries) & set(_OURS):
        raise OutputExists(
            "OUTPUT is a directory that holds no checkpoint, so --overwrite does not replace it.",
            where=f"{output}: {', '.join(sorted(entries)[:4])}",
            do="Name another directory, or remove this one yourself.",
        )


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A directory beside OUTPUT that becomes OUTPUT when the block ends without an exception.

    On any exception it is removed and OUTPUT is as it was.
    """
    target = Path(os.path.realpath(output))
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield stage
        _open_up(stage)
        _sync(stage)
        _replace(stage, target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _open_up(stage: Path) -> None:
    """The modes that plain writing gives; mkdtemp and safetensors make private files."""
    mask = os.umask(0)
    os.umask(mask)
    for path in stage.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    stage.chmod(0o777 & ~mask)


def _sync(stage: Path) -> None:
    for path in [*stage.rglob("*"), stage]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_free(path: Path, *, overwrite: bool) -> None:
    """
    Raises:
        OutputExists: `path` is there and may not be replaced.
    """
    if not overwrite and (path.exists() or path.is_symlink()):
        raise OutputExists(
            f"There is a {path.name} already.",
            where=str(path),
            do="Remove it, or add --overwrite to replace it.",
        )


@contextmanager
def adding(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """The name of a file beside `path` that becomes `path` when the block ends without an
    exception. On any exception it is removed, and what was at `path` is as it was.

    Raises:
        OutputExists: `path` is there and may not be replaced.
    """
    require_free(path, overwrite=overwrite)
    stage = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield stage
        _sync_one(stage)
        if overwrite:
            os.rename(stage, path)
        else:
            try:
                os.link(stage, path)  # unlike a rename, fails if the name was taken meanwhile
            except FileExistsError:
                require_free(path, overwrite=False)
                raise
        _sync_one(path.parent)
    finally:
        stage.unlink(missing_ok=True)


def _replace(stage: Path, target: Path) -> None:
    """Give the finished directory its name; an old one goes in the same instant."""
    if not target.exists():
        os.rename(stage, target)
    elif _exchange(stage, target):
        shutil.rmtree(stage)
    else:  # no atomic exchange here: the old directory is out of the way for one instant
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        os.rename(target, old / target.name)
        try:
            os.rename(stage, target)
        except OSError:
            os.rename(old / target.name, target)
            raise
        shutil.rmtree(old)
    _sync_one(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE): both names change hands at once. False if unsupported."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
