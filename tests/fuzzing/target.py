"""What is fuzzed, and what must hold of every input.

Only the errors that a bad file may give come out, within bounds of time and memory; what is accepted
means the same when it is read again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converter.errors import NeoconvertError
from tests.hostile.trial import NBYTES, SECONDS, status

Read = Callable[[bytes, Path], object]
Mutate = Callable[[bytes, random.Random], bytes]
_PEAK = Path("/proc/self/clear_refs")


class Finding(AssertionError):
    """An input of which the property does not hold."""


def _nothing(_place: Path) -> None:
    pass


@dataclass(frozen=True)
class Target:
    """One parser of ours."""

    name: str
    seeds: Callable[[], list[bytes]]
    """Sound inputs, made from the test models."""
    mutated: Mutate
    """An input with something about it changed; the same for the same state of the generator."""
    read: Read
    """Have the parser read an input, as a file in a directory of its own, and check what its meaning
    must agree with. Returns that meaning, which can be compared."""
    prepare: Callable[[Path], Any] = _nothing
    """Put into that directory what lies beside the file."""
    codes: frozenset[int] = field(default=frozenset({3}))
    """Exit codes of the errors that may come out; none where nothing is refused."""


class Trial:
    """A target, ready in a directory. Sound inputs have been read, so that libraries are in memory."""

    def __init__(self, target: Target, place: Path) -> None:
        self.target, self.place = target, place
        self._peak = os.open(_PEAK, os.O_WRONLY) if _PEAK.exists() else None
        target.prepare(place)
        self.seeds = target.seeds()
        for seed in self.seeds:
            target.read(seed, place)

    def __call__(self, data: bytes) -> bool:
        """Whether an input is accepted.

        Raises:
            Finding: the property does not hold; and whatever else comes out that must not.
        """
        if self._peak is not None:
            os.pwrite(self._peak, b"5", 0)  # the peak begins here
        held, begun = _resident("VmRSS"), time.thread_time()
        accepted, meaning = self._outcome(data)
        seconds, taken = time.thread_time() - begun, _resident("VmHWM") - held
        if seconds > SECONDS:
            raise Finding(f"{seconds:.1f} s of processor time")
        if taken > NBYTES:
            raise Finding(f"{taken >> 20} MiB of memory")
        if accepted and self._outcome(data) != (True, meaning):
            raise Finding("it means something else when it is read again")
        return accepted

    def _outcome(self, data: bytes) -> tuple[bool, object]:
        try:
            return True, self.target.read(data, self.place)
        except NeoconvertError as error:
            if error.exit_code not in self.target.codes:
                raise Finding(f"exit code {error.exit_code}: {error!r}") from error
            if not all(error.lines()):
                raise Finding(f"an error that lacks one of its three lines: {error!r}") from error
            return False, None

    def chosen(self, rng: random.Random) -> bytes:
        """A sound input with a few things about it changed."""
        data = rng.choice(self.seeds)
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = self.target.mutated(data, rng)
        return data


def _resident(name: str) -> int:
    return status(name) if _PEAK.exists() else 0


def require(held: bool, what: str) -> None:
    if not held:
        raise Finding(what)
