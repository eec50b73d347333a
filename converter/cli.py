"""The `neoconvert` command: parse, call one function, print, exit code. No arithmetic.

Nothing heavy is imported until a command needs it: `--help` is instant.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import click

from converter import cli_defaults
from converter.choices import LensLayout, Reverse
from converter.cli_batch import batch
from converter.cli_completion import sources
from converter.cli_ending import Group, reporting
from converter.cli_env import env, version
from converter.cli_options import (
    UserPath,
    converting,
    converting_whole,
    cores,
    graph,
    printing,
    process_option,
    reading,
    running,
    sharing,
    verifying,
)
from converter.cli_running import conversion, open_named, require_report
from converter.cli_verify import reference, verify
from converter.output import shown

EPILOG = "Exit codes: 0 done and verified, 1 verification failed (nothing published), 2 usage, 3 bad input or a full disk, 4 this machine cannot do what was asked for, 70 a fault of neoconvert, 75 of batch alone: what failed may pass if it is run again, 130 and 143 interrupted."


@click.group(cls=Group, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@version
@click.pass_context
def main(context: click.Context) -> None:
    """Convert GPT-Neo checkpoints between Hugging Face and TransformerLens, and prove every file.

    SOURCE is a directory, a weight file, or a hub id such as EleutherAI/gpt-neo-125m.
    Every conversion is verified before it is published: each tensor bit for bit, and the
    model's log-probabilities in the software that will run it.
    """
    name = context.invoked_subcommand or ""
    context.default_map = {name: cli_defaults.read(name, main.commands)}


@main.command("hf-to-tl")
@click.argument("source", shell_complete=sources)
@click.argument("output", type=UserPath())
@click.option(
    "--layout",
    type=click.Choice(get_args(LensLayout)),
    default="hooked",
    show_default=True,
    help="hooked: HookedTransformer's names (TL 2 and 3). bridge: TransformerBridge's (TL 3 and 4).",
)
@process_option("none")
@converting_whole
@reporting
def hf_to_tl(source: str, output: Path, **options: Any) -> Any:
    """Convert Hugging Face to TransformerLens.

    \b
    neoconvert hf-to-tl EleutherAI/gpt-neo-125m neo-125m-tl
    neoconvert hf-to-tl my-finetune/ my-finetune-bridge --layout bridge
    neoconvert hf-to-tl my-finetune/ my-processed --process default --ledger exact
    """
    return conversion("hf-to-tl", source, output, **options)


@main.command("bake")
@click.argument("source", shell_complete=sources)
@click.argument("output", type=UserPath())
@process_option("default")
@converting_whole
@reporting
def bake(source: str, output: Path, **options: Any) -> Any:
    """Bake processing into an HF checkpoint.

    The result is a GPTNeoForCausalLM directory of the same function that transformers and
    TransformerBridge open as any other. Biases that folding makes ride on the LayerNorms.

    \b
    neoconvert bake EleutherAI/gpt-neo-125m neo-125m-processed
    """
    return conversion("bake", source, output, **options)


@main.command("tl-to-hf")
@click.argument("source", shell_complete=sources)
@click.argument("output", type=UserPath())
@click.option(
    "--reverse",
    type=click.Choice(get_args(Reverse)),
    default="auto",
    show_default=True,
    help="Undoing TransformerLens's processing. exact: the original bits, from the ledger, or exit 3."
    " functional: plain GPT-Neo of the same function, no ledger needed. auto: the best to be had.",
)
@converting_whole
@reporting
def tl_to_hf(source: str, output: Path, **options: Any) -> Any:
    """Convert TransformerLens to Hugging Face.

    Processing is undone.

    \b
    neoconvert tl-to-hf neo-125m-tl neo-125m-hf
    neoconvert tl-to-hf my-processed my-model --reverse exact
    neoconvert tl-to-hf model.pt model-hf --cfg cfg.json --allow-pickle
    """
    return conversion("tl-to-hf", source, output, **options)


@main.command("export-onnx")
@click.argument("source", shell_complete=sources)
@click.argument("output", required=False, type=UserPath())
@reading
@converting
@graph
@running("standard")
@verifying
@sharing
@printing
@reporting
def export_onnx(source: str, output: Path | None, **options: Any) -> Any:
    """Export to ONNX.

    Without OUTPUT, model.onnx is added beside SOURCE's own weights and copies none of them: one
    directory for transformers, TransformerBridge, onnxruntime, optimum and transformers.js.

    \b
    neoconvert export-onnx my-model
    neoconvert export-onnx EleutherAI/gpt-neo-125m neo-125m-onnx
    neoconvert export-onnx my-model --hook 'blocks.*.hook_resid_post'
    neoconvert export-onnx my-model my-model-js --for transformers-js
    """
    return conversion("export-onnx", source, output, **options)


@main.command("explain")
@click.argument("original", shell_complete=sources)
@click.argument("converted", shell_complete=sources)
@reading
@click.option(
    "--exit-code",
    is_flag=True,
    help="End with 1 where the two are different models, or something is not explained.",
)
@click.option(
    "--report",
    type=UserPath(dir_okay=False),
    metavar="FILE.html",
    help="Write what was found as one HTML page, with a map of the model.",
)
@cores
@printing
@reporting
def explain(
    original: str,
    converted: str,
    display: Any,
    revision: str | None,
    cfg: Path | None,
    allow_pickle: bool,
    adapter: Path | None,
    exit_code: bool,
    report: Path | None,
) -> Any:
    """Say which steps make weights differ.

    Found from the weights alone; no metadata is trusted. --revision, --cfg and --adapter are ORIGINAL's.

    \b
    neoconvert explain EleutherAI/gpt-neo-125m neo-125m-tl
    neoconvert explain my-model my-edited-model --report edit.html
    """
    require_report(report)
    from converter.explaining import explain as run

    first = open_named(
        original, revision=revision, cfg=cfg, allow_pickle=allow_pickle, adapter=adapter
    )
    second = open_named(converted, allow_pickle=allow_pickle)
    with display.progress() as progress:
        result = run(first, second, progress=progress)
    display.explanation(result)
    if report:
        from converter.explaining.page import write_page

        write_page(result, Path(os.path.realpath(report)))
        display.say(f"  report: {shown(report)}")
    other = result.verdict == "different-model" or bool(result.unexplained)
    return result.to_json(), int(exit_code and other)


@main.command("inspect")
@click.argument("path", shell_complete=sources)
@reading
@printing
@reporting
def inspect(path: str, display: Any, **reading: Any) -> Any:
    """Show what a checkpoint is.

    Layout, config, tensors, dtypes and provenance, from headers alone. Or an ONNX file.
    """
    from converter.inspection import Inspection

    result = Inspection(open_named(path, graphs=True, **reading))
    display.inspection(result)
    return result.to_json(), 0


main.add_command(verify)
main.add_command(reference)
main.add_command(batch)
main.add_command(env)


@main.command("demo")
@click.argument("output", required=False, type=UserPath())
@printing
@reporting
def demo(output: Path | None, display: Any) -> Any:
    """The tour on the model that ships here.

    Offline: HF to both TransformerLens layouts and back, every byte compared.
    Results are kept in OUTPUT, which is neoconvert-demo unless you name another.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from converter.demo.tour import run

    return run(output or Path("neoconvert-demo"), display)
