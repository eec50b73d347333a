"""Naming what a set of tensors is that is no GPT-Neo, or not yet one, and what to do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.checkpoint.foreign_formats import from_flax
from converter.errors import BadInput, NotRepresentable, TensorMismatch, UnknownTensor

_ALONE = "neoconvert converts GPT-Neo alone; open this model with the library that saved it."
_OTHERS: dict[str, str] = {
    r"\.attn\.c_attn\.weight$": "GPT-2 (attn.c_attn)",
    r"\.mlp\.fc_in\.weight$": "GPT-J (mlp.fc_in)",
    r"\bgpt_neox\.|\.attention\.query_key_value\.": "GPT-NeoX (attention.query_key_value)",
    r"\.self_attention\.query_key_value\.": "BLOOM or Falcon (self_attention.query_key_value)",
    r"\bdecoder\.layers\.\d+\.self_attn\.": "OPT (decoder.layers)",
    r"\.attn\.qkv_proj\.weight$": "CodeGen (attn.qkv_proj)",
    r"\.attn\.Wqkv\.weight$": "MPT (attn.Wqkv)",
    r"\.self_attn\.q_proj\.": "LLaMA or one of its kind (self_attn.q_proj)",
    r"\bencoder\.layer\.\d+\.attention\.": "BERT or one of its kind (encoder.layer)",
}
"""Names that GPT-Neo does not have -> whose they are."""
_QUANTISED = re.compile(
    r"\.(SCB|qweight|qzeros|scales|biases|g_idx|weight_scale|weight_scale_inv|weight_packed|absmax|quant_map"
    r"|weight\.(absmax|quant_map|nested_absmax|quant_state\..*)|weight_format)$"
)
_ADAPTED = re.compile(
    r"\b(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\b|\.ia3_l\b"
)
_STORED_OTHERWISE = {
    r"\.(weight|bias)_(orig|mask)$|\.parametrizations\.": (
        "Some weights are stored as what they are computed from (pruning or a parametrization).",
        "Where it was made, make them plain before saving: torch.nn.utils.prune.remove(module,"
        " 'weight') or torch.nn.utils.parametrize.remove_parametrizations(module, 'weight').",
    ),
    r"\b_?flat_param": (
        "The tensors are FSDP's flat parameters: one process's part of the weights.",
        "Save the whole: with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):"
        " torch.save(model.state_dict(), FILE)",
    ),
}
"""Names of what stands for weights: what it is, and what to do."""
_INTEGERS = re.compile(r"(torch\.)?q?u?int8|[IU]8|F8_\w+|(torch\.)?float8_\w+|[IU]32|torch\.int32")


@dataclass(frozen=True)
class Seen:
    """What is known of a file's tensors before a layout is made of them."""

    names: Collection[str]
    """Of all tensors."""
    sizes: Mapping[str, int]
    """Elements of each that has the name of a GPT-Neo weight."""
    odd: Mapping[str, str]
    """By name, the dtype of those with such a name that are no floats."""
    config: Mapping[str, Any]
    """config.json, or nothing."""
    where: str

    def first(self, pattern: str | re.Pattern[str]) -> str | None:
        """The first name in which the pattern is found."""
        return next((name for name in self.names if re.search(pattern, name)), None)


def refuse_foreign_tensors(tensors: Seen) -> None:
    """
    Raises:
        BadInput: the tensors are another model's, or a GPT-Neo's in a form that must first be
            brought back to plain weights. The message says which, and how.
    """
    for check in (
        _flax,
        _other_model,
        _rotary,
        _quantised,
        _unmerged,
        _stored_otherwise,
        _empty,
        _optimizer,
    ):
        if error := check(tensors):
            raise error


def _flax(tensors: Seen) -> BadInput | None:
    name = tensors.first(r"[./](wte|wpe)[./]embedding$")
    if name is None:
        return None
    where = Path(tensors.where)
    return NotRepresentable(
        "The weights are Flax's (kernel, embedding and scale for weight).",
        where=f"{where}: {name}",
        do=from_flax(where.parent if where.suffix else where),
    )


def _other_model(tensors: Seen) -> BadInput | None:
    for pattern, whose in _OTHERS.items():
        if name := tensors.first(pattern):
            return NotRepresentable(
                f"The tensors have the names of {whose}, not of GPT-Neo.",
                where=f"{tensors.where}: {name}",
                do=_ALONE,
            )
    return None


def _rotary(tensors: Seen) -> BadInput | None:
    said = {k: v for k, v in tensors.config.items() if k in ("rotary", "rotary_dim") and v}
    lacking = not tensors.first(r"\b(wpe|ln_2)\b") and tensors.first(r"\bwte\b")
    if not said and not (lacking and tensors.first(r"\bln_1\b")):
        return None
    fields = ", ".join(f"{k}={v}" for k, v in said.items()) or "no wpe and no ln_2"
    return NotRepresentable(
        f"This is GPT-J or one of its kind under GPT-Neo's model_type: rotary positions ({fields}),"
        " where GPT-Neo has learned ones.",
        where=tensors.where,
        do=_ALONE,
    )


def _quantised(tensors: Seen) -> BadInput | None:
    said = tensors.config.get("quantization_config")
    method = str(said.get("quant_method", "")) if isinstance(said, dict) else ""
    shown = tensors.first(_QUANTISED)
    integers = [name for name, dtype in tensors.odd.items() if _INTEGERS.fullmatch(dtype)]
    integer = next((name for name in integers if name.endswith("weight")), None)
    if shown or (integer and said):
        name = integer or shown or ""
        kind = f" by {method}" if method else ""
        return NotRepresentable(
            f"The weights are quantised{kind}; neoconvert converts plain floats.",
            where=f"{tensors.where}: {name}"
            + (f" ({tensors.odd[name]})" if name in tensors.odd else ""),
            do="Give the checkpoint that it was quantised from"
            + _dequantised(method, tensors.where),
        )
    if said:
        return NotRepresentable(
            "config.json has a quantization_config, and the weights are plain floats: transformers"
            " would quantise them when it loads them.",
            where=tensors.where,
            do="If they are meant as they are, remove quantization_config from config.json.",
        )
    return None


def _dequantised(method: str, where: str) -> str:
    """transformers 5 cannot `save_pretrained` what it dequantised."""
    if method != "bitsandbytes":
        return "."
    code = (
        "import torch; from transformers import AutoModelForCausalLM as M;"
        f" m = M.from_pretrained({where!r}).dequantize(); m.config.save_pretrained('OUT');"
        " torch.save(m.state_dict(), 'OUT/pytorch_model.bin')"
    )
    return f"; or undo it, and convert OUT with --allow-pickle: python -c {shlex.quote(code)}"


def _unmerged(tensors: Seen) -> BadInput | None:
    name = tensors.first(_ADAPTED)
    if name is None:
        return None
    if not tensors.first(r"\bln_[1f]\.weight$"):
        return UnknownTensor(
            "The tensors are an adapter's (PEFT), without the model that it adapts.",
            where=f"{tensors.where}: {name}",
            do="Give the model, and the adapter's directory with it: neoconvert hf-to-tl BASE OUT --adapter DIR",
        )
    return UnknownTensor(
        "The weights are those of a model with an adapter (PEFT) that is not merged into them.",
        where=f"{tensors.where}: {name}",
        do="Where it was trained, save model.merge_and_unload().save_pretrained(OUT), and convert OUT.",
    )


def _stored_otherwise(tensors: Seen) -> BadInput | None:
    for pattern, (what, do) in _STORED_OTHERWISE.items():
        if name := tensors.first(pattern):
            return UnknownTensor(what, where=f"{tensors.where}: {name}", do=do)
    return None


def _empty(tensors: Seen) -> BadInput | None:
    empty = [name for name, size in tensors.sizes.items() if size == 0]
    if not empty:
        return None
    return TensorMismatch(
        f"{len(empty)} of {len(tensors.sizes)} weights are empty: placeholders that DeepSpeed ZeRO-3 saves"
        " where the weights are not gathered.",
        where=f"{tensors.where}: {empty[0]} has no elements",
        do="Put them together from the training checkpoint (FOLDER, which holds latest and global_step…),"
        " then convert OUT with --allow-pickle --cfg config.json:"
        " python -m deepspeed.utils.zero_to_fp32 FOLDER OUT",
    )


def _optimizer(tensors: Seen) -> BadInput | None:
    name = tensors.first(r"\b(exp_avg|exp_avg_sq|momentum_buffer|fp32_flat_groups)\b")
    if name is None or tensors.sizes:
        return None
    return UnknownTensor(
        "The tensors are an optimizer's state, and no weights are with them.",
        where=f"{tensors.where}: {name}",
        do="Give the model's own file, which is beside the optimizer's in the same checkpoint.",
    )
