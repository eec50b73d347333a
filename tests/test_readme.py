"""README's code runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from converter.convert import export_onnx, hf_to_tl, tl_to_hf
from converter.demo import MODEL
from converter.verification.loading import has_hooked_transformer

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_code_block(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "hooked, in TransformerLens 2 or 3" in block and not has_hooked_transformer():
        pytest.skip("HookedTransformer was removed in TransformerLens 4")
    hf_to_tl(MODEL, tmp_path / "neo-tl", check=False)
    hf_to_tl(MODEL, tmp_path / "neo-bridge", layout="bridge", check=False)
    tl_to_hf(tmp_path / "neo-tl", tmp_path / "neo-hf", check=False)
    export_onnx(tmp_path / "neo-hf", check=False)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec("import onnxruntime", names)
    exec("from transformer_lens.model_bridge import TransformerBridge", names)
    exec(block, names)
    if "unexplained" in block:
        assert capsys.readouterr().out == "('transformer.h.1.attn.attention.out_proj.weight',)\n"
    assert {"model", "bridge", "session", "result"} & set(names)


def test_there_are_blocks_for_every_layout() -> None:
    assert len(BLOCKS) >= 3


def test_commands_of_the_table_exist() -> None:
    from converter.cli import main

    named = set(re.findall(r"^\| `neoconvert ([\w-]+)", README, re.MULTILINE))
    assert named == set(main.commands)
