"""Finding a checkpoint: a directory, a weight file or a hub id -> files, config and layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from converter.checkpoint import hub
from converter.checkpoint.files import optional_json, read_json, weight_files
from converter.checkpoint.foreign_files import refuse_pointers
from converter.checkpoint.listing import meant_beside
from converter.checkpoint.reader import Entry, Reader, Stored
from converter.checkpoint.signature import Signature, signature
from converter.errors import SourceChanged, SourceNotFound, UsageError
from converter.strict_json import Json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "vocab.bpe", "bpe.codes",
    "tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model",
    "source.spm", "target.spm", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""The only files that are copied from a source. A blind `*.json` would bring its index along."""
TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer's further chat templates, each a .jinja file: they are copied too."""
_MOST_TEMPLATES = 100
PROVENANCE = "neoconvert.json"
ATTESTATION = "neoconvert.intoto.jsonl"
LEDGER = "ledger.safetensors"


@dataclass(frozen=True)
class Source:
    """The files of a checkpoint, found and opened, not yet interpreted."""

    given: str
    """What the user typed; of a model on the hub, its id."""
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
    bundled: tuple[tuple[Entry, Json], ...] = field(default=(), repr=False)
    """Configs in the weight file itself, and where in it: they go before those beside it."""
    notes: tuple[str, ...] = ()
    """What was found in looking for the files; see `Checkpoint.notes`."""
    live: bool = False
    """The weights are in memory: `path` is only what messages call them."""
    ledger_of: Path | None = None
    """For weights in memory: the directory whose ledger was made for them."""
    tokenizer: Any = field(default=None, repr=False)
    """The tokenizer object that goes with them, for models that are built of them."""
    opened: Mapping[Path, Signature | None] = field(default_factory=dict, repr=False)
    """Its files as they were before they were opened."""
    tokenizer_is_own: bool = False
    """The user gave it, so it is written beside the weights. That of a HookedTransformer or a
    bridge is not: TransformerLens has made it prepend a token."""

    @property
    def name(self) -> str:
        """What it is called wherever it lies: a hub id, or the last part of a local path."""
        return self.given if self.revision or self.live else called(self.given)

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

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Plain floats, by name. A name that a file says is another one's has that one's tensor."""
        found = {name: stored for r in self.readers for name, stored in r.tensors.items()}
        aliases = {alias: kept for r in self.readers for alias, kept in r.aliases.items()}
        more = {a: found[kept] for a, kept in aliases.items() if kept in found and a not in found}
        return found | more

    @cached_property
    def other(self) -> dict[str, str]:
        """What else the files hold, by name: its dtype, or what it is."""
        return {name: kind for r in self.readers for name, kind in r.other.items()}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Of bundles: by tensor, the entry that holds it."""
        return {name: entry for r in self.readers for name, entry in r.entries.items()}

    def reader(self, stored: Stored) -> Reader:
        """That of the file that holds a tensor."""
        return next(reader for reader in self.readers if stored.name in reader.tensors)

    def read(self, stored: Stored) -> np.ndarray:
        """A whole tensor, as it is stored."""
        return self.reader(stored).read(stored.name)

    def require_unchanged(self) -> None:
        """
        Raises:
            SourceChanged: a file is not the one that was opened, so what was read is of both.
        """
        for path, before in self.opened.items():
            if signature(path) != before:
                raise SourceChanged(
                    "SOURCE changed while it was read; nothing was published.",
                    where=str(path),
                    do="Run again when nothing writes to it.",
                )

    def tokenizer_files(self) -> list[Path]:
        """Tokenizer files beside the weights. A bare weight file's neighbours are not its own."""
        return _tokenizer_files(self.path) if self.is_directory else []


def find(
    given: str,
    *,
    revision: str | None,
    cfg: Path | None,
    allow_pickle: bool,
    cache: Path | None,
) -> Source:
    """Resolve what the user typed and open its weight files (headers only).

    Args:
        cache: where what comes from the hub is kept; None: in huggingface_hub's own.

    Raises:
        SourceNotFound, MissingShard, CorruptFile, ConfigError, PickleRefused: as their names say.
        UsageError: --revision with a local path.
    """
    path = Path(os.path.expanduser(given))
    if path.exists():
        if revision is not None:
            raise UsageError(
                "--revision names a commit on the hub, but SOURCE is a local path.",
                where=given,
                do="Leave --revision out, or give the hub id (owner/name).",
            )
        commit = None
    elif path.is_symlink():
        raise SourceNotFound(
            "This is a link that leads to nothing.",
            where=given,
            do="Make the link anew, or give the place that it should lead to.",
        )
    else:
        given, path, commit = _from_hub(given, revision, cache)
    directory = path if path.is_dir() else path.parent
    files = weight_files(path)
    beside = ("config.json", "cfg.json", "generation_config.json", PROVENANCE, LEDGER)
    opened = {*files.weights, *(directory / name for name in beside), *_tokenizer_files(directory)}
    opened |= {cfg} if cfg else set()
    before = {p: signature(p) for p in sorted(opened) if p.is_file()}
    if path.is_dir():
        refuse_pointers(_tokenizer_files(path))
        if (more := len(list((path / TEMPLATES).glob("*.jinja"))) - _MOST_TEMPLATES) > 0:
            files.notes.append(f"{more} of the tokenizer's chat templates are left out: too many")
    readers = files.open(allow_pickle=allow_pickle)
    hf_config: Json | None
    tl_config: Json | None
    if cfg is None:
        hf_config = optional_json(directory / "config.json")
        tl_config = optional_json(directory / "cfg.json")
        config_path = directory / ("cfg.json" if tl_config is not None else "config.json")
    else:
        config_path, stated = cfg, read_json(cfg)
        hf_config, tl_config = (stated, None) if stated.get("model_type") else (None, stated)
    return Source(
        given=given,
        path=path,
        readers=readers,
        hf_config=hf_config,
        tl_config=tl_config,
        generation_config=optional_json(directory / "generation_config.json"),
        provenance=optional_json(directory / PROVENANCE),
        revision=commit,
        config_path=config_path,
        bundled=tuple(c for r in readers for c in r.configs) if cfg is None else (),
        notes=tuple(files.notes),
        opened=before,
    )


def _from_hub(given: str, revision: str | None, cache: Path | None) -> tuple[str, Path, str]:
    """The model's id, its directory and the commit."""
    at_the_hub = hub.named(given)
    if at_the_hub is None:
        raise SourceNotFound(
            "There is no such file or directory, and this is not a hub id.",
            where=given,
            do=f"{meant_beside(given)}Give a directory, a weight file or a hub id such as EleutherAI/gpt-neo-125m.",
        )
    model, own = at_the_hub
    if revision is not None and own is not None:
        raise UsageError(
            "The revision is named twice.",
            where=f"{given} --revision {revision}",
            do=f"Leave one of the two out: {model}",
        )
    wanted = [
        "*.json",
        *TOKENIZER_FILES,
        f"{TEMPLATES}/*.jinja",
        "README.md",
    ]  # a card says under which licence
    path, commit = hub.fetch(model, own if revision is None else revision, wanted, cache)
    return model, path, commit


def _tokenizer_files(directory: Path) -> list[Path]:
    further = sorted((directory / TEMPLATES).glob("*.jinja"))[:_MOST_TEMPLATES]
    found = (*(directory / name for name in TOKENIZER_FILES), *further)
    return [path for path in found if path.is_file()]


def called(given: str | Path) -> str:
    """The last part of a local path, which says the same on every machine."""
    full = os.path.abspath(os.path.expanduser(given))
    return os.path.basename(full) or full


def provenance_of(path: Path) -> Json | None:
    """The neoconvert.json of a directory, or of the one a file is in."""
    return optional_json((path if path.is_dir() else path.parent) / PROVENANCE)
