"""The weight files of a checkpoint: one, or shards with their index, each checked before it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from converter import strict_json
from converter.checkpoint.foreign_files import not_weights, pointer, refuse_foreign_file
from converter.checkpoint.foreign_folders import ANY_INDEX, nothing_here
from converter.checkpoint.reader import Reader, SafetensorsReader
from converter.checkpoint.recipes import quoted
from converter.checkpoint.standard import (
    INDEX,
    PICKLE_WEIGHTS,
    PICKLES,
    WEIGHTS,
    holds_weights,
    weights_name,
)
from converter.errors import ConfigError, CorruptFile, MissingShard, PickleRefused, passing
from converter.strict_json import Json

_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")
_MAX_JSON_BYTES = 64 * 2**20
_LONGEST_NAME = 255
"""Bytes that any file system takes."""


@dataclass
class Files:
    """A checkpoint's weight files."""

    weights: list[Path] = field(default_factory=list)
    promised: dict[str, Path] = field(default_factory=dict)
    """For shards: tensor name -> the file that the index says holds it."""
    notes: list[str] = field(default_factory=list)

    def open(self, *, allow_pickle: bool) -> tuple[Reader, ...]:
        """Readers of all files, headers read and checked against the index."""
        readers = tuple(_open(file, allow_pickle) for file in self.weights)
        self._check(readers)
        return readers

    def _check(self, readers: tuple[Reader, ...]) -> None:
        seen: dict[str, Path] = {}
        for file, reader in zip(self.weights, readers, strict=True):
            for name in (*reader.tensors, *reader.other):
                if name in seen:
                    raise CorruptFile(
                        f"Tensor {name} is in two shards.",
                        where=f"{seen[name]} and {file}",
                        do="Remove the stale shards, or download the checkpoint again.",
                    )
                seen[name] = file
        lacking = [name for name in self.promised if name not in seen]
        if [name.split(".")[-2:] for name in lacking] == [["lm_head", "weight"]]:
            # Some savers list the head that a tied model keeps once. Whether it may be missing, the
            # config tells.
            self.notes.append(
                f"the index lists {lacking[0]}, which no shard holds: it is the embedding"
            )
            del self.promised[lacking[0]]
        for name, file in self.promised.items():
            if seen.get(name) != file:
                raise CorruptFile(
                    f"The index says that {file.name} holds {name}; it does not.",
                    where=str(file.parent),
                    do="Index and shards are of different checkpoints; download both again.",
                )


def weight_files(path: Path) -> Files:
    """A weight file, the shards of an index, or a directory's weights: safetensors before pickle,
    one file before shards.

    Raises:
        SourceNotFound: there are none; the message names what is there instead.
        MissingShard, CorruptFile: the index or the shards are unsound.
    """
    if not path.is_dir():
        if re.fullmatch(ANY_INDEX, path.name):
            return _shards(path)
        _refuse_part(path)
        return Files([path])
    if name := weights_name(path):
        return _shards(path / name) if name.endswith(INDEX) else Files([path / name])
    if files := _without_index(path):
        return files
    raise nothing_here(path)


def _shards(index: Path) -> Files:
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
                do=f"Download {shard.name} too{_other(index)}.",
            )
    return Files(list(dict.fromkeys(promised.values())), promised)


def _other(index: Path) -> str:
    """The weights beside an index that could be read, were it not there."""
    others = (index.parent / name for name in (WEIGHTS, PICKLE_WEIGHTS))
    other = next((path.name for path in others if path.is_file()), None)
    return f", or give {other} itself" if other else ""


def _refuse_part(path: Path) -> None:
    """
    Raises:
        MissingShard: the file is one of several shards.
    """
    found = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.(safetensors|bin)", path.name)
    if found is None or int(found[2]) < 2:
        return
    index = path.with_name(f"{found[1]}.{found[3]}{INDEX}")
    whole = holds_weights(path.parent) or _SHARD.fullmatch(path.name)
    raise MissingShard(
        f"The file is one of {int(found[2])} shards, each with a part of the weights.",
        where=str(path),
        do=f"Give the index of the shards: {quoted(index)}"
        if index.is_file() and not whole
        else f"Give the directory, with all of them: {quoted(path.parent)}",
    )


def _without_index(directory: Path) -> Files | None:
    """Shards whose index is lost: their names say how many there are."""
    found = sorted(path for path in directory.iterdir() if _SHARD.fullmatch(path.name))
    for kind in ("safetensors", "bin"):
        shards = [path for path in found if path.name.endswith(kind)]
        if not shards:
            continue
        stem, total = shards[0].stem.split("-of-")
        stem = stem.rpartition("-")[0]
        wanted = {f"{stem}-{i + 1:05}-of-{total}.{kind}" for i in range(int(total))}
        missing = sorted(wanted ^ {path.name for path in shards})
        if missing:
            raise MissingShard(
                f"These shards have no index, and are not all of one set: {', '.join(missing[:4])}.",
                where=str(directory),
                do=f"Download the missing shards and the index, {stem}.{kind}{INDEX}.",
            )
        note = (
            f"the shards' index, {stem}.{kind}{INDEX}, is lost: all {len(shards)} shards were read"
        )
        return Files(shards, notes=[note])
    return None


def _plain_file_name(name: str) -> bool:
    safe = name not in ("", ".", "..") and not set(name) & {"\0", "/", "\\", ":"}
    safe = safe and len(name.encode("utf-8", "replace")) <= _LONGEST_NAME
    return (
        safe
        and PurePosixPath(name).name == PureWindowsPath(name).name == name
        and name.endswith((".safetensors", ".bin"))
    )


def _open(path: Path, allow_pickle: bool) -> Reader:
    refuse_foreign_file(path)
    if path.suffix == ".safetensors":
        return SafetensorsReader(path)
    if path.suffix in PICKLES:
        if not allow_pickle:
            raise PickleRefused(
                "This is a pickle file, which can run code when it is opened.",
                where=str(path),
                do="If you trust where it came from, add --allow-pickle (read with weights_only=True).",
            )
        from converter.checkpoint.pickles import PickleReader

        return PickleReader(path)
    raise not_weights(path)


def read_json(path: Path) -> Json:
    """A JSON object from a file. ConfigError if it is none, CorruptFile if it is too large."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
        if len(content) > _MAX_JSON_BYTES:
            raise CorruptFile("The JSON file is over 64 MiB.", where=str(path), do="Do not use it.")
        text = content.decode("utf-8")
        if error := pointer(path, text):
            raise error
        value = strict_json.loads(text)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and passing(error):
            raise
        raise ConfigError(
            f"The file cannot be read as JSON: {error}.",
            where=str(path),
            do="Download or write it again.",
        ) from error
    if not isinstance(value, dict):
        raise ConfigError("The file holds no JSON object.", where=str(path), do="Write it again.")
    return value


def optional_json(path: Path) -> Json | None:
    return read_json(path) if path.is_file() else None
