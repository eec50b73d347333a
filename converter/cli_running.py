"""What the commands do once their options are parsed: open, convert, show, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli_ending import told
from converter.errors import UsageError, VerificationFailed
from converter.interrupts import Interrupted
from converter.output import shown

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


def require_report(path: Path | None, output: Path | None = None) -> None:
    """
    Raises:
        UsageError: a report cannot be written there; told before an hour's work, not after.
    """
    if path is None:
        return
    from converter.checkpoint.replaceable import require_free

    target = path.resolve()
    require_free(target, overwrite=True)
    if output is not None and target == output.resolve():
        what = "The report and OUTPUT are the same place."
    elif not target.parent.is_dir():
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
    require_report(report, output)
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
    except Interrupted:
        from converter.checkpoint.publish import PUBLISHED

        if not PUBLISHED:
            raise
        return {"output": str(PUBLISHED[-1]), "published": True}, 0
    # It is published, if it was to be: from here on, what fails is a warning.
    document = done.to_json()
    try:
        display.conversion(done)
    except Exception as error:
        display.warn(f"what was done could not be shown: {error!r}")
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


def report_to(path: Path | None, verification: Any, artifact: str | None, display: Any) -> bool:
    """Write a report if one was asked for. Where that fails, say so; returns whether it did not."""
    if path is None or verification is None:
        return True
    from converter.checkpoint.source import provenance_of
    from converter.verification.report import write_report

    title = f"neoconvert {click.get_current_context().info_name}"
    try:
        provenance = provenance_of(Path(artifact)) if artifact else None
        write_report(verification, path.resolve(), title=title, provenance=provenance)
    except Exception as error:
        what, where, _ = told(error).lines()
        display.warn(f"no report was written: {what} {where}")
        return False
    display.say(f"  report: {shown(path)}")
    return True
