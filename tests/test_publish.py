"""OUTPUT is the old one or the whole new one, whatever happens in between."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import converter
from converter.checkpoint import publish, renaming, writer
from converter.checkpoint.plan import Planned
from converter.checkpoint.publish import adding, staging
from converter.checkpoint.record import UNSEALED, bears_seal, rerecord, sealed, survey
from converter.checkpoint.replaceable import check_output
from converter.checkpoint.signature import identity
from converter.checkpoint.workspace import Workspace, clean
from converter.convert import hf_to_tl
from converter.errors import NoSpace, OutputExists, SamePlace, SourceChanged, VerificationFailed
from converter.interrupts import Interrupted
from tests.checkpoints import Recipe, read_all, write_hf
from tests.models import random_hf

OLD = "old"


def _old(output: Path) -> None:
    """A directory as neoconvert leaves it."""
    output.mkdir(parents=True)
    (output / "weights").write_text(OLD)
    _sign(output)


def _sign(output: Path) -> None:
    (output / "neoconvert.json").write_text("{}")
    rerecord(output)


def _is_old(output: Path) -> bool:
    names = sorted(p.name for p in output.iterdir())
    return names == ["neoconvert.json", "weights"] and (output / "weights").read_text() == OLD


def _publish(output: Path, text: str = "new", *, overwrite: bool = True) -> list[str]:
    with staging(output, overwrite=overwrite) as stage:
        (stage.path / "weights").write_text(text)
        (stage.path / "config.json").write_text(text)
        _sign(stage.path)
    return stage.warnings


def _names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.fixture
def no_renameat2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that can neither exchange names nor rename without replacing."""
    monkeypatch.setattr(renaming, "_renameat2", lambda a, b, flag: False)  # noqa: ARG005


@pytest.fixture(params=["renameat2", "nothing of the kind"])
def either(request: pytest.FixtureRequest) -> None:
    if request.param != "renameat2":
        request.getfixturevalue("no_renameat2")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("before", ["nothing", "empty", "ours"])
def test_publishes_whole(before: str, tmp_path: Path) -> None:
    out = tmp_path / "deep/er/out"
    if before == "empty":
        out.mkdir(parents=True)
    elif before == "ours":
        _old(out)
    with staging(out, overwrite=True) as stage:
        (stage.path / "new").write_text("new")
        assert before != "ours" or _is_old(out)
    assert _names(out) == ["new"]
    assert _names(tmp_path) == ["deep"]
    assert _names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Interrupted])
def test_any_exception_leaves_the_old(error: type[BaseException], tmp_path: Path) -> None:
    _old(tmp_path / "out")
    for place in (tmp_path / "out", tmp_path / "made/for/this"):
        with pytest.raises(error), staging(place, overwrite=True) as stage:  # noqa: PT012
            (stage.path / "half").write_text("half")
            raise error(2)
    assert _is_old(tmp_path / "out")
    assert _names(tmp_path) == ["out"]


PUT = {
    "a file": lambda out: (out / "README.md").write_text("mine"),
    "a folder": lambda out: (out / ".git").mkdir(),
    "a link": lambda out: (out / "link").symlink_to("/etc/passwd"),
    "a changed file": lambda out: (out / "weights").write_text("new"),
    "a changed record": lambda out: (out / "neoconvert.json").write_text('{"files": {}}'),
    "no record": lambda out: (out / "neoconvert.json").unlink(),
}  # fmt: skip


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("meanwhile", [False, True])
@pytest.mark.parametrize("put", PUT)
def test_what_a_person_put_there_stays(put: str, meanwhile: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _old(out)
    if not meanwhile:
        PUT[put](out)
    with pytest.raises(OutputExists), staging(out, overwrite=True) as stage:  # noqa: PT012
        (stage.path / "weights").write_text("new")
        if meanwhile:
            PUT[put](out)
        there = {p.name: p.is_file() and p.read_bytes() for p in out.iterdir()}
    if meanwhile:
        assert {p.name: p.is_file() and p.read_bytes() for p in out.iterdir()} == there
    assert _names(tmp_path) == ["out"]


def test_refusal_names_what_is_there(tmp_path: Path) -> None:
    _old(tmp_path / "out")
    (tmp_path / "out/thesis.tex").write_text("years")
    (tmp_path / "out/weights").write_text("old, but not as old")
    with pytest.raises(OutputExists) as raised:
        check_output(tmp_path / "out", None, overwrite=True)
    assert "thesis.tex" in raised.value.where
    assert "weights (changed since)" in raised.value.where


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("before", ["nothing", "empty", "ours"])
def test_of_two_runs_one_wins(before: str, overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if before == "empty":
        out.mkdir()
    elif before == "ours":
        _old(out)
        overwrite = True
    with pytest.raises(OutputExists, match="while this ran"):  # noqa: PT012, SIM117
        with staging(out, overwrite=overwrite) as stage:
            (stage.path / "weights").write_text("second")
            _publish(out, "first", overwrite=overwrite)
    assert (out / "weights").read_text() == "first"
    assert _names(tmp_path) == ["out"]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("there", [False, True])
def test_parent_that_cannot_be_synced(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one is not removed before the new name is on the disk."""
    out = tmp_path / "out"
    if there:
        _old(out)
    real = renaming.sync

    def failing(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(publish, "sync", failing)
    with pytest.raises(OSError, match="Input/output"):
        _publish(out)
    assert _is_old(out) if there else not out.exists()
    assert _names(tmp_path) == ["out"] * there


def test_old_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _old(tmp_path / "out")
    unlink = Path.unlink

    def failing(self: Path, missing_ok: bool = False) -> None:
        if self.name == "weights":
            raise OSError(errno.EIO, "Input/output error")
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        (warning,) = _publish(tmp_path / "out")
    assert "Input/output error" in warning
    assert (tmp_path / "out/weights").read_text() == "new"


def test_no_space_is_said_before_writing(tmp_path: Path) -> None:
    with pytest.raises(NoSpace), staging(tmp_path / "out", needs=2**60):
        raise AssertionError
    assert not _names(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from converter.checkpoint import record, renaming
from converter.checkpoint.publish import staging, adding
if sys.argv[3] == "plain":
    renaming._renameat2 = lambda a, b, flag: False
left = int(sys.argv[2])
def counted(call):
    def step(*args, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return step
for name in ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "fsync", "open", "write"):
    setattr(os, name, counted(getattr(os, name)))
renaming._renameat2 = counted(renaming._renameat2)
def go():
    for i in range(20):
        pid = os.fork()
        if not pid:
            globals()["left"] = left + i
            out = Path(sys.argv[1]) / str(i) / "out"
            if sys.argv[4] == "inside":
                os.chdir(out)
            if sys.argv[4] == "file":
                with adding(out, mark=b"", overwrite=True) as stage:
                    stage.path.write_bytes(record.sealed(b"new " + record.UNSEALED.encode()))
            else:
                with staging(out, overwrite=True) as stage:
                    (stage.path / "weights").write_text("new")
                    (stage.path / "config.json").write_text("new")
                    (stage.path / "neoconvert.json").write_text("{}")
                    record.rerecord(stage.path)
            os._exit(0)
        os.waitpid(pid, 0)
go()
"""


@pytest.mark.parametrize("system", ["renameat2", "plain"])
@pytest.mark.parametrize("kind", ["new", "ours", "inside", "file", "old file"])
def test_killed_at_every_call(kind: str, system: str, tmp_path: Path) -> None:
    """OUTPUT is the old or the new one (or, where names cannot be exchanged, the next run restores
    it), and after the next run nothing is left behind."""
    for first in (0, 20, 40):
        _killed_from(first, kind, system, tmp_path / str(first))


def _killed_from(first: int, kind: str, system: str, root: Path) -> None:
    for i in range(20):
        out = root / str(i) / "out"
        out.parent.mkdir(parents=True)
        if kind == "ours":
            _old(out)
        elif kind == "inside":
            out.mkdir()
        elif kind == "old file":
            out.write_bytes(sealed(b"old " + UNSEALED.encode()))
    mode = "file" if "file" in kind else kind
    subprocess.run([sys.executable, "-c", KILLED, root, str(first), system, mode], check=True)
    for i in range(20):
        out = root / str(i) / "out"
        if "file" in kind:
            assert not out.exists() or bears_seal(out)
            assert out.exists() or kind == "file"
            with adding(out, mark=b"", overwrite=True) as stage:
                stage.path.write_bytes(sealed(b"next " + UNSEALED.encode()))
        else:
            clean(out.parent)
            if out.is_dir():
                clean(out)
            if kind == "ours" or (out.exists() and any(out.iterdir())):
                assert not survey(out, deep=True).foreign
                assert len({p.read_text() for p in out.glob("[wc]*")}) == 1
                complete = (out / "config.json").exists() or kind == "ours"
                assert complete
            assert not _publish(out, "next")
        assert _names(out.parent) == ["out"]


def test_a_living_run_is_left_alone(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as stage:
        (stage.path / "weights").write_text("first")
        assert not clean(tmp_path)
        assert _names(stage.path) == ["weights"]


def test_a_folder_that_only_looks_like_a_workspace_stays(tmp_path: Path) -> None:
    mine = tmp_path / ".out.abcdefgh.partial"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    (tmp_path / ".out.ijklmnop.partial").mkdir()
    (tmp_path / ".out.ijklmnop.partial/lock").write_text("mine, too")
    _publish(tmp_path / "out")
    assert (mine / "thesis.tex").read_text() == "years"
    assert (tmp_path / ".out.ijklmnop.partial/lock").read_text() == "mine, too"


@pytest.mark.parametrize("there", ["link", "moved", "another's"])
def test_nothing_is_moved_for_a_workspace_that_was_unpacked(there: str, tmp_path: Path) -> None:
    """Who packs a folder does not know what it will be on this machine."""
    model, victim = tmp_path / "model", tmp_path / "victim"
    victim.mkdir()
    place = model / ".x.abcdefgh.partial"
    (place / "new").mkdir(parents=True)
    (place / "new/sitecustomize.py").write_text("print('ran')")
    (model / "docs").symlink_to(victim)
    note: dict[str, Any] = {"neoconvert": 1, "output": "docs", "filling": identity(victim)}
    if there != "link":
        (model / "docs").unlink()
        (model / "docs").mkdir()
        note["filling"] = identity(model / "docs")
    here = identity(place)
    assert here is not None
    if there == "another's":
        note["folder"] = [here.device, here.inode + 1]
    elif there == "moved":  # with its true number, which a copy has not
        note["folder"] = here
        shutil.copytree(place, tmp_path / "kept")
        shutil.rmtree(place)
        (tmp_path / "taken").mkdir()
        shutil.copytree(tmp_path / "kept", place)
        if identity(place) == here:
            pytest.skip("the file system gave the number again")
    (place / "lock").write_text(json.dumps(note))
    _publish(model / "out")
    assert not list(victim.iterdir())
    assert there == "link" or not list((model / "docs").iterdir())
    assert (place / "new/sitecustomize.py").exists()


@pytest.mark.parametrize("part", ["new", "old", "folder", "lock"])
def test_links_in_a_workspace_are_not_followed(part: str, tmp_path: Path) -> None:
    """Even where the note is true."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years")
    place = tmp_path / "model/.x.abcdefgh.partial"
    place.mkdir(parents=True)
    note = {"neoconvert": 1, "output": ".", "filling": identity(tmp_path / "model")}
    (place / "lock").write_text(json.dumps(note | {"folder": identity(place)}))
    if part == "folder":
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere/new").symlink_to(victim)
    elif part == "lock":
        (place / "lock").rename(tmp_path / "lock")
        (place / "lock").symlink_to(tmp_path / "lock")
        shutil.copytree(victim, place / "new")
    else:
        (place / part).symlink_to(victim)
    _publish(tmp_path / "model/out")
    assert (victim / "thesis.tex").read_text() == "years"
    assert not (tmp_path / "model/thesis.tex").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_for_a_lock_keeps_nobody_waiting(tmp_path: Path) -> None:
    place = tmp_path / ".x.abcdefgh.partial"
    place.mkdir()
    os.mkfifo(place / "lock")
    _publish(tmp_path / "out")
    assert stat.S_ISFIFO((place / "lock").lstat().st_mode)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
def test_another_users_workspace_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a directory that all may write to, its owner knows what it is."""
    place, target = tmp_path / ".out.abcdefgh.partial", tmp_path / "out"
    (place / "new").mkdir(parents=True)
    target.mkdir()
    (place / "new/x.py").write_text("theirs")
    note = {
        "neoconvert": 1,
        "output": "out",
        "folder": identity(place),
        "filling": identity(target),
    }
    (place / "lock").write_text(json.dumps(note))
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
        clean(tmp_path)
    assert not list(target.iterdir())
    clean(tmp_path)
    assert (target / "x.py").exists()  # one's own is filled on


@pytest.mark.parametrize("name", [".download.partial", ".out.abcdefgh.partial"])
def test_such_a_folder_in_output_is_told_first(name: str, tmp_path: Path) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "part").write_text("of a download")
    with pytest.raises(OutputExists, match="already"), staging(tmp_path / "out"):
        raise AssertionError
    assert _names(tmp_path / "out") == [name]


def test_output_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = here.stat().st_ino
    _publish(Path("."))
    assert here.stat().st_ino == before
    assert _names(here) == ["config.json", "neoconvert.json", "weights"]
    assert _names(tmp_path) == ["here"]
    with pytest.raises(OutputExists, match="where you are"):
        _publish(Path("."))


def test_windows_has_no_directories_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renaming, "_renameat2", lambda a, b, flag: False)  # noqa: ARG005
    opened = []
    real = os.open

    def watching(path: Path, flags: int, *more: int) -> int:
        opened.append((Path(path), flags))
        return real(path, flags, *more)

    with monkeypatch.context() as patch:
        patch.setattr(renaming, "_WINDOWS", True)
        patch.setattr(os, "open", watching)
        _old(tmp_path / "out")
        _publish(tmp_path / "out")
    assert not any(path.is_dir() for path, _ in opened)
    assert (tmp_path / "out/weights").read_text() == "new"


@pytest.mark.usefixtures("either")
def test_files_are_replaced_only_if_sealed(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for text in (b"first ", b"second "):
        with adding(path, mark=b" ", overwrite=True) as stage:
            stage.path.write_bytes(sealed(text + UNSEALED.encode() + b"!"))
        assert path.read_bytes().startswith(text)
        assert bears_seal(path)
    with pytest.raises(OutputExists, match="already"), adding(path, mark=b"", overwrite=False):
        raise AssertionError
    with pytest.raises(OutputExists, match="kind"), adding(path, mark=b"<!", overwrite=True):
        raise AssertionError
    path.write_bytes(path.read_bytes().replace(b"second", b"edited"))
    with (
        pytest.raises(OutputExists, match="is not a file of this kind"),
        adding(path, mark=b"", overwrite=True),
    ):
        raise AssertionError
    assert _names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_file_whose_directory_cannot_be_synced(
    exchanged: bool, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was put over an old one in one call cannot be taken back: it is published, and that is said."""
    path = tmp_path / "model.onnx"
    if there:
        path.write_bytes(sealed(b"old " + UNSEALED.encode()))
    if not exchanged:
        monkeypatch.setattr(renaming, "_renameat2", lambda a, b, flag: False)  # noqa: ARG005
    real = renaming.sync

    def failing(place: Path) -> None:
        if place == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        real(place)

    monkeypatch.setattr(publish, "sync", failing)

    def add() -> list[str]:
        with adding(path, mark=b"", overwrite=True) as stage:
            stage.path.write_bytes(b"new")
        return stage.warnings

    if there and not exchanged:
        (warning,) = add()
        assert "could not be synced (Input/output error)" in warning
        assert path.read_bytes() == b"new"
    else:
        with pytest.raises(OSError, match="Input/output"):
            add()
        assert path.read_bytes().startswith(b"old ") if there else not path.exists()
    assert _names(tmp_path) == ["model.onnx"] * there


def test_an_edit_of_one_bit_is_seen(tmp_path: Path) -> None:
    """In a weight file, too, of which the record has the header's digest and the tensors'."""
    out = tmp_path / "out"
    write_hf(tmp_path / "hf", Recipe())
    hf_to_tl(tmp_path / "hf", out, check=False)
    hf_to_tl(tmp_path / "hf", out, check=False, overwrite=True)
    for path in out.iterdir():
        good = path.read_bytes()
        path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        with pytest.raises(
            OutputExists, match=r"Nothing in OUTPUT is as neoconvert wrote it|did not write"
        ):
            hf_to_tl(tmp_path / "hf", out, check=False, overwrite=True)
        path.write_bytes(good)


@pytest.mark.parametrize("how", ["replaced", "rewritten"])
def test_source_that_changes(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converter.checkpoint.writer import Writer

    write_hf(tmp_path / "hf", Recipe())
    write_hf(tmp_path / "other", Recipe(seed=1))
    weights, other = (tmp_path / name / "model.safetensors" for name in ("hf", "other"))
    write = Writer.write

    def meanwhile(self: Writer, tensor: Planned, array: np.ndarray) -> None:
        if other.exists() and how == "replaced":
            other.replace(weights)
        elif other.exists():
            weights.write_bytes(other.read_bytes())
            other.unlink()
        write(self, tensor, array)

    monkeypatch.setattr(Writer, "write", meanwhile)
    with pytest.raises(SourceChanged):
        hf_to_tl(tmp_path / "hf", tmp_path / "out", check=False)
    assert _names(tmp_path) == ["hf", "other"]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is claimed before the first weight is read."""
    write_hf(tmp_path / "hf", Recipe())
    _old(tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space") as raised:
        hf_to_tl(tmp_path / "hf", tmp_path / "out", overwrite=True, check=False)
    assert raised.value.filename == str(tmp_path / "out")
    assert _is_old(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_failed_verification_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that loses one bit: the file is sound, its content is not what it must be."""
    from converter.checkpoint.writer import Writer

    write_hf(tmp_path / "hf", Recipe())
    _old(tmp_path / "out")
    write = Writer.write

    def faulty(self: Writer, tensor: Planned, array: np.ndarray) -> None:
        if tensor.name == "blocks.1.mlp.W_in":
            array = array.copy()
            array.view("u4")[0, 0] ^= 1
        write(self, tensor, array)

    monkeypatch.setattr(Writer, "write", faulty)
    with pytest.raises(VerificationFailed, match=r"blocks\.1\.mlp\.W_in"):
        hf_to_tl(tmp_path / "hf", tmp_path / "out", overwrite=True)
    assert _is_old(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed(sign: signal.Signals, tmp_path: Path) -> None:
    """A real process, killed while it writes."""
    write_hf(tmp_path / "hf", Recipe())
    _old(tmp_path / "out")
    program = (
        "import sys, time\n"
        "from converter.checkpoint.writer import Writer\n"
        "Writer.write = lambda *a: (print('writing', flush=True), time.sleep(60))\n"
        "from converter.cli import main; main()"
    )
    arguments = [
        "hf-to-tl",
        str(tmp_path / "hf"),
        str(tmp_path / "out"),
        "--overwrite",
        "--no-verify",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(sign)
        assert process.wait(10) == (-9 if sign is signal.SIGKILL else 128 + sign)
    assert _is_old(tmp_path / "out")
    if sign is not signal.SIGKILL:  # nobody can tidy up after SIGKILL
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_output_that_holds_the_source(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(SamePlace):
        check_output(tmp_path / "a", tmp_path / "a/b", overwrite=True)
    with pytest.raises(SamePlace):
        check_output(tmp_path / "a/b/inside", tmp_path / "a/b", overwrite=False)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(SamePlace):
        check_output(tmp_path / "link/b/inside", tmp_path / "a/b", overwrite=False)
    (tmp_path / "a/b/model.pt").write_bytes(b"")
    check_output(tmp_path / "a/b/tl", tmp_path / "a/b/model.pt", overwrite=False)


def test_modes_and_no_links(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", Recipe(finite=True))
    hf_to_tl(tmp_path / "hf", tmp_path / "new/parents/out", process="center_unembed", check=False)
    out = tmp_path / "new/parents/out"
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert all(p.is_file() and not p.is_symlink() for p in out.iterdir())
    assert {p.stat().st_mode & 0o777 for p in out.iterdir()} == {0o666 & ~_umask()}
    assert read_all(out)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def four_at_once(run: Callable[[str], None]) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, "abcd"))
    finally:
        sys.setswitchinterval(before)


def test_runs_beside_one_another_clean_without_harm(tmp_path: Path) -> None:
    """Each settles what it takes for a dead run's, while others begin and end."""

    def run(name: str) -> None:
        for turn in range(60):
            if turn % 2:
                clean(tmp_path)
            assert Workspace(tmp_path, name).close() == []

    four_at_once(run)
    assert list(tmp_path.iterdir()) == []


def test_runs_beside_one_that_fails_keep_the_folder_that_it_made(tmp_path: Path) -> None:
    def run(name: str) -> None:
        for turn in range(60):
            with suppress(LookupError), staging(tmp_path / "new" / f"{name}{turn}"):
                raise LookupError

    four_at_once(run)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "new"])


def test_source_and_output_times_do_not_matter(tmp_path: Path) -> None:
    """The same input gives the same bytes, provenance included."""
    write_hf(tmp_path / "hf", Recipe())
    hf_to_tl(tmp_path / "hf", tmp_path / "a", check=False)
    time.sleep(0.01)
    hf_to_tl(tmp_path / "hf", tmp_path / "b", check=False)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_same_conversion_writes_the_same_bytes(tmp_path: Path) -> None:
    source = random_hf(tmp_path / "m", scale=1.5)
    outputs = []
    for name in ("one", "two"):
        converter.hf_to_tl(source, tmp_path / name, process="default", graph=converter.Graph())
        files = sorted((tmp_path / name).iterdir())
        outputs.append({file.name: file.read_bytes() for file in files})
    assert "model.onnx" in outputs[0]
    assert outputs[0] == outputs[1]


def test_the_disk_begins_while_the_rest_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[int] = []

    def begin(handle: int) -> None:
        before.append(os.fstat(handle).st_size)
        renaming.begin_sync(handle)

    monkeypatch.setattr(writer, "begin_sync", begin)
    monkeypatch.setattr(writer, "_ENOUGH", 2**12)
    hf_to_tl(random_hf(tmp_path / "hf"), tmp_path / "tl", check=False)
    size = (tmp_path / "tl/model.safetensors").stat().st_size
    assert len(before) > size // 2**14
    renaming.begin_sync(-1)  # where it cannot be asked, it is not
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    renaming.begin_sync(0)
