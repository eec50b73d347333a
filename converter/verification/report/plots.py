"""Numbers to places on a plot: percentages of its width and height, the origin at the top left.

Percentages let a plot stretch with the page while its letters keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Number = float | None
"""None: not finite, which JSON cannot say."""


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str
    minor: bool = False
    """May go where there is little room."""


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis over whole decades."""

    low: int
    high: int
    zero: bool = False
    """The lowest decade stands for zero, which has no logarithm."""

    @classmethod
    def over(cls, values: Iterable[Number]) -> Scale:
        known = [value for value in values if value is not None]
        logs = [math.log10(value) for value in known if value > 0] or [0.0]
        low = math.floor(min(logs))
        zero = any(value <= 0 for value in known)
        return cls(low - zero, max(math.ceil(max(logs)), low + 1), zero)

    def __call__(self, value: float) -> float:
        """How far along the axis, 0 to 100."""
        log = math.log10(value) if value > 0 else self.low
        return min(max(100 * (log - self.low) / (self.high - self.low), 0.0), 100.0)

    def ticks(self, most: int = 7) -> list[Tick]:
        step = math.ceil((self.high - self.low) / (most - 1))
        decades = range(self.low + self.zero, self.high + 1)
        named = [Tick(self(10.0**n), power(n)) for n in decades if n % step == 0]
        return [Tick(0.0, "0"), *named] if self.zero else named


def power(exponent: int) -> str:
    """Of ten."""
    return f"10{str(exponent).translate(SUPERSCRIPTS)}" if exponent else "1"


@dataclass(frozen=True)
class Stop:
    """A place at which a plot can be read: of its two values, their heights and their names."""

    at: float
    error: Number
    floor: Number
    label: str


@dataclass(frozen=True)
class Curves:
    """Error against float32's own noise, along positions or along layers."""

    error: str
    """Path data, as the next two: in percent, y downward."""
    floor: str
    ground: str
    """The area below the floor."""
    stops: list[Stop]
    x: list[Tick]
    y: list[Tick]
    holes: list[float]
    """Where the error is not finite."""
    says: str
    """The plot in words."""


def by_position(data: dict[str, Any]) -> Curves:
    """The `by_position` of a probe, its bins at their true places."""
    start: list[int] = data["start"]
    first, last = start[0], start[-1]
    at = [50.0 if first == last else 100 * (s - first) / (last - first) for s in start]
    names = [
        f"position {a}" if b == a + 1 else f"positions {a}–{b - 1}" for a, b in pairwise(start)
    ]
    single = last - first == len(start) - 1
    names.append(f"position {last}" if single else f"positions from {last}")
    step = 1
    while (last - first) / step > 6:
        step *= 2
    ticks = [
        Tick(100 * (s - first) / (last - first) if last > first else 50.0, str(s), bool(i % 2))
        for i, s in enumerate(range(first, last + 1, step))
    ]
    return _curves(at, names, ticks, data["error"], data["floor"])


def by_layer(units: Sequence[dict[str, Any]]) -> Curves:
    """The residual stream unit by unit, evenly spaced."""
    names = [str(unit["unit"]) for unit in units]
    at = [100 * (i + 0.5) / len(units) for i in range(len(units))]
    every = math.ceil(len(units) / 12)
    ticks = [
        Tick(x, name.removeprefix("block "), minor=bool(i % (2 * every)) and len(units) > 8)
        for i, (x, name) in enumerate(zip(at, names, strict=True))
        if i % every == 0
    ]
    return _curves(
        at, names, ticks, [unit["error"] for unit in units], [unit["floor"] for unit in units]
    )


def _curves(
    at: list[float],
    names: list[str],
    ticks: list[Tick],
    error: Sequence[Number],
    floor: Sequence[Number],
) -> Curves:
    scale = Scale.over([*error, *floor])
    errors = [None if value is None else 100 - scale(value) for value in error]
    floors = [None if value is None else 100 - scale(value) for value in floor]
    stops = [
        Stop(round(x, 2), e, f, f"{name}: error {brief(a)}, noise floor {brief(b)}")
        for x, e, f, name, a, b in zip(at, errors, floors, names, error, floor, strict=True)
    ]
    y = [Tick(100 - tick.at, tick.label) for tick in scale.ticks()]
    holes = [x for x, value in zip(at, error, strict=True) if value is None]
    says = f"{_peak('The largest error is', error, names)} {_peak('Float32’s own noise is at most', floor, names)}"
    return Curves(
        _line(at, errors), _line(at, floors), _area(at, floors), stops, ticks, y, holes, says
    )


def _peak(words: str, values: Sequence[Number], names: Sequence[str]) -> str:
    known = [(value, name) for value, name in zip(values, names, strict=True) if value is not None]
    missing = len(values) - len(known)
    gap = f" It is not finite at {missing} of {len(values)} places." if missing else ""
    if not known:
        return gap.strip()
    value, name = max(known, key=lambda pair: pair[0])
    return f"{words} {brief(value)}, at {name}.{gap}"


def _runs(at: Sequence[float], heights: Sequence[Number]) -> list[list[tuple[float, float]]]:
    """The stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(at, heights, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def _line(at: Sequence[float], heights: Sequence[Number]) -> str:
    """A point alone becomes a line of no length, which round caps make a dot."""
    runs = [[*run, run[0]] if len(run) == 1 else run for run in _runs(at, heights)]
    return "".join("M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in run) for run in runs)


def _area(at: Sequence[float], heights: Sequence[Number]) -> str:
    return "".join(
        f"M{run[0][0]:.2f} 100L"
        + "L".join(f"{x:.2f} {y:.2f}" for x, y in run)
        + f"L{run[-1][0]:.2f} 100Z"
        for run in _runs(at, heights)
    )


def brief(value: Number) -> str:
    """Three digits, as the terminal prints them."""
    return "not finite" if value is None else f"{value:.2e}"
