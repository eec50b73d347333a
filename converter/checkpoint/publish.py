"""All-or-nothing publishing: a workspace is filled, checked, synced, and gets its name in one instant.

Before that instant nothing has changed; after it, the result is published, and whatever goes wrong is
a warning. What may be replaced is decided before the work and enforced in that instant.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from converter.checkpoint.locking import alone_in
from converter.checkpoint.record import Survey, survey
from converter.checkpoint.renaming import exchange, rename_new, sync, sync_tree
from converter.checkpoint.replaceable import fixed, require_free, require_replaceable
from converter.checkpoint.signature import identity, signature
from converter.checkpoint.workspace import Workspace, clean, is_workspace, weights_first
from converter.errors import NoSpace, OutputExists, full
from converter.interrupts import held

PUBLISHED: list[Path] = []
"""What this process has published, so that an error that comes later can say that it is there."""


@dataclass
class Stage:
    """What is being made."""

    path: Path
    """The directory to fill, or the name of the file to write."""
    warnings: list[str] = field(default_factory=list)
    """What went wrong after it was published, or with what a dead run had left."""


@contextmanager
def staging(output: Path, *, overwrite: bool = False, needs: int = 0) -> Iterator[Stage]:
    """A directory that becomes OUTPUT when the block ends without an exception.

    On any exception it is removed and OUTPUT is as it was.

    Args:
        overwrite: OUTPUT may be replaced if neoconvert wrote all of it.
        needs: bytes that will be written, at least.

    Raises:
        OutputExists: OUTPUT may not be replaced, now or at the end: another made or changed it.
        NoSpace: there is too little.
    """
    target = Path(os.path.realpath(output))
    with parents_of(target), _naming(output):
        warnings = [f"a killed run left {kept}" for kept in clean(target.parent)]
        if target.is_dir():
            clean(target)
        before = require_replaceable(output, overwrite=overwrite, deep=True)
        inside = before is not None and before.empty and fixed(target)
        _require_space(target if inside else target.parent, needs)
        where = before.where if before else None
        place = Workspace(target, ".") if inside else Workspace(target.parent, target.name, where)
        stage = Stage(place.new, warnings)
        try:
            yield stage
            _open_up(place.new, target if before else None)
            sync_tree(place.new)
            with held():
                if inside:
                    _fill(place, target, output)
                else:
                    _rename(place, target, before, output)
                PUBLISHED.append(target)
                stage.warnings += _close(place)
        except BaseException:
            if place.folder.exists():
                place.close()
            raise


@contextmanager
def _naming(place: Path) -> Iterator[None]:
    """Say where a write failed: the system names a file only where one is opened."""
    try:
        yield
    except OSError as error:
        if full(error) and not error.filename:
            error.filename = str(place)
        raise


@contextmanager
def parents_of(target: Path) -> Iterator[None]:
    """Make the directories that OUTPUT is to be in; those made are removed again if they stay empty."""
    missing = [path for path in (target.parent, *target.parent.parents) if not path.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
        for path in missing:
            sync(path.parent)
    except BaseException:
        for path in missing:
            try:
                path.rmdir()
            except OSError:
                break
        raise


def _require_space(directory: Path, needs: int) -> None:
    try:
        disk = shutil.disk_usage(directory)
    except FileNotFoundError:  # another run made it, failed, and removed it: `Workspace` makes it
        return
    if disk.total and disk.free < needs:
        raise NoSpace(
            f"There is too little space: {needs:,} bytes will be written, {disk.free:,} are free.",
            where=str(directory),
            do="Free some, or name an OUTPUT on another disk. Nothing was written.",
        )


def _open_up(stage: Path, former: Path | None) -> None:
    """The modes that plain writing gives (mkdtemp and safetensors make private files); of the
    directory, the former one's."""
    mask = os.umask(0)
    os.umask(mask)
    for path in stage.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    mode = 0o777 & ~mask
    if former:
        with suppress(FileNotFoundError):  # removed meanwhile, which `_rename` will notice
            mode = former.stat().st_mode & 0o7777
    stage.chmod(mode)


def _close(place: Workspace) -> list[str]:
    """Remove what was replaced; OUTPUT is published, so that nothing is an error any more."""
    try:
        place.say(committed=True)
        return [f"what was replaced is still there in part: {kept}" for kept in place.close()]
    except OSError as error:
        return [f"what was replaced could not be removed ({error.strerror}): {place.folder}"]


def _meanwhile(output: Path | str) -> OutputExists:
    return OutputExists(
        "OUTPUT was made or changed while this ran, and is left as it is. Nothing was published.",
        where=str(output),
        do="See what is there; then run again, or name another OUTPUT.",
    )


def _rename(place: Workspace, target: Path, before: Survey | None, output: Path) -> None:
    """Give the finished directory its name; an old one goes in the same instant."""

    def is_former(path: Path) -> bool:
        return before is not None and _same(survey(path, deep=False), before)

    if before and before.empty and identity(target) == before.where:
        with suppress(OSError):  # it is not empty any more
            target.rmdir()
    replaces = before is not None and not before.empty
    _name(place.new, target, output, is_former if replaces else None, aside=place.old)


def _name(
    new: Path,
    target: Path,
    output: Path,
    is_former: Callable[[Path], bool] | None,
    *,
    aside: Path | None = None,
) -> list[str]:
    """Give what is finished its name. Returns what a person should know.

    Args:
        is_former: whether what is at a path is what may go; None: nothing may be there.
        aside: where a directory waits, which cannot be replaced in one call where names cannot be
            exchanged.
    """
    made, gone = identity(new), False
    if is_former is None:
        _rename_new(new, target, output)
    elif _exchanged(new, target, output):
        if not is_former(new):
            exchange(new, target)
            raise _meanwhile(output)
    elif not is_former(target):
        raise _meanwhile(output)
    elif aside is not None:  # the old one is out of the way for one instant
        os.rename(target, aside)
        _rename_new(new, target, output)
    else:
        os.replace(new, target)
        gone = True
    try:
        sync(target.parent)  # the disk knows the new name before anything old is removed
    except OSError as error:
        if gone:
            return [f"the directory of {target} could not be synced ({error.strerror})"]
        if new.exists():
            exchange(new, target)
        elif identity(target) == made:
            os.rename(target, new)  # `close` puts an old one back
        raise
    return []


def _rename_new(new: Path, target: Path, output: Path) -> None:
    try:
        rename_new(new, target)
    except FileExistsError as error:
        raise _meanwhile(output) from error


def _exchanged(new: Path, target: Path, output: Path) -> bool:
    try:
        return exchange(new, target)
    except FileNotFoundError as error:
        raise _meanwhile(output) from error


def _same(now: Survey, before: Survey) -> bool:
    return (now.where, now.ours, now.foreign) == (before.where, before.ours, before.foreign)


def _fill(place: Workspace, target: Path, output: Path) -> None:
    """Bring the finished files into an empty directory that must stay the one it is."""
    with alone_in(target):
        if not all(is_workspace(entry) for entry in target.iterdir()):
            raise _meanwhile(output)
        place.say(filling=identity(target))
        moved: list[Path] = []
        try:
            for path in weights_first(place.new):
                rename_new(path, target / path.name)
                moved.append(path)
            sync(target)
        except OSError as error:
            for path in moved:
                os.rename(target / path.name, path)
            place.say(filling=None)
            if isinstance(error, FileExistsError):
                raise _meanwhile(output) from error
            raise


@contextmanager
def adding(path: Path, *, mark: bytes, overwrite: bool, needs: int = 0) -> Iterator[Stage]:
    """The name of a file beside `path` that becomes `path` when the block ends without an
    exception. On any exception it is removed, and what was at `path` is as it was.

    Args:
        mark: of the files that `path` is to be one of; see `bears_seal`.
        overwrite: `path` may be replaced if neoconvert sealed it, and it is one of those.
        needs: bytes that will be written, at least.

    Raises:
        OutputExists: `path` may not be replaced, now or at the end. NoSpace: there is too little.
    """
    with _naming(path):
        warnings = [f"a killed run left {kept}" for kept in clean(path.parent)]
        before = require_free(path, mark=mark, overwrite=overwrite)

        def is_former(there: Path) -> bool:
            return signature(there) == before

        _require_space(path.parent, needs)
        place = Workspace(path.parent, path.name, identity(path))
        stage = Stage(place.file, warnings)
        try:
            yield stage
            sync(place.file)
            place.say(file=identity(place.file))
            with held():
                stage.warnings += _name(place.file, path, path, is_former if before else None)
                PUBLISHED.append(path)
                stage.warnings += _close(place)
        except BaseException:
            if place.folder.exists():
                place.close()
            raise
