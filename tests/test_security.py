"""SECURITY.md names tests for what it promises: each is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text())))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_is_named_is_there(file: str, name: str) -> None:
    text = (ROOT / "tests" / file).read_text()
    assert f"def {name or 'test_'}" in text


def test_every_row_names_one() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    rows = [line for line in text.split("## Measured")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 12
    for row in rows:
        assert ".py" in row, row


def test_the_table_counts_what_there_is() -> None:
    from tests.hostile import inputs

    text = (ROOT / "SECURITY.md").read_text().replace(",", "")
    found = re.search(r"\| all \| (\d+) \|", text)
    assert found
    assert int(found[1]) == len(inputs())
