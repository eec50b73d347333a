"""OUTPUT is the old one or the whole new one, whatever happens in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import converter
from converter.checkpoint import publish
from converter.checkpoint.plan import Planned
from converter.checkpoint.publish import check_output, staging
from converter.convert import hf_to_tl
from converter.errors import SamePlace, VerificationFailed
from tests.checkpoints import Recipe, read_all, write_hf
from tests.models import random_hf


def _old(output: Path) -> None:
    output.mkdir()
    (output / "neoconvert.json").write_text("old")


@pytest.mark.parametrize("atomic", [True, False])
def test_replaces_whole(atomic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not atomic:
        monkeypatch.setattr(publish, "_exchange", lambda a, b: False)  # noqa: ARG005
    _old(tmp_path / "out")
    with staging(tmp_path / "out") as stage:
        (stage / "new").write_text("new")
        assert (tmp_path / "out/neoconvert.json").read_text() == "old"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_leaves_the_old(error: type[BaseException], tmp_path: Path) -> None:
    _old(tmp_path / "out")
    with pytest.raises(error), staging(tmp_path / "out") as stage:  # noqa: PT012
        (stage / "half").write_text("half")
        raise error
    assert (tmp_path / "out/neoconvert.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_failed_swap_restores_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _old(tmp_path / "out")
    monkeypatch.setattr(publish, "_exchange", lambda a, b: False)  # noqa: ARG005
    rename, calls = os.rename, []

    def failing(a: Path, b: Path) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="No space"), staging(tmp_path / "out"):
        pass
    assert (tmp_path / "out/neoconvert.json").read_text() == "old"


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is claimed before the first weight is read."""
    write_hf(tmp_path / "hf", Recipe())
    _old(tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        hf_to_tl(tmp_path / "hf", tmp_path / "out", overwrite=True, check=False)
    assert (tmp_path / "out/neoconvert.json").read_text() == "old"
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
    assert (tmp_path / "out/neoconvert.json").read_text() == "old"
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
        assert process.wait(10) != 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["neoconvert.json"]
    if sign is not signal.SIGKILL:  # nobody can tidy up after SIGKILL
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_output_that_holds_the_source(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(SamePlace):
        check_output(tmp_path / "a", tmp_path / "a/b", overwrite=True)
    check_output(tmp_path / "a/b/inside", tmp_path / "a/b", overwrite=False)


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
