"""A process that dies at its n-th call that changes files, acted out within this one: from that call on
nothing is done any more, no handler tidies up, and its locks are free."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from converter.checkpoint import renaming
from converter.checkpoint.workspace import LIVE, LOCK, Workspace

_CALLS = ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "fsync", "write")


class Died(BaseException):
    """Passes through every handler for errors."""


class System:
    """The calls of this process.

    Args:
        plain: names can neither be exchanged nor given without replacing, as on some file systems.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, plain: bool) -> None:
        self._left: int | None = None
        self._locks: list[int] = []
        exchange = (lambda *_: False) if plain else renaming._renameat2
        patch.setattr(renaming, "_renameat2", self._counted(exchange))
        for name in _CALLS:
            patch.setattr(os, name, self._counted(getattr(os, name)))
        patch.setattr(os, "open", self._noting(os.open))
        patch.setattr(Workspace, "close", self._living(Workspace.close))

    @contextmanager
    def dying_after(self, calls: int) -> Iterator[None]:
        """The process that does what is in the block dies at a call; or not, if there are fewer."""
        before = set(LIVE)
        self._left, self._locks = calls, []
        try:
            yield
        except Died:
            for folder in set(LIVE) - before:
                LIVE.pop(folder)
            for handle in self._locks:
                with suppress(OSError):
                    os.close(handle)
        finally:
            self._left = None

    def killed(self, place: Workspace) -> None:
        """The process that has this workspace is gone."""
        LIVE.pop(place.folder)
        os.close(place._lock)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if self._left is not None:
                self._left -= 1
                if self._left < 0:
                    raise Died
            return call(*arguments, **options)

        return step

    def _noting(self, call: Callable[..., int]) -> Callable[..., int]:
        def step(path: Any, *arguments: Any, **options: Any) -> int:
            handle = call(path, *arguments, **options)
            if self._left is not None and Path(os.fsdecode(path)).name == LOCK:
                self._locks.append(handle)
            return handle

        return step

    def _living(self, close: Callable[[Workspace], list[str]]) -> Callable[[Workspace], list[str]]:
        def step(place: Workspace) -> list[str]:
            if self._left is None or self._left >= 0:
                return close(place)
            if place.folder in LIVE:
                self.killed(place)
            return []

        return step
