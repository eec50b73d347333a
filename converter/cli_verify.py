"""`neoconvert verify` and `neoconvert reference`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from converter.choices import Check
from converter.cli_completion import sources
from converter.cli_ending import reporting
from converter.cli_options import UserPath, printing, reading, running, text, verifying
from converter.cli_running import READING, open_named, report_to, require_report, verified
from converter.errors import UsageError
from converter.output import shown

if TYPE_CHECKING:
    from converter.verification.original import Original


@click.command("verify")
@click.argument("original", shell_complete=sources)
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT…", shell_complete=sources)
@reading
@click.option(
    "--check",
    "checks",
    type=click.Choice(get_args(Check)),
    multiple=True,
    default=get_args(Check),
    show_default=True,
    help="Repeatable. weights: bit for bit. function: log-probabilities.",
)
@click.option(
    "--require",
    callback=lambda _context, _option, given: given or None,
    multiple=True,
    metavar="LINK,…",
    help="Links that must be compared: weights, structure, program, route, arithmetic. Default: all"
    " of what neoconvert wrote, none of what others did.",
)
@click.option(
    "--max-ratio",
    type=float,
    help="How many times float32's own noise ARTIFACT may be off. Default: 8.",
)
@click.option(
    "--max-kl",
    type=float,
    metavar="NATS",
    help="For ARTIFACTs that are lossy on purpose (quantised): the largest KL of a probe.",
)
@click.option(
    "--min-top1",
    type=float,
    metavar="SHARE",
    help="Likewise: the least share of positions with the same most likely token, over all probes."
    " One probe may miss it by two standard deviations of so few positions, or by less than one.",
)
@click.option(
    "--max-perplexity-ratio",
    type=float,
    metavar="RATIO",
    help="Likewise: ARTIFACT's perplexity over ORIGINAL's, on texts. Beside the others.",
)
@text
@click.option(
    "--python",
    "pythons",
    type=UserPath(exists=True, dir_okay=False),
    multiple=True,
    metavar="PATH",
    help="Repeatable. Run ARTIFACT's weights in the environment of this interpreter too.",
)
@running(None)
@verifying
@printing
@reporting
def verify(
    original: str,
    artifacts: tuple[str, ...],
    display: Any,
    revision: str | None,
    cfg: Path | None,
    allow_pickle: bool,
    adapter: Path | None,
    report: Path | None,
    **options: Any,
) -> Any:
    """Check that ARTIFACT reproduces ORIGINAL.

    Any two of HF and TransformerLens checkpoints and ONNX files. A directory with weights and a
    model.onnx is checked in both runtimes; of several graphs, each. For several ARTIFACTs, ORIGINAL
    runs once.
    --revision, --cfg and --adapter are ORIGINAL's. Exit code 0 if all do, 1 if one does not.

    \b
    neoconvert verify my-model my-model-tl
    neoconvert verify my-model my-model-tl my-model-js --effort quick
    """
    require_report(report)
    if report is not None and len(artifacts) > 1:
        raise UsageError(
            "A report is of one ARTIFACT.",
            where=f"--report {report}",
            do="Verify one at a time, or take --json.",
        )
    known = _original(original, allow_pickle, revision, cfg, adapter)
    opened_all = [open_named(name, allow_pickle=allow_pickle, graphs=True) for name in artifacts]
    documents = []
    for name, artifact in zip(artifacts, opened_all, strict=True):
        if len(artifacts) > 1:
            display.say(f"[bold]{shown(name)}[/]")
        documents.append(verified(known, artifact, display, layers=report is not None, **options))
    if len(documents) > 1:
        passed = all(document["passed"] for document in documents)
        return {"passed": passed, "verifications": documents}, 0 if passed else 1
    (document,) = documents
    written = report_to(report, document, artifacts[0], display)
    return document, 1 if not document["passed"] else 0 if written else 3


@click.command("reference")
@click.argument("original", shell_complete=sources)
@click.argument("file", type=UserPath(dir_okay=False))
@reading
@text
@running("standard")
@click.option(
    "--overwrite", is_flag=True, help="Replace FILE, if it is a reference that neoconvert wrote."
)
@printing
@reporting
def reference(original: str, file: Path, display: Any, **options: Any) -> Any:
    """Write what verify needs of ORIGINAL to one small FILE.

    verify takes FILE in ORIGINAL's place, and neither reads nor runs ORIGINAL again: probes, the
    float64 log-probabilities at some tokens, float32's noise, and digests of the weights.

    \b
    neoconvert reference EleutherAI/gpt-neo-125m neo-125m.reference
    neoconvert verify neo-125m.reference my-neo-tl
    """
    from converter.recorded import reference as run

    reading = {name: options.pop(name) for name in READING}
    checkpoint = open_named(original, graphs=True, **reading)
    with display.progress() as progress:
        document = run(checkpoint, file, progress=progress, **options)
    count = len(document["probes"])
    display.say(f"{shown(file)}: {document['bytes']:,} bytes, {count} probes")
    return document, 0


def _original(
    name: str,
    allow_pickle: bool,
    revision: str | None,
    cfg: Path | None,
    adapter: Path | None,
) -> Original:
    """A reference file, or a checkpoint that is read as the options say."""
    from converter.recorded.file import is_reference
    from converter.verification.original import Original, original_of

    if not is_reference(path := Path(os.path.expanduser(name))):
        return Original(
            open_named(
                name,
                revision=revision,
                cfg=cfg,
                allow_pickle=allow_pickle,
                adapter=adapter,
                graphs=True,
            )
        )
    given = {"--revision": revision, "--cfg": cfg, "--adapter": adapter}
    if unread := [option for option, value in given.items() if value]:
        raise UsageError(
            "A reference file is read by itself.", where=unread[0], do=f"Leave {unread[0]} out."
        )
    return original_of(path)
