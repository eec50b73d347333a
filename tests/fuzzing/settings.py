"""Targets whose files are settings: config.json, cfg.json, neoconvert.json, an adapter's config, and a
batch's manifest."""

from __future__ import annotations

import csv
import io
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter import strict_json
from converter.adapter import with_adapter
from converter.batch import manifest
from converter.checkpoint import open_checkpoint
from converter.checkpoint.config import ACTIVATIONS, NeoConfig
from converter.checkpoint.files import read_json
from converter.checkpoint.hf_config import ACTIVATION_ALIASES, from_hf, to_hf
from converter.checkpoint.provenance import describes
from converter.checkpoint.record import survey
from converter.checkpoint.tl_config import from_tl, to_tl
from converter.cli import main
from converter.cli_manifest import jobs_of
from converter.convert import tl_to_hf
from converter.inspection import Inspection
from converter.strict_json import Json
from tests.fuzzing import values
from tests.fuzzing.target import Target, require
from tests.hostile import sound
from tests.models import TINY


def _read_config(data: bytes, place: Path) -> NeoConfig:
    path = place / "config.json"
    path.write_bytes(data)
    config = read_json(path)
    ours = from_hf(config, str(path), [])
    for base in (config, None):
        written = to_hf(ours, base, tied=config.get("tie_word_embeddings", True), dtype=None)
        again = from_hf(json.loads(json.dumps(written)))
        require(again == ours, f"written again, it is {again}")
    _require_as_transformers(config, ours)
    return ours


def _require_as_transformers(config: Json, ours: NeoConfig) -> None:
    from transformers import GPTNeoConfig

    theirs: Any = GPTNeoConfig.from_dict(dict(config))
    same = {
        "num_layers": ours.n_layers, "hidden_size": ours.d_model, "num_heads": ours.n_heads,
        "max_position_embeddings": ours.n_ctx, "vocab_size": ours.d_vocab, "window_size": ours.window_size,
        "activation_function": ours.act_fn, "layer_norm_epsilon": ours.eps,
        "attention_layers": list(ours.attn_types),
    }  # fmt: skip
    for name, value in same.items():
        found = getattr(theirs, name)
        found = ACTIVATION_ALIASES.get(found, found) if isinstance(found, str) else found
        require(found == value, f"transformers reads {name} as {found!r:.60}, not {value!r:.60}")
    inner = theirs.intermediate_size or 4 * theirs.hidden_size
    require(inner == ours.d_mlp, f"transformers has an MLP of {inner}, not {ours.d_mlp}")


def _read_cfg(data: bytes, place: Path) -> NeoConfig:
    path = place / "cfg.json"
    path.write_bytes(data)
    config = read_json(path)
    ours = from_tl(config, str(path), [])
    if ours.act_fn in ACTIVATIONS:
        written = to_tl(ours, config, dtype="float32", model_name="gpt-neo")
        again = from_tl(json.loads(json.dumps(written)))
        plain = replace(ours, score_divisors=())  # they go into the weights
        require(again == plain, f"written again, it is {again}")
    return ours


def _hf_configs() -> list[bytes]:
    more = {"attention_layers": ["global", "local"], "attention_types": None}
    renamed = {"num_attention_heads": 4, "num_hidden_layers": 2}
    return [
        values.dumped(c) for c in (TINY, TINY | more, TINY | renamed, {"model_type": "gpt_neo"})
    ]


def _tl_configs() -> list[bytes]:
    config = json.loads((sound.hooked() / "cfg.json").read_text())
    scaled = {"use_attn_scale": True, "attn_scale": 2.0, "scale_attn_by_inverse_layer_idx": True}
    least = {name: config[name] for name in ("n_layers", "d_model", "n_ctx", "d_vocab", "d_head", "act_fn")}  # fmt: skip
    return [values.dumped(c) for c in (config, config | scaled, least)]


def _read_provenance(data: bytes, place: Path) -> object:
    """As inspecting and undoing read it."""
    (place / "src/neoconvert.json").write_bytes(data)
    survey(place / "src", deep=False)
    opened = open_checkpoint(place / "src")
    shown = strict_json.dumps(Inspection(opened).to_json())
    done = tl_to_hf(opened, place / "out", dry_run=True)
    return shown, describes(opened), strict_json.dumps(done.to_json())


def _read_adapter(data: bytes, place: Path) -> object:
    (place / "adapter/adapter_config.json").write_bytes(data)
    merged = with_adapter(open_checkpoint(sound.hf()), place / "adapter").merged
    assert merged is not None
    json.dumps(merged.adapter.to_json(), allow_nan=False)
    settings = merged.adapter.settings
    modules = [f"transformer.h.{i}.attn.attention.q_proj" for i in range(2)]
    said = [(settings.rank_of(m), settings.scale_of(m), settings.is_target(m)) for m in modules]
    return settings, repr(said)


def _adapters() -> list[bytes]:
    config = json.loads((sound.adapter() / "adapter_config.json").read_text())
    more = {
        "rank_pattern": {"h.1.attn.attention.q_proj": 2},
        "alpha_pattern": {r"h\.[01]\..*": 3.5},
    }
    return [values.dumped(c) for c in (config, config | more | {"use_rslora": True})]


def _read_manifest(data: bytes, place: Path) -> object:
    path = place / "manifest"
    path.write_bytes(data)
    rows = manifest.read(path)
    lines = "\n".join(json.dumps(dict(row.cells)) for row in rows if row.cells)
    (place / "again").write_text(lines, "utf-8")
    again = [row.cells for row in manifest.read(place / "again")]
    require(repr(again) == repr([row.cells for row in rows if row.cells]), f"as JSON: {again}")
    jobs, lost, _ = jobs_of(
        path, main.commands, dry_run=True, overwrite=False, delete_fetched=False
    )
    return repr((jobs, [outcome.error for outcome in lost]))


_ROWS: list[Json] = [
    {"command": "hf-to-tl", "source": "src", "output": "out/{name}", "process": "default", "no-verify": True},
    {"command": "tl-to-hf", "source": "s*", "output": "back/{parent}/{name}", "max_shard_size": "1GB"},
    {"command": "export-onnx", "source": "a/b@v*", "output": "out/{revision}", "hook": ["blocks.*", "embed"]},
]  # fmt: skip


def _manifests() -> list[bytes]:
    table = io.StringIO()
    writer = csv.DictWriter(table, sorted({name for row in _ROWS for name in row}))
    writer.writeheader()
    writer.writerows(_ROWS)
    return [b"\n".join(values.dumped(row) for row in _ROWS), table.getvalue().encode()]


def _manifest_mutated(data: bytes, rng: random.Random) -> bytes:
    """A line's JSON, or a cell, or the text."""
    lines = data.split(b"\n")
    if rng.random() < 0.3:
        return values.text_mutated(data, rng)
    at = rng.randrange(len(lines))
    if lines[at].startswith(b"{"):
        lines[at] = values.mutated(lines[at], rng)
    else:
        cells: list[Any] = lines[at].decode("utf-8", "replace").split(",")
        cells = values.changed(cells, rng)
        cells = cells if isinstance(cells, list) else [cells]
        lines[at] = ",".join(map(str, cells)).encode("utf-8", "replace")
    return b"\n".join(lines)


def _beside_adapter(place: Path) -> None:
    sound.copied(sound.adapter, place / "adapter")


def _beside_manifest(place: Path) -> None:
    sound.copied(sound.hf, place / "src")
    os.chdir(place)  # which sources and outputs are relative to


def _provenances() -> list[bytes]:
    return [(of() / "neoconvert.json").read_bytes() for of in (sound.processed, sound.hooked)]


TARGETS = [
    Target("config.json", _hf_configs, values.mutated, _read_config),
    Target("cfg.json", _tl_configs, values.mutated, _read_cfg),
    Target(
        "neoconvert.json", _provenances, values.mutated, _read_provenance,
        prepare=lambda place: sound.copied(sound.processed, place / "src"),
    ),
    Target("adapter_config.json", _adapters, values.mutated, _read_adapter, prepare=_beside_adapter),
    Target(
        "manifest", _manifests, _manifest_mutated, _read_manifest,
        prepare=_beside_manifest, codes=frozenset({2, 3}),
    ),
]  # fmt: skip
