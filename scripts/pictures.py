"""docs/report.png: the upper part of a real report, as a browser shows it."""

from __future__ import annotations

import base64
import os
import shutil
import sys
import tempfile
from pathlib import Path

import converter
from converter.demo import MODEL
from converter.verification.report import write_report
from tests import browser

OUT = Path(__file__).resolve().parent.parent / "docs/report.png"
WIDTH = 1300
HEIGHT = """
(() => {
  const last = document.getElementById("ratios").closest("section");
  return last.getBoundingClientRect().bottom + scrollY;
})()
"""
"""Down to the end of the section of the ratios."""


def report(directory: Path) -> Path:
    """Of the demo model, with TransformerLens's default processing, in HookedTransformer."""
    os.chdir(directory)  # a report says the names that it was given
    shutil.copytree(MODEL, "python-neo")
    converter.hf_to_tl("python-neo", "python-neo-tl", process="default", check=False)
    found = converter.verify("python-neo", "python-neo-tl", layers=True)
    path = directory / "report.html"
    write_report(found.to_json(), path, title="neoconvert verify")
    return path


def main() -> None:
    found, why = browser.find()
    if found is None:
        sys.exit(why)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as profile:
        page = report(Path(scratch))
        with browser.page(found, Path(profile)) as tab:
            tab.open(page, width=WIDTH)
            height = tab.run(HEIGHT)
            area = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 0.7}
            answer = tab.call("Page.captureScreenshot", captureBeyondViewport=True, clip=area)
        os.chdir(OUT.parent)
    OUT.write_bytes(base64.b64decode(answer["data"]))
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
