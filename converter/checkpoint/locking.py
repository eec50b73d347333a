"""Locks on files, which go when the process that has them does."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def lock(handle: int) -> bool | None:
    """Take a file's lock. False where another has it; None where there are no locks, so that nobody
    knows a dead run's leftovers from a living one's."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK) else None
    return True


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Other runs that fill the same directory wait, where there are locks."""
    handle = None
    try:
        if os.name != "nt":
            import fcntl

            handle = os.open(directory, os.O_RDONLY)
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)
