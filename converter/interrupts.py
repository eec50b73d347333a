"""Ctrl-C and SIGTERM: one exception for both, never in the middle of a step that must be whole, and
an end within seconds even where a library does not let Python's handlers run."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

GRACE_S = 2.0
"""How long the main thread may take to unwind before it is ended."""
_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_WHOLE = threading.RLock()
"""Held during a step that must be whole."""
_pending: list[int] = []
_depth = 0
_raised = False
"""One came already: what it interrupts is being tidied, and ends in time whatever comes."""


class Interrupted(BaseException):
    """A signal asked for the end; `exit_code` is the shell's, 130 or 143."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A step that must be whole: a signal that comes meanwhile is raised after it."""
    global _depth, _raised
    with _WHOLE:
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
    if _pending and not _depth:
        _raised = True
        raise Interrupted(_pending.pop())


@contextlib.contextmanager
def handled(give_up: Callable[[], None]) -> Iterator[None]:
    """Signals raise `Interrupted` while the block runs.

    Args:
        give_up: called from another thread where the main thread has not ended in time; tidies
            and says so. The process ends after it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _raised
    _pending.clear()
    _raised = False
    before: dict[signal.Signals, Any] = {}
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    ended = threading.Event()
    woken = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading, ended, give_up), daemon=True)
    watcher.start()
    try:
        for sign in _SIGNALS:
            if (was := signal.getsignal(sign)) is not signal.SIG_IGN:  # nohup, or a shell's `&`
                before[sign] = was
                signal.signal(sign, _on_signal)
        yield
    finally:
        ended.set()
        for sign, was in before.items():
            signal.signal(sign, was if was is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(woken)
        writing.close()
        watcher.join(1)
        reading.close()


def _on_signal(signum: int, _frame: FrameType | None) -> None:
    global _raised
    if _depth:
        _pending.append(signum)
    elif not _raised:
        _raised = True
        raise Interrupted(signum)


def _watch(reading: socket.socket, ended: threading.Event, give_up: Callable[[], None]) -> None:
    while came := reading.recv(64):  # nothing: the block has ended
        if signums := set(came) & set(_SIGNALS):
            if ended.wait(GRACE_S):
                return
            code = 128 + max(signums)
            with _WHOLE:
                give_up()
                os._exit(code)
