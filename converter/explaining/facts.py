"""What is said of each tensor, once it is known by which steps most of them changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from converter.checkpoint import Checkpoint
from converter.explaining.explanation import Cast, TensorFact
from converter.explaining.place import Place, locate
from converter.explaining.ways import Found, Mark
from converter.layout import EMBEDDING, GPT_NEO, HEAD, Slot
from converter.processing import STEPS

ORDER = tuple(step.name for step in STEPS)
_CARRIER = {b: w for pairs in GPT_NEO.carriers("hf").values() for w, b in pairs}
"""For each bias that HF has no tensor for, the weight that carries it."""
_BIAS = "unembed.b_U"


@dataclass
class Searched:
    """One tensor before the vote."""

    key: str
    difference: float
    found: Found
    carried: bool


def facts_of(
    original: Checkpoint,
    converted: Checkpoint,
    tensors: list[Searched],
    decided: dict[str, Mark],
    cast: Cast | None,
) -> tuple[TensorFact, ...]:
    """In the order of the forward pass.

    Args:
        decided: what most tensors say about each step.
        cast: the one that most matrices went through.
    """
    facts: dict[str, TensorFact] = {}
    for tensor in tensors:
        fact = _fact(original, converted, tensor, decided, cast, tensors)
        key, stored = tensor.key, any(tensor.key in c.stored for c in (original, converted))
        carrier = _carrier(tensor, converted.slots[tensor.key])
        if stored or (carrier is None and not fact.explained):
            facts[key] = fact
        elif carrier is not None and not fact.explained:
            held = facts[carrier]
            keeps = fact.keeps_function and held.keeps_function
            source = fact if held.explained else held
            facts[carrier] = replace(
                source,
                key=carrier,
                name=held.name,
                difference=held.difference,
                keeps_function=keeps,
                shift=False,  # of the bias, not of what carries it
            )
    return tuple(facts[key] for key in converted.slots if key in facts)


def _carrier(tensor: Searched, slot: Slot) -> str | None:
    """The tensor that stands for one that no file stores: the tied embedding, or the weight that
    carries a bias."""
    if tensor.key == HEAD:
        return EMBEDDING
    if tensor.carried and slot.local in _CARRIER:
        return tensor.key.removesuffix(slot.local) + _CARRIER[slot.local]
    return None


def _fact(
    original: Checkpoint,
    converted: Checkpoint,
    tensor: Searched,
    decided: dict[str, Mark],
    cast: Cast | None,
    tensors: list[Searched],
) -> TensorFact:
    found, slot = tensor.found, converted.slots[tensor.key]
    separate = (Mark.APPLIED, Mark.UNDONE)
    steps, missing, extra = [], [], []
    for step in ORDER:
        mark = found.marks.get(step, Mark.SILENT)
        if mark in separate and mark is decided[step]:
            steps += [step] if tensor.difference else []
        elif mark in separate:
            extra.append(step)
        elif mark is Mark.ABSENT and decided[step] in separate:
            missing.append(step)
    agrees = found.match.agrees and not found.foreign
    # What changes no log-probability is a mean that came or went; without its step, just that.
    shift = tensor.key == _BIAS and found.keeps and not missing and not (agrees and not extra)
    extra = [] if shift else extra
    explained = agrees and not missing and not extra and not shift
    place = Place() if found.match.agrees else locate(found.match, converted, tensor.key)
    named = converted if slot.name else original
    narrowed = cast is not None and not cast.exact and tensor.difference > 0
    return TensorFact(
        key=tensor.key,
        name=named.tensor_name(tensor.key),
        layer=slot.layer,
        difference=tensor.difference,
        residual=found.match.residual,
        relative=found.match.relative,
        steps=tuple(steps),
        undone=tuple(step for step in steps if decided[step] is Mark.UNDONE),
        explained=explained,
        keeps_function=found.keeps or explained,
        product=found.match.product,
        where=place.where,
        place=place.words,
        by_head=place.by_head,
        missing=tuple(missing) if agrees else (),
        extra=tuple(extra) if agrees else (),
        shift=shift,
        resembles=None if agrees else _resembled(converted, tensor, tensors),
        cast=narrowed,
        carried=tensor.carried and tensor.difference > 0,
    )


def _resembled(converted: Checkpoint, tensor: Searched, tensors: list[Searched]) -> str | None:
    """The tensor whose place an altogether different one has taken."""
    match = tensor.found.match
    if match.samples is None or match.share < 0.5 or match.samples[0].size < 16:
        return None
    shape, held = converted.slots[tensor.key].hub_shape, match.samples[1]
    for other in tensors:
        samples = other.found.match.samples
        same_place = other.key == tensor.key or converted.slots[other.key].hub_shape != shape
        if samples is None or same_place or not held.any():
            continue
        if np.linalg.norm(samples[0] - held) < 0.02 * np.linalg.norm(held):
            return converted.tensor_name(other.key)
    return None
