"""What the commands do once their options are parsed: open, convert, show, report."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from converter.errors import SourceNotFound, UsageError, VerificationFailed, classified
from converter.interrupts import Interrupted
from converter.output import shown

if TYPE_CHECKING:
    from converter.checkpoint import Checkpoint
    from converter.exporting import Graph
    from converter.pushing import Repository
    from converter.request import Request, Writing
    from converter.verification.original import Original


def open_named(
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
    from converter.opening import adapted, open_artifact

    opener = open_artifact if graphs else open_checkpoint
    checkpoint = opener(source, revision=revision, cfg=cfg, allow_pickle=allow_pickle)
    return adapted(checkpoint, adapter, allow_pickle=allow_pickle)


def require_report(path: Path | None, output: Path | None = None) -> None:
    """
    Raises:
        UsageError: a report cannot be written there; raised before an hour's work, not after.
    """
    if path is None:
        return
    from converter.checkpoint.replaceable import require_free
    from converter.html import MARK

    target = Path(os.path.realpath(path))
    require_free(target, mark=MARK, overwrite=True)
    if output is not None and target == Path(os.path.realpath(output)):
        what = "The report and OUTPUT are the same place."
    elif not target.parent.is_dir():
        what = "There is no such directory for the report."
    else:
        return
    raise UsageError(what, where=f"--report {path}", do="Name a file in a directory that is there.")


READING = ("revision", "cfg", "allow_pickle", "adapter")
"""The options that say how SOURCE is read."""


def request_of(
    command: Any, *, layers: bool = False, formats: tuple[str, ...] = ("onnx",), **options: Any
) -> Request:
    """What a command's options, but `READING` and the report, ask for.

    Raises:
        UsageError: no such value.
    """
    from converter.request import Checking, Request, Writing

    graph = _graph(formats, *(options.pop(n) for n in ("weights", "no_past", "hooks", "client")))
    stored = {n: options.pop(n) for n in ("dtype", "max_shard_size", "overwrite", "dry_run")}
    stored["model_card"] = options.pop("model_card", False)
    proved = {n: options.pop(n) for n in ("check", "device", "runtime", "effort")}
    writing = Writing(
        graph=graph,
        ledger=options.pop("ledger", "none" if command == "export-onnx" else "compact"),
        keep_weights="safetensors" in formats,
        **stored,
    )
    return Request(command, writing, Checking(layers=layers, **proved), **options)


def conversion(command: str, source: str, output: Path | None, display: Any, **options: Any) -> Any:
    from converter.checkpoint.hub import named
    from converter.checkpoint.standard import holds_weights
    from converter.convert import run

    reading = {name: options.pop(name) for name in READING}
    report, push_to = options.pop("report"), options.pop("push_to")
    request = request_of(command, layers=report is not None, **options)
    try:
        source_checkpoint = open_named(source, **reading)
    except SourceNotFound as error:
        at_the_hub = "/" in source and named(source) is not None
        if output and holds_weights(output) and not (at_the_hub or os.path.exists(source)):
            typed = f"neoconvert {command} {quote(str(output))} {quote(source)}"
            error.do += f" Or, since SOURCE comes first, did you mean {typed}?"
        raise
    require_report(report, output)
    if report and not request.checking.check:
        raise UsageError("There is no verification to report.", where="--no-verify", do="Leave it out.")  # fmt: skip
    repository = _aimed(push_to, output, request.writing)
    try:
        with display.progress() as progress:
            checking = replace(request.checking, progress=progress)
            done = run(replace(request, checking=checking), source_checkpoint, output)
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
    if repository and output:
        from converter.pushing import deliver

        pushed = deliver(output, repository)
        document["pushed"] = pushed.to_json()
        display.say(
            f"  pushed to {shown(pushed.url)}, branch {shown(pushed.branch)}: {pushed.commit[:12]}"
        )
    return document, 0


def _aimed(push_to: str | None, output: Path | None, writing: Writing) -> Repository | None:
    """Where to push to, if anywhere. Whether that is possible is found out before an hour's work."""
    if push_to is None:
        return None
    from converter.pushing import aim

    if output is None:
        raise UsageError(
            "What is pushed is a whole directory, and the rest of this one is not neoconvert's.",
            where=f"--push-to {push_to}",
            do="Name an OUTPUT directory.",
        )
    found = aim(push_to, overwrite=writing.overwrite)
    return None if writing.dry_run else found


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


def verified(original: Original, artifact: Checkpoint, display: Any, **options: Any) -> Any:
    """Verify one artifact and show it; the JSON document, with the files that were changed since."""
    from converter.inspection import changed_files
    from converter.verification import verify
    from converter.wording import departures

    with display.progress() as progress:
        result = verify(original, artifact, progress=progress, **options)
    display.verification(result)
    document = result.to_json() | {"changed_files": {}}
    for name, checkpoint in (("original", original.checkpoint), ("artifact", artifact)):
        checkpoint.source.require_unchanged()
        document["changed_files"][name] = changed = changed_files(checkpoint)
        for line in departures(changed):
            display.warn(f"{checkpoint.source.path}: {line}")
    return document


def report_to(path: Path | None, verification: Any, artifact: str | None, display: Any) -> bool:
    """Write a report if one was asked for. Where that fails, say so; returns whether it did not."""
    if path is None or verification is None:
        return True
    from converter.checkpoint.source import provenance_of
    from converter.verification.report import write_report

    title = f"neoconvert {click.get_current_context().info_name}"
    try:
        provenance = provenance_of(Path(artifact)) if artifact else None
        write_report(verification, Path(os.path.realpath(path)), title=title, provenance=provenance)
    except Exception as error:
        what, where, _ = classified(error).lines()
        display.warn(f"no report was written: {what} {where}")
        return False
    display.say(f"  report: {shown(path)}")
    return True
