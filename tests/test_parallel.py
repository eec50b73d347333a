"""What is computed ahead comes in order, and what goes wrong there is raised where it is asked for."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from converter import parallel
from converter.parallel import ahead


@pytest.fixture(params=[1, 2, 3], autouse=True)
def _cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: request.param)
    monkeypatch.setattr(parallel, "_pool", None)


def test_in_order_and_only_a_few_ahead() -> None:
    started: list[int] = []

    def work(i: int) -> int:
        started.append(i)
        time.sleep(0.002 * (i % 3))
        return i

    for asked, result in enumerate(ahead(partial(work, i) for i in range(20))):
        assert result == asked
        assert len(started) <= asked + 1 + parallel.cores()
    assert sorted(started) == list(range(20))


def test_a_failure_is_raised_at_its_place() -> None:
    def work(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        return i

    results = ahead(partial(work, i) for i in range(9))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_tasks_within_tasks_do_not_wait_for_a_thread() -> None:
    def outer(i: int) -> list[int]:
        return list(ahead(partial(lambda j: i * j, j) for j in range(3)))

    found: list[list[int]] = []
    thread = threading.Thread(
        target=lambda: found.extend(ahead(partial(outer, i) for i in range(8))), daemon=True
    )
    thread.start()
    thread.join(20)
    assert found == [[0, i, 2 * i] for i in range(8)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    def tasks() -> Iterator[partial[int]]:
        return (partial(int, i) for i in range(5))

    assert list(ahead(tasks())) == list(range(5))
    child = os.fork()
    if child == 0:
        os._exit(list(ahead(tasks())) != list(range(5)))
    for _ in range(1000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the forked process waits for ever")
    assert status == 0


def test_free_memory_is_kept_only_within(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr(parallel, "_glibc", lambda *given: told.append(given))
    with parallel.memory_kept():
        assert set(told) == {("mallopt", -1, 2**28), ("mallopt", -3, 2**28)}
        told.clear()
    assert set(told) == {("mallopt", -1, 2**26), ("mallopt", -3, 2**25), ("malloc_trim", 0)}
