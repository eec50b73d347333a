"""The `neoconvert` command: parse, call one function, print, exit code. No arithmetic.

Nothing heavy is imported until a command needs it: `--help` is instant.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from converter import __version__
from converter.errors import NeoconvertError

if TYPE_CHECKING:
    from converter.checkpoint import Checkpoint

SCHEMA_VERSION = 1
Command = TypeVar("Command", bound=Callable[..., Any])

EPILOG = "Exit codes: 0 done and verified, 1 verification failed (nothing published), 2 usage, 3 bad input, 4 this machine cannot do what was asked for."


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="neoconvert")
def main() -> None:
    """Convert GPT-Neo checkpoints between Hugging Face and TransformerLens, and prove every file.

    SOURCE is a directory, a weight file, or a hub id such as EleutherAI/gpt-neo-125m.
    Every conversion is verified before it is published: each tensor bit for bit, and the
    model's log-probabilities in the software that will run it.
    """


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


_reading = _options(
    click.option(
        "--revision", metavar="REV", help="Branch, tag or commit, when SOURCE is a hub id."
    ),
    click.option(
        "--cfg",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="The config of a bare state dict: TransformerLens's cfg or HF's config, as JSON.",
    ),
    click.option(
        "--allow-pickle",
        is_flag=True,
        help="Read .bin, .pt and .pth files (always weights_only=True). Only for files you trust.",
    ),
)
_printing = _options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def _processing(default: str) -> Callable[[Command], Command]:
    return _options(
        click.option(
            "--process",
            default=default,
            show_default=True,
            metavar="none|default|all|STEP,…",
            help="TransformerLens's processing: fold_ln, center_writing_weights, center_unembed,"
            " fold_value_biases (these four are default, what from_pretrained does),"
            " refactor_factored_attn_matrices.",
        ),
        click.option(
            "--ledger",
            type=click.Choice(["compact", "exact", "none"]),
            default="compact",
            show_default=True,
            help="What is kept so that processing can be undone. exact: the original bits.",
        ),
    )


_converting = _options(
    click.option(
        "--dtype",
        type=click.Choice(["keep", "float32", "float16", "bfloat16"]),
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
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda[:N]",
        help="Where verification runs the models.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace OUTPUT, whole, once all is verified."),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
)


def _reporting(command: Command) -> Command:
    """Errors as three lines and an exit code; SIGTERM cleans up like Ctrl-C."""

    @functools.wraps(command)
    def wrapper(*args: Any, as_json: bool, quiet: bool, debug: bool, **kwargs: Any) -> None:
        name = click.get_current_context().info_name or ""
        signal.signal(signal.SIGTERM, _on_sigterm)
        from converter.display import Display

        display = Display(as_json=as_json, quiet=quiet)
        try:
            document, exit_code = command(*args, display=display, **kwargs)
        except NeoconvertError as error:
            if debug:
                raise
            _fail(name, error, as_json)
        except KeyboardInterrupt:
            click.echo("Interrupted; OUTPUT is as it was.", err=True)
            sys.exit(130)
        except OSError as error:
            if debug or error.errno is None:
                raise
            _fail(name, _os_error(error), as_json)
        if as_json:
            _print_json(name, exit_code, document)
        sys.exit(exit_code)

    return wrapper  # type: ignore[return-value]


def _on_sigterm(signum: int, _frame: object) -> NoReturn:
    sys.exit(128 + signum)


def _os_error(error: OSError) -> NeoconvertError:
    return NeoconvertError(
        f"The system refused: {error.strerror}.",
        where=str(error.filename or error.filename2 or "no file named"),
        do="Check permissions and free space; OUTPUT is as it was.",
    )


def _print_json(command: str, exit_code: int, document: dict[str, Any]) -> None:
    head = {"schema_version": SCHEMA_VERSION, "command": command, "exit_code": exit_code}
    click.echo(json.dumps(head | document, indent=2, allow_nan=False))


def _fail(command: str, error: NeoconvertError, as_json: bool) -> NoReturn:
    what, where, do = error.lines()
    click.echo(f"{click.style('Error', fg='red', bold=True)}: {what}", err=True)
    click.echo(f"   in: {where}", err=True)
    click.echo(f"   do: {do}", err=True)
    if as_json:
        fault = {"type": type(error).__name__, "what": what, "where": where, "do": do}
        _print_json(command, error.exit_code, {"error": fault} | error.details)
    sys.exit(error.exit_code)


def _open(
    source: str, revision: str | None = None, cfg: Path | None = None, allow_pickle: bool = False
) -> Checkpoint:
    from converter.checkpoint import open_checkpoint

    return open_checkpoint(source, revision=revision, cfg=cfg, allow_pickle=allow_pickle)


def _convert(direction: str, source: str, output: Path, display: Any, **options: Any) -> Any:
    from converter import convert

    opened = _open(source, *(options.pop(name) for name in ("revision", "cfg", "allow_pickle")))
    dtype = options.pop("dtype")
    with display.progress() as progress:
        done = getattr(convert, direction)(
            opened, output, dtype=None if dtype == "keep" else dtype, progress=progress, **options
        )
    display.conversion(done)
    return done.to_json(), 0


@main.command("hf-to-tl")
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--layout",
    type=click.Choice(["hooked", "bridge"]),
    default="hooked",
    show_default=True,
    help="hooked: HookedTransformer's names (TL 2 and 3). bridge: TransformerBridge's (TL 3 and 4).",
)
@_processing("none")
@_reading
@_converting
@_printing
@_reporting
def hf_to_tl(source: str, output: Path, **options: Any) -> Any:
    """Convert a Hugging Face checkpoint to TransformerLens.

    \b
    neoconvert hf-to-tl EleutherAI/gpt-neo-125m neo-125m-tl
    neoconvert hf-to-tl my-finetune/ my-finetune-bridge --layout bridge
    neoconvert hf-to-tl my-finetune/ my-processed --process default --ledger exact
    """
    return _convert("hf_to_tl", source, output, **options)


@main.command("bake")
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@_processing("default")
@_reading
@_converting
@_printing
@_reporting
def bake(source: str, output: Path, **options: Any) -> Any:
    """Bake TransformerLens's processing into a plain Hugging Face checkpoint.

    The result is a GPTNeoForCausalLM directory of the same function that transformers and
    TransformerBridge open as any other. Biases that folding makes ride on the LayerNorms.

    \b
    neoconvert bake EleutherAI/gpt-neo-125m neo-125m-processed
    """
    return _convert("bake", source, output, **options)


@main.command("tl-to-hf")
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--reverse",
    type=click.Choice(["auto", "exact", "functional"]),
    default="auto",
    show_default=True,
    help="Undoing TransformerLens's processing. exact: the original bits, from the ledger, or exit 3."
    " functional: plain GPT-Neo of the same function, no ledger needed. auto: the best to be had.",
)
@_reading
@_converting
@_printing
@_reporting
def tl_to_hf(source: str, output: Path, **options: Any) -> Any:
    """Convert a TransformerLens checkpoint to Hugging Face, undoing processing.

    \b
    neoconvert tl-to-hf neo-125m-tl neo-125m-hf
    neoconvert tl-to-hf my-processed my-model --reverse exact
    neoconvert tl-to-hf model.pt model-hf --cfg cfg.json --allow-pickle
    """
    return _convert("tl_to_hf", source, output, **options)


@main.command("verify")
@click.argument("original")
@click.argument("artifact")
@_reading
@click.option(
    "--check",
    "checks",
    type=click.Choice(["weights", "function"]),
    multiple=True,
    default=("weights", "function"),
    show_default=True,
    help="Repeatable. weights: bit for bit. function: log-probabilities.",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]")
@_printing
@_reporting
def verify(
    original: str,
    artifact: str,
    display: Any,
    checks: tuple[str, ...],
    device: str,
    revision: str | None,
    cfg: Path | None,
    allow_pickle: bool,
) -> Any:
    """Check that ARTIFACT reproduces ORIGINAL: any two of HF and TL checkpoints.

    --revision and --cfg are ORIGINAL's. Exit code 0 if it does, 1 if it does not.
    """
    from converter.verification import verify as run

    first = _open(original, revision, cfg, allow_pickle)
    second = _open(artifact, allow_pickle=allow_pickle)
    with display.progress() as progress:
        result = run(first, second, checks=checks, device=device, progress=progress)
    display.verification(result)
    return result.to_json(), 0 if result.passed else 1


@main.command("explain")
@click.argument("original")
@click.argument("converted")
@_reading
@_printing
@_reporting
def explain(
    original: str,
    converted: str,
    display: Any,
    revision: str | None,
    cfg: Path | None,
    allow_pickle: bool,
) -> Any:
    """Say which processing steps make the weights of two checkpoints differ.

    Found from the weights alone; no metadata is trusted. --revision and --cfg are ORIGINAL's.

    \b
    neoconvert explain EleutherAI/gpt-neo-125m neo-125m-tl
    """
    from converter.explaining import explain as run

    first = _open(original, revision, cfg, allow_pickle)
    second = _open(converted, allow_pickle=allow_pickle)
    with display.progress() as progress:
        result = run(first, second, progress=progress)
    display.explanation(result)
    return result.to_json(), 0


@main.command("inspect")
@click.argument("path")
@_reading
@_printing
@_reporting
def inspect(path: str, display: Any, **reading: Any) -> Any:
    """Show layout, config, tensors, dtypes and provenance of a checkpoint. Reads headers only."""
    from converter.inspection import Inspection

    result = Inspection(_open(path, **reading))
    display.inspection(result)
    return result.to_json(), 0


@main.command("demo")
@click.argument("output", required=False, type=click.Path(path_type=Path))
@_printing
@_reporting
def demo(output: Path | None, display: Any) -> Any:
    """The whole tour on the small trained model that ships in the package, offline.

    Results are kept in OUTPUT if it is given (default: neoconvert-demo).
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from converter.demo.tour import run

    return run(output or Path("neoconvert-demo"), display)
