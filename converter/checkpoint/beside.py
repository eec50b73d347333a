"""What else a directory holds that transformers loads with the weights found there, or in their place."""

from __future__ import annotations

import os
import re
import shlex

from converter.checkpoint.recipes import quoted
from converter.checkpoint.source import Source
from converter.checkpoint.standard import NAMED, weights_name
from converter.errors import ConfigError, UnknownTensor

_ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""A file of what transformers 5 saves from several devices."""


def refuse_other_weights(source: Source) -> None:
    """Of a directory in HF's layout: what `from_pretrained` runs must be what was read.

    Which of two models is run depends on the versions of transformers and peft, so that neither may
    be chosen here.

    Raises:
        ConfigError: the config names other weights.
        UnknownTensor: an adapter or a second set of weights lies beside them.
    """
    if not source.is_directory:
        return
    read = weights_name(source.path) or "its shards"
    named = (source.hf_config or {}).get(NAMED)
    if named is not None and named != read:
        other = str(source.path / str(named))
        there = os.path.basename(other) == named and os.path.isfile(other)
        its = f"; if {named}, give that file: {shlex.quote(other)}" if there else ""
        raise ConfigError(
            f"The config names other weights, {str(named)[:80]!r}, than {read}: transformers 5 loads"
            " them, and its earlier versions do not.",
            where=f"{source.config_path}: {NAMED}",
            do=f"If {read} is meant, remove {NAMED} from the config{its}",
        )
    if (source.path / _ADAPTER).is_file():
        place = quoted(source.path)
        raise UnknownTensor(
            "An adapter (PEFT) lies beside the weights: transformers adds it to them, but only where"
            " peft is installed.",
            where=str(source.path / _ADAPTER),
            do="Move the adapter to a folder of its own, and name that with --adapter if it is to be"
            f" merged: mkdir {place}/adapter && mv {place}/adapter_* {place}/adapter",
        )
    if second := sorted(p.name for p in source.path.iterdir() if _SHARD.fullmatch(p.name)):
        raise UnknownTensor(
            f"Two sets of weights are here, {read} and {second[0]}: transformers 5 loads the latter,"
            " and its earlier versions the former.",
            where=str(source.path),
            do=f"Keep one set alone; if {read} is meant, move the files shard-* away.",
        )
