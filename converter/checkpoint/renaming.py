"""The system's calls that publishing stands on, and what stands in where one is missing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from pathlib import Path

_WINDOWS = os.name == "nt"
_HERE = -100  # AT_FDCWD
_NOREPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_START = 2  # SYNC_FILE_RANGE_WRITE
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


def exchange(a: Path, b: Path) -> bool:
    """Both names change hands in one instant. False where the system has no such call."""
    return _renameat2(a, b, _EXCHANGE)


def rename_new(a: Path, b: Path) -> None:
    """Rename, and never over anything.

    Raises:
        FileExistsError: something is at `b`.
    """
    if _renameat2(a, b, _NOREPLACE):
        return
    if not a.is_dir():
        try:
            os.link(a, b)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            os.unlink(a)
            return
    if os.path.lexists(b):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(b))
    try:
        os.rename(a, b)  # of a directory: fails, too, where another is that is not empty
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(b)) from error
        raise


def _renameat2(a: Path, b: Path, flag: int) -> bool:
    """Linux's call. False where the kernel or the file system has it not."""
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(b))


def sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def sync(path: Path) -> None:
    """Have the disk hold a file, or a directory's names. Where directories cannot be synced (Windows,
    some network file systems), the system orders them itself."""
    directory = path.is_dir()
    if directory and _WINDOWS:
        return
    handle = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (directory and error.errno in (*_UNSUPPORTED, errno.EBADF)):
            raise
    finally:
        os.close(handle)


def begin_sync(handle: int) -> None:
    """Have the system start writing what an open file has been given, where it can be asked to
    (Linux): a later `sync` has less to wait for. Else it may begin only when memory is full."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system's
        start = ctypes.CDLL(None).sync_file_range
        start(handle, ctypes.c_int64(0), ctypes.c_int64(0), _START)
