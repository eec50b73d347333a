"""docs/report.png and docs/edit.png: the upper parts of real pages, as a browser shows them."""

from __future__ import annotations

import base64
import os
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.numpy import load_file, save_file

import converter
from converter.demo import MODEL
from converter.explaining.page import write_page
from converter.verification.report import write_report
from tests import browser

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH = 1300
BOTTOM = """
(() => {
  const last = document.getElementById("%s").closest("section");
  return last.getBoundingClientRect().bottom + scrollY;
})()
"""
"""Down to the end of the section with this heading."""


def report(directory: Path) -> Path:
    """Of the demo model, with TransformerLens's default processing, in HookedTransformer."""
    os.chdir(directory)  # a report says the names that it was given
    shutil.copytree(MODEL, "python-neo")
    converter.hf_to_tl("python-neo", "python-neo-tl", process="default", check=False)
    found = converter.verify("python-neo", "python-neo-tl", layers=True)
    path = directory / "report.html"
    write_report(found.to_json(), path, title="neoconvert verify")
    return path


def edit(directory: Path) -> Path:
    """What an edit changed: head 2 of block 1 ablated in TransformerLens's processed weights."""
    os.chdir(directory)
    converter.hf_to_tl("python-neo", "edited-tl", layout="bridge", process="default", check=False)
    file = directory / "edited-tl/model.safetensors"
    tensors = load_file(file)
    tensors["blocks.1.attn.o.weight"][:, 64:96] = 0
    save_file(tensors, file)
    path = directory / "edit.html"
    write_page(converter.explain("python-neo", "edited-tl"), path)
    return path


def main() -> None:
    found, why = browser.find()
    if found is None:
        sys.exit(why)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as profile:
        pages = [
            ("report.png", report(Path(scratch)), "ratios"),
            ("edit.png", edit(Path(scratch)), "heads"),
        ]
        with browser.page(found, Path(profile)) as tab:
            for name, page, last in pages:
                tab.open(page, width=WIDTH)
                height = tab.run(BOTTOM % last)
                area = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 0.7}
                answer = tab.call("Page.captureScreenshot", captureBeyondViewport=True, clip=area)
                (DOCS / name).write_bytes(base64.b64decode(answer["data"]))
                print(f"{DOCS / name}: {(DOCS / name).stat().st_size:,} bytes")
        os.chdir(DOCS)


if __name__ == "__main__":
    main()
