"""One command on one hostile input, in a process of its own, and everything that must hold of it.

The process is forked from one that has the libraries in memory, and says itself what it opened to
write, started, imported or asked the network for. What it may change is OUTPUT, and that only if it
succeeds.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS, NBYTES = 5.0, 300 * 2**20
"""Of processor time, and beyond what the process had when it began."""
_HANGS_S = 45
Make = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Input:
    """What `make` writes into an empty directory; it returns the command's arguments. OUTPUT, if
    there is one, is `out` in that directory."""

    kind: str
    name: str
    make: Make = field(repr=False)
    codes: frozenset[int] = frozenset({3})
    """Exit codes that are right: 0 where the file may be harmless, 1 where it may be a sound file
    of another model."""


@dataclass
class Outcome:
    code: int
    seconds: float
    nbytes: int
    out: str
    err: str
    wrong: list[str]
    """What does not hold; empty: all is well."""


def run(given: Input, main: Callable[..., Any]) -> Outcome:
    """Make the input, run the command line on it, and judge.

    Args:
        main: a Click command, called with the arguments.
    """
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        place, notes = Path(scratch) / "here", Path(scratch) / "notes"
        place.mkdir()
        notes.mkdir()
        try:
            arguments = given.make(place)
            before = _snapshot(place)
            outcome = forked(arguments, place, notes, main)
            after = _snapshot(place)
        finally:
            _unlock(place)
    done = outcome.code == 0
    changed = {
        name
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name) and not (done and _is_output(name))
    }
    if outcome.code not in given.codes:
        outcome.wrong.append(f"exit code {outcome.code}, not one of {sorted(given.codes)}")
    if changed:
        outcome.wrong.append(f"changed {sorted(changed)[:3]}")
    if outcome.seconds > SECONDS:
        outcome.wrong.append(f"{outcome.seconds:.1f} s")
    if outcome.nbytes > NBYTES:
        outcome.wrong.append(f"{outcome.nbytes >> 20} MiB")
    outcome.wrong += _unlike_an_error(outcome)
    return outcome


def _is_output(name: str) -> bool:
    return name == "out" or name.startswith("out/")


def _unlike_an_error(outcome: Outcome) -> list[str]:
    wrong = []
    text = outcome.out + outcome.err
    if "Traceback" in text:
        wrong.append("a traceback")
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t" for c in text):
        wrong.append("control characters")
    usage = outcome.code == 2 and outcome.err.startswith("Usage: ")
    if outcome.code not in (0, 1) and not usage:
        begins = [line.split(":")[0].strip() for line in outcome.err.splitlines()]
        if begins != ["Error", "in", "do"] or outcome.out:
            wrong.append("no error of three lines")
    return wrong


def _snapshot(place: Path) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            path = Path(folder) / name
            said = path.lstat()
            link = os.readlink(path) if path.is_symlink() else ""
            changed = said.st_mtime_ns if not stat.S_ISDIR(said.st_mode) else 0
            found[str(path.relative_to(place))] = (
                stat.S_IFMT(said.st_mode), said.st_ino, said.st_size, changed, link,
            )  # fmt: skip
    return found


def _unlock(place: Path) -> None:
    for folder, _, _ in os.walk(place):
        os.chmod(folder, 0o700)
    shutil.rmtree(place, ignore_errors=True)


def forked(arguments: list[str], place: Path, notes: Path, main: Callable[..., Any]) -> Outcome:
    """Call the command line in a child that stands in `place`; `notes`: an empty directory for what
    it prints."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            os.setpgid(0, 0)
            _become(arguments, place, notes, main)
        os._exit(99)
    hung = not _waited(child)
    if hung:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    said = json.loads((notes / "said").read_text()) if (notes / "said").exists() else {}
    code = os.waitstatus_to_exitcode(status)
    wrong = list(said.get("did", ["died"]))
    if hung:
        wrong = [f"still there after {_HANGS_S} s"]
    texts = [(notes / name).read_text("utf-8", "surrogateescape") for name in ("out", "err")]
    seconds = used.ru_utime + used.ru_stime
    return Outcome(code, seconds, said.get("nbytes", 0), texts[0], texts[1], wrong)


def _waited(child: int) -> bool:
    end = time.monotonic() + _HANGS_S
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.01)
    return False


def _become(arguments: list[str], place: Path, notes: Path, main: Callable[..., Any]) -> None:
    """The rest of the child's life."""
    for number, path in enumerate((Path(os.devnull), notes / "out", notes / "err")):
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(handle, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(place)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    room = 6 * 2**30  # so that what takes all memory ends here and not elsewhere
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + room,) * 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, did = status("VmRSS"), watched(place)
    try:
        main(arguments, prog_name="neoconvert")
        code: Any = 0
    except SystemExit as end:
        code = end.code
    did += [f"imported {m.__file__}" for m in _modules_in(place)]
    sys.stdout.flush()
    sys.stderr.flush()
    document = {"nbytes": status("VmHWM") - before, "did": sorted(set(did))}
    (notes / "said").write_text(json.dumps(document))
    os._exit(code if isinstance(code, int) else 98)


def _modules_in(place: Path) -> list[Any]:
    found = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None)]
    return [m for m in found if Path(str(m.__file__)).is_relative_to(place)]


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


_RUNS = {
    "subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.forkpty",
    "socket.connect", "socket.getaddrinfo", "pickle.find_class",
}  # fmt: skip
_CHANGES = {
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "shutil.rmtree",
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watched(place: Path) -> list[str]:
    """What Python does from now on that it should not."""
    did: list[str] = []

    def outside(path: object) -> bool:
        if not isinstance(path, (str, bytes)):
            return False
        full = os.path.abspath(os.fsdecode(path))
        return full != os.devnull and not Path(full).is_relative_to(place)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _RUNS:
            did.append(f"{event} {arguments!r:.80}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES and outside(path):
                did.append(f"opened {path!r:.80} to write")
        elif event in _CHANGES and any(outside(path) for path in arguments[:2]):
            did.append(f"{event} {arguments!r:.80}")

    sys.addaudithook(hook)
    return did
