"""What a graph may take of this machine: memory and time in proportion to its own size.

A graph of a few bytes can ask for terabytes, or loop for ever. The system refuses memory beyond a
limit (Linux: of the whole process, while the block runs); a limit of processor time interrupts the
work. That is the calling thread's: neither waiting counts, so that a busy machine decides
nothing, nor what other threads do, so that the number of cores does not.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from converter.errors import NeoconvertError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")
_CHECK_S = 0.1
_MEMORY, _SECONDS = 192 * 2**20, 3.0
"""What anything may take, however small."""
_SLOWEST = 1e8
"""Multiplications a second that a slow machine does."""
_REFUSED = re.compile("alloc|require more than")
"""In onnxruntime's errors."""
_HEADS = 64
"""Where the graph does not say."""


class AsksTooMuch(NeoconvertError):
    """A graph that takes more memory or time than its weights and inputs account for. Not a file
    that is read wrongly, nor a check that fails: nobody should run it."""


@dataclass(frozen=True)
class Allowance:
    nbytes: int
    seconds: float
    """Of the calling thread's processor time."""

    def beside(self, other: Allowance) -> Allowance:
        """Enough for either, in each respect."""
        return Allowance(max(self.nbytes, other.nbytes), max(self.seconds, other.seconds))

    def on_gpu(self) -> Allowance:
        """Its driver's libraries are loaded, and its memory is seen as the process's."""
        return Allowance(self.nbytes + 2**40, self.seconds + 300)


def to_open(elements: int, file_bytes: int) -> Allowance:
    """For making a session: weights are widened, packed and folded.

    Args:
        elements: of all tensors.
        file_bytes: of the graph's own file, which is parsed and copied.
    """
    threads = (os.cpu_count() or 1) * 8 * 2**20  # their stacks
    return Allowance(
        _MEMORY + threads + 24 * elements + 6 * file_bytes,
        _SECONDS + (8 * elements + 16 * file_bytes) / _SLOWEST,
    )


def to_run(
    tokens: int, length: int, *, elements: int, widest: int, heads: int | None, outputs: int
) -> Allowance:
    """For one run, of which a dozen of the largest values may be there at a time. (onnxruntime's
    pool of memory, in which the weights are too, grows by doubling.)

    Args:
        tokens: in all rows. length: of a row, with what is cached.
        widest: the largest dimension of a weight.
        outputs: how many are asked for.
    """
    per_token = 8 * (widest + min(widest, heads or _HEADS) * length)
    products = 2 * tokens * (elements + outputs * widest)
    return Allowance(
        _MEMORY + 16 * elements + tokens * per_token * (12 + outputs),
        _SECONDS + products / _SLOWEST,
    )


@contextmanager
def bounded(allowed: Allowance, stop: Callable[[], None], where: str) -> Iterator[None]:
    """Run the block within limits.

    Args:
        stop: called from another thread when the time is over; has the block end in an error.

    Raises:
        AsksTooMuch: the block failed because it reached a limit.
        MemoryError: there is less memory here than it may have.
    """
    over, ended, used = threading.Event(), threading.Event(), _clock()
    until = used() + allowed.seconds

    def watch() -> None:
        while not ended.wait(_CHECK_S):
            if used() > until:
                over.set()
                stop()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with _memory(allowed.nbytes):
            yield
    except Exception as error:
        if over.is_set():
            raise _too_much(f"{allowed.seconds:.0f} s of processor time", where) from error
        if not isinstance(error, MemoryError) and not _REFUSED.search(str(error)):
            raise
        if 0 < _kib(Path("/proc/meminfo"), "MemAvailable") < allowed.nbytes:
            raise MemoryError(where) from error
        raise _too_much(f"{allowed.nbytes / 2**20:,.0f} MiB of memory", where) from error
    finally:
        ended.set()
        watcher.join()


def _clock() -> Callable[[], float]:
    """This thread's processor time, for another to read; of the process where there is no such clock."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time
    return partial(time.clock_gettime, time.pthread_getcpuclockid(threading.get_ident()))


_lock = threading.Lock()
_active: list[int] = []
_former: tuple[int, int] | None = None
"""The limit as it was, while a block is active."""


@contextmanager
def _memory(nbytes: int) -> Iterator[None]:
    """The process may have so much more while the block runs; blocks beside one another, the sum."""
    global _former
    used = _kib(_STATUS, "VmData")
    if resource is None or not used:
        yield
        return
    with _lock:
        if _former is None:
            _former = resource.getrlimit(resource.RLIMIT_DATA)
        _active.append(nbytes)
        limits = [n for n in (*_former, used + sum(_active)) if n != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(limits), _former[1]))
    try:
        yield
    finally:
        with _lock:
            _active.remove(nbytes)
            if not _active:
                resource.setrlimit(resource.RLIMIT_DATA, _former)
                _former = None


def _kib(path: Path, name: str) -> int:
    """Bytes, of a line that gives KiB; 0 where the system does not tell."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _too_much(what: str, where: str) -> AsksTooMuch:
    return AsksTooMuch(
        f"The graph takes more than {what}, for which its weights and inputs are no reason.",
        where=where,
        do="Do not use this file; export it again from a checkpoint you trust.",
    )
