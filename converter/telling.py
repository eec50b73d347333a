"""Any exception as what it means to the user: three lines, and whether trying again may help."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from converter.errors import CannotDoHere, Fault, NeoconvertError, SystemRefused, full, passing


def panicked(error: BaseException) -> bool:
    """Whether it is a library in Rust that gave up, which Python takes for no Exception."""
    return type(error).__name__ == "PanicException"


def told(error: BaseException) -> NeoconvertError:
    """An error as what it means to the user."""
    if isinstance(error, NeoconvertError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        advice = "Free some space" if full(error) else "Check permissions and the disk"
        if error.errno == errno.EFBIG:
            advice = (
                "Write smaller files (--max-shard-size 1GB), raise the limit (ulimit -f unlimited)"
            )
        refused = SystemRefused(
            f"The system refused: {error.strerror}.",
            where=str(error.filename or error.filename2 or "no file named"),
            do=f"{advice}, or name another place. Nothing was published.",
        )
        refused.transient = passing(error)
        return refused
    if isinstance(error, MemoryError) or _is_torch_without_memory(error):
        lacking = CannotDoHere(
            "There is not enough memory.",
            where=str(error).partition("\n")[0] or "this machine",
            do="End other programs. Where models are run, --effort quick takes less memory; where files"
            " are written, --no-verify takes the least.",
        )
        lacking.transient = True
        return lacking
    if isinstance(error, ImportError) and not (error.name or "").startswith("converter"):
        return CannotDoHere(
            f"A library is installed here that cannot be imported: {error}.",
            where=error.name or _place(error),
            do="Install that library again. With --debug you see where it fails.",
        )
    return Fault(
        f"A fault of neoconvert: {type(error).__name__}: {str(error) or 'no more is known'}.",
        where=_place(error),
        do="Please report it, with what the same command prints with --debug.",
    )


def _is_torch_without_memory(error: BaseException) -> bool:
    """torch has no exception of its own for it on the CPU."""
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in said or "out of memory" in said
    )


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "nowhere known"
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name}"
