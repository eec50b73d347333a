"""A verification as one HTML file, to read, to print and to send.

It shows the document of `neoconvert verify --json` and decides nothing: verdicts, ratios and
errors are the document's own. `page.html` holds all markup, `plots` all coordinates.
"""

from __future__ import annotations

from converter.verification.report.page import render, write_report

__all__ = ["render", "write_report"]
