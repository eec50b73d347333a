"""The answer in plain language. Numbers come in; nothing is decided here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from converter.dtypes import NAMES
from converter.layout import LAYOUTS
from converter.processing.steps import BY_NAME
from converter.wording import runs, size_of_change

if TYPE_CHECKING:
    from converter.explaining.explanation import Explanation, TensorFact

_NOTHING = "no step separates them"

_SHIFT = "all logits shift alike, and log-probabilities stay as they are"


def line(fact: TensorFact) -> str:
    """One tensor in a sentence."""
    if fact.same:
        return f"{fact.named}: the same numbers"
    start = f"{fact.named} differs by up to {_size(fact.difference)}"
    if fact.difference == 0:  # an equal tensor that should not be equal
        start = f"{fact.named} is as it was"
    causes = [f"{step} undone" if step in fact.undone else step for step in fact.steps]
    free = [name for name, step in BY_NAME.items() if any(part.products for part in step.parts)]
    if fact.product and fact.explained and not set(free) & set(fact.steps):
        causes.append(f"signs and order that {_and(free)} leaves free")
    causes += ["biases carried by its LayerNorm"] if fact.carried else []
    causes += ["a cast"] if fact.cast else []
    if fact.explained:
        if not causes:
            return f"{start}: rounding only"
        return f"{start}: {', '.join(causes)}; nothing else, {_left(fact)}"
    if fact.shift:
        return f"{start}: one number more for every token, by no step; {_SHIFT}"
    if fact.missing:
        return f"{start}: {_and(fact.missing)} {_is(fact.missing)} missing here; {_function(fact)}"
    if fact.extra:
        return f"{start}: {_and(fact.extra)}, here and not elsewhere; {_function(fact)}"
    named = f"{', '.join(causes)}, and " if causes else ""
    if fact.resembles:
        return f"{start}: {named}it holds what belongs in {fact.resembles}, {_left(fact)}"
    if fact.place:
        at = f"{fact.place} ({', '.join(fact.where)})"
        return f"{start}: {named}something else at {at}, {_left(fact)}{_kept(fact)}"
    return f"{start}: {named}something else all over it, {_left(fact)}{_kept(fact)}"


def _left(fact: TensorFact) -> str:
    if fact.product:
        return f"{fact.product} {'left with' if not fact.explained else 'agree to'} {fact.residual:.0e} of its norm"
    rest = "" if fact.explained else f" ({size_of_change(fact.relative)} of the tensor's size)"
    return f"residual {_size(fact.residual)}{rest}"


def _function(fact: TensorFact) -> str:
    return "the function is the same" if fact.keeps_function else "the function is not the same"


def _kept(fact: TensorFact) -> str:
    return (
        "; no step of TransformerLens does this, and it is no change of function: other tensors make up for it"
        if fact.keeps_function
        else ""
    )


def _size(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def collapsed(facts: Sequence[TensorFact]) -> list[TensorFact]:
    """Tensors that differ, blocks that are alike in one: `blocks.{0-11}.attn.W_Q`."""
    groups: dict[object, list[TensorFact]] = {}
    for fact in facts:
        if fact.same:
            continue
        template = fact.name
        if fact.layer is not None:
            template = fact.name.replace(f".{fact.layer}.", ".{}.", 1)
        alike = (template, fact.steps, fact.explained, fact.keeps_function, fact.product, fact.where,
                 fact.missing, fact.extra, fact.shift, fact.resembles, fact.cast)  # fmt: skip
        groups.setdefault(alike, []).append(fact)
    result = []
    for (template, *_), group in groups.items():  # type: ignore[misc]
        layers = runs([fact.layer for fact in group if fact.layer is not None])
        result.append(
            replace(
                group[0],
                name=template.replace("{}", layers if layers.isdigit() else f"{{{layers}}}"),
                difference=max(fact.difference for fact in group),
                residual=max(fact.residual for fact in group),
                relative=max(fact.relative for fact in group),
            )
        )
    return result


def headline(found: Explanation) -> list[str]:
    """The answer to "why do these weights differ?", sentence by sentence."""
    said = [_verdict(found)]
    said += [f"{step}: {BY_NAME[step].sentence}." for step in found.steps]
    if found.carried:
        said.append(
            f"The {found.carried} checkpoint keeps its folded biases in ln_1 and ln_f (gain 1, bias constant),"
            " since Hugging Face's GPT-Neo has no bias on q, k, v and lm_head."
        )
    if found.cast and not found.cast.exact:
        said.append(_cast(found))
    if found.coarse:
        said.append("The steps were computed in the storage dtype, or one side is a rounded copy:"
                    " edits within a few of its roundings would not show.")  # fmt: skip
    if found.steps or found.layouts != ("hf", "hf"):  # else nobody asked
        said += [f"{step} has no trace here: {why}." for step, why in found.silence.items()]
    said += _where(found)
    if found.verdict != "different-model" and "hf" in found.layouts and found.steps:
        said.append(
            "HookedTransformer.from_pretrained_no_processing, or neoconvert --process none,"
            " keeps Hugging Face's own numbers."
        )
    before, after = (LAYOUTS[layout].title for layout in found.layouts)
    if before != after and not all(fact.same for fact in found.tensors):
        said.append(f"Tensors are named as in {after}.")
    return said


def _verdict(found: Explanation) -> str:
    n, odd = len(found.tensors), len(found.unexplained)
    differ = "differs" if odd == 1 else "differ"
    layouts = _and(list(dict.fromkeys(LAYOUTS[layout].title for layout in found.layouts)))
    if found.verdict == "same-weights":
        wide = (
            f" ({NAMES[found.cast.before]} stored as {NAMES[found.cast.after]}, which changes no value)"
            if found.cast
            else ""
        )
        return f"Same weights: all {n} tensors hold the same numbers{wide}; only names and shapes may differ ({layouts})."
    separated = _separated(found)
    if found.verdict == "same-function":
        if odd == 0:
            return f"Same function, other weights: {separated}, and nothing else. With that accounted for, all {n} tensors agree to {_size(found.residual)}."
        return f"Same function, other weights: {separated}; {odd} of {n} tensors {differ} in a further way that leaves the function as it is."
    if found.reasons and not n:
        return f"Different models: {_and(found.reasons)}."
    why = f" ({_and(found.reasons)})" if found.reasons else ""
    if not odd:
        return f"Different models{why}: {separated}; the weights agree otherwise."
    whole = [t for t in found.tensors if not t.explained and not t.where]
    if odd > n / 2 and len(whole) > n / 4:
        typical = sorted(t.relative for t in whole)[len(whole) // 2]
        kin = (
            f"another checkpoint of the same family, say a fine-tuned one (weights are {typical:.1%} apart)"
            if typical < 0.5
            else "an unrelated checkpoint"
        )
        return f"Different models{why}: {odd} of {n} tensors {differ} by more than any step explains; the second looks like {kin}. What the weights still tell: {separated}."
    if separated == _NOTHING:
        return f"Different models{why}: {odd} of {n} tensors {differ}, and no step explains that; the others hold the same numbers."
    return (
        f"Different models{why}: {separated}, but {odd} of {n} tensors {differ} by more than that."
    )


def _separated(found: Explanation) -> str:
    applied = [step for step in found.steps if step not in found.undone]
    parts = []
    if applied:
        parts.append(
            f"TransformerLens's {_and(applied)} {'was' if len(applied) == 1 else 'were'} applied"
        )
    if found.undone:
        parts.append(
            f"{_and(found.undone)} of the original {'is' if len(found.undone) == 1 else 'are'} undone"
        )
    if found.carried and not parts:
        parts.append("biases are carried by the LayerNorms")
    if found.cast and not found.cast.exact:
        parts.append(f"values were rounded to {NAMES[found.cast.after]}")
    rounded = any(fact.explained and not fact.same for fact in found.tensors)
    return _and(parts) if parts else f"{_NOTHING} but rounding" if rounded else _NOTHING


def _cast(found: Explanation) -> str:
    cast = found.cast
    assert cast is not None
    stored = "" if cast.stored == cast.after else f", though the file says {NAMES[cast.stored]}"
    return (
        f"The converted values are {NAMES[cast.after]}, the original's {NAMES[cast.before]}{stored}:"
        " the function is the same but for that rounding."
    )


def _where(found: Explanation) -> list[str]:
    said = []
    for step, who in found.partial.items():
        if "missing" in who:
            said.append(f"{step} is not complete: {_few(who['missing'])} went without it.")
        if "extra" in who:
            said.append(f"{step} shows in {_few(who['extra'])} only.")
    said += [
        f"{t.named} has one number more for every token, and no step accounts for it: {_SHIFT}."
        for t in found.tensors
        if t.shift
    ]
    rest = [t for t in found.tensors if not (t.explained or t.missing or t.extra or t.shift)]
    if 0 < len(rest) <= 6:
        where = [f"{t.named} at {t.place}" if t.place else t.named for t in rest]
        said.append(f"What no step explains: {'; '.join(where)}.")
    return said


def _few(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (_and(names[:most]) if not more else ", ".join(names[:most])) + more
