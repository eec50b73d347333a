"""Every refusal's last line is advice that works when it is followed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from converter.errors import NeoconvertError
from tests.advice import adapter, batch, converting, foreign, opening, recorded, sites, verifying
from tests.advice.row import Row, refusal, run

ROWS: list[Row] = [
    *adapter.ROWS,
    *batch.ROWS,
    *opening.ROWS,
    *foreign.ROWS,
    *converting.ROWS,
    *recorded.ROWS,
    *verifying.ROWS,
]


NOT_FOLLOWED = {
    ("cli_ending.py", "_refusals"): "click's own words: see tests/test_schema.py",
    ("pushing.py", "The hub could not be asked: "): "needs the hub: see tests/test_push.py",
    ("pushing.py", "The hub refuses: "): "needs the hub: see tests/test_push.py",
    ("pushing.py", "The repository has"): "needs the hub: see tests/test_push.py",
    ("pushing.py", "Only what neoconvert wrote is pushed"): "needs the hub: see tests/test_push.py",
    ("onnx/session.py", "onnxruntime cannot use the GPU here"): "needs onnxruntime-gpu",
    (
        "exporting.py",
        "The converted files do not reproduce",
    ): "a fault of neoconvert, to be reported",
    ("verification/function.py", "_open"): "a fault of neoconvert, with another's words",
    ("verification/remote.py", "_ask"): "the words of another refusal",
    (
        "verification/libraries.py",
        " tensor(s): ",
    ): "with the versions tested here, what opens also loads",
    (
        "streaming.py",
        " throughout, and layout ",
    ): "no command gets there: the route is chosen so that nothing is lost",
}
"""Refusals whose advice is not followed here, each with the reason."""


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
    known = [*((row.file, row.says) for row in ROWS), *NOT_FOLLOWED]
    covered = {site for file, says in known for site in sites.of(file, says)}
    missing = [str(site) for site in sites.sites() if site not in covered]
    assert not missing, "\n".join([f"{len(missing)} without a row in tests/advice:", *missing])


def test_every_row_is_of_a_refusal() -> None:
    known = [*((row.file, row.says) for row in ROWS), *NOT_FOLLOWED]
    assert not [pair for pair in known if not sites.of(*pair)]
