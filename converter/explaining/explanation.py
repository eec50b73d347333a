"""What `explain` found: data, its JSON, and (in `wording`) its plain language."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from converter.dtypes import NAMES
from converter.explaining.wording import collapsed, headline, line
from converter.layout import ALSO_HEAD, Layout, is_tied_head

Verdict = Literal["same-weights", "same-function", "different-model"]


@dataclass(frozen=True)
class Cast:
    """Between which dtypes values were rounded or widened (safetensors codes)."""

    before: str
    after: str
    stored: str
    """What the converted file says; wider than `after` where the values came through a cast."""
    exact: bool
    """Widening: no value changed."""

    def to_json(self) -> dict[str, Any]:
        return {
            "from": NAMES[self.before],
            "to": NAMES[self.after],
            "stored": NAMES[self.stored],
            "exact": self.exact,
        }


@dataclass(frozen=True)
class TensorFact:
    """One tensor: how it differs, what accounts for that, what is left."""

    key: str
    """Its `hooked` name."""
    name: str
    """Its name in the converted checkpoint, or in the original where that has no place for it; see
    `Checkpoint.tensor_name`."""
    layer: int | None
    difference: float
    """The largest difference of the stored values."""
    residual: float
    """The largest difference left after the steps; where `product` is set, of that product and
    relative to its norm."""
    relative: float
    """What is left beside the tensor's own size (root mean square)."""
    steps: tuple[str, ...]
    """Steps that changed this tensor, in either direction."""
    undone: tuple[str, ...]
    """Those of them that the original has and the converted one has not."""
    explained: bool
    """The steps that separate the checkpoints account for all of the difference."""
    keeps_function: bool
    product: str | None = None
    where: tuple[str, ...] = ()
    """Where the unexplained rest is, as indices into the converted tensor; empty: all over."""
    place: str | None = None
    """The same in the model's terms: "neuron 17"."""
    by_head: tuple[float, ...] = ()
    """Of an unexplained tensor of attention: each head's share of what is left."""
    missing: tuple[str, ...] = ()
    """Steps that separate the checkpoints, but not this tensor."""
    extra: tuple[str, ...] = ()
    """Steps that were carried out on this tensor, but not on most others."""
    shift: bool = False
    """It has one number more for every token, by no step: all logits shift alike."""
    resembles: str | None = None
    """The tensor whose place this one has taken, it seems."""
    cast: bool = False
    carried: bool = False
    """Its LayerNorm carries biases."""

    @property
    def named(self) -> str:
        """Its name, for people."""
        return self.name + (ALSO_HEAD if is_tied_head(self.name, self.key) else "")

    @property
    def same(self) -> bool:
        return self.difference == 0 and self.explained

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "key": self.key,
            "difference": _number(self.difference),
            "residual": _number(self.residual),
            "residual_of": self.product or "weight",
            "relative_residual": _number(self.relative),
            "steps": list(self.steps),
            "undone": list(self.undone),
            "explained": self.explained,
            "keeps_function": self.keeps_function,
            "where": list(self.where),
            "place": self.place,
            "by_head": [float(f"{share:.4g}") for share in self.by_head],
            "missing_steps": list(self.missing),
            "extra_steps": list(self.extra),
            "resembles": self.resembles,
            "line": line(self),
        }


@dataclass(frozen=True)
class Explanation:
    """Why the weights of two checkpoints differ."""

    original: str
    converted: str
    layouts: tuple[Layout, Layout]
    verdict: Verdict
    steps: tuple[str, ...]
    """TransformerLens's steps that separate the two, in its order, whichever has them."""
    undone: tuple[str, ...]
    """Those of `steps` that the original has and the converted one has not."""
    silence: dict[str, str]
    """Steps of which the weights cannot tell, and why: mostly, they had nothing to do."""
    carried: str | None
    """Which side keeps folded biases in its LayerNorms: "original", "converted" or None."""
    cast: Cast | None
    coarse: bool
    """The steps were computed in the storage dtype, or the original is a rounded copy."""
    reasons: tuple[str, ...]
    """Beyond the weights: configs that are not one model's."""
    tensors: tuple[TensorFact, ...]

    def __repr__(self) -> str:
        steps = f": {', '.join(self.steps)}" if self.steps else ""
        odd = len(self.unexplained)
        left = f", {odd} tensor{'s' * (odd > 1)} unexplained" if odd else ""
        return f"<Explanation {self.original} → {self.converted}: {self.verdict}{steps}{left}>"

    @property
    def unexplained(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.tensors if not t.explained)

    @property
    def partial(self) -> dict[str, dict[str, list[str]]]:
        """Steps that some tensors went through and some did not: who does not fit the rest."""
        result: dict[str, dict[str, list[str]]] = {}
        for t in self.tensors:
            for kind, steps in (("missing", t.missing), ("extra", t.extra)):
                for step in steps:
                    result.setdefault(step, {}).setdefault(kind, []).append(t.name)
        return result

    @property
    def residual(self) -> float:
        """The largest difference left in an explained tensor."""
        return max((t.residual for t in self.tensors if t.explained and not t.product), default=0.0)

    def headline(self) -> list[str]:
        """The answer, in a few sentences."""
        return headline(self)

    def lines(self) -> list[str]:
        """A line for each tensor that differs; blocks that are alike share one."""
        return [line(fact) for fact in collapsed(self.tensors)]

    def to_json(self) -> dict[str, Any]:
        """The keys that DESIGN's JSON contract names, and more."""
        return {
            "verdict": self.verdict,
            "steps": list(self.steps),
            "unexplained": list(self.unexplained),
            "undone": list(self.undone),
            "no_trace": dict(self.silence),
            "partial": self.partial,
            "carried": self.carried,
            "cast": self.cast.to_json() if self.cast else None,
            "computed_in_storage_dtype": self.coarse,
            "reasons": list(self.reasons),
            "headline": " ".join(self.headline()),
            "tensors": [t.to_json() for t in self.tensors],
        }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
