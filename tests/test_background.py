"""What goes on beside is done in order, and its failures are not lost."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from converter.background import Background


def test_in_order_and_done_on_leaving() -> None:
    done: list[int] = []

    def slowly(i: int) -> None:
        time.sleep(0.002 * (i % 3))
        done.append(i)

    with Background() as background:
        for i in range(20):
            background.do(slowly, i)
            assert i - len(done) < 6  # the queue is bounded
    assert done == list(range(20))


@pytest.mark.parametrize("after", [0, 10])
def test_a_failure_is_raised(after: int) -> None:
    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Background() as background:  # noqa: PT012
        background.do(fail)
        for _ in range(after):
            background.do(int)


def test_an_error_in_the_foreground_ends_it() -> None:
    started, going = threading.Event(), threading.Event()
    done: list[Any] = []

    def long() -> None:
        started.set()
        going.wait(5)

    with pytest.raises(KeyboardInterrupt), Background() as background:  # noqa: PT012
        background.do(long)
        background.do(done.append, 1)
        started.wait(5)
        threading.Timer(0.05, going.set).start()
        raise KeyboardInterrupt
    assert not done
    assert not [t for t in threading.enumerate() if t.name.startswith("background")]
