"""Choosing the route: from what the source is and what was asked for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from converter.checkpoint import Checkpoint
from converter.checkpoint.ledger_file import LedgerFile, open_ledger
from converter.checkpoint.provenance import describes
from converter.checkpoint.source import LEDGER
from converter.choices import Reverse
from converter.dtypes import same_bits, sha256
from converter.errors import CannotUndo, UsageError
from converter.layout import EMBEDDING, GPT_NEO, HEAD, LAYOUTS, Layout, Slot
from converter.piecewise import stored_as
from converter.processing import Carry, Rounding, State, Step, detect, in_order
from converter.processing.step import in_float64, is_vector
from converter.route import Functional, Processing, Route, Tensors, Undoing, groups


def recorded_steps(source: Checkpoint) -> tuple[str, ...]:
    """The steps that provenance says the source has gone through, in order; not those of other
    weights, and not those that most LayerNorms and biases deny."""
    recorded = (source.source.provenance or {}).get("steps", [])
    names = [str(name) for name in recorded] if isinstance(recorded, list) else []
    if not names or not describes(source):
        return ()
    denied = _denied(source)
    return tuple(step.name for step in in_order(names) if step.name not in denied)


def _denied(source: Checkpoint) -> set[str]:
    """Steps that by their vectors alone most units have not gone through."""
    denials: dict[str, list[bool]] = {}
    for slots in groups(source.slots, whole=True):
        unit = {s.local: source.tensor(s.key, "F64") for s in slots if is_vector(s.local)}
        coarsest = max((Rounding.of(source.code(s.key)) for s in slots), key=lambda r: r.relative)
        with np.errstate(invalid="ignore", over="ignore"):
            states = detect(unit, coarsest)
        if Carry().state(unit, coarsest) is State.APPLIED:
            states["fold_ln"] = State.APPLIED  # what was folded is carried by the LayerNorm
        for name, state in states.items():
            if state is not State.NOTHING_TO_DO:
                denials.setdefault(name, []).append(state is State.NOT_APPLIED)
    return {name for name, no in denials.items() if 2 * sum(no) > len(no)}


def plain(source: Checkpoint) -> Route:
    """Layout and dtype only."""
    scaled = ("its attention scale is absorbed into W_Q and b_Q",)
    return Route(
        source,
        folded=source.config.folded,
        tied=source.tied,
        steps=recorded_steps(source),
        remarks=scaled if source.config.score_divisors else (),
    )


def processing(source: Checkpoint, steps: Sequence[Step], layout: Layout) -> Route:
    """The route that applies `steps`; those that the weights have gone through already are left out.

    Whether they have is read off the weights, one unit at a time.
    """
    if not steps:
        return plain(source)
    done = already_applied(source, steps)
    wanted = tuple(step for step in steps if step.name not in done)
    remarks = tuple(f"{name} is applied already: not applied twice" for name in sorted(done))
    touched = {step.name for step in wanted}
    carry = (Carry(),) if GPT_NEO.carriers(layout) else ()
    return Processing(
        source,
        folded=LAYOUTS[layout].folds and (source.config.folded or "fold_ln" in touched | done),
        tied=source.tied and not any(step.touches({EMBEDDING, HEAD}) for step in wanted),
        steps=tuple(s.name for s in in_order({*touched, *done, *recorded_steps(source)})),
        remarks=remarks,
        pipeline=(*wanted, *carry),
    )


def already_applied(source: Checkpoint, steps: Sequence[Step]) -> set[str]:
    """Names of the steps that every unit they concern has gone through. Weights are read no further
    than it takes to know."""
    open_, applied = list(steps), set()
    for slots in groups(source.slots, whole=True):
        unit = _AsAsked(source, slots)
        codes = {source.code(slot.key) for slot in slots}
        coarsest = max((Rounding.of(code) for code in codes), key=lambda r: r.relative)
        for name, state in detect(unit, coarsest, open_).items():
            if state is State.NOT_APPLIED:
                open_ = [step for step in open_ if step.name != name]
            elif state is State.APPLIED:
                applied.add(name)
    return applied & {step.name for step in open_}


class _AsAsked(Mapping[str, Any]):
    """A unit whose tensors are read when they are asked for; the last one is kept."""

    def __init__(self, source: Checkpoint, slots: Sequence[Slot]) -> None:
        self._keys = {slot.local: slot.key for slot in slots}
        self._source = source
        self._last: tuple[str, Any] | None = None

    def __getitem__(self, name: str) -> Any:
        if self._last is None or self._last[0] != name:
            self._last = None  # released before the next is read
            stored = self._source.tensor(self._keys[name])
            self._last = name, in_float64({name: stored})[name]
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys


def reversing(source: Checkpoint, reverse: Reverse = "auto", *, recast: bool = False) -> Route:
    """The way from TL (or baked HF) back to plain HF.

    Raises:
        CannotUndo: `exact` was asked for and cannot be had; the message says why.
        UsageError: `exact` together with another dtype.
    """
    if reverse == "exact" and recast:
        raise UsageError(
            "--reverse exact returns the original bits, so it cannot change the dtype.",
            where="--dtype",
            do="Leave --dtype out, or use --reverse auto.",
        )
    place = source.source.ledger_directory
    ledger = open_ledger(place) if place and reverse != "functional" else None
    if ledger is not None:
        return _with_ledger(source, ledger, reverse)
    carried = biased_units(source)
    processed = bool(carried or source.config.folded or recorded_steps(source))
    if not processed:
        return plain(source)
    named_alone = place is None and _beside_ledger(source)
    if reverse == "exact" and named_alone:
        raise CannotUndo(
            "A weight file that is named itself comes without the ledger beside it.",
            where=str(source.source.path),
            do=f"Name its directory: {shlex.quote(str(source.source.directory))}",
        )
    if reverse == "exact":
        raise _cannot("there is no ledger.safetensors beside the weights", source)
    why = "no ledger is beside the weights"
    if reverse == "functional":
        why = "as asked for"
    elif named_alone:
        why = "a weight file that is named itself comes without the ledger beside it"
    return Functional(
        source,
        folded=False,
        tied=source.tied and "final" not in carried,
        reverse="functional",
        remarks=(f"functional: same function, processed basis ({why})", *plain(source).remarks),
    )


def has_ledger(source: Checkpoint) -> bool:
    place = source.source.ledger_directory
    return place is not None and (place / LEDGER).is_file()


def biased_units(source: Checkpoint) -> set[str]:
    """Units with non-zero biases that HF GPT-Neo has no tensor for."""
    names = GPT_NEO.without_place("hf")
    return {
        slot.prefix.rstrip(".")
        for slot in source.slots.values()
        if slot.local in names and slot.key in source.stored and source.tensor(slot.key).any()
    }


def _beside_ledger(source: Checkpoint) -> bool:
    return not source.source.live and (source.source.directory / LEDGER).is_file()


def _cannot(why: str, source: Checkpoint) -> CannotUndo:
    return CannotUndo(
        f"The original bits cannot be restored: {why}.",
        where=str(source.source.path),
        do="Use --reverse auto (original basis where a ledger is) or functional (same function).",
    )


def _with_ledger(source: Checkpoint, ledger: LedgerFile, reverse: Reverse) -> Route:
    ledger.require_fits(source.slots)
    edited = edited_tensors(source, ledger)
    if reverse == "exact" and ledger.kind != "exact":
        raise _cannot(f"the ledger is {ledger.kind}, made without --ledger exact", source)
    if reverse == "exact" and edited:
        names = ", ".join(source.tensor_name(key) for key in sorted(edited)[:4])
        raise _cannot(f"{len(edited)} tensor(s) were edited since processing: {names}", source)
    exact = ledger.kind == "exact" and not edited
    remarks = ["exact: every tensor has the original's SHA-256"] if exact else []
    if not exact:
        why = "the ledger is compact" if ledger.kind != "exact" else "weights were edited"
        remarks.append(f"functional: undone into the original basis, in float64 ({why})")
    if edited:
        names = ", ".join(source.tensor_name(key) for key in sorted(edited)[:6])
        more = f" and {len(edited) - 6} more" if len(edited) > 6 else ""
        remarks.append(f"edited since processing: {names}{more}")
    route = Undoing(
        source,
        folded=False,
        tied=False,
        reverse="exact" if exact else "functional",
        remarks=tuple(remarks),
        ledger=ledger,
        edited=edited,
    )
    if ledger.tied and _still_tied(route):
        return replace(route, tied=True)
    return route


def between(original: Checkpoint, artifact: Checkpoint) -> Route:
    """The route that the artifact's provenance says it took from the original.

    A claim, no more: the artifact must then be, bit for bit, what that route makes.
    """
    provenance = artifact.source.provenance or {}
    name = provenance.get("route")
    if name == Processing.name:
        return processing(original, in_order(recorded_steps(artifact)), artifact.layout)
    if name in (Functional.name, Undoing.name):
        return reversing(original, "functional" if name == Functional.name else "auto")
    return unprocessed(original, artifact)


def unprocessed(original: Checkpoint, artifact: Checkpoint) -> Route:
    """The route to an artifact that has the original's own weights."""
    return replace(plain(original), scale=artifact.config.score_divisors)


def edited_tensors(source: Checkpoint, ledger: LedgerFile) -> frozenset[str]:
    """`hooked` names of the tensors that are not those the ledger was made for, by SHA-256."""
    return frozenset(
        slot.key
        for slot in source.slots.values()
        if slot.key in source.stored
        and sha256(source.tensor(slot.key)) != ledger.processed_sha256[slot.prefix].get(slot.local)
    )


_ENDS = {EMBEDDING, HEAD, "ln_final.w", "ln_final.b", "unembed.b_U"}


def _still_tied(route: Undoing) -> bool:
    """Whether embedding and head, undone, are one matrix, to the last bit."""
    if not route.edited & _ENDS:
        return True
    found: Tensors = {}
    for slots in groups(route.source.slots, whole=True):
        if any(slot.key in (EMBEDDING, HEAD) for slot in slots):
            unit = {slot.local: route.source.tensor(slot.key) for slot in slots}
            made = route.make(unit, slots[0].layer).tensors
            found |= {key: made[key] for key in (EMBEDDING, HEAD) if key in made}
    code = route.code(EMBEDDING)
    return same_bits(stored_as(found[EMBEDDING], code), np.asarray(stored_as(found[HEAD], code)).T)
