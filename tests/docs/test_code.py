"""The Python in README and docs/ runs as it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

import converter
from converter.verification.loading import has_hooked_transformer
from tests.docs.pages import TEXTS, blocks, make_models

BLOCKS = [
    pytest.param(block, id=f"{page}: {block.splitlines()[0]}")
    for page, text in TEXTS.items()
    for block in blocks(text, "python")
]


@pytest.mark.parametrize("block", BLOCKS)
def test_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "hooked, in TransformerLens 3" in block and not has_hooked_transformer():
        pytest.skip("HookedTransformer was removed in TransformerLens 4")
    make_models(tmp_path)
    converter.export_onnx(tmp_path / "neo-hf", check=False)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block, names)
    printed = "".join(line[2:] for line in block.splitlines(keepends=True) if line[:3] == "# (")
    assert printed or "print(" not in block
    assert capsys.readouterr().out == printed
    assert {"model", "bridge", "session", "result"} & set(names)


def test_there_are_blocks_for_every_layout() -> None:
    assert len(BLOCKS) >= 10
