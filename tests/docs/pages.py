"""README and the pages of docs/: what they show, and the models that they speak of."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import converter
from converter.demo import MODEL

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}


def blocks(text: str, language: str) -> list[str]:
    """What stands in a page's fences of this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def make_models(directory: Path) -> None:
    """The demo model, under the names that the pages give to a reader's models."""
    shutil.copytree(MODEL, directory / "python-neo")
    hooked = converter.hf_to_tl(MODEL, directory / "neo-tl", check=False)
    converter.hf_to_tl(MODEL, directory / "neo-bridge", layout="bridge", check=False)
    converter.tl_to_hf(hooked.output, directory / "neo-hf", check=False)
