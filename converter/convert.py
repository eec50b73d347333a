"""The pipeline: plan -> stream units -> verify -> publish."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converter.checkpoint import EMBEDDING, HEAD, Checkpoint, open_checkpoint, provenance
from converter.checkpoint.hf_config import to_hf
from converter.checkpoint.plan import Plan, Planned, make_plan
from converter.checkpoint.publish import check_output, staging
from converter.checkpoint.tl_config import to_tl
from converter.checkpoint.writer import Writer
from converter.dtypes import NAMES, chunks, code_named
from converter.errors import BadInput, NotRepresentable, VerificationFailed
from converter.layout import Layout
from converter.processing.attn_scale import absorb, hub_tensor
from converter.progress import Progress, silent
from converter.verification import Verification, verify


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, or with `published` False would do."""

    source: Checkpoint
    output: Path
    plan: Plan
    published: bool
    verification: Verification | None

    def to_json(self) -> dict[str, Any]:
        """The keys that DESIGN's JSON contract names, and the plan's figures."""
        return {
            "source": self.source.source.given,
            "output": str(self.output),
            "layout": self.plan.layout,
            "steps": list(self.plan.steps),
            "reverse": "none",
            "published": self.published,
            "tensors": len(self.plan.tensors),
            "bytes": self.plan.nbytes,
            "shards": list(self.plan.shards),
            "dropped": list(self.plan.dropped),
            "invented": list(self.plan.invented),
            "verification": self.verification.to_json() if self.verification else None,
        }


def hf_to_tl(
    source: Checkpoint | str | Path,
    output: str | Path,
    *,
    layout: Layout = "hooked",
    **options: Any,
) -> Conversion:
    """HF -> TransformerLens. `options`: see `convert`. BadInput if SOURCE is not HF."""
    source = _opened(source)
    if source.layout != "hf":
        raise BadInput(
            f"SOURCE is a TransformerLens checkpoint already (layout {source.layout}).",
            where=str(source.source.path),
            do="Use neoconvert tl-to-hf to bring it to Hugging Face's layout.",
        )
    return convert(source, Path(output), layout=layout, **options)


def tl_to_hf(source: Checkpoint | str | Path, output: str | Path, **options: Any) -> Conversion:
    """TransformerLens -> HF. `options`: see `convert`. BadInput if SOURCE is HF already."""
    source = _opened(source)
    if source.layout == "hf":
        raise BadInput(
            "SOURCE is in Hugging Face's layout already.",
            where=str(source.source.path),
            do="Use neoconvert hf-to-tl to bring it to TransformerLens's layout.",
        )
    return convert(source, Path(output), layout="hf", **options)


def _opened(source: Checkpoint | str | Path) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else open_checkpoint(source)


def convert(
    source: Checkpoint,
    output: Path,
    *,
    layout: Layout,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    check: bool = True,
    device: str = "auto",
    progress: Progress | None = None,
) -> Conversion:
    """Convert an open checkpoint to `layout` and publish it at `output`, verified.

    Args:
        dtype: "float32", "float16" or "bfloat16" to store in; None keeps each tensor's own.
        max_shard_size: as the hub writes it, such as "5GB".
        check: verify the files written (weights and function) before publishing.
        device: where verification computes: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        NotRepresentable: the target cannot hold what the source holds.
        OutputExists, SamePlace: see `publish.check_output`.
        VerificationFailed: the files do not reproduce the source; nothing was published.
    """
    check_output(output, source.source.path, overwrite=overwrite)
    _refuse_processed(source, layout)
    code = code_named(dtype) if dtype else None
    plan = make_plan(source, layout, dtype=code, max_shard_size=max_shard_size)
    if layout == "hooked":
        _cfg(source, plan)  # an activation that TL lacks is refused before a weight is read
    if dry_run:
        return Conversion(source, output, plan, False, None)
    with staging(output) as stage:
        sha256 = _stream(source, plan, stage, progress or silent)
        _write_beside(source, plan, stage, recast=code is not None)
        verification = None
        if check:
            artifact = open_checkpoint(stage)
            verification = verify(source, artifact, device=device, progress=progress)
            if not verification.passed:
                raise VerificationFailed(
                    "The converted files do not reproduce the original; nothing was published.",
                    where=_first_problem(verification),
                    do="A fault of neoconvert or of this machine: please report it, with --json's output.",
                    details={"verification": verification.to_json()},
                )
        provenance.write(
            stage,
            source,
            plan,
            source_sha256=sha256["source"],
            output_sha256=sha256["output"],
            verification=verification.to_json() if verification else None,
        )
    return Conversion(source, output, plan, True, verification)


def _first_problem(verification: Verification) -> str:
    part = verification.first_divergence
    where = f"{part.unit}{f', {part.tensor}' if part.tensor else ''}: " if part else ""
    return where + " ".join(verification.problems[:2])


def _refuse_processed(source: Checkpoint, layout: Layout) -> None:
    if source.config.folded:
        raise NotRepresentable(
            "The checkpoint is processed: its LayerNorms are folded into the weights (LNPre).",
            where=f"{source.source.path}, to {layout}",
            do="Save the model unprocessed (from_pretrained_no_processing) and convert that.",
        )


def _stream(
    source: Checkpoint, plan: Plan, stage: Path, progress: Progress
) -> dict[str, dict[str, str]]:
    """Read, lay out, cast and write one tensor at a time. SHA-256 of all read and written."""
    planned = {tensor.slot.key: tensor for tensor in plan.tensors}
    read: dict[str, str] = {}

    def carry_over(key: str, writer: Writer) -> None:
        tensor, stored = planned.get(key), source.stored.get(key)
        array = source.tensor(key)
        if stored:
            slot = source.slots[key]
            read[stored.name] = _sha256(slot.to_hub.inverse.apply(array, source.config.sizes))
            if tensor is None and not (plan.tied and key == HEAD):
                _require_zero(array, stored.name, plan.layout)
        if tensor:
            array = absorb(array, source.config, source.slots[key], tensor.code)
            if tensor.code != source.code(key):
                _require_finite(array, source, tensor)
            writer.write(tensor, tensor.slot.to_hub.inverse.apply(array, plan.config.sizes))

    done, total = 0, plan.nbytes
    with Writer(stage, plan) as writer:
        for key in source.slots:
            carry_over(key, writer)
            if tensor := planned.get(key):
                done += tensor.nbytes
                progress(f"writing {tensor.name}", done, total)
    return {"source": read, "output": writer.sha256}


def _sha256(array: np.ndarray) -> str:
    digest = hashlib.sha256()
    for chunk in chunks(array):
        digest.update(chunk.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _require_zero(tensor: np.ndarray, name: str, layout: Layout) -> None:
    if np.any(tensor):
        raise NotRepresentable(
            f"{name} is not zero, and layout {layout} has no place for this bias.",
            where=f"{name}: {np.count_nonzero(tensor)} of {tensor.size} elements, up to {np.abs(tensor).max()}",
            do="Set the bias to zero, or keep the checkpoint in its layout.",
        )


def _require_finite(cast_array: np.ndarray, source: Checkpoint, tensor: Planned) -> None:
    """float16 ends at 65504: a weight beyond it would become infinite in silence."""
    with np.errstate(invalid="ignore"):
        lost = int(np.isinf(cast_array).sum())
    if lost and lost > int(np.isinf(hub_tensor(source, tensor.slot.key)).sum()):
        raise NotRepresentable(
            f"{lost} element(s) of {tensor.name} are too large for {NAMES[tensor.code]}.",
            where=f"{source.source.path}: {tensor.source}",
            do="Use --dtype bfloat16 or float32, or keep the dtype.",
        )


def _cfg(source: Checkpoint, plan: Plan) -> dict[str, Any]:
    code = next((t.code for t in plan.tensors if t.slot.key == EMBEDDING), source.dtype)
    name = Path(source.source.given).resolve().name or "gpt-neo"
    return to_tl(plan.config, source.original_tl_config, dtype=NAMES[code], model_name=name)


def _write_beside(source: Checkpoint, plan: Plan, stage: Path, *, recast: bool) -> None:
    """Configs and tokenizer: what each layout's own loaders look for."""
    base = source.original_hf_config
    if plan.layout == "hooked":
        _write_json(stage / "cfg.json", _cfg(source, plan))
    else:
        code = next(t.code for t in plan.tensors if t.slot.key == EMBEDDING)
        dtype = NAMES[code] if recast or base is None else None
        config = to_hf(plan.config, base, tied=source.tied, dtype=dtype)
        _write_json(stage / "config.json", config)
        if plan.layout == "hf":
            generation = source.original_generation_config or _generation_config(config)
            _write_json(stage / "generation_config.json", generation)
    for path in source.source.tokenizer_files():
        shutil.copyfile(path, stage / path.name)


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    tokens = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True} | {k: v for k, v in tokens.items() if v is not None}


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
