"""A command that is killed, or refused, at its n-th call to the system: what is there then, and after
the next run.

Calls are those by which Python changes files: writes, renames, links, syncs, removals, and opening to
write. Each trial is a forked process.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.checkpoint import ledger_file, renaming
from converter.checkpoint.workspace import SUFFIX
from tests.hostile import sound
from tests.hostile.trial import Outcome, forked

CALLS = (
    "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "fsync", "open",
    "write", "pwrite", "posix_fallocate", "ftruncate", "truncate", "chmod", "sendfile", "copy_file_range",
)  # fmt: skip
ERRORS = {
    "full": errno.ENOSPC,
    "quota": errno.EDQUOT,
    "broken": errno.EIO,
    "read-only": errno.EROFS,
}
KILL = "kill"
BESIDE = "genai_config.json"
"""Written after the graph is published, or by the next run."""


@dataclass(frozen=True)
class Command:
    name: str
    arguments: tuple[str, ...]
    before: Callable[[Path], object]
    """Makes what is there already in a directory: SOURCE, and an OUTPUT that is to be replaced."""


def _source(of: Callable[[], Path]) -> Callable[[Path], object]:
    return lambda place: sound.copied(of, place / "src")


def _over(of: Callable[[], Path], former: Callable[[], Path]) -> Callable[[Path], object]:
    def before(place: Path) -> None:
        sound.copied(of, place / "src")
        sound.copied(former, place / "out")

    return before


def _old_graph(place: Path) -> None:
    sound.copied(sound.beside, place / "src")


def _old_report(place: Path) -> None:
    sound.copied(sound.hf, place / "src")
    shutil.copy(sound.report(), place / "report.html")


PLAIN = ("--no-verify",)
OVER = ("--no-verify", "--overwrite")
PROCESS = ("--process", "default", "--ledger", "exact")
REPORT = ("verify", "src", "src", "--check", "weights", "--report", "report.html")
COMMANDS = [
    Command("hf-to-tl", ("hf-to-tl", "src", "out", *PROCESS, *PLAIN), _source(sound.hf)),
    Command("hf-to-tl over", ("hf-to-tl", "src", "out", *PROCESS, *OVER), _over(sound.hf, sound.hooked)),
    Command("tl-to-hf", ("tl-to-hf", "src", "out", *PLAIN), _source(sound.processed)),
    Command("tl-to-hf over", ("tl-to-hf", "src", "out", *OVER), _over(sound.processed, sound.hooked)),
    Command("bake", ("bake", "src", "out", *PLAIN), _source(sound.hf)),
    Command("bake over", ("bake", "src", "out", *OVER), _over(sound.hf, sound.hooked)),
    Command("export-onnx in place", ("export-onnx", "src", *PLAIN), _source(sound.hf)),
    Command("export-onnx in place, over", ("export-onnx", "src", "--no-past", *OVER), _old_graph),
    Command("a report", REPORT, _source(sound.hf)),
    Command("a report over", REPORT, _old_report),
]  # fmt: skip
SYSTEMS = ("renameat2", "plain")
"""Whether two names can change hands at once."""


@dataclass(frozen=True)
class Crash:
    command: Command
    system: str
    how: str
    """KILL, one of ERRORS; or one of them with a "+": from then on, and not once."""
    at: int


Tree = dict[str, bytes]


def tree(place: Path) -> Tree:
    """Every file with its bytes, every directory, but not the workspaces of runs that died."""
    found: Tree = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if SUFFIX in name or (path.name.startswith(".") and name.endswith(".new")):
            continue
        found[name] = path.read_bytes() if path.is_file() else b""
    return found


def left(place: Path) -> list[str]:
    return sorted(p.name for p in place.rglob("*") if p.name.startswith("."))


@dataclass(frozen=True)
class States:
    old: Tree
    new: Tree
    calls: int


def states(command: Command, system: str, main: Callable[..., Any]) -> States:
    """What is there before and after a run that nothing happens to, and its calls."""
    with _made(command) as place:
        old = tree(place)
        outcome, calls = _run(command, system, KILL, 10**9, place, main)
        assert outcome.code == 0, outcome.err
        assert not left(place)
        return States(old, tree(place), calls)


def trial(crash: Crash, known: States, main: Callable[..., Any]) -> list[str]:
    """What does not hold after a crash; empty: all is well."""
    with _made(crash.command) as place:
        outcome, _ = _run(crash.command, crash.system, crash.how, crash.at, place, main)
        wrong = _after(crash, known, outcome, place)
        again = crash.command.arguments
        if again[0] != "verify":  # which replaces a report of ours in any case
            again = (*again, "--overwrite")
        outcome, _ = _run(crash.command, crash.system, KILL, 10**9, place, main, again)
        if outcome.code or "left" in outcome.err:
            wrong.append(f"the next run ends with {outcome.code}: {outcome.err!r}")
        if tree(place) != known.new:
            wrong.append("the next run does not make OUTPUT")
        if found := left(place):
            wrong.append(f"the next run leaves {found}")
        return wrong


def _after(crash: Crash, known: States, outcome: Outcome, place: Path) -> list[str]:
    now = tree(place)
    is_new = _without(now) == _without(known.new)
    is_old = now == known.old
    if crash.how == KILL:
        gone = {k: v for k, v in known.old.items() if k.split("/")[0] != "out"}
        aside = crash.system == "plain" and crash.command.name.endswith("over") and now == gone
        good = outcome.code in (-signal.SIGKILL, 0) and (is_old or is_new or aside)
        return [] if good else [f"killed ({outcome.code}): neither old nor new"]
    wrong = []
    if outcome.code == 0 and not is_new:
        wrong.append("exit code 0, and OUTPUT is not the new one")
    if outcome.code != 0 and not is_old:
        wrong.append(f"exit code {outcome.code}, and OUTPUT is not the old one")
    if outcome.code not in (0, 3):
        wrong.append(f"exit code {outcome.code}: {outcome.err!r}")
    lines = [line.strip().split(":")[0] for line in outcome.err.splitlines()][-3:]
    told = lines == ["Error", "in", "do"] or "no report was written" in outcome.err
    if outcome.code == 3 and not told:
        wrong.append(f"no error of three lines: {outcome.err!r}")
    if not crash.how.endswith("+") and outcome.code and left(place) and not _removing(outcome):
        wrong.append(f"leaves {left(place)}")
    return wrong


def _without(found: Tree) -> Tree:
    return {name: data for name, data in found.items() if Path(name).name != BESIDE}


def _removing(outcome: Outcome) -> bool:
    """The call that failed was one of tidying."""
    return "injected in unlink" in outcome.err or "injected in rmdir" in outcome.err


class _made:
    def __init__(self, command: Command) -> None:
        self.command = command

    def __enter__(self) -> Path:
        self._scratch = tempfile.TemporaryDirectory(prefix="crash-")
        place = Path(self._scratch.name) / "here"
        place.mkdir()
        self.command.before(place)
        return place

    def __exit__(self, *_: object) -> None:
        self._scratch.cleanup()


def _run(
    command: Command,
    system: str,
    how: str,
    at: int,
    place: Path,
    main: Callable[..., Any],
    arguments: tuple[str, ...] | None = None,
) -> tuple[Outcome, int]:
    with tempfile.TemporaryDirectory(prefix="notes-") as notes:
        count = Path(notes) / "calls"

        def counted(words: list[str], **options: str) -> None:
            if system == "plain":
                renaming._renameat2 = lambda a, b, flag: False  # noqa: ARG005
            calls = _interpose(how, at)
            try:
                main(words, **options)
            finally:
                at_end = calls()
                handle = _REAL["open"](count, os.O_WRONLY | os.O_CREAT)
                _REAL["write"](handle, str(at_end).encode())

        outcome = forked(list(arguments or command.arguments), place, Path(notes), counted)
        return outcome, int(count.read_text()) if count.exists() else -1


_REAL = {name: getattr(os, name) for name in ("open", "write")}


def _interpose(how: str, at: int) -> Callable[[], int]:
    """Have the call number `at` kill the process or fail. Returns what ends it, and tells how many there
    have been."""
    done, over = 0, False

    def step(name: str) -> None:
        nonlocal done
        if over:
            return
        done += 1
        if how == KILL:
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)
        elif done == at or (how.endswith("+") and done > at and name in ("open", "write", "mkdir", "posix_fallocate", "sendfile")):  # fmt: skip
            code = ERRORS[how.rstrip("+")]
            raise OSError(code, f"{os.strerror(code)} (injected in {name})", "a file")

    def counted(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            step(name)
            return call(*args, **options)

        return counting

    for name in CALLS:
        if name not in ("open", "write") and hasattr(os, name):
            setattr(os, name, counted(getattr(os, name), name))
    low, high = os.open, io.open

    def opening(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            step("open")
        return low(path, flags, *args, **options)

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        writes = set(mode) & set("wxa+") and isinstance(file, (str, os.PathLike))
        if writes:
            step("open")
        stream: Any = high(file, mode, *args, **options)
        if writes:
            stream.write = counted(stream.write, "write")
        return stream

    os.open, os.write = opening, counted(os.write, "write")
    io.open = builtins.open = opened
    saved = "save_file"  # the ledger's one write, by the safetensors library
    setattr(ledger_file, saved, counted(getattr(ledger_file, saved), "write"))
    if renaming._renameat2.__name__ != "<lambda>":
        renaming._renameat2 = counted(renaming._renameat2, "rename")

    def end() -> int:
        nonlocal over
        over = True
        return done

    return end
