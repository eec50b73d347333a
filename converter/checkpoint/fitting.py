"""Which config goes with the weights, and what to say when it does not fit them."""

from __future__ import annotations

from dataclasses import replace

from converter.checkpoint.config import NeoConfig
from converter.checkpoint.hf_config import from_hf
from converter.checkpoint.names import shared
from converter.checkpoint.reader import Entry, Stored
from converter.checkpoint.recognise import Recognised
from converter.checkpoint.source import Source
from converter.checkpoint.tl_config import from_tl, of_bridge
from converter.errors import ConfigError, TensorMismatch
from converter.layout import GPT_NEO, LAYOUTS, Slot, axes
from converter.strict_json import Json

_WRITES = {
    "hf": "model.config.to_json_file('config.json')",
    "bridge": "bridge.original_model.config.to_json_file('config.json')",
    "hooked": "json.dump(model.cfg.to_dict(), open('cfg.json', 'w'), default=str)",
}
"""What writes the config of a layout, in Python."""


def read_config(source: Source, seen: Recognised, notes: list[str]) -> tuple[Source, NeoConfig]:
    """The architecture, and the source with the configs that go with its weights.

    A config in the weight file goes before one beside it; of several, the one nearest to the
    weights. A bridge's own cfg says neither local attention nor unscaled scores: never read.

    Raises:
        ConfigError: there is none, or it cannot be these weights'.
        NotRepresentable: see `from_tl`.
    """
    source = _with_bundled(source, seen, notes)
    where = str(source.config_path)
    of_a_bridge = source.tl_config is not None and of_bridge(source.tl_config)
    if of_a_bridge:
        source = replace(source, tl_config=None)
    wanted = LAYOUTS[seen.layout]
    if source.tl_config is not None and (wanted.has_cfg or source.hf_config is None):
        config = from_tl(source.tl_config, where, notes)
    elif source.hf_config is not None:
        if source.tl_config is not None and source.config_path is not None:
            where = str(source.config_path.with_name("config.json"))
            notes.append("the cfg.json beside the weights is not theirs, and was not used")
        config = from_hf(source.hf_config, where, notes)
    elif of_a_bridge:
        raise ConfigError(
            "The cfg is a TransformerBridge's own, which knows neither GPT-Neo's local attention nor"
            " its unscaled scores.",
            where=where,
            do="Give HF's config with --cfg config.json. Where the model is, this writes it:"
            f" {_WRITES['bridge']}",
        )
    else:
        raise ConfigError(
            f"There is no {wanted.config} beside the weights, and shapes alone do not tell the heads.",
            where=str(source.path),
            do=f"Put it beside the weights, or give it with --cfg {wanted.config} if they are the first"
            f" that is named. Where the model is, this writes it: {_WRITES[seen.layout]}",
        )
    if config.n_layers > len(seen.found):  # before a table of that size is built
        raise ConfigError(
            f"The config says {config.n_layers} layers; the files hold {len(seen.found)} tensors.",
            where=where,
            do="Check the config against the checkpoint it came with.",
        )
    return source, config


def _with_bundled(source: Source, seen: Recognised, notes: list[str]) -> Source:
    """The source with the configs that are in the weight file, if there are any."""
    hf = [(e, c) for e, c in source.bundled if "n_layers" not in c]
    tl = [(e, c) for e, c in source.bundled if "n_layers" in c and not of_bridge(c)]
    if hf:
        found = dict(_nearest(hf, seen.entry, source))
        if "model_type" not in found:
            notes.append("the config in the file has no model_type: gpt_neo, by the weights' names")
            found["model_type"] = "gpt_neo"
        source = replace(source, hf_config=found, tl_config=None, config_path=source.path)
    if tl:
        found = _nearest(tl, seen.entry, source)
        hf_config = source.hf_config if hf else None
        source = replace(source, hf_config=hf_config, tl_config=found, config_path=source.path)
    bridges = [config for _, config in source.bundled if of_bridge(config)]
    if bridges and not tl and source.hf_config is None:
        source = replace(source, tl_config=bridges[0], config_path=source.path)
    elif bridges:
        notes.append(
            "the bridge's own cfg in the file, which misses GPT-Neo's attention, was not read"
        )
    return source


def _nearest(configs: list[tuple[Entry, Json]], entry: Entry, source: Source) -> Json:
    common = [len(shared((entry, other))) for other, _ in configs]
    nearest = [found for found, n in zip(configs, common, strict=True) if n == max(common)]
    if any(config != nearest[0][1] for _, config in nearest):
        names = ", ".join(".".join(other) for other, _ in nearest[:4])
        raise ConfigError(
            f"The file holds several configs that differ: {names}.",
            where=str(source.path),
            do="Give the one that is meant with --cfg FILE.",
        )
    return nearest[0][1]


def mismatch(slot: Slot, stored: Stored, source: Source) -> TensorMismatch:
    """The error for a tensor whose shape is not what the config makes it: which field, which value."""
    what = f"Tensor {slot.name} has shape {list(stored.shape)}; the config makes it {list(slot.shape)}."
    do = "Give the config that belongs to these weights."
    sides = axes(slot.to_hub.before)
    if len(stored.shape) == len(sides):
        for side, found, expected in zip(sides, stored.shape, slot.shape, strict=True):
            if found != expected and len(side) == 1 and (field := _FIELDS.get(side[0])):
                has_cfg = source.tl_config is not None and source.hf_config is None
                name = field.name if has_cfg else field.hf
                do = f"If the weights are right (tokens were added, say), the config's {name} must be {found}, not {expected}."
                break
    return TensorMismatch(what, where=f"{stored.file}, with {source.config_path}", do=do)


_FIELDS = {field.axis: field for field in GPT_NEO.fields if field.axis != "n"}
"""Those that alone set an axis: a number of heads goes with their width."""
