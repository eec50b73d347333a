"""`adapter_config.json`, as far as merging depends on it. What cannot be merged here is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.checkpoint.config import is_finite
from converter.errors import ConfigError, NotRepresentable
from converter.strict_json import Json

_INERT = {
    # What was trained, and how; the result is in the tensors.
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
    # nn.Linear has its weight as [out, in] whatever this says, and peft puts it right.
    "fan_in_fan_out",
}  # fmt: skip
_READ = {
    "alpha_pattern", "ensure_weight_tying", "lora_alpha", "lora_bias", "modules_to_save", "r",
    "rank_pattern", "use_dora", "use_rslora",
}  # fmt: skip
_KEEP_THE_BASE = {"gaussian", "orthogonal", "eva"}
"""Initialisations that leave the base's weights as they were. Others (pissa, olora, loftq, corda)
move a part of them into the adapter."""
_BESIDE_THE_WEIGHTS = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "XLORA",
}  # fmt: skip
"""Methods that add inputs, or choose between adapters at run time: no weights hold them."""
_LONGEST_PATTERN, _MOST_REPEATS, _MOST_PATTERNS = 200, 3, 1000


@dataclass(frozen=True)
class Settings:
    """What a LoRA adapter's config says."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    """By pattern of module names: where the rank is another."""
    alphas: Mapping[str, float]
    rslora: bool
    dora: bool
    lora_bias: bool
    targets: tuple[str, ...]
    """Ends of the names of all modules that have an update; empty: not said in that way."""
    saved: tuple[str, ...]
    """Ends of the names of modules that were trained whole."""
    ties: bool
    base: str | None
    """Where its base was, when it was trained."""
    kept: Json
    """The fields that say something, for the record."""

    def rank_of(self, module: str) -> int:
        return self.ranks.get(_matching(self.ranks, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by."""
        alpha = self.alphas.get(_matching(self.alphas, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def is_saved(self, module: str) -> bool:
        """Whether the module is a whole one of the adapter's own."""
        return any(module.endswith(end) for end in self.saved)

    def is_target(self, module: str) -> bool:
        return any(module == end or module.endswith(f".{end}") for end in self.targets)


def settings_of(config: Mapping[str, Any], where: str, merge: str) -> Settings:
    """Read an adapter's config.

    Args:
        where: the file, for messages.
        merge: the command with which peft itself merges the adapter.

    Raises:
        ConfigError: a field that is not what peft writes.
        NotRepresentable: another method than LoRA, or a variant that is not merged here.
    """
    _require_lora(config, where, merge)
    kept = {name: value for name, value in config.items() if value not in (None, False, [], {}, "")}
    ranks = _pattern_table(config, "rank_pattern", where)
    alphas = _pattern_table(config, "alpha_pattern", where)
    targets = config.get("target_modules")
    partial = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    base = config.get("base_model_name_or_path")
    return Settings(
        rank=_rank(config.get("r", 8), "r", where),
        alpha=_number(config.get("lora_alpha", 8), "lora_alpha", where),
        ranks={key: _rank(value, f"rank_pattern[{key!r}]", where) for key, value in ranks.items()},
        alphas={k: _number(value, f"alpha_pattern[{k!r}]", where) for k, value in alphas.items()},
        rslora=_flag(config, "use_rslora", where),
        dora=_flag(config, "use_dora", where),
        lora_bias=_flag(config, "lora_bias", where),
        targets=() if partial or isinstance(targets, str) else _names(config, "target_modules", where),
        saved=_names(config, "modules_to_save", where),
        ties=_flag(config, "ensure_weight_tying", where),
        base=base if isinstance(base, str) and base else None,
        kept=kept,
    )  # fmt: skip


def _require_lora(config: Mapping[str, Any], where: str, merge: str) -> None:
    method = config.get("peft_type")
    if not isinstance(method, str):
        raise ConfigError(
            f"peft_type is {_short(method)}: this is no adapter's config.",
            where=where,
            do="Give the directory that peft's save_pretrained wrote.",
        )
    if method in _BESIDE_THE_WEIGHTS:
        raise NotRepresentable(
            f"The adapter is {method}, which works beside the weights: no model without it has its function.",
            where=f"{where}: peft_type",
            do="Train a LoRA adapter; it becomes part of the weights.",
        )
    if method != "LORA":
        raise NotRepresentable(
            f"The adapter is {_short(method)}; neoconvert merges LoRA.",
            where=f"{where}: peft_type",
            do=merge,
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in _KEEP_THE_BASE:
        raise NotRepresentable(
            f"init_lora_weights {_short(start)} took a part of the base's weights into the adapter.",
            where=f"{where}: init_lora_weights",
            do=merge,
        )
    for name, value in config.items():
        if name not in _INERT | _READ and value not in (None, False, [], {}, ""):
            raise NotRepresentable(
                f"{_short(name)} is set, which neoconvert does not merge.",
                where=f"{where}: {_short(name)}",
                do=merge,
            )


def _flag(config: Mapping[str, Any], name: str, where: str) -> bool:
    value = config.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise _wrong(name, value, "true or false", where)


def _rank(value: Any, name: str, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
        return value
    raise _wrong(name, value, "a whole number above 0", where)


def _number(value: Any, name: str, where: str) -> float:
    if is_finite(value):
        return float(value)
    raise _wrong(name, value, "a finite number", where)


def _names(config: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = config.get(name)
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(one, str) and one for one in value):
        return tuple(value)
    raise _wrong(name, value, "a list of names", where)


def _pattern_table(config: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """Values by regular expressions, as peft has them, kept simple enough to be matched quickly."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _MOST_PATTERNS:
        raise _wrong(name, value, "an object of patterns and numbers", where)
    for pattern in value:
        try:
            repeats = len(re.findall(r"[*+?{]", pattern))
            if (
                len(pattern) > _LONGEST_PATTERN
                or repeats > _MOST_REPEATS
                or re.search(r"\)[*+{]", pattern)
            ):
                raise ValueError
            re.compile(_whole(pattern))
        except (re.error, ValueError, RecursionError, OverflowError):
            raise _wrong(name, pattern, "names of modules or simple patterns", where) from None
    return value


def _whole(pattern: str) -> str:
    """As peft matches: the end of a module's name."""
    return rf"(.*\.)?({pattern})$"


def _matching(patterns: Sequence[str] | Mapping[str, Any], module: str) -> str:
    return next((p for p in patterns if re.match(_whole(p), module)), module)


def _wrong(name: str, value: Any, expected: str, where: str) -> ConfigError:
    return ConfigError(
        f"{name} is {_short(value)}: expected {expected}.",
        where=where,
        do="Get the adapter's config again from where the adapter came from.",
    )


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}…"
