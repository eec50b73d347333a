"""What the commands do once their options are parsed: open, convert, show, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.errors import UsageError, VerificationFailed

if TYPE_CHECKING:
    from converter.checkpoint import Checkpoint
    from converter.exporting import Graph


def opened(
    source: str,
    *,
    revision: str | None = None,
    cfg: Path | None = None,
    allow_pickle: bool = False,
    adapter: Path | None = None,
    graphs: bool = False,
) -> Checkpoint:
    """The checkpoint that a command names, with the adapter that it names; `graphs`: or ONNX."""
    from converter.checkpoint import open_checkpoint
    from converter.opening import open_artifact

    opener = open_artifact if graphs else open_checkpoint
    checkpoint = opener(source, revision=revision, cfg=cfg, allow_pickle=allow_pickle)
    if adapter is None:
        return checkpoint
    from converter.adapter import with_adapter

    return with_adapter(checkpoint, adapter, allow_pickle=allow_pickle)


def require_report(path: Path | None) -> None:
    """
    Raises:
        UsageError: a report cannot be written there; told before an hour's work, not after.
    """
    if path is None:
        return
    if path.exists() and not path.is_file():
        what = "There is something there that is no file."
    elif not path.resolve().parent.is_dir():
        what = "There is no such directory for the report."
    else:
        return
    raise UsageError(what, where=f"--report {path}", do="Name a file in a directory that is there.")


def conversion(
    direction: str, source: str, output: Path | None, display: Any, **options: Any
) -> Any:
    from converter import convert

    reading = ("revision", "cfg", "allow_pickle", "adapter")
    source_checkpoint = opened(source, **{name: options.pop(name) for name in reading})
    dtype, report = options.pop("dtype"), options.pop("report")
    require_report(report)
    asked = options.pop("formats", ("onnx",))
    options["graph"] = _graph(asked, *(options.pop(n) for n in ("weights", "no_past", "hooks", "client")))  # fmt: skip
    if "safetensors" in asked:
        options["keep_weights"] = True
    if report and not options["check"]:
        raise UsageError("There is no verification to report.", where="--no-verify", do="Leave it out.")  # fmt: skip
    try:
        with display.progress() as progress:
            done = getattr(convert, direction)(
                source_checkpoint, output, dtype=None if dtype == "keep" else dtype, progress=progress,
                layers=report is not None, **options,
            )  # fmt: skip
    except VerificationFailed as error:
        report_to(report, error.details.get("verification"), None, display)
        raise
    display.conversion(done)
    document = done.to_json()
    report_to(report, document["verification"], document["output"], display)
    return document, 0


def _graph(
    asked: tuple[str, ...], weights: Any, no_past: bool, hooks: tuple[str, ...], client: str | None
) -> Graph | None:
    from converter.exporting import Graph

    if "onnx" in asked:
        return Graph.of(weights, not no_past, hooks, client)
    given = {"--weights": weights, "--no-past": no_past, "--hook": hooks, "--for": client}
    if names := [name for name, value in given.items() if value]:
        raise UsageError(
            f"{names[0]} says what an ONNX graph is like, and none was asked for.",
            where=names[0],
            do="Add --format onnx.",
        )
    return None


def report_to(path: Path | None, verification: Any, artifact: str | None, display: Any) -> None:
    if path is None or verification is None:
        return
    from converter.checkpoint.source import provenance_of
    from converter.verification.report import write_report

    title = f"neoconvert {click.get_current_context().info_name}"
    provenance = provenance_of(Path(artifact)) if artifact else None
    write_report(verification, path.resolve(), title=title, provenance=provenance)
    display.say(f"  report: {path}")
