"""The files beside the weights: configs and tokenizer, as each layout's own loaders look for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter import strict_json
from converter.checkpoint.checkpoint import Checkpoint
from converter.checkpoint.foreign_files import refuse_to_copy
from converter.checkpoint.hf_config import to_hf
from converter.checkpoint.plan import Plan
from converter.checkpoint.source import Source, called
from converter.checkpoint.tl_config import to_tl
from converter.dtypes import NAMES, holding
from converter.layout import LAYOUTS
from converter.strict_json import Json

if TYPE_CHECKING:
    from converter.route import Route


def write(
    route: Route, plan: Plan, stage: Path, *, recast: bool, graph: Json | None = None
) -> None:
    """Write config and tokenizer files.

    Args:
        recast: the storage dtype was asked for.
        graph: what config.json says beside an ONNX graph, whose clients look for HF's files in
            any layout; None: no graph.
    """
    source = route.source
    has_cfg = LAYOUTS[plan.layout].has_cfg
    if has_cfg:
        _write_json(stage / "cfg.json", cfg(route, plan, recast=recast))
    if not has_cfg or graph is not None:
        config = hf_config(route, plan, recast=recast) | (graph or {})
        _write_json(stage / "config.json", config)
        if LAYOUTS[plan.layout].library == "transformers" or graph is not None:
            _write_json(stage / "generation_config.json", generation_config(source, config))
    for path in source.source.tokenizer_files():
        target = stage / path.relative_to(source.source.path)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if source.source.tokenizer is not None and source.source.tokenizer_is_own:
        source.source.tokenizer.save_pretrained(stage)


def require_copyable(source: Source) -> None:
    """
    Raises:
        BadInput: see `refuse_to_copy`, of the tokenizer's files and generation_config.json.
    """
    if source.is_directory:
        generation = source.path / "generation_config.json"
        own = [generation] if generation.is_file() else []
        refuse_to_copy([*source.tokenizer_files(), *own], source.path)


def hf_config(route: Route, plan: Plan, *, recast: bool) -> dict[str, Any]:
    """HF's config.json. `recast`: the storage dtype was asked for."""
    base = route.source.original_hf_config
    says = recast or base is None or any(base.get(n) for n in ("dtype", "torch_dtype"))
    dtype = _dtype(route, plan, recast) if says else None
    return to_hf(plan.config, base, tied=route.tied, dtype=dtype)


def generation_config(source: Checkpoint, config: dict[str, Any]) -> dict[str, Any]:
    """The source's own, or what transformers makes of the model's `config`."""
    if (own := source.original_generation_config) is not None:
        return own
    tokens = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {k: v for k, v in tokens.items() if v is not None}


def cfg(route: Route, plan: Plan, *, recast: bool) -> dict[str, Any]:
    """TransformerLens's config. NotRepresentable where TL lacks the activation."""
    source = route.source
    name = called(source.source.given) if source.source.place else "gpt-neo"
    dtype = _dtype(route, plan, recast)
    return to_tl(plan.config, source.original_tl_config, dtype=dtype, model_name=name)


def _dtype(route: Route, plan: Plan, recast: bool) -> str:
    """What a config is to state. What the source's does, where one library opens both, and so opens
    them alike; else, and where a dtype was asked for, what rounds no weight."""
    source, codes = route.source, {tensor.code for tensor in plan.tensors}
    if not recast and (stated := source.stated_dtype):
        if LAYOUTS[source.layout].config == LAYOUTS[plan.layout].config:
            return NAMES[stated]
        codes.add(stated)
    return NAMES[holding(codes)]


def _write_json(path: Path, document: Json) -> None:
    path.write_bytes(strict_json.file_of(document, indent=2))
