"""Every refusal's last line is advice that works when it is followed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from converter.errors import NeoconvertError
from tests.advice import adapter, batch, converting, foreign, opening, sites
from tests.advice.row import Row, refusal, run

ROWS: list[Row] = [*adapter.ROWS, *batch.ROWS, *opening.ROWS, *foreign.ROWS, *converting.ROWS]


NOT_YET = ("onnx/", "verification/", "streaming", "exporting", "checkpoint/pickles")


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Where errors were made: file and line, the last the one that was shown."""
    made: list[tuple[str, int]] = []
    init = NeoconvertError.__init__

    def noting(self: NeoconvertError, *args: object, **words: object) -> None:
        init(self, *args, **words)  # type: ignore[arg-type]
        frame = sys._getframe(1)
        made.append((frame.f_code.co_filename, frame.f_lineno))

    monkeypatch.setattr(NeoconvertError, "__init__", noting)
    return made


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_followed(
    row: Row, raised: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "a b"
    here.mkdir()
    monkeypatch.chdir(here)
    asked = row.ask()
    raised.clear()
    what, _, do = refusal(asked)
    meant = sites.of(row.file, row.says)
    assert any(
        (sites.ROOT / site.file).samefile(file) and site.first <= line <= site.last
        for site in meant
        for file, line in raised
        if Path(file).is_relative_to(sites.ROOT)
    ), (what, raised)
    assert row.advice in do, do
    if row.follow and (next_one := row.follow(do, asked)) is not None:
        run(next_one)


def test_every_refusal_has_a_row() -> None:
    covered = {site for row in ROWS for site in sites.of(row.file, row.says)}
    missing = [
        str(site)
        for site in sites.sites()
        if site not in covered and not site.file.startswith(NOT_YET)
    ]
    assert not missing, "\n".join([f"{len(missing)} without a row in tests/advice:", *missing])


def test_every_row_is_of_a_refusal() -> None:
    assert not [row.name for row in ROWS if not sites.of(row.file, row.says)]
