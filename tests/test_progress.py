"""What a person sees while a command works: on a terminal, in a log, and when asked to be quiet."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from converter import display_progress
from converter.display_progress import Pace, shown_on
from converter.progress import silent


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display_progress, "time", clock)
    return clock


def test_bytes_rate_and_time_left(clock: Clock) -> None:
    pace = Pace()
    assert pace.at(0, 4_000_000_000) == "0 B of 4.0 GB"
    clock.now += 10
    assert pace.at(1_000_000_000, 4_000_000_000) == "1.0 GB of 4.0 GB · 100.0 MB/s · 30 s left"
    clock.now += 590
    assert pace.at(2_000_000_000, 4_000_000_000) == "2.0 GB of 4.0 GB · 3.3 MB/s · 10 min left"
    # Another phase begins anew; one that is not counted says nothing.
    assert pace.at(0, 5_000_000) == "0 B of 5.0 MB"
    clock.now += 2
    assert pace.at(1_000_000, 5_000_000) == "1.0 MB of 5.0 MB · 500.0 kB/s · 8 s left"
    assert pace.at(0, 0) == ""


def test_a_line_a_minute_where_there_is_no_terminal(clock: Clock) -> None:
    out = io.StringIO()
    with shown_on(Console(file=out, width=40)) as progress:
        for done in range(0, 100, 10):
            progress("writing a[b]\x1b[2J", done * 1000, 100_000)
            clock.now += 25
    assert out.getvalue().splitlines() == [
        "writing a[b]\\x1b[2J: 30.0 kB of 100.0 kB · 400 B/s · 3 min left",
        "writing a[b]\\x1b[2J: 60.0 kB of 100.0 kB · 400 B/s · 2 min left",
        "writing a[b]\\x1b[2J: 90.0 kB of 100.0 kB · 400 B/s · 25 s left",
    ]


@pytest.mark.parametrize("width", [50, 80, 200])
def test_a_bar_fits_its_terminal(clock: Clock, width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    with shown_on(console) as progress:
        for done in (0, 300_000_000):
            progress("writing transformer.h.11.attn.attention.out_proj.weight", done, 10**9)
            clock.now += 3
    assert ("300.0 MB of 1.0 GB · 100.0 MB/s · 7 s left" in out.getvalue()) is (width > 50)


def test_quiet_is_quiet() -> None:
    with shown_on(Console(quiet=True, force_terminal=True)) as progress:
        assert progress is silent
