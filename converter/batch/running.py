"""Jobs one after another in this process, or some at a time in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from converter import interrupts, parallel
from converter.batch.job import Job, Outcome, attempt, failed
from converter.checkpoint.publish import PUBLISHED
from converter.checkpoint.workspace import abandon, clean
from converter.errors import CannotDoHere
from converter.interrupts import GRACE_S, Interrupted


def outcomes(jobs: Sequence[Job], *, processes: int = 1) -> Generator[Outcome, None, None]:
    """Do the jobs, and give what came of each as soon as it has.

    Args:
        processes: how many at a time. 1: here, in order. More: each in a process that loads the
            libraries once, with its share of the cores; one that is killed takes no other along.
    """
    if processes == 1:
        yield from map(attempt, jobs)
    elif jobs:
        yield from _spread(jobs, min(processes, len(jobs)))


def clean_beside(jobs: Iterable[Job]) -> list[str]:
    """Put right what killed runs left beside the outputs. Returns what must stay, and why."""
    parents = dict.fromkeys(Path(os.path.realpath(job.output)).parent for job in jobs)
    return [f"a killed run left {kept}" for parent in parents for kept in clean(parent)]


class _Worker:
    """A process that does one job after another."""

    def __init__(self, share: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, share))
        with _environment(OMP_NUM_THREADS=str(max(1, parallel.cores() // share))):
            self.process.start()
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        self.job = job
        with suppress(OSError):  # it is dead: `take` finds out
            self.connection.send(job)

    def take(self) -> tuple[Outcome, bool]:
        """What came of its job, and whether the process still lives."""
        job, self.job = self.job, None
        assert job is not None
        try:
            return self.connection.recv(), True
        except (EOFError, OSError):
            self.process.join()
            return failed(job, _killed(job, self.process.exitcode)), False

    def end(self) -> None:
        self.connection.close()
        if self.job is not None:
            self.process.terminate()

    def join(self) -> None:
        self.process.join(GRACE_S + 2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def _environment(**more: str) -> Iterator[None]:
    """Variables that a new process finds: its libraries read them before any code of ours runs."""
    added = {name: value for name, value in more.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _killed(job: Job, code: int | None) -> CannotDoHere:
    how = f"exit code {code}"
    if code is not None and code < 0:
        with suppress(ValueError):
            how = signal.Signals(-code).name
    error = CannotDoHere(
        f"The process that did this was ended ({how}) before it said what came of it.",
        where=job.given,
        do="Run again, with fewer --jobs where memory is short: the system kills what takes too much.",
    )
    error.transient = True
    return error


def _spread(jobs: Sequence[Job], processes: int) -> Iterator[Outcome]:
    waiting = deque(jobs)
    workers: list[_Worker] = []
    try:
        for _ in range(processes):
            workers.append(_Worker(processes))
            workers[-1].give(waiting.popleft())
        while busy := {worker.connection: worker for worker in workers if worker.job}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                outcome, lives = worker.take()
                if not lives:
                    workers[workers.index(worker)] = worker = _Worker(processes)
                if waiting:
                    worker.give(waiting.popleft())
                if outcome.status == "converted":
                    PUBLISHED.append(outcome.job.output)
                yield outcome
    finally:
        for worker in workers:
            worker.end()
        for worker in workers:
            worker.join()


def _work(connection: Connection, share: int) -> None:
    """What a worker does until nothing more comes."""
    os.dup2(2, 1)  # stdout is for what the batch says; libraries print where they like
    parallel.share_among(share)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with suppress(EOFError, OSError, Interrupted), interrupts.handled(abandon):
            while True:
                connection.send(attempt(connection.recv()))
    finally:
        abandon()


def _end_with_parent() -> None:
    """A run that is killed takes its processes along: none is to meet the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def apart(jobs: Sequence[Job]) -> Iterator[tuple[Job, Path, str]]:
    """Jobs that another stands in the way of, each with the place and a sentence that says how."""
    written: dict[Path, tuple[str, Job]] = {}
    for job in jobs:
        for what, given in _written(job):
            place = Path(os.path.realpath(given))
            if place in written:
                other, first = written[place]
                other = "that" if other == what else other
                yield job, given, f"{_begin(what)} is {other} of line {first.line} too"
            written.setdefault(place, (what, job))
    for job in jobs:
        for what, given in _written(job):
            for above in Path(os.path.realpath(given)).parents:
                other, first = written.get(above, ("", job))
                if first is not job:
                    yield job, given, f"{_begin(what)} is inside {other} of line {first.line}"
        source = Path(os.path.realpath(os.path.expanduser(job.source)))
        for place in (source, *source.parents):
            _, first = written.get(place, ("", job))
            if first is not job:
                yield job, job.output, f"SOURCE is what line {first.line} writes"


def _written(job: Job) -> Iterator[tuple[str, Path]]:
    yield "OUTPUT", job.output
    if job.report is not None:
        yield "the report", job.report


def _begin(words: str) -> str:
    return words[0].upper() + words[1:]
