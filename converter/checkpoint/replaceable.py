"""What may be replaced: what neoconvert wrote, and nothing that a person put there."""

from __future__ import annotations

import os
from pathlib import Path

from converter.checkpoint.record import Survey, bears_seal, survey
from converter.checkpoint.signature import Signature, identity, signature
from converter.checkpoint.workspace import is_workspace
from converter.errors import OutputExists, SamePlace


def check_output(output: Path, source: Path | None, *, overwrite: bool) -> None:
    """Refuse an OUTPUT that would harm what is there. Nothing is written, and no weight is read.

    Raises:
        SamePlace: OUTPUT is SOURCE, in it, or a directory that holds it.
        OutputExists: it is there and may not be replaced.
    """
    target = Path(os.path.realpath(output))
    if source is not None:
        _require_apart(output, target, source)
    require_replaceable(output, overwrite=overwrite, deep=False)


def _require_apart(output: Path, target: Path, source: Path) -> None:
    origin = Path(os.path.realpath(source))
    if _within(origin, target):
        raise SamePlace(
            "OUTPUT is the same place as SOURCE, or holds it.",
            where=f"{output} and {source}",
            do="Name another OUTPUT directory.",
        )
    if origin.is_dir() and _within(target, origin):
        raise SamePlace(
            "OUTPUT is inside SOURCE, which nothing is written to.",
            where=f"{output} and {source}",
            do="Name an OUTPUT directory beside SOURCE, or anywhere else.",
        )


def _within(path: Path, directory: Path) -> bool:
    """Also through another mount of the directory, or another spelling of its name."""
    where = identity(directory)
    return directory in (path, *path.parents) or (
        where is not None and where in {identity(p) for p in (path, *path.parents)}
    )


def require_replaceable(output: Path, *, overwrite: bool, deep: bool) -> Survey | None:
    """What is at OUTPUT, all of which may go; None where nothing is.

    Args:
        deep: tell by digests what neoconvert wrote; otherwise by names and sizes.

    Raises:
        OutputExists: it may not be replaced.
    """
    target = Path(os.path.realpath(output))
    if not os.path.lexists(target):
        return None
    if not target.is_dir():
        raise OutputExists(
            "OUTPUT exists and is not a directory.",
            where=str(output),
            do="Name another OUTPUT directory.",
        )
    if not overwrite:
        if not all(is_workspace(entry) for entry in target.iterdir()):
            raise OutputExists(
                "OUTPUT exists already.",
                where=str(output),
                do="Name another directory, or add --overwrite (overwrite=True) to replace what neoconvert wrote.",
            )
        return Survey(identity(target))
    found = survey(target, deep=deep)
    if not found.empty and fixed(target):
        raise OutputExists(
            "OUTPUT cannot be replaced whole: it is where you are, or a mounted file system.",
            where=str(output),
            do="Go to another directory and run it there, or name a directory inside OUTPUT.",
        )
    if found.foreign:
        few = ", ".join(found.foreign[:6])
        more = f" and {len(found.foreign) - 6} more" if len(found.foreign) > 6 else ""
        raise OutputExists(
            "OUTPUT holds what neoconvert did not write, and --overwrite does not remove that."
            if found.ours
            else "Nothing in OUTPUT is as neoconvert wrote it, so --overwrite does not replace it.",
            where=f"{output}: {few}{more}",
            do="Move these elsewhere, or name another directory.",
        )
    return found


def fixed(target: Path) -> bool:
    """Whether a directory must stay the one it is: someone stands in it, or it is a mount."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return os.path.ismount(target)
    return target in (here, *here.parents) or os.path.ismount(target)


def require_free(path: Path, *, mark: bytes, overwrite: bool) -> Signature | None:
    """What is at `path`, which may be replaced; None where nothing is.

    Args:
        mark: of the files that `path` is to be one of; see `bears_seal`.

    Raises:
        OutputExists: it may not.
    """
    if not os.path.lexists(path):
        return None
    if not overwrite:
        raise OutputExists(
            f"There is a {path.name} already.",
            where=str(path),
            do="Remove it, or add --overwrite to replace one that neoconvert wrote.",
        )
    if not bears_seal(path, mark):
        raise OutputExists(
            f"{path.name} is there already, and is not a file of this kind as neoconvert wrote it.",
            where=str(path),
            do="Move it elsewhere first, or name another file. Only what neoconvert wrote is ever replaced,"
            " and by its like.",
        )
    return signature(path)
