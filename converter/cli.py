"""The `neoconvert` command: parse, call one function, print, exit code. No arithmetic.

Nothing heavy is imported until a command needs it: `--help` is instant.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter import __version__
from converter.cli_options import converting, printing, processing, reading, reporting

if TYPE_CHECKING:
    from converter.checkpoint import Checkpoint

EPILOG = "Exit codes: 0 done and verified, 1 verification failed (nothing published), 2 usage, 3 bad input, 4 this machine cannot do what was asked for."


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="neoconvert")
def main() -> None:
    """Convert GPT-Neo checkpoints between Hugging Face and TransformerLens, and prove every file.

    SOURCE is a directory, a weight file, or a hub id such as EleutherAI/gpt-neo-125m.
    Every conversion is verified before it is published: each tensor bit for bit, and the
    model's log-probabilities in the software that will run it.
    """


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
@processing("none")
@reading
@converting
@printing
@reporting
def hf_to_tl(source: str, output: Path, **options: Any) -> Any:
    """Convert Hugging Face to TransformerLens.

    \b
    neoconvert hf-to-tl EleutherAI/gpt-neo-125m neo-125m-tl
    neoconvert hf-to-tl my-finetune/ my-finetune-bridge --layout bridge
    neoconvert hf-to-tl my-finetune/ my-processed --process default --ledger exact
    """
    return _convert("hf_to_tl", source, output, **options)


@main.command("bake")
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@processing("default")
@reading
@converting
@printing
@reporting
def bake(source: str, output: Path, **options: Any) -> Any:
    """Bake processing into an HF checkpoint.

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
@reading
@converting
@printing
@reporting
def tl_to_hf(source: str, output: Path, **options: Any) -> Any:
    """Convert TransformerLens to Hugging Face.

    Processing is undone.

    \b
    neoconvert tl-to-hf neo-125m-tl neo-125m-hf
    neoconvert tl-to-hf my-processed my-model --reverse exact
    neoconvert tl-to-hf model.pt model-hf --cfg cfg.json --allow-pickle
    """
    return _convert("tl_to_hf", source, output, **options)


@main.command("verify")
@click.argument("original")
@click.argument("artifact")
@reading
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
@printing
@reporting
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
    """Check that ARTIFACT reproduces ORIGINAL.

    Any two of HF and TransformerLens checkpoints.
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
@reading
@printing
@reporting
def explain(
    original: str,
    converted: str,
    display: Any,
    revision: str | None,
    cfg: Path | None,
    allow_pickle: bool,
) -> Any:
    """Say which steps make weights differ.

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
@reading
@printing
@reporting
def inspect(path: str, display: Any, **reading: Any) -> Any:
    """Show what a checkpoint is.

    Layout, config, tensors, dtypes and provenance, from headers alone.
    """
    from converter.inspection import Inspection

    result = Inspection(_open(path, **reading))
    display.inspection(result)
    return result.to_json(), 0


@main.command("demo")
@click.argument("output", required=False, type=click.Path(path_type=Path))
@printing
@reporting
def demo(output: Path | None, display: Any) -> Any:
    """The tour on the model that ships here.

    Offline: HF to both TransformerLens layouts and back, every byte compared.
    Results are kept in OUTPUT if it is given (default: neoconvert-demo).
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from converter.demo.tour import run

    return run(output or Path("neoconvert-demo"), display)
