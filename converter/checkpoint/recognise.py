"""Finding a GPT-Neo among the tensors of a file, whatever wraps it: never guessing between two."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from converter.checkpoint.foreign_weights import Seen, refuse_foreign_tensors
from converter.checkpoint.hf_config import from_hf
from converter.checkpoint.names import Reading, ReadName, read_names, shared
from converter.checkpoint.reader import Entry, Stored
from converter.checkpoint.recipes import keeping, options_for
from converter.checkpoint.source import Source
from converter.dtypes import same_bits
from converter.errors import MissingTensor, UnknownTensor
from converter.layout import LAYOUTS, Layout

HEADS = {
    "score": "the head of a sequence classifier",
    "classifier": "the head of a token classifier",
    "qa_outputs": "the head of a question answerer",
    "v_head": "a value head",
    "value_head": "a value head",
}
"""Modules beside the trunk that are no part of the language model, and what they are."""
OUTSIDE = "outside the model that was found"


@dataclass(frozen=True)
class Recognised:
    """The tensors of one GPT-Neo, by their names in its layout."""

    layout: Layout
    found: dict[str, Stored]
    other: dict[str, str]
    """Those that are no plain floats: their dtype."""
    entry: Entry = ()
    """In a bundle: the keys that lead to the weights."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Tensors beside them, by their name in the file, each with the reason."""
    notes: list[str] = field(default_factory=list)


def recognise(source: Source) -> Recognised:
    """
    Raises:
        MissingTensor: there is no GPT-Neo.
        NotRepresentable, UnknownTensor, TensorMismatch: there is something else, which is named;
            or more than one GPT-Neo.
    """
    tensors, odd = source.tensors, source.other
    names = [*tensors, *odd]
    readings = read_names(names)
    known = {read.name for r in readings[:1] for read in r.names}
    has_cfg = bool(readings) and LAYOUTS[readings[0].layout].has_cfg
    refuse_foreign_tensors(
        Seen(
            names,
            sizes={n: math.prod(s.shape) for n, s in tensors.items() if n in known},
            odd={n: dtype for n, dtype in odd.items() if n in known},
            config={} if has_cfg else source.hf_config or {},
            where=str(source.path),
        )
    )
    if not readings:
        raise _nothing(names, source)
    reading = readings[0]
    _refuse_second_layout(readings, source)
    for reads in reading.reads.values():
        _require_one(reads, source)
    first = {weight: reads[0].name for weight, reads in reading.reads.items()}
    entry = _clipped(shared(source.entries.get(name, ()) for name in known), reading.root)
    return Recognised(
        layout=reading.layout,
        found={weight: tensors[name] for weight, name in first.items() if name in tensors},
        other={weight: odd[name] for weight, name in first.items() if name in odd},
        entry=entry,
        dropped=_beside(reading, entry, source),
        notes=_notes(reading, entry, source),
    )


def _nothing(names: list[str], source: Source) -> MissingTensor:
    if source.hf_config is not None:
        from_hf(source.hf_config, str(source.config_path))  # names a wrong model type
    return MissingTensor(
        "No GPT-Neo embedding is among the tensors (transformer.wte.weight, embed.W_E or embed.weight).",
        where=f"{source.path}: {', '.join(sorted(names)[:3]) or 'no tensors'}",
        do="Give a GPT-Neo checkpoint in the Hugging Face, HookedTransformer or TransformerBridge layout.",
    )


def _refuse_second_layout(readings: list[Reading], source: Source) -> None:
    """Two models in different layouts: names of the one are not the other's."""
    first = readings[0].names
    ours = {read.name for read in first}
    for other in readings[1:]:
        if ours.isdisjoint(read.name for read in other.names):
            raise _two_models(first[0], other.names[0], source)


def _require_one(reads: list[ReadName], source: Source) -> None:
    """What has one weight's name twice must be the same tensor twice, bit for bit."""
    one, *others = (source.tensors.get(read.name) for read in reads)
    for read, other in zip(reads[1:], others, strict=True):
        if one is None or other is None or not _same(one, other, source):
            raise _two_models(reads[0], read, source)


def _same(one: Stored, two: Stored, source: Source) -> bool:
    alike = (one.shape, one.code) == (two.shape, two.code)
    return alike and same_bits(source.read(one), source.read(two))


def _two_models(one: ReadName, two: ReadName, source: Source) -> UnknownTensor:
    ours, theirs = (_place(read, source) for read in (one, two))
    entry = _entry(one, source)
    mine, its = (_front(read, entry) for read in (one, two))
    what = f"Two models are here, {ours} and {theirs}"
    keep = [f"k.startswith({mine!r})"] if mine else []
    if one.prefix == two.prefix:
        what = f"Two tensors are here for one weight, {one.name} and {two.name}"
        keep = [f"k != {'.'.join(two.name.split('.')[len(_segments(entry)) :])!r}"]
    elif its.startswith(mine) and entry == _entry(two, source):
        keep.append(f"not k.startswith({its!r})")
    return UnknownTensor(
        f"{what}; which is meant cannot be told.",
        where=f"{source.path}: {one.name} and {two.name}",
        do=_told("Save the one you mean alone", source, " and ".join(keep), entry),
    )


def _told(do: str, source: Source, condition: str, entry: Entry) -> str:
    """Advice, with the command that follows it where the weights are in files."""
    if source.live:
        return f"{do}, and give that."
    files = list(dict.fromkeys(stored.file for stored in source.tensors.values()))
    command, name = keeping(files, condition, _keys(entry))
    return f"{do}, and give {name} with {options_for(name, source.config_path)}: {command}"


def _place(read: ReadName, source: Source) -> str:
    """Where a reading is, for people: "['ema'] (model.)" or "'policy.'"."""
    entry = _entry(read, source)
    rest = _front(read, entry)
    if entry:
        return _keys(entry) + (f" ({rest})" if rest else "")
    return repr(rest) if rest else "the one without a prefix"


def _keys(entry: Entry) -> str:
    return "".join(f"[{key}]" if key.isdecimal() else f"[{key!r}]" for key in entry)


def _segments(entry: Entry) -> list[str]:
    return ".".join(entry).split(".") if entry else []


def _clipped(entry: Entry, prefix: tuple[str, ...]) -> Entry:
    """As much of an entry's keys as is no part of the model's own names."""
    while entry and len(_segments(entry)) > len(prefix):
        entry = entry[:-1]
    return entry


def _entry(read: ReadName, source: Source) -> Entry:
    """The entry of a bundle that holds the model that a tensor is of."""
    return _clipped(source.entries.get(read.name, ()), read.prefix)


def _front(read: ReadName, entry: Entry) -> str:
    """What stands before the model's own names within an entry: "model.", or nothing."""
    return ".".join((*read.prefix[len(_segments(entry)) :], ""))


def _beside(reading: Reading, entry: Entry, source: Source) -> dict[str, str]:
    """What else the file holds, and why it is no part of the model.

    Raises:
        UnknownTensor: it is part of it, and GPT-Neo has no place for it.
    """
    dropped, unknown = {}, []
    root = reading.root
    for name in reading.left:
        segments = tuple(name.split("."))
        if source.entries.get(name, ())[: len(entry)] != entry:
            continue  # another entry of the bundle: its optimizer, say
        if segments[: len(root)] != root:
            dropped[name] = OUTSIDE
        elif len(segments) > len(root) + 1 and segments[len(root)] in HEADS:
            dropped[name] = HEADS[segments[len(root)]]
        else:
            unknown.append(name)
    if unknown:
        first = source.tensors.get(unknown[0])
        raise UnknownTensor(
            f"{len(unknown)} tensor(s) have no place in a GPT-Neo model: {', '.join(unknown[:4])}.",
            where=f"{source.path}: {unknown[0]} {list(first.shape) if first else source.other[unknown[0]]}",
            do=_told(
                "If the model is whole without them, save it without them",
                source,
                _without(unknown, reading, len(_segments(entry))),
                entry,
            ),
        )
    return dropped


def _without(unknown: list[str], reading: Reading, own: int) -> str:
    """Which tensors are not these, in Python: by what their names begin with, where no weight's does."""
    names = [name.split(".")[own:] for name in unknown]
    known = [read.name.split(".")[own:] for read in reading.names]
    taken = {tuple(name[:n]) for name in known for n in range(len(name) + 1)}
    begins: dict[str, None] = {}
    for name in names:
        length = next((n for n in range(1, len(name)) if tuple(name[:n]) not in taken), len(name))
        begins[".".join(name[:length])] = None
    return f"not k.startswith({tuple(begins)!r})"


def _notes(reading: Reading, entry: Entry, source: Source) -> list[str]:
    notes = []
    beside = [key for reader in source.readers for key in reader.beside if (key,) != entry[:1]]
    configs = {config[0] for reader in source.readers for config, _ in reader.configs if config}
    if entry and set(beside) - configs:
        more = f" and {len(beside) - 5} more" if len(beside) > 5 else ""
        notes.append(
            f"the weights are {_keys(entry)} in the file, beside {', '.join(beside[:5])}{more}"
        )
    elif entry and not beside:
        notes.append(f"the weights are {_keys(entry)} in the file")
    prefixes = {_front(read, entry) for read in reading.names} - {""}
    parts = [f"without {', '.join(sorted(prefixes))} in front"] if prefixes else []
    parts += [f"without {', '.join(reading.inside)} in between"] if reading.inside else []
    if parts:
        notes.append(f"the names are read {' and '.join(parts)}")
    if reading.layout == "bridge" and any("wte" in read.name.split(".") for read in reading.names):
        notes.append(
            "the names are HF's, with what TransformerBridge adds to a model"
            " (bridge.original_model.state_dict()): read as the bridge's"
        )
    twice = sum(len(reads) > 1 for reads in reading.reads.values())
    if twice:
        what = "tensor is" if twice == 1 else "tensors are"
        notes.append(f"{twice} {what} there under more than one name, with the same bits")
    return notes
