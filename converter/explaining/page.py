"""What `explain` found, as a page: a map of the model, the heads that changed, each tensor in a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from markupsafe import Markup

from converter import html
from converter.explaining.explanation import Explanation, TensorFact
from converter.explaining.wording import line
from converter.output import inert
from converter.wording import size_of_change

Shade = Literal["same", "steps", "free", "changed", "none"]
"""The same numbers; accounted for by steps; changed, but not the function; changed; no such tensor."""
_FAINTEST = 1e-6
"""Beside a tensor's own size: what is smaller is shown as this."""


@dataclass(frozen=True)
class Cell:
    """A tensor on the map."""

    state: Shade
    strength: float
    """How much of the tensor changed, from 0 to 1, on a logarithmic scale."""
    says: str


@dataclass(frozen=True)
class Grid:
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def write_page(found: Explanation, path: Path) -> None:
    """Write the page; `path` holds the old one or the whole new one.

    Raises:
        OutputExists: there is a file at `path` that is no page of ours, or was changed since.
    """
    html.write(path, render(found))


def render(found: Explanation) -> str:
    """The page as HTML: one file that loads nothing. Same findings, same bytes."""
    differing = [fact for fact in found.tensors if not fact.same]
    return html.render(
        __package__,
        "page.html",
        filters={"change": size_of_change, "parts": _parts},
        tone="fail" if found.verdict == "different-model" else "pass",
        found=found,
        grid=_grid(found),
        heads=_heads(found),
        odd=[fact for fact in differing if not fact.explained],
        rest=[fact for fact in differing if fact.explained],
        lines={fact.key: line(fact) for fact in differing},
    )


def _parts(name: str) -> Markup:
    """A tensor's name, which may be broken after its dots."""
    return Markup(".<wbr>").join(inert(name).split("."))


def _grid(found: Explanation) -> Grid:
    """Rows are the model's units from its input to its output, columns the tensors of a unit."""
    units: dict[str, dict[str, TensorFact]] = {}
    for fact in found.tensors:
        unit, column = _place(fact)
        units.setdefault(unit, {})[column] = fact
    columns = tuple(dict.fromkeys(column for tensors in units.values() for column in tensors))
    rows = tuple(
        (unit, tuple(_cell(tensors.get(column)) for column in columns))
        for unit, tensors in units.items()
    )
    return Grid(columns, rows)


def _place(fact: TensorFact) -> tuple[str, str]:
    """The unit, and the tensor's name without the block's."""
    if fact.layer is not None:
        return f"block {fact.layer}", fact.name.partition(f".{fact.layer}.")[2]
    unit = "output" if fact.key.startswith(("ln_final", "unembed")) else "input"
    return unit, fact.name


def _cell(fact: TensorFact | None) -> Cell:
    if fact is None:
        return Cell("none", 0, "")
    if fact.same:
        return Cell("same", 0, line(fact))
    says = line(fact)
    if fact.explained:
        return Cell("steps", 1, says)
    return Cell("free" if fact.keeps_function else "changed", _strength(fact.relative), says)


def _strength(share: float) -> float:
    if not math.isfinite(share):
        return 1
    span = math.log(max(_FAINTEST, min(1, share)) / _FAINTEST) / math.log(1 / _FAINTEST)
    return round(0.25 + 0.75 * span, 3)


def _heads(found: Explanation) -> list[tuple[TensorFact, list[float]]]:
    """Attention's tensors of which some heads changed more than others: the share of each."""
    changed = [f for f in found.tensors if f.by_head and not f.explained]
    return [(fact, [round(share, 4) for share in fact.by_head]) for fact in changed]
