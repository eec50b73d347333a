"""The options that commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from converter.choices import (
    DEFAULT_STEPS,
    STEPS,
    Client,
    Effort,
    Format,
    GraphWeights,
    LedgerOption,
    RuntimeName,
    place,
)
from converter.cli_completion import hooks, steps
from converter.errors import UsageError

Callback = TypeVar("Callback", bound=Callable[..., Any])


def _options(*options: Callable[[Callback], Callback]) -> Callable[[Callback], Callback]:
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


class UserPath(click.Path):
    """See `choices.place`."""

    def __init__(self, **more: Any) -> None:
        super().__init__(path_type=Path, **more)

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            path = place(value, "it", "Name one.")
        except UsageError as error:
            self.fail(error.what, param, ctx)
        return super().convert(path, param, ctx)


reading = _options(
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id."),
    click.option(
        "--cfg",
        type=UserPath(exists=True, dir_okay=False),
        help="The config of a bare state dict: TransformerLens's cfg or HF's config, as JSON.",
    ),
    click.option(
        "--allow-pickle",
        is_flag=True,
        help="Read .bin, .pt, .pth and .ckpt files (always weights_only=True). Only for files you trust.",
    ),
    click.option(
        "--adapter",
        type=UserPath(),
        metavar="DIR",
        help="A PEFT (LoRA) adapter of these weights, merged into them in float64.",
    ),
)
printing = _options(
    click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def process_option(default: str) -> Callable[[Callback], Callback]:
    return _options(
        click.option(
            "--process",
            default=default,
            show_default=True,
            metavar="none|default|all|STEP,…",
            shell_complete=steps,
            help=f"TransformerLens's processing: {', '.join(DEFAULT_STEPS)}"
            " (these are default, what from_pretrained does),"
            f" {', '.join(name for name in STEPS if name not in DEFAULT_STEPS)}.",
        ),
        click.option(
            "--ledger",
            type=click.Choice(get_args(LedgerOption)),
            default="compact",
            show_default=True,
            help="What is kept so that processing can be undone. exact: the original bits.",
        ),
    )


class _Dtype(click.Choice[str]):
    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        said = super().get_invalid_choice_message(value, ctx)
        word = str(value).lower().removeprefix("torch.")
        meant = next((name for name, others in _DTYPES.items() if word in others), None)
        return f"{said} Did you mean {meant}?" if meant else said


_DTYPES = {
    "float32": ("float32", "float", "single", "fp32", "f32"),
    "float16": ("float16", "half", "fp16", "f16"),
    "bfloat16": ("bfloat16", "bf16", "bfloat"),
}

converting = _options(
    click.option(
        "--dtype",
        type=_Dtype(["keep", "float32", "float16", "bfloat16"]),
        default="keep",
        show_default=True,
        help="Dtype to store in.",
    ),
    click.option(
        "--max-shard-size",
        default="5GB",
        show_default=True,
        metavar="SIZE",
        help="Split larger checkpoints into shards, with an index.",
    ),
    click.option(
        "--verify/--no-verify",
        "check",
        default=True,
        show_default=True,
        help="Check the files written before they are published.",
    ),
    click.option(
        "--overwrite",
        is_flag=True,
        help="Replace OUTPUT, whole, once all is verified, if neoconvert wrote all of it.",
    ),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
)


cores = click.option(
    "--jobs",
    "cores",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cores to use. Default: all. The result is the same.",
)


def running(effort: Effort | None) -> Callable[[Callback], Callback]:
    """`effort`: the default; None: an original's own."""
    own = "" if effort else " Default: standard; of a reference file, its own."
    return _options(
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="auto|cpu|cuda[:N]",
            help="Where verification runs the models.",
        ),
        click.option(
            "--effort",
            type=click.Choice(get_args(Effort)),
            default=effort,
            show_default=effort is not None,
            help=f"How much is run. thorough: every token, every position, whatever it costs.{own}",
        ),
        cores,
    )


text = click.option(
    "--text",
    type=UserPath(exists=True, dir_okay=False),
    metavar="FILE",
    help="Text of your own to probe too, in UTF-8.",
)
verifying = _options(
    click.option(
        "--runtime",
        type=click.Choice(get_args(RuntimeName)),
        help="Run the weights in torch, or the graph in onnxruntime, alone. Default: what there is.",
    ),
    click.option(
        "--report",
        type=UserPath(dir_okay=False),
        metavar="FILE.html",
        help="Write the verification as one HTML page, with plots.",
    ),
)
graph = _options(
    click.option(
        "--hook",
        "hooks",
        multiple=True,
        shell_complete=hooks,
        metavar="PATTERN",
        help="Repeatable. TransformerLens's hook points that become ONNX outputs: blocks.*.hook_resid_post",
    ),
    click.option(
        "--weights",
        type=click.Choice(get_args(GraphWeights)),
        help="Where the graph's weights are. shared: in the safetensors files (default). external:"
        " in model.onnx_data. inline: in model.onnx, up to 2 GB.",
    ),
    click.option("--no-past", is_flag=True, help="ONNX without a cache of keys and values."),
    click.option(
        "--for",
        "client",
        type=click.Choice(get_args(Client)),
        help="ONNX in the folders that this client looks in.",
    ),
)
formats = click.option(
    "--format",
    "formats",
    type=click.Choice(get_args(Format)),
    multiple=True,
    default=("safetensors",),
    show_default=True,
    help="Repeatable. onnx: a graph too; alone with --weights external or inline, nothing else.",
)


sharing = _options(
    click.option(
        "--model-card",
        is_flag=True,
        help="Write README.md too: where it comes from, what was done and checked, how to load it.",
    ),
    click.option(
        "--push-to",
        metavar="OWNER/NAME",
        help="Push OUTPUT to the hub once it is published, in one commit. @BRANCH may follow.",
    ),
)
converting_whole = _options(
    reading, converting, formats, graph, running("standard"), verifying, sharing, printing
)
"""What every command that writes a checkpoint takes."""
