"""The place beside OUTPUT where one run works, and what becomes of the places of runs that died.

A workspace is a directory `.NAME.XXXXXXXX.partial` with a locked file in it. A lock that can be had is
a dead run's. What such a run had moved aside is put back, what it had half written is removed, and a
file that is not neoconvert's is neither moved nor removed.

A folder that was downloaded or unpacked may hold what looks like one. A workspace is a run's only where
its note names the very directory that it lies in, which nobody can know beforehand, and this user made it;
links are not followed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from converter.checkpoint.locking import lock
from converter.checkpoint.record import bears_seal, remove, survey
from converter.checkpoint.renaming import exchange, rename_new, sync
from converter.checkpoint.signature import Identity, identity

LOCK, SUFFIX = "lock", ".partial"
_NAME = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(SUFFIX)}", re.DOTALL)
"""As mkdtemp makes it of OUTPUT's."""
LIVE: dict[Path, Workspace] = {}
"""Those of this process."""


class Workspace:
    """`new` becomes OUTPUT, `old` is where the former one waits; `file` is for an OUTPUT that is one
    file, and lies beside it because a graph points into its own directory."""

    def __init__(self, parent: Path, name: str, replaces: Identity | None = None) -> None:
        """Make it.

        Args:
            name: of OUTPUT, in `parent`; "." where OUTPUT is `parent` itself.
            replaces: what is there, and may go.
        """
        while True:
            stem = "neoconvert" if name == "." else name[:48]
            parent.mkdir(parents=True, exist_ok=True)  # another run made it, failed, and removed it
            self.folder = Path(tempfile.mkdtemp(prefix=f".{stem}.", suffix=SUFFIX, dir=parent))
            try:
                self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            except FileNotFoundError:  # another run took it for a dead one's
                continue
            except OSError:
                self.folder.rmdir()
                raise
            if lock(self._lock) is not False and (self.folder / LOCK).exists():
                break
            os.close(self._lock)
        self.note: dict[str, Any] = {"neoconvert": 1, "output": name, "replaces": replaces}
        self.note["folder"] = identity(self.folder)
        self.new, self.old = self.folder / "new", self.folder / "old"
        self.file = parent / f"{self.folder.name.removesuffix(SUFFIX)}.new"
        LIVE[self.folder] = self
        try:
            self.new.mkdir()
            self.say(new=identity(self.new))
        except OSError:
            self.close()
            raise

    def say(self, **facts: Any) -> None:
        """Leave word for the next run, should this one die."""
        self.note |= facts
        text = json.dumps(self.note).encode()
        os.lseek(self._lock, 0, os.SEEK_SET)
        os.write(self._lock, text.ljust(1024) + b"\n")
        os.fsync(self._lock)

    def close(self) -> list[str]:
        """Leave things as they must be, committed or not. Returns what is left, and why."""
        kept = settle(self.folder, self.note)
        os.close(self._lock)
        LIVE.pop(self.folder, None)
        if not kept:
            _discard(self.folder)
        return kept


def abandon() -> None:
    """Settle what this process still has open, because it ends."""
    for place in list(LIVE.values()):
        with suppress(Exception):
            place.close()


def clean(parent: Path) -> list[str]:
    """Settle what dead runs left in a directory. Returns what is left all the same, and why."""
    if not parent.is_dir():
        return []
    kept = []
    for entry in list(parent.iterdir()):
        if is_workspace(entry):
            kept += _reclaim(entry)
    return kept


_PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""A link or a FIFO is no lock of ours, and does not keep us."""


def _reclaim(folder: Path) -> list[str]:
    try:
        if not os.path.lexists(folder / LOCK):
            folder.rmdir()  # an empty one: the run died at once
            return []
        if not stat.S_ISREG((folder / LOCK).lstat().st_mode):
            return []
        handle = os.open(folder / LOCK, os.O_RDWR | _PLAIN)
    except OSError:
        return []
    kept = ["a run's that lives"]
    try:
        if not _mine(os.fstat(handle)) or not lock(handle):
            return []
        note = _note(handle, folder)
        if note is None:
            if os.fstat(handle).st_size or not _untouched(folder):
                return []
            note = {"output": "", "new": identity(folder / "new")}
        kept = settle(folder, note)
        return kept
    finally:
        os.close(handle)
        if not kept:
            _discard(folder)


def _untouched(folder: Path) -> bool:
    """Whether it is there, and the run died before it put anything into it."""
    new = folder / "new"
    try:
        alone = {entry.name for entry in folder.iterdir()} <= {LOCK, "new"}
        return alone and (not os.path.lexists(new) or (_is_folder(new) and not any(new.iterdir())))
    except FileNotFoundError:  # another run has just removed it
        return False


def _mine(file: os.stat_result) -> bool:
    return stat.S_ISREG(file.st_mode) and (os.name == "nt" or file.st_uid == os.geteuid())


def _is_folder(path: Path) -> bool:
    """And no link to one."""
    return path.is_dir() and not path.is_symlink()


def _note(handle: int, folder: Path) -> dict[str, Any] | None:
    """What the dead run left word of; None where it is not a run's."""
    try:
        note = json.loads(os.read(handle, 4096))
        name, here = note["output"], _identity(note["folder"])
        plain = isinstance(name, str) and "/" not in name and name != ".."
        if note["neoconvert"] == 1 and plain and here is not None and here == identity(folder):
            return dict(note)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    return None


def settle(folder: Path, note: dict[str, Any]) -> list[str]:
    """Put back, move on or remove what is in a workspace. Returns what must stay, and why."""
    name, parent = note["output"], folder.parent
    target = parent if name == "." else parent / name
    kept = []
    filled = _identity(note.get("filling"))
    if filled is not None and filled == identity(target) and _is_folder(folder / "new"):
        kept += _fill_on(folder / "new", target)
    kept += _settle_directory(folder, target, note)
    kept += _settle_file(parent / f"{folder.name.removesuffix(SUFFIX)}.new", target, note)
    return kept


def _identity(said: Any) -> Identity | None:
    return Identity(*said) if isinstance(said, (list, tuple)) and len(said) == 2 else None


def _meant(aside: Path, note: dict[str, Any]) -> bool:
    """Whether what was exchanged for ours is what was to be replaced, and no other run's."""
    if note.get("committed") or note.get("replaces") is None:
        return True
    return identity(aside) == _identity(note["replaces"])


def _settle_directory(folder: Path, target: Path, note: dict[str, Any]) -> list[str]:
    new, old, made = folder / "new", folder / "old", _identity(note.get("new"))
    if _is_folder(old) and not os.path.lexists(target):
        rename_new(old, target)
        sync(target.parent)
    kept = []
    for aside in (new, old):
        if not _is_folder(aside):
            continue
        if identity(aside) == made:
            shutil.rmtree(aside)
        elif identity(target) == made:  # it was exchanged for ours
            found = survey(aside, deep=False)
            if not found.foreign and _meant(aside, note):
                remove(aside, found)
            elif not note.get("committed") and exchange(aside, target):
                remove(aside, survey(aside, deep=True))
            else:
                kept.append(f"{aside}: {', '.join(found.foreign[:4])}")
        else:
            kept.append(f"{aside}: there is another {target.name} now")
    left = (str(aside) for aside in (new, old) if os.path.lexists(aside) and not kept)
    return [*kept, *left]


def _settle_file(file: Path, target: Path, note: dict[str, Any]) -> list[str]:
    made = _identity(note.get("file"))
    if not os.path.lexists(file):
        return []
    if (
        made is None
        or identity(file) == made
        or (bears_seal(file) and _meant(file, note))
        or (identity(target) == made and exchange(file, target))
    ):
        file.unlink()
    else:
        return [f"{file}: it was put there meanwhile"]
    return []


def _fill_on(new: Path, target: Path) -> list[str]:
    """Give a directory the files that are ready for it. It is theirs once this has begun."""
    kept = []
    for path in weights_first(new):
        try:
            rename_new(path, target / path.name)
        except FileExistsError:
            if identity(path) == identity(target / path.name):  # linked, and not unlinked yet
                path.unlink()
            else:
                kept.append(f"{path}: there is another {path.name} now")
    sync(target)
    return kept


def weights_first(new: Path) -> list[Path]:
    """Weights first, and last of all what says that they are complete."""
    last = ("config.json", "cfg.json", "neoconvert.json")
    rank = {name: i for i, name in enumerate(last)}
    return sorted(new.iterdir(), key=lambda path: (rank.get(path.name, -1), path.name))


def _discard(folder: Path) -> None:
    """Remove a settled workspace, its lock last. Another run may be at it as well."""
    with suppress(FileNotFoundError):
        (folder / "new").rmdir()
    (folder / LOCK).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        folder.rmdir()


def is_workspace(entry: Path) -> bool:
    """By its name, and the lock that a run makes first; whose it is, `clean` finds out."""
    if not (_NAME.fullmatch(entry.name) and _is_folder(entry)):
        return False
    try:
        return os.path.lexists(entry / LOCK) or not any(entry.iterdir())
    except OSError:  # another run removed it, or it is nobody's to look into
        return False
