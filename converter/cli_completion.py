"""What a shell offers when the tab key is pressed: paths and hub ids, steps, hook points."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from converter.choices import STEPS


def sources(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Files and directories, and the models in huggingface_hub's cache."""
    return [
        CompletionItem(incomplete, type="file"),
        *(CompletionItem(name) for name in _cached() if name.startswith(incomplete)),
    ]


def steps(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The steps, each once, with commas; or none, default, all."""
    before, comma, last = incomplete.rpartition(",")
    named = before.split(",") if before else []
    offered = [name for name in STEPS if name not in named]
    if not comma:
        offered = ["none", "default", "all", *offered]
    return [CompletionItem(before + comma + name) for name in offered if name.startswith(last)]


def hooks(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """TransformerLens's hook points, of every block."""
    from converter.onnx.hooks import BLOCK

    names = ["hook_embed", "hook_pos_embed", *(f"blocks.*.{name}" for name in BLOCK)]
    names += ["ln_final.hook_scale", "ln_final.hook_normalized"]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _cached() -> list[str]:
    """Ids of the models in the cache, as huggingface_hub names their directories; it is not imported
    for this, since a key is waiting."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE", f"{home}/hub")))
    try:
        names = [entry.name for entry in cache.iterdir()]
    except OSError:
        return []
    models = (name.removeprefix("models--") for name in names if name.startswith("models--"))
    return sorted(model.replace("--", "/", 1) for model in models)
