"""Pieces of arithmetic on all cores: NumPy lets go of Python's lock inside an operation."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

T = TypeVar("T")
_MOST = 4
"""Threads: more wait for memory, and each holds pieces of it."""
_here = threading.local()
_sharers = 1
_most_cores: int | None = None


def use_cores(most: int) -> None:
    """From now on, use no more cores than that: here, in the libraries, and in processes of ours. To
    be called before NumPy and torch are imported."""
    global _most_cores
    _most_cores = most
    os.environ["OMP_NUM_THREADS"] = str(most)


def share_among(processes: int) -> None:
    """From now on, this process is one of so many that share the machine."""
    global _sharers
    _sharers = processes


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h, with M_ before them."""
_LARGE = 2**28


def share_memory() -> None:
    """Have all threads take memory from two places, not each from its own, where glibc gives it out:
    what one gives back serves the others. To be called before there are threads."""
    _glibc("mallopt", _ARENA_MAX, 2)


def numpy_without_threads() -> None:
    """Import NumPy with a BLAS of one thread. Its own would spin for work on cores that ours need."""
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ:
        return
    os.environ[name] = "1"
    try:
        importlib.import_module("numpy")
    finally:
        del os.environ[name]  # other libraries, and other processes, have threads to use


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Within, glibc gives memory that is free out again, and does not return it to the system: each
    new page is first filled with zeros, a tenth of the time that running a model takes."""
    _glibc("mallopt", _MMAP_THRESHOLD, _LARGE)
    _glibc("mallopt", _TRIM_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        # What it comes to by itself once large pieces were freed.
        _glibc("mallopt", _MMAP_THRESHOLD, _LARGE // 8)
        _glibc("mallopt", _TRIM_THRESHOLD, _LARGE // 4)
        give_back()


def give_back() -> None:
    """Give back what glibc keeps of memory that is free."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *args: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system's
        getattr(ctypes.CDLL(None), name)(*args)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        all_of_them = len(os.sched_getaffinity(0))
    else:
        all_of_them = os.cpu_count() or 1
    own = max(1, all_of_them // _sharers)
    return min(own, _most_cores or own)


def ahead(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of the tasks, in order, a few of them computed before they are asked for.

    A task that itself comes here has its tasks done one after another; one alone needs no thread.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, 2))
    threads = min(cores(), _MOST)
    if threads == 1 or len(first) < 2 or getattr(_here, "working", False):
        for task in chain(first, tasks):
            yield task()
        return
    waiting: deque[Future[T]] = deque()
    try:
        for task in chain(first, tasks):
            waiting.append(_threads(threads).submit(task))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for left in waiting:
            left.cancel()


_pool: ThreadPoolExecutor | None = None


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(count, initializer=_mark)
    return _pool


def _mark() -> None:
    _here.working = True


def _forget() -> None:
    global _pool
    _pool = None  # a forked process has none of the threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
