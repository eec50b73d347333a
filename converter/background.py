"""Work that goes on beside the arithmetic: hashing and writing, for which Python's lock is free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_AT_MOST = 4
"""Pieces that wait: more would only take memory."""


class Background:
    """A context manager with one thread that does what it is given, in order.

    What goes wrong there is raised by a later `do`, or on leaving.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "background")
        self._waiting: deque[Future[object]] = deque()

    def do(self, work: Callable[..., object], *args: Any) -> None:
        """Have `work(*args)` done. Waits while much is waiting."""
        if len(self._waiting) >= _AT_MOST:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(work, *args))

    def finish(self) -> None:
        """Wait until all is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self._thread.shutdown(cancel_futures=True)
