"""Which weight a tensor is, read off the end of its name.

What wraps a model puts its own names in front (`module.`, `base_model.model.`) or in between
(`_orig_mod.`, `_original_component.`). None of them is listed here: a name is read from its end,
by the layout's table, and what is left over in front is the wrapper's. Two names that end alike are
two readings, which the caller must not choose between.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from converter.layout import EMBEDDING, GPT_NEO, HEAD, LAYOUTS, TABLE, Layout

LAYER = "{i}"
TRUNK = "transformer"
"""What GPTNeoForCausalLM calls the GPTNeoModel in it. A GPTNeoModel's own names lack it."""
_IN_TRUNK = ("wte", "wpe", "h", "ln_f")
_ATTENTION = "attention"
"""HF's name for the module in `attn`, which the bridge has no word for."""
_WRAPPED = "_original_component"
"""Where TransformerBridge keeps a module of the model that it wraps: no name of another has it."""


@dataclass(frozen=True)
class ReadName:
    """One tensor's name, read."""

    name: str
    """In the file."""
    weight: str
    """In the layout."""
    prefix: tuple[str, ...]
    """What stands before it: the wrapper's names, without the model's own `transformer`."""
    inside: tuple[str, ...]
    """Wrappers' names between the layout's own."""


@dataclass(frozen=True)
class Reading:
    """A file's names as those of one layout."""

    layout: Layout
    reads: dict[str, list[ReadName]]
    """By weight (or known buffer). More than one each: two readings, or the same tensor twice."""
    left: tuple[str, ...]
    """Names that no weight's name ends."""

    @property
    def names(self) -> list[ReadName]:
        """All that were read."""
        return [read for reads in self.reads.values() for read in reads]

    @property
    def root(self) -> tuple[str, ...]:
        """The prefix that all weights have in common: what begins otherwise is not the model's."""
        return shared(read.prefix for read in self.names)

    @property
    def inside(self) -> tuple[str, ...]:
        """Wrappers' names that stand between the layout's own, each once."""
        return tuple(dict.fromkeys(part for read in self.names for part in read.inside))


def shared(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """What they all begin with."""
    paths = list(paths)
    first = min(paths, key=len)
    while any(path[: len(first)] != first for path in paths):
        first = first[:-1]
    return first


def read_names(names: Iterable[str]) -> list[Reading]:
    """The layouts in which these names are a model's, the one that leaves fewest unread first."""
    names = list(names)
    in_bridge = any(_WRAPPED in name.split(".") for name in names)
    readings = []
    for layout in LAYOUTS:
        reads: dict[str, list[ReadName]] = {}
        left = []
        for name in names:
            if read := _read(name, layout, in_bridge=in_bridge):
                reads.setdefault(read.weight, []).append(read)
            else:
                left.append(name)
        if _ENDS[layout] & set(reads):
            readings.append(Reading(layout, reads, tuple(left)))
    return sorted(readings, key=lambda reading: len(reading.left))


def _read(name: str, layout: Layout, *, in_bridge: bool) -> ReadName | None:
    segments = name.split(".")
    mixed = in_bridge and layout == "bridge"
    own = [_BRIDGE.get(s, s) for s in segments] if mixed else segments
    vocabulary, by_last = _endings(layout)
    for ending, template in by_last.get(own[-1], ()):
        layer, inside, at = "", [], len(own)
        for part in reversed(ending):
            at -= 1
            while at >= 0 and own[at] != part and not (part == LAYER and own[at].isdecimal()):
                if own[at] in vocabulary or own[at].isdecimal():
                    at = -1
                    break
                inside.append(segments[at])
                at -= 1
            if at < 0:
                break
            layer = own[at] if part == LAYER else layer
        if at < 0:
            continue
        prefix = segments[:at]
        if prefix[-1:] == [TRUNK] and segments[at] in _IN_TRUNK:
            prefix.pop()
        wrappers = tuple(part for part in reversed(inside) if part != _ATTENTION)
        return ReadName(name, template.format(i=layer), tuple(prefix), wrappers)
    return None


Endings = dict[str, list[tuple[tuple[str, ...], str]]]


@cache
def _endings(layout: Layout) -> tuple[frozenset[str], Endings]:
    """A layout's segments, and by last segment: the ending to look for, and the name it stands for."""
    by_last: Endings = {}
    vocabulary: set[str] = set()
    for template in GPT_NEO.templates(layout):
        ending = tuple(template.removeprefix(f"{TRUNK}.").split("."))
        by_last.setdefault(ending[-1], []).append((ending, template))
        vocabulary.update(ending)
    return frozenset(vocabulary), by_last


def _bridge_words() -> dict[str, str]:
    """HF's word -> the bridge's: TransformerBridge renames the modules of the model that it wraps,
    and `bridge.original_model.state_dict()` has some names in one vocabulary, some in the other."""
    words: dict[str, str] = {}
    for row in TABLE:
        if row.hf and row.bridge:
            own = [part for part in row.hf.split(".") if part not in (TRUNK, _ATTENTION)]
            words |= dict(zip(own, row.bridge.split("."), strict=True))
    return words


_BRIDGE = _bridge_words()
_ENDS: dict[Layout, set[str]] = {
    layout: {GPT_NEO.name(key, layout) for key in (EMBEDDING, HEAD)} for layout in LAYOUTS
}
"""The embedding and the head: a tied model may have kept either alone."""
