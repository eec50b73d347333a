"""Runs that publish at one place, in any order, with people and deaths in between: OUTPUT is wholly the
old or wholly the new one, what a person put there stays, and what dead runs leave is cleaned."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from converter.checkpoint import publish, record, replaceable, workspace
from converter.checkpoint.publish import Stage, staging
from converter.checkpoint.signature import signature
from converter.checkpoint.workspace import LIVE, clean
from converter.errors import OutputExists
from tests.dying import System

Content = dict[str, bytes]


@dataclass
class Run:
    context: AbstractContextManager[Stage]
    stage: Stage
    since: int
    """The state of OUTPUT in which it began."""
    onto_nothing: bool
    """Whether there was nothing to replace then."""


@dataclass
class Model:
    """What must be at OUTPUT."""

    now: Content | None = None
    states: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    state: int = 0
    """Another with everything that was done to OUTPUT."""
    theirs: dict[str, bytes] = field(default_factory=dict)
    """What people put there: files of OUTPUT, by name."""
    aside: tuple[Content, int] | None = None
    """What a dead run had moved out of the way, and the state in which it was; the next run restores it."""
    displaced: bool = False
    """A run died between seeing that OUTPUT is not what it was and putting that back."""
    unsettled: bool = False
    """A run died while it published, and none has begun since."""
    meddled: bool = False
    """Someone did something to OUTPUT since a run died."""

    def becomes(self, content: Content | None) -> None:
        self.now, self.state = content, next(self.states)

    def restored(self) -> None:
        if self.aside is not None and (self.now is None or self.displaced):
            self.now, self.state = self.aside
            self.aside = None  # else it is kept, and said
        self.displaced = self.unsettled = False

    @property
    def empty(self) -> bool:
        return not self.now


def contents(directory: Path) -> Content | None:
    if not directory.exists():
        return None
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}  # fmt: skip


def _finish(run: Run) -> Content:
    path = run.stage.path
    (path / "config.json").write_text((path / "weights").read_text())
    (path / "neoconvert.json").write_text("{}")
    record.rerecord(path)
    return contents(path) or {}


def _is_ours(name: str) -> bool:
    return name.endswith((".partial", ".new"))


OVERWRITE = st.sampled_from([True, True, False])
CALLS = st.integers(0, 30) | st.integers(4, 9)
"""Until a process dies; the latter about where names change hands."""


class Publishing(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        shared = Path("/dev/shm")
        made = tempfile.mkdtemp(dir=shared if shared.is_dir() else None)
        self.base = Path(made).resolve()
        self.out = self.base / "out"
        self.model, self.runs, self.count = Model(), list[Run](), 0
        self.died: list[Any] = []
        """The contexts of runs: Python would tidy up what it collects."""
        (self.base / "notes.txt").write_text("mine")

    @initialize(plain=st.booleans(), ours=st.booleans())
    def system_is(self, plain: bool, ours: bool) -> None:
        self.system, self.plain = System(self.patch, plain=plain), plain
        if ours:
            self.begin(overwrite=False)
            _finish(self.runs[0])
            self.runs.pop().context.__exit__(None, None, None)
            self.model.becomes(contents(self.out))

    def teardown(self) -> None:
        for run in self.runs:
            self.died.append(run.context)
            self.system.killed(LIVE[run.stage.path.parent])
        self.patch.undo()
        shutil.rmtree(self.base)
        for context in self.died:
            context.gen.close()

    # Runs

    @rule(overwrite=OVERWRITE)
    def begin(self, overwrite: bool) -> None:
        context = staging(self.out, overwrite=overwrite)
        may = self._settled(lambda: not self.model.now or (overwrite and not self.model.theirs))
        try:
            stage = context.__enter__()
        except OutputExists:
            assert not may
            return
        assert may
        self.count += 1
        (stage.path / "weights").write_text(f"version {self.count}")
        self.runs.append(Run(context, stage, self.model.state, self.model.empty))

    def _settled(self, may: Any) -> bool:
        """What begins puts right what dead runs left."""
        self.model.restored()
        return bool(may())

    @rule(overwrite=OVERWRITE, calls=CALLS)
    def dies_as_it_begins(self, overwrite: bool, calls: int) -> None:
        lost = self.model.aside
        context = staging(self.out, overwrite=overwrite)
        self.died.append(context)
        begun: list[Stage] = []
        with self.system.dying_after(calls), suppress(OutputExists):
            begun.append(context.__enter__())
        if begun:
            self.system.killed(LIVE[begun[0].path.parent])
        if lost is not None and contents(self.out) == lost[0]:
            self.model.restored()

    @precondition(lambda self: self.runs and not self.model.displaced)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        run, new = self._finished(data)
        published = self._published(run)
        if self.model.state == run.since:
            assert published
        elif not (run.onto_nothing and self.model.now is None):
            assert not published
        if published:
            self.model.becomes(new)
            self.model.meddled = True

    def _finished(self, data: st.DataObject) -> tuple[Run, Content]:
        run = data.draw(st.sampled_from(self.runs))
        self.runs.remove(run)
        return run, _finish(run)

    def _published(self, run: Run) -> bool:
        try:
            run.context.__exit__(None, None, None)
        except OutputExists:
            return False
        return True

    @precondition(lambda self: self.runs and not self.model.displaced)
    @rule(data=st.data(), calls=CALLS)
    def dies_as_it_publishes(self, data: st.DataObject, calls: int) -> None:
        run, new = self._finished(data)
        old, since, finished = self.model.now, self.model.state, False
        self.died.append(run.context)
        with self.system.dying_after(calls):
            self._published(run)
            finished = True
        if run.stage.path.parent in LIVE:  # it died as it tidied up
            self.system.killed(LIVE[run.stage.path.parent])
        found = contents(self.out)
        changed = since != run.since and not (run.onto_nothing and old is None)
        self.model.unsettled = not finished
        if found is None and old:
            assert self.plain
            assert not finished
            assert not changed
            self.model.aside = old, since
        elif found == new and changed:
            assert old is not None
            assert not finished
            self.model.aside, self.model.displaced = (old, since), True
        else:
            assert found in (old, new) or not (found or old)
        if found != old:
            self.model.becomes(found)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), dies=st.booleans())
    def stops(self, data: st.DataObject, dies: bool) -> None:
        """By an error, or by its death."""
        run = data.draw(st.sampled_from(self.runs))
        self.runs.remove(run)
        if dies:
            self.died.append(run.context)
            self.system.killed(LIVE[run.stage.path.parent])
            return
        with suppress(ValueError):
            run.context.__exit__(ValueError, ValueError("in the middle"), None)

    # People

    @rule(name=st.sampled_from(["README.md", "weights", "neoconvert.json", "", ""]))
    def someone_comes(self, name: str) -> None:
        """And writes a file of their own, or into one of ours; or makes OUTPUT; or removes it all."""
        removes = self.model.theirs or (self.out.exists() and not name)
        if self.model.displaced or (self.model.unsettled and removes):
            return  # what was moved aside may come back, or may not
        if removes:
            shutil.rmtree(self.out)
            self.model.theirs.clear()
            self.model.becomes(None)
        elif not name:
            self.out.mkdir()
            self.model.becomes({})
        else:
            self.out.mkdir(exist_ok=True)
            content = f"mine {self.model.state}".encode() * 3
            (self.out / name).write_bytes(content)
            self.model.theirs[name] = content
            self.model.becomes({**(self.model.now or {}), name: content})
        self.model.meddled = True

    # What must hold

    @rule()
    def cleaned(self) -> None:
        kept = clean(self.base)
        self._settled(bool)
        living = {path.parent.name for path in (run.stage.path for run in self.runs)}
        left = {p.name for p in self.base.iterdir() if _is_ours(p.name)} - living
        assert all(any(name in said for said in kept) for name in left)
        assert self.model.meddled or not left
        if not left:
            self.model.meddled = False

    @invariant()
    def output_is_whole(self) -> None:
        found, must = contents(self.out), self.model.now
        assert found == must or not (found or must)

    @invariant()
    def what_people_put_there_stays(self) -> None:
        assert (self.base / "notes.txt").read_text() == "mine"
        for name, content in () if self.model.displaced else self.model.theirs.items():
            assert (self.out / name).read_bytes() == content

    @invariant()
    def living_runs_are_left_alone(self) -> None:
        for run in self.runs:
            assert (run.stage.path / "weights").exists()


SETTINGS = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
Publishing.TestCase.settings = SETTINGS
TestPublishing = Publishing.TestCase


def _over(a: Path, b: Path) -> None:
    """Over whatever is there."""
    if b.is_dir():
        shutil.rmtree(b)
    a.rename(b)


def _in_two_steps(a: Path, b: Path) -> bool:
    between = a.with_name("between")
    os.rename(b, between)
    os.rename(a, b)
    os.rename(between, a)
    return True


def _piece_by_piece(a: Path, b: Path) -> None:
    os.mkdir(b)
    for path in a.iterdir():
        os.rename(path, b / path.name)


def _everything_ours(directory: Path, *, deep: bool) -> record.Survey:
    found = survey(directory, deep=deep)
    for name in found.foreign:
        if (now := signature(directory / name.removesuffix(" (changed since)"))) is not None:
            found.ours[name.removesuffix(" (changed since)")] = now
    found.foreign.clear()
    return found


survey = record.survey
FAULTS: dict[str, list[tuple[object, str, object]]] = {
    "a change meanwhile is not seen": [(publish, "_same", lambda *_: True)],
    "a living run is taken for a dead one": [(workspace, "lock", lambda _: True)],
    "what dead runs leave stays": [(publish, "clean", lambda _: []), (workspace, "_reclaim", lambda _: [])],
    "what was moved aside is not restored": [(workspace, "rename_new", lambda *_: None)],
    "a new one is put over what is there": [(publish, "rename_new", _over)],
    "names are exchanged in two steps": [(publish, "exchange", _in_two_steps)],
    "files are published one by one": [(publish, "rename_new", _piece_by_piece)],
    "what a person put there is ours": [(replaceable, "survey", _everything_ours), (publish, "survey", _everything_ours)],
    "a failed run leaves its workspace": [(workspace, "settle", lambda *_: ["kept"])],
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for where, what, fault in FAULTS[name]:
        monkeypatch.setattr(where, what, fault)
    quick = settings(
        SETTINGS, max_examples=300, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises((AssertionError, OSError)):
        run_state_machine_as_test(Publishing, settings=quick)


class _First:
    """Draws the first there is."""

    def draw(self, _strategy: object) -> Run:
        return self.runs[0]

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs


def test_a_run_that_dies_over_anothers_result() -> None:
    """Two replace the same; the second dies in the instant between the exchange and taking it back."""
    machine = Publishing()
    machine.system_is(plain=False, ours=True)
    first: Any = _First(machine.runs)
    machine.begin(overwrite=True)
    machine.begin(overwrite=True)
    machine.publish(first)
    machine.dies_as_it_publishes(first, 5)
    assert machine.model.displaced
    machine.cleaned()
    machine.output_is_whole()
    machine.teardown()
