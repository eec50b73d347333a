"""An adapter's directory, as peft's `save_pretrained` writes it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converter.adapter.settings import Settings, settings_of
from converter.checkpoint.files import read_json
from converter.checkpoint.pickles import PickleReader
from converter.checkpoint.provenance import placeless
from converter.checkpoint.reader import Reader, SafetensorsReader, recorded
from converter.checkpoint.source import called
from converter.choices import place
from converter.dtypes import cast, sha256
from converter.errors import PickleRefused, SourceNotFound

_CONFIG, _WEIGHTS, _PICKLE = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """An opened LoRA adapter; its tensors are read when they are asked for."""

    given: str
    directory: Path
    settings: Settings
    reader: Reader

    @property
    def file(self) -> Path:
        return next(iter(self.reader.tensors.values())).file

    def read(self, name: str) -> np.ndarray:
        """A tensor, float64."""
        return cast(self.reader.read(name), "F64")

    def to_json(self) -> dict[str, Any]:
        """What provenance keeps: its name, its config, its tensors and their digests."""
        return {
            "given": called(self.given),
            "config": placeless(self.settings.kept),
            "tensors": {
                name: recorded(stored.code, stored.shape, sha256(self.reader.read(name)))
                for name, stored in sorted(self.reader.tensors.items())
            },
        }


def open_adapter(given: str | Path, base: str, *, allow_pickle: bool = False) -> Adapter:
    """Open an adapter's directory: its config, and the header of its weights.

    Args:
        base: what the user called the base, for the advice.

    Raises:
        SourceNotFound: no adapter is there.
        PickleRefused: its weights are a pickle file, and `allow_pickle` is not set.
        ConfigError, NotRepresentable: see `settings_of`. CorruptFile: see `SafetensorsReader`.
    """
    directory = place(given, "--adapter", f"Name the directory that holds {_CONFIG}.")
    config = directory / _CONFIG
    if not config.is_file():
        raise _none(given, directory)
    settings = settings_of(read_json(config), str(config), merge_command(base, str(given)))
    if (directory / _WEIGHTS).is_file():
        reader: Reader = SafetensorsReader(directory / _WEIGHTS)
    elif (directory / _PICKLE).is_file():
        if not allow_pickle:
            raise PickleRefused(
                "The adapter's weights are a pickle file, which can run code when it is opened.",
                where=str(directory / _PICKLE),
                do="If you trust where it came from, add --allow-pickle (read with weights_only=True).",
            )
        reader = PickleReader(directory / _PICKLE)
    else:
        raise SourceNotFound(
            f"The adapter has a config and no {_WEIGHTS}.",
            where=str(directory),
            do=f"Download the adapter's {_WEIGHTS} too.",
        )
    if not reader.tensors:
        raise SourceNotFound(
            "The adapter's file holds no weights.",
            where=str(directory),
            do="Save the adapter again with peft's save_pretrained.",
        )
    return Adapter(str(given), directory, settings, reader)


def merge_command(base: str, adapter: str) -> str:
    """How peft merges an adapter. Its result is a plain HF directory."""
    code = (
        f"import peft, transformers as t; m = t.AutoModelForCausalLM.from_pretrained({base!r});"
        f" peft.PeftModel.from_pretrained(m, {adapter!r}).merge_and_unload().save_pretrained('merged')"
    )
    return f"Let peft merge it, and convert merged/: python -c {shlex.quote(code)}"


def _none(given: str | Path, directory: Path) -> SourceNotFound:
    if not directory.is_dir():
        return SourceNotFound(
            "There is no such directory for the adapter.",
            where=f"--adapter {given}",
            do="Name the directory that holds adapter_config.json; from the hub: hf download ID --local-dir DIR.",
        )
    inner = sorted(path.parent.name for path in directory.glob(f"*/{_CONFIG}"))
    return SourceNotFound(
        f"The directory holds no {_CONFIG}.",
        where=f"--adapter {given}",
        do=f"Name the adapter inside it: {shlex.quote(str(directory / inner[0]))}"
        if inner
        else "Name the directory that peft's save_pretrained wrote.",
    )
