"""A few of the crashes of `scripts/crashes`, and that its checks can fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.cli import main
from tests import crashes
from tests.crashes import COMMANDS, KILL, Command, Crash, states, trial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(
    ("name", "system", "how"),
    [
        ("hf-to-tl over", "renameat2", KILL),
        ("hf-to-tl over", "renameat2", "full"),
        ("hf-to-tl over", "plain", KILL),
        ("export-onnx in place", "renameat2", "broken"),
    ],
)
def test_killed_and_refused(name: str, system: str, how: str) -> None:
    """The calls of publishing itself are the last ones."""
    command = next(c for c in COMMANDS if c.name == name)
    known = states(command, system, main)
    assert known.calls > 30
    for at in (3, known.calls // 2, *range(known.calls - 6, known.calls + 1, 2)):
        assert not trial(Crash(command, system, how, at), known, main), at


def _careless(_words: list[str], **_: Any) -> None:
    """Writes in place."""
    out = Path("out")
    out.mkdir(exist_ok=True)
    for name in ("a", "b"):
        with open(out / name, "w") as file:
            file.write("new")


def _hasty(_words: list[str], **_: Any) -> None:
    """Removes the old before the new is there, and says that all is well whatever happened."""
    out, new = Path("out"), Path("new")
    try:
        new.mkdir()
        with open(new / "a", "w") as file:
            file.write("new")
        os.unlink(out / "a")
        os.rmdir(out)
        os.rename(new, out)
    except OSError:
        pass


@pytest.mark.parametrize("how", [KILL, "full"])
@pytest.mark.parametrize("faulty", [_careless, _hasty])
def test_the_checks_can_fail(
    faulty: Callable[..., Any], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(place: Path) -> None:
        (place / "out").mkdir()
        (place / "out/a").write_text("old")

    monkeypatch.setattr(crashes, "left", lambda _: [])
    command = Command("verify over", ("verify",), before)
    known = states(command, "renameat2", faulty)
    assert any(
        trial(Crash(command, "renameat2", how, at), known, faulty)
        for at in range(known.calls, 0, -1)
    )
