"""JSON beside the weights: configs, the index, provenance, generation settings, an adapter's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile import sound
from tests.hostile.damage import JSON, NO_FILE, NONSENSE, ODD_JSON, Bytes, Place, replace, rewrite
from tests.hostile.trial import Input

EITHER = frozenset({0, 3})
HF = [
    ["hf-to-tl", "src", "out", "--no-verify"],
    ["bake", "src", "out", "--no-verify"],
    ["inspect", "src"],
    ["export-onnx", "src", "out", "--no-verify"],
    ["hf-to-tl", "src", "out", "--no-verify", "--layout", "bridge", "--process", "default"],
]
TL = [["tl-to-hf", "src", "out", "--no-verify"], ["inspect", "src"]]


@dataclass(frozen=True)
class Document:
    """A JSON file of a sound directory, and the commands that read it."""

    name: str
    of: Callable[[], Path]
    commands: list[list[str]]
    needed: bool
    """Without it, nothing can be read; else what is no file is as if it were not there."""


DOCUMENTS = [
    Document("config.json", sound.hf, HF, True),
    Document("cfg.json", sound.hooked, TL, True),
    Document("model.safetensors.index.json", sound.sharded, HF, False),
    Document("neoconvert.json", sound.processed, TL, False),
    Document("generation_config.json", sound.hf, HF, False),
    Document(
        "adapter_config.json",
        sound.adapter,
        [["hf-to-tl", sound.HF, "out", "--no-verify", "--adapter", "src"]],
        True,
    ),
]

VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 10**30, 3.5, float("nan"), float("inf"), "x", "4", [], {}, [[]],
    ["\x1b[31m"], {"a": {"b": []}}, "x" * 10**6,
]  # fmt: skip
FIELDS = {
    "config.json": [
        "vocab_size", "hidden_size", "num_layers", "num_heads", "max_position_embeddings",
        "window_size", "intermediate_size", "attention_types", "attention_layers",
        "layer_norm_epsilon", "activation_function", "tie_word_embeddings", "model_type",
        "bos_token_id", "dtype", "architectures", "auto_map", "quantization_config",
    ],
    "cfg.json": [
        "d_vocab", "d_model", "n_layers", "n_heads", "d_head", "n_ctx", "window_size", "d_mlp",
        "attn_types", "eps", "act_fn", "attn_scale", "use_attn_scale", "normalization_type", "dtype",
        "original_architecture", "tokenizer_name",
    ],
    "neoconvert.json": ["steps", "source", "layout", "ledger", "config", "files", "schema_version"],
    "model.safetensors.index.json": ["weight_map", "metadata"],
    "generation_config.json": ["eos_token_id", "max_length"],
    "adapter_config.json": [
        "r", "lora_alpha", "target_modules", "peft_type", "rank_pattern", "alpha_pattern",
        "modules_to_save", "use_rslora", "use_dora", "layers_to_transform", "bias",
    ],
}  # fmt: skip
SHARDS: list[Any] = [
    "../model.safetensors", "/etc/passwd", "C:x.safetensors", "a/b.safetensors", "a\\b.safetensors",
    "model.safetensors\0", "model-00003-of-00002.safetensors", "model.safetensors.index.json", ".",
    "", None, 1, ["model-00001-of-00002.safetensors"], "\x1b]0;x\x07.safetensors",
]  # fmt: skip


def inputs() -> Iterator[Input]:
    for document in DOCUMENTS:
        turn = 0
        for name, damage in {**NONSENSE, **JSON}.items():
            yield _changed(document, name, damage, turn, frozenset({3}))
            turn += 1
        for name, damage in ODD_JSON.items():
            yield _changed(document, name, damage, turn, EITHER)
            turn += 1
        for name, place in NO_FILE.items():
            yield _replaced(document, name, place, turn)
            turn += 1
        for field in FIELDS[document.name]:
            for value in VALUES:
                shown = repr(value)[:24]
                yield _changed(document, f"{field} = {shown}", _set(field, value), turn, EITHER)
                turn += 1
    index = DOCUMENTS[2]
    for number, shard in enumerate(SHARDS):
        yield _changed(index, f"a shard {shard!r}", _shard(shard), number, frozenset({3}))
    head = "lm_head.weight"  # tied, and listed without being there: transformers reads it too
    for number, name in enumerate([head, "h.9.x", "x" * 10**6, "\x1b[2J\n   do: rm", ""]):
        codes = frozenset({0 if name == head else 3})
        yield _changed(index, f"a tensor {name[:20]!r}", _listed(name), number, codes)


def _command(document: Document, turn: int) -> list[str]:
    return sound.filled(document.commands[turn % len(document.commands)])


def _changed(
    document: Document, name: str, damage: Bytes, turn: int, codes: frozenset[int]
) -> Input:
    def make(place: Path) -> list[str]:
        path = sound.copied(document.of, place / "src") / document.name
        if not path.exists():
            path.write_text("{}")
        rewrite(path, damage)
        return _command(document, turn)

    return Input(document.name, name, make, codes)


def _replaced(document: Document, name: str, other: Place, turn: int) -> Input:
    def make(place: Path) -> list[str]:
        path = sound.copied(document.of, place / "src") / document.name
        path.touch()
        replace(path, other)
        return _command(document, turn)

    return Input(document.name, name, make, frozenset({3}) if document.needed else EITHER)


def _set(field: str, value: Any) -> Bytes:
    return lambda data: json.dumps(json.loads(data) | {field: value}).encode()


def _shard(name: Any) -> Bytes:
    def change(data: bytes) -> bytes:
        index = json.loads(data)
        index["weight_map"]["transformer.wte.weight"] = name
        return json.dumps(index).encode()

    return change


def _listed(name: str) -> Bytes:
    def change(data: bytes) -> bytes:
        index = json.loads(data)
        index["weight_map"][name] = "model-00001-of-00002.safetensors"
        return json.dumps(index).encode()

    return change
