"""Finding a checkpoint: a directory, a weight file or a hub id -> files, config and layout."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from converter.checkpoint.reader import PickleReader, Reader, SafetensorsReader
from converter.errors import (
    ConfigError,
    CorruptFile,
    MissingShard,
    PickleRefused,
    SourceNotFound,
    UsageError,
)

Json = dict[str, Any]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
"""The only files that are copied from a source. A blind `*.json` would bring its index along."""
WEIGHTS = "model.safetensors"
PICKLE_WEIGHTS = "pytorch_model.bin"
PROVENANCE = "neoconvert.json"
LEDGER = "ledger.safetensors"
_INDEX = ".index.json"
_MAX_JSON_BYTES = 64 * 2**20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+[\w.-]*")


@dataclass(frozen=True)
class Source:
    """The files of a checkpoint, found and opened, not yet interpreted."""

    given: str
    """What the user typed."""
    path: Path
    """The directory, or the weight file."""
    readers: tuple[Reader, ...]
    hf_config: Json | None = field(repr=False)
    tl_config: Json | None = field(repr=False)
    generation_config: Json | None = field(repr=False)
    provenance: Json | None = field(repr=False)
    revision: str | None = None
    """The commit, for a hub id."""
    config_path: Path | None = None
    live: bool = False
    """The weights are in memory: `path` is only what messages call them."""
    ledger_of: Path | None = None
    """For weights in memory: the directory whose ledger was made for them."""
    tokenizer: Any = field(default=None, repr=False)
    """The tokenizer object that goes with them, for models that are built of them."""
    tokenizer_is_own: bool = False
    """The user gave it, so it is written beside the weights. That of a HookedTransformer or a
    bridge is not: TransformerLens has made it prepend a token."""

    @property
    def place(self) -> Path | None:
        """Where its files are, if anywhere."""
        return None if self.live else self.path

    @property
    def directory(self) -> Path:
        """
        Raises:
            UsageError: the weights are in memory, and have none.
        """
        if self.live:
            raise UsageError(
                "A model in memory has no directory of its own.",
                where=self.given,
                do="Name an OUTPUT directory, or write the model to one first.",
            )
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def is_directory(self) -> bool:
        return not self.live and self.path.is_dir()

    @property
    def ledger_directory(self) -> Path | None:
        """Where its ledger is, if it has one. A bare weight file's neighbours are not its own."""
        return self.path if self.is_directory else self.ledger_of

    def tokenizer_files(self) -> list[Path]:
        """Tokenizer files beside the weights. A bare weight file's neighbours are not its own."""
        if not self.is_directory:
            return []
        return [self.path / n for n in TOKENIZER_FILES if (self.path / n).is_file()]


@dataclass
class _Files:
    weights: list[Path] = field(default_factory=list)
    promised: dict[str, Path] = field(default_factory=dict)
    """For shards: tensor name -> the file that the index says holds it."""


def find(
    given: str, *, revision: str | None = None, cfg: Path | None = None, allow_pickle: bool = False
) -> Source:
    """Resolve what the user typed and open its weight files (headers only).

    Raises:
        SourceNotFound, MissingShard, CorruptFile, ConfigError, PickleRefused: as their names say.
        UsageError: --revision with a local path.
    """
    path = Path(given).expanduser()
    if path.exists():
        if revision is not None:
            raise UsageError(
                "--revision names a commit on the hub, but SOURCE is a local path.",
                where=given,
                do="Leave --revision out, or give the hub id (owner/name).",
            )
        commit = None
    else:
        path, commit = _from_hub(given, revision)
    directory = path if path.is_dir() else path.parent
    files = _weight_files(path) if path.is_dir() else _Files([path])
    readers = tuple(_open(file, allow_pickle) for file in files.weights)
    _check_index(files, readers, path)
    config_path = cfg
    tl_config = read_json(cfg) if cfg else None
    hf_config: Json | None = None
    if cfg and tl_config and tl_config.get("model_type"):
        hf_config, tl_config = tl_config, None
    pair = readers[0].extra if isinstance(readers[0], PickleReader) else None
    if cfg is None and pair is not None:
        tl_config, config_path = pair, path
    elif cfg is None:
        hf_config = _optional_json(directory / "config.json")
        tl_config = _optional_json(directory / "cfg.json")
        config_path = directory / ("cfg.json" if tl_config is not None else "config.json")
    return Source(
        given=given,
        path=path,
        readers=readers,
        hf_config=hf_config,
        tl_config=tl_config,
        generation_config=_optional_json(directory / "generation_config.json"),
        provenance=_optional_json(directory / PROVENANCE),
        revision=commit,
        config_path=config_path,
    )


def _from_hub(given: str, revision: str | None) -> tuple[Path, str]:
    """Download through huggingface_hub, or find in its cache when offline."""
    if not _HUB_ID.fullmatch(given):
        raise SourceNotFound(
            "There is no such file or directory, and this is not a hub id.",
            where=given,
            do="Give a directory, a weight file or a hub id such as EleutherAI/gpt-neo-125m.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]
    try:
        found = Path(snapshot_download(given, revision=revision, allow_patterns=wanted))
        if not any(found.glob("*.safetensors")):
            found = Path(
                snapshot_download(given, revision=revision, allow_patterns=[*wanted, "*.bin"])
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceNotFound(
            f"There is no such local path, and the hub gave no such model: {reason}",
            where=f"{given}" + (f" at revision {revision}" if revision else ""),
            do="Check the name; offline, fill the cache first (hf download) or give a local directory.",
        ) from error
    return found, found.name


def holds_weights(directory: Path) -> bool:
    """Whether a directory has a file of weights, or an index of several."""
    names = [f"{name}{suffix}" for name in (WEIGHTS, PICKLE_WEIGHTS) for suffix in ("", _INDEX)]
    return any((directory / name).is_file() for name in names)


def _weight_files(directory: Path) -> _Files:
    """A directory's weights, safetensors before pickle, one file before shards."""
    for name in (WEIGHTS, PICKLE_WEIGHTS):
        if (directory / name).is_file():
            return _Files([directory / name])
        index = directory / f"{name}{_INDEX}"
        if index.is_file():
            return _shards(index)
    raise SourceNotFound(
        f"The directory holds no {WEIGHTS} (or its index) and no {PICKLE_WEIGHTS}.",
        where=str(directory),
        do="Name the directory that holds the weights, or the weight file itself.",
    )


def _shards(index: Path) -> _Files:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile("The index has no weight_map.", where=str(index), do="Download it again.")
    promised: dict[str, Path] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _plain_file_name(name):
            raise CorruptFile(
                f"The index names {name!r} as a shard, which is not a plain weight file's name.",
                where=f"{index}: {tensor}",
                do="Do not use this checkpoint; its index tries to leave the directory.",
            )
        promised[tensor] = index.parent / name
    for shard in dict.fromkeys(promised.values()):
        if not shard.is_file():
            raise MissingShard(
                f"The index names {shard.name}, which is not there.",
                where=str(index),
                do="Download the missing shard.",
            )
    return _Files(list(dict.fromkeys(promised.values())), promised)


def _plain_file_name(name: str) -> bool:
    safe = name not in ("", ".", "..") and not set(name) & {"\0", "/", "\\", ":"}
    return (
        safe
        and PurePosixPath(name).name == PureWindowsPath(name).name == name
        and name.endswith((".safetensors", ".bin"))
    )


def _check_index(files: _Files, readers: tuple[Reader, ...], path: Path) -> None:
    seen: dict[str, Path] = {}
    for file, reader in zip(files.weights, readers, strict=True):
        for name in (*reader.tensors, *reader.other):
            if name in seen:
                raise CorruptFile(
                    f"Tensor {name} is in two shards.",
                    where=f"{seen[name]} and {file}",
                    do="Remove the stale shards, or download the checkpoint again.",
                )
            seen[name] = file
    for name, file in files.promised.items():
        if seen.get(name) != file:
            raise CorruptFile(
                f"The index says that {file.name} holds {name}; it does not.",
                where=str(path),
                do="Index and shards are of different checkpoints; download both again.",
            )


def _open(path: Path, allow_pickle: bool) -> Reader:
    if path.suffix == ".safetensors":
        return SafetensorsReader(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        if not allow_pickle:
            raise PickleRefused(
                "This is a pickle file, which can run code when it is opened.",
                where=str(path),
                do="If you trust where it came from, add --allow-pickle (read with weights_only=True).",
            )
        return PickleReader(path)
    raise CorruptFile(
        f"{path.suffix or 'No suffix'!r}: this is not a weight file that neoconvert reads.",
        where=str(path),
        do="Give the checkpoint that the graph was exported from; `verify` and `inspect` read graphs."
        if path.suffix == ".onnx"
        else "Give a .safetensors file, or .bin, .pt or .pth with --allow-pickle.",
    )


def read_json(path: Path) -> Json:
    """A JSON object from a file. ConfigError if it is none, CorruptFile if it is too large."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptFile("The JSON file is over 64 MiB.", where=str(path), do="Do not use it.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"The file cannot be read as JSON: {error}.",
            where=str(path),
            do="Download or write it again.",
        ) from error
    if not isinstance(value, dict):
        raise ConfigError("The file holds no JSON object.", where=str(path), do="Write it again.")
    return value


def provenance_of(path: Path) -> Json | None:
    """The neoconvert.json of a directory, or of the one a file is in."""
    return _optional_json((path if path.is_dir() else path.parent) / PROVENANCE)


def _optional_json(path: Path) -> Json | None:
    return read_json(path) if path.is_file() else None
