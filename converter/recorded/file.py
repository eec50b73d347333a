"""The reference file: safetensors with JSON metadata, sealed. Read as hostile input."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from converter.checkpoint import NeoConfig
from converter.checkpoint.config import checked, integers
from converter.checkpoint.publish import adding
from converter.checkpoint.reader import SafetensorsReader, open_safetensors
from converter.checkpoint.record import UNSEALED, bears_seal, sealed
from converter.choices import Effort
from converter.dtypes import CODES
from converter.errors import BadInput, CorruptFile
from converter.layout import LAYOUTS
from converter.recorded.recipes import Recipe
from converter.recorded.sampled import LIKELIEST, Table, unpadded
from converter.verification.evidence import Evidence
from converter.verification.measuring import Errors
from converter.verification.probes import Probe, wholes
from converter.verification.result import RuntimeInfo

KEY = "neoconvert_reference"
MARK = KEY.encode()
"""In the header of a reference file, which may be replaced by another."""
SCHEMA_VERSION = 1
MOST_BYTES = 256 * 2**20
_ERRORS = ("max_abs", "rms", "scale")
"""Of a float32 run, what a noise floor is made of; its errors by position follow."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Contents:
    """What a reference file holds."""

    given: str
    """What the original is called wherever it lies."""
    layout: Any
    config: NeoConfig
    codes: Mapping[str, str]
    """Storage dtypes of the original's own tensors, by `hooked` name."""
    effort: Effort
    seed: int
    versions: Mapping[str, str]
    probes: Sequence[Probe]
    tables: Mapping[int, Table]
    own: Sequence[Errors | None]
    noise: Sequence[Sequence[Errors]]
    info: RuntimeInfo
    strange: tuple[float, str] | None
    recipes: tuple[Recipe, ...]


def is_reference(path: Path) -> bool:
    """Whether a file says that it is one. That says nothing of its soundness."""
    try:
        if not path.is_file():
            return False
        with open_safetensors(path) as file:
            return KEY in (file.metadata() or {})
    except Exception:  # whatever it is, it does not say so
        return False


def write(path: Path, contents: Contents, *, overwrite: bool) -> int:
    """Returns the file's size in bytes.

    Raises:
        OutputExists: there is a file that may not be replaced.
    """
    from safetensors.numpy import save

    arrays: dict[str, NDArray[Any]] = {"seal": np.frombuffer(UNSEALED.encode(), np.uint8)}
    for i, probe in enumerate(contents.probes):
        arrays[f"tokens.{i}"] = probe.tokens.astype(np.float64)
        if probe.mask is not None:
            arrays[f"mask.{i}"] = probe.mask.astype(np.float64)
        own, noise = contents.own[i], contents.noise[i]
        runs = [*([own] if own else []), *noise]
        arrays[f"runs.{i}"] = np.array(
            [[*(getattr(run, name) for name in _ERRORS), *run.by_position] for run in runs]
        )
    for i, table in contents.tables.items():
        arrays[f"logp.{i}"] = table.logp
        arrays[f"top.{i}"] = table.top.astype(np.float64)
        arrays[f"facts.{i}"] = table.facts
    said = {
        "schema_version": SCHEMA_VERSION,
        **{n: getattr(contents, n) for n in ("given", "layout", "effort", "seed", "versions")},
        "config": dataclasses.asdict(contents.config),
        "codes": contents.codes,
        "probes": [
            {
                "name": p.name, "start": p.start, "prefill": p.prefill, "text": p.text,
                "padded": p.mask is not None, "own": own is not None,
            }
            for p, own in zip(contents.probes, contents.own, strict=True)
        ],
        "info": dataclasses.asdict(contents.info),
        "strange": contents.strange,
        "recipes": [
            {
                **{n: getattr(r, n) for n in ("steps", "carried", "folded", "scale", "computed")},
                "sha256": r.sha256,
                "neutral": sorted(r.neutral),
                "evidence": dataclasses.asdict(r.evidence),
            }
            for r in contents.recipes
        ],
    }  # fmt: skip
    content = sealed(save(arrays, {KEY: json.dumps(said)}))
    with adding(path, mark=MARK, overwrite=overwrite, needs=len(content)) as stage:
        stage.path.write_bytes(content)
    return len(content)


def read(path: Path) -> Contents:
    """
    Raises:
        CorruptFile: it is damaged, or no sound reference file.
        ConfigError: its config cannot be a GPT-Neo's.
    """
    if path.stat().st_size > MOST_BYTES:
        raise _unsound(path, f"it is larger than {MOST_BYTES:,} bytes")
    if not bears_seal(path):
        raise _unsound(path, "it was changed since it was written, or is no regular file")
    reader = SafetensorsReader(path)
    try:
        said = json.loads(reader.aliases[KEY])
        return _contents(said, reader, str(path))
    except BadInput:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:  # fmt: skip
        raise _unsound(path, str(error)[:200] or type(error).__name__) from error


def _unsound(path: Path, why: str) -> CorruptFile:
    return CorruptFile(
        f"The reference file cannot be used: {why}.",
        where=str(path),
        do="Copy it again; or remove it and write it again: neoconvert reference ORIGINAL FILE",
    )


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _number(value: Any, low: int, high: int, what: str) -> int:
    _need(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high, what)
    return int(value)


def _text(value: Any, what: str) -> str:
    _need(isinstance(value, str) and len(value) <= 1000, what)
    return str(value)


def _config(said: Any, n_tensors: int, where: str) -> NeoConfig:
    fields = integers(said, where)
    _need(fields["n_layers"] <= n_tensors, "it has more layers than tensors")
    types, scale = said["attn_types"], said["score_divisors"]
    _need(isinstance(types, list) and isinstance(scale, list), "its config has no lists")
    _need(len(scale) in (0, fields["n_layers"]), "its scales are not one for each layer")
    _need(all(isinstance(x, float) and math.isfinite(x) and x > 0 for x in scale), "a scale")
    _need(isinstance(said["folded"], bool), "folded is not true or false")
    return checked(
        fields
        | {"attn_types": tuple(types), "score_divisors": tuple(scale), "eps": said["eps"]}
        | {"act_fn": _text(said["act_fn"], "act_fn"), "folded": said["folded"]},
        where,
    )


def _contents(said: Any, reader: SafetensorsReader, where: str) -> Contents:
    _need(said["schema_version"] == SCHEMA_VERSION, f"its version is not {SCHEMA_VERSION}")
    codes = dict(said["codes"])
    _need(set(codes.values()) <= CODES.keys() and bool(codes), "a dtype that is none")
    config = _config(said["config"], len(codes), where)
    _need(said["layout"] in tuple(LAYOUTS), "its layout is none")
    _need(said["effort"] in get_args(Effort), "its effort is none")

    def array(name: str, *shape: int | None) -> Array:
        found = reader.read(name)
        _need(found.dtype == np.float64 and found.ndim == len(shape), f"{name}: no float64 of {len(shape)} axes")  # fmt: skip
        fits = all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
        _need(fits, f"{name} has the shape {list(found.shape)}")
        _need(bool(np.isfinite(found).all()), f"{name} is not finite")
        return found

    def whole(found: Array, below: int, what: str) -> NDArray[np.int64]:
        _need(bool((found >= 0).all() and (found < below).all()), what)  # before they are cast
        numbers = found.astype(np.int64)
        _need(bool((numbers == found).all()), what)
        return numbers

    probes = [_probe(p, i, config, array, whole) for i, p in enumerate(said["probes"])]
    _need(bool(probes), "it has no probe")
    own: list[Errors | None] = []
    noise = []
    for i, probe in enumerate(probes):
        runs = array(f"runs.{i}", None, len(_ERRORS) + probe.tokens.shape[1])
        found = [Errors(r[0], 0.0, r[1], 0.0, 1.0, r[2], 1, by_position=tuple(r[3:])) for r in runs.tolist()]  # fmt: skip
        first = 1 if said["probes"][i]["own"] is True else 0
        _need(bool((runs >= 0).all()) and len(found) > first, "a run's errors")
        own.append(found[0] if first else None)
        noise.append(found[first:])
    tables, at = {}, 0
    for i in sorted(set(wholes(probes))):
        count = int(unpadded(probes[i]).sum())
        likely = min(LIKELIEST, config.d_vocab)
        top = whole(array(f"top.{i}", count, likely), config.d_vocab, f"top.{i}: no tokens")
        logp, facts = array(f"logp.{i}", count, None), array(f"facts.{i}", count, 3)
        _need(likely < logp.shape[1] <= config.d_vocab + likely, f"logp.{i} has no columns")
        _need(bool((logp <= 1e-9).all() and (facts >= -1e-9).all()), f"logp.{i} is no logarithm")
        tables[i] = Table(logp, top, facts, at, config.d_vocab)
        at += count
    return Contents(
        given=_text(said["given"], "its name"),
        layout=said["layout"],
        config=config,
        codes=codes,
        effort=said["effort"],
        seed=_number(said["seed"], -(2**63), 2**63, "seed"),
        versions={_text(k, "a name"): _text(v, "a version") for k, v in said["versions"].items()},
        probes=probes,
        tables=tables,
        own=own,
        noise=noise,
        info=_info(said["info"]),
        strange=None if said["strange"] is None else (float(said["strange"][0]), _text(said["strange"][1], "strange")),
        recipes=tuple(_recipe(recipe) for recipe in said["recipes"]),
    )  # fmt: skip


def _probe(said: Any, i: int, config: NeoConfig, array: Any, whole: Any) -> Probe:
    tokens = whole(array(f"tokens.{i}", None, None), config.d_vocab, f"tokens.{i}: no tokens")
    batch, length = tokens.shape
    start = _number(said["start"], 0, config.n_ctx, "start")
    _need(batch >= 1 and 1 <= length <= config.n_ctx - start, f"tokens.{i}: too long, or nothing")
    mask = whole(array(f"mask.{i}", batch, length), 2, f"mask.{i}") if said["padded"] is True else None  # fmt: skip
    if mask is not None:  # left padding, and at least one token
        _need(bool((np.diff(mask, axis=1) >= 0).all() and mask[:, -1].all()), f"mask.{i}")
    prefill = said["prefill"]
    return Probe(
        _text(said["name"], "a probe's name"), tokens,
        None if mask is None else mask.astype(bool), start,
        None if prefill is None else _number(prefill, 1, length, "prefill"),
        said["text"] is True,
    )  # fmt: skip


def _info(said: Any) -> RuntimeInfo:
    name, what, version, device, role = (
        _text(said[name], name) for name in ("name", "what", "version", "device", "role")
    )
    tf32 = said["tf32"]
    _need(tf32 is None or isinstance(tf32, bool), "tf32 is not true or false")
    return RuntimeInfo(name, what, version, device, role, tf32)


def _recipe(said: Any) -> Recipe:
    digests = {str(code): dict(by_key) for code, by_key in said["sha256"].items()}
    _need(all(isinstance(d, str) for by_key in digests.values() for d in by_key.values()), "a digest")  # fmt: skip
    flags = [said[name] for name in ("carried", "folded", "computed")]
    _need(all(isinstance(flag, bool) for flag in flags), "a recipe's flags")
    found = said["evidence"]
    _need(found["outcome"] in ("same", "differs", "not comparable"), "an outcome")
    error, times = found["error"], found["times"]
    _need(all(n is None or isinstance(n, (int, float)) for n in (error, times)), "a number")
    why, where = (None if found[n] is None else _text(found[n], n) for n in ("why", "where"))
    _need(why is not None or found["outcome"] == "same", "evidence without a reason")
    _need(where is not None or found["outcome"] != "differs", "evidence without a place")
    return Recipe(
        steps=tuple(_text(step, "a step") for step in said["steps"]),
        carried=flags[0], folded=flags[1], computed=flags[2],
        scale=tuple(float(x) for x in said["scale"]),
        sha256=digests,
        neutral=frozenset(_text(key, "a name") for key in said["neutral"]),
        evidence=Evidence(
            "the weights", "route", found["outcome"], why, where, error, times
        ),
    )  # fmt: skip
