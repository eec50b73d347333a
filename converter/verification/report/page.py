"""The document, arranged for the page; the page, written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from converter import html
from converter.verification.evidence import QUESTIONS
from converter.verification.report import origin, plots


@dataclass(frozen=True)
class Panel:
    """One of several plots of a kind, of which the page shows one at a time."""

    name: str
    where: str
    """The runtime, or other words that tell panels of one name apart."""
    passed: bool
    chosen: bool
    """Shown first."""
    curves: plots.Curves
    units: list[dict[str, Any]]
    """The numbers of the plot where they are few enough for a table; or none."""


@dataclass(frozen=True)
class Chained:
    """One link, with what is known of it for each subject."""

    name: str
    question: str
    state: str
    """ "differs" if it does anywhere, "open" if it is compared nowhere, else "same"."""
    items: list[dict[str, Any]]


@dataclass(frozen=True)
class Ratios:
    """The probes' ratios on one scale."""

    scale: plots.Scale
    noise: float
    """Where the noise itself is, ratio 1."""
    limit: float
    ticks: list[plots.Tick]


def write_report(
    document: dict[str, Any],
    path: Path,
    *,
    title: str = "Verification",
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write the report of a verification; `path` holds the old report or the whole new one.

    Args:
        document: `Verification.to_json()`, or the whole document of `neoconvert verify --json`.
        title: for the head of the page: what was done.
        provenance: the artifact's `neoconvert.json`, if it has one.

    Raises:
        OutputExists: there is a file at `path` that is no report of ours, or was changed since.
    """
    html.write(path, render(document, title=title, provenance=provenance))


def render(
    document: dict[str, Any],
    *,
    title: str = "Verification",
    provenance: dict[str, Any] | None = None,
) -> str:
    """The report as HTML: one file that loads nothing. Same document, same bytes."""
    filters: html.Filters = {
        "brief": plots.brief,
        "times": times,
        "allowed": allowed,
        "share": share,
        "plain": plain,
        "json": _json,
    }
    return html.render(
        __package__,
        "page.html",
        "page.js",
        filters=filters,
        tone=_tone(document),
        doc=document,
        title=title,
        groups=_groups(document),
        worst=max(document["probes"], key=_badness, default=None),
        chain=_chain(document),
        ratios=_ratios(document),
        positions=_positions(document),
        layers=_layers(document),
        origin=origin.read(provenance),
    )


def _tone(document: dict[str, Any]) -> str:
    """Of the verdict: "open" where nothing failed, and something that must be compared could not be."""
    if document["passed"]:
        return "pass"
    evidence = document.get("evidence") or []
    uncompared = [e for e in evidence if e.get("required") and e["outcome"] == "not comparable"]
    return "open" if uncompared and len(uncompared) == len(document["problems"]) else "fail"


def _chain(document: dict[str, Any]) -> list[Chained]:
    chain = []
    for name, question in QUESTIONS.items():
        items = [item for item in document.get("evidence") or [] if item["link"] == name]
        outcomes = {item["outcome"] for item in items}
        state = "differs" if "differs" in outcomes else "same" if "same" in outcomes else "open"
        if items:
            chain.append(Chained(name, question, state, items))
    return chain


def _groups(document: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The probes by the software that ran the artifact."""
    found = groupby(document["probes"], key=lambda probe: str(probe["runtime"]))
    return [(runtime, list(probes)) for runtime, probes in found]


def _badness(probe: dict[str, Any]) -> tuple[bool, float]:
    ratio = probe["ratio"]
    return not probe["passed"], float("inf") if ratio is None else ratio


def _ratios(document: dict[str, Any]) -> Ratios:
    limit = document["max_ratio"]
    # Two decades on either side of 1 at least: honest ratios look alike in every report.
    scale = plots.Scale.over([0.1, 100, limit, *(p["ratio"] for p in document["probes"])])
    return Ratios(scale, scale(1), scale(limit), scale.ticks(5))


def _positions(document: dict[str, Any]) -> list[Panel]:
    several = len(_groups(document)) > 1
    shown = [p for p in document["probes"] if (p.get("by_position") or {}).get("start")]
    # The longest tells most; of a failed verification, the longest that failed.
    first = max(
        shown, key=lambda p: (not p["passed"], len(p["by_position"]["start"])), default=None
    )
    return [
        Panel(
            p["name"], p["runtime"] if several else "", p["passed"], p is first,
            plots.by_position(p["by_position"]), [],
        )
        for p in shown
    ]  # fmt: skip


def _layers(document: dict[str, Any]) -> list[Panel]:
    entries = [entry for entry in document.get("layers") or [] if entry["units"]]
    return [
        Panel(
            entry["probe"], entry["runtime"], document["passed"], index == 0,
            plots.by_layer(entry["units"]), entry["units"],
        )
        for index, entry in enumerate(entries)
    ]  # fmt: skip


def times(ratio: plots.Number) -> str:
    """A ratio, which may be anything from nothing to millions."""
    if ratio is None:
        return "not finite"
    if ratio < 100:
        return f"{ratio:.2f}"
    return f"{float(f'{ratio:.2g}'):,.0f}" if ratio < 1e8 else f"{ratio:.1e}"


def allowed(ratio: float) -> str:
    """What was measured, in units of what is allowed."""
    part = share(ratio) + " of" if ratio <= 1 else times(ratio) + " times"
    return f"{part} what is allowed"


def share(value: plots.Number) -> str:
    """A share in per cent, which says 100 % only of all."""
    if value is None:
        return "not finite"
    text = f"{100 * value:.2f}".rstrip("0").rstrip(".")
    return ">99.99 %" if text == "100" and value < 1 else f"{text} %"


def plain(value: plots.Number) -> str:
    """A number of ordinary size."""
    return "not finite" if value is None else f"{value:.6g}"


def _json(stops: list[plots.Stop]) -> str:
    return json.dumps([[s.at, s.error, s.floor, s.label] for s in stops], ensure_ascii=False)
