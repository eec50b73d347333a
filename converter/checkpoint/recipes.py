"""Commands for people to run: each writes the weights that are meant to a file of their own."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

ONE, ONE_PICKLE = "one.safetensors", "one.pt"


def keeping(files: list[Path], condition: str = "", keys: str = "") -> tuple[str, str]:
    """A shell command that writes some tensors of these files to one file here, and its name.

    Args:
        condition: which tensors, in Python, of their name `k` in the file.
        keys: what leads to them in a bundle, as `['state_dict']`.
    """
    names = [str(file) for file in files]
    every = f"for f in {names!r} " if len(names) > 1 else ""
    file = "f" if every else repr(names[0])
    chosen = f" if {condition}" if condition else ""
    if files[0].suffix == ".safetensors":
        code = (
            "from safetensors.torch import load_file, save_file; save_file({k: v "
            f"{every}for k, v in load_file({file}).items(){chosen}}}, {ONE!r})"
        )
        return python_command(code), ONE
    code = (
        "import torch; from converter.checkpoint.pickles import load;"
        f" torch.save({{k: v {every}for k, v in load({file}){keys}.items(){chosen}}}, {ONE_PICKLE!r})"
    )
    return python_command(code), ONE_PICKLE


def python_command(code: str) -> str:
    """Code as a shell command in this very environment, which has what it imports."""
    return f"{interpreter()} -c {shlex.quote(code)}"


def quoted(path: Path) -> str:
    """As a shell takes it."""
    return shlex.quote(str(path))


def interpreter() -> str:
    """As a shell takes it."""
    return shlex.quote(sys.executable or "python")


def options_for(name: str, config: Path | None = None) -> str:
    """The options that such a file is read with."""
    cfg = f"--cfg {quoted(config) if config else 'config.json'}"
    return cfg if name == ONE else f"--allow-pickle {cfg}"
