"""One thing to do, and what came of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from converter.batch import there
from converter.checkpoint import Checkpoint, hub, open_checkpoint
from converter.checkpoint.publish import parents_of
from converter.checkpoint.source import provenance_of
from converter.checkpoint.workspace import Workspace
from converter.convert import run
from converter.errors import NeoconvertError, OutputExists, VerificationFailed, classified, panicked
from converter.opening import adapted
from converter.request import Request

Status = Literal["converted", "there", "planned", "failed"]


@dataclass(frozen=True)
class Job:
    """SOURCE, OUTPUT and what is requested. Plain data, so that another process can do it."""

    source: str
    output: Path
    request: Request
    line: int = 0
    """In the manifest."""
    revision: str | None = None
    cfg: Path | None = None
    allow_pickle: bool = False
    adapter: Path | None = None
    report: Path | None = None
    delete_fetched: bool = False
    """What comes from the hub is fetched to a place beside OUTPUT, and removed afterwards."""

    @property
    def given(self) -> str:
        """SOURCE as a user writes it."""
        return f"{self.source}@{self.revision}" if self.revision else self.source

    @property
    def local(self) -> bool:
        return os.path.exists(os.path.expanduser(self.source)) or hub.named(self.source) is None


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    job: Job
    status: Status
    seconds: float = 0.0
    source_sha256: str | None = None
    """Of the source's tensors, as neoconvert.json has it. The same: the same weights."""
    conversion: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    """`type`, `what`, `where`, `do`."""
    details: dict[str, Any] | None = None
    """More of the error: the failed verification, say."""
    exit_code: int = 0
    transient: bool = False
    """It failed, and may succeed later with nothing about it changed."""
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The line that `--json` prints; see `converter.schema`."""
        document = {
            "line": self.job.line,
            "source": self.job.given,
            "output": str(self.job.output),
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "source_sha256": self.source_sha256,
            "warnings": list(self.warnings),
            "conversion": self.conversion,
        }
        if self.error is None:
            return document
        return document | {"transient": self.transient, "error": self.error} | (self.details or {})


def failed(job: Job, error: NeoconvertError, seconds: float = 0.0) -> Outcome:
    """The outcome of a job that ended in an error."""
    what, where, do = error.lines()
    said = {"type": type(error).__name__, "what": what, "where": where, "do": do}
    return Outcome(
        job, "failed", seconds, error=said, details=error.details, exit_code=error.exit_code,
        transient=error.transient,
    )  # fmt: skip


def attempt(job: Job) -> Outcome:
    """Do a job, unless it is done already. Raises nothing but an interrupt."""
    start = time.monotonic()
    try:
        outcome = _done(job)
    except BaseException as error:
        if not (isinstance(error, Exception) or panicked(error)):
            raise
        outcome = failed(job, classified(error))
        if isinstance(error, VerificationFailed):
            outcome = replace(outcome, warnings=_report(job, error.details.get("verification")))
    return replace(outcome, seconds=time.monotonic() - start)


def _done(job: Job) -> Outcome:
    record, why = None, None
    if there.occupied(job.output):
        record = there.record_at(job.output)
        why = "its neoconvert.json is missing, or is not as neoconvert wrote it"
        if record is not None:
            why = there.other_request(record, job.request) or there.damage(job.output)
    if record and why is None and not job.local:
        commit = hub.commit_of(job.source, job.revision)
        if commit is not None:
            was = record["source"]["revision"]
            if commit == was:
                return Outcome(job, "there", source_sha256=record["source_sha256"])
            why = f"it was made of revision {was}, and {job.given} is {commit} now"
    with _opened(job) as source:
        if record and why is None:
            why = there.other_source(record, source)
            if why is None:
                return Outcome(job, "there", source_sha256=record["source_sha256"])
        if why is not None and not job.request.writing.overwrite:
            raise OutputExists(
                f"OUTPUT is there, and is not what is asked for: {why}.",
                where=str(job.output),
                do="To replace it, add --overwrite, or a column overwrite that is true in this line; or name"
                " another OUTPUT.",
            )
        done = run(job.request, source, job.output)
    document = done.to_json()
    if not done.published:
        return Outcome(job, "planned", conversion=document)
    made = provenance_of(job.output) or {}
    return Outcome(
        job, "converted", source_sha256=made.get("source_sha256"), conversion=document,
        warnings=_report(job, document["verification"]),
    )  # fmt: skip


@contextmanager
def _opened(job: Job) -> Iterator[Checkpoint]:
    with _cache(job) as cache:
        source = open_checkpoint(
            job.source, revision=job.revision, cfg=job.cfg, allow_pickle=job.allow_pickle,
            cache=cache,
        )  # fmt: skip
        yield adapted(source, job.adapter, allow_pickle=job.allow_pickle)


@contextmanager
def _cache(job: Job) -> Iterator[Path | None]:
    """Where what comes from the hub is kept: None, in huggingface_hub's own cache."""
    if job.local or not job.delete_fetched:
        yield None
        return
    output = Path(os.path.realpath(job.output))
    with parents_of(output):
        place = Workspace(output.parent, f"{output.name}.source")
        try:
            yield place.new
        finally:
            place.close()


def _report(job: Job, verification: dict[str, Any] | None) -> tuple[str, ...]:
    """Write the report that was asked for. Returns what a person should know."""
    if job.report is None or verification is None:
        return ()
    from converter.verification.report import write_report

    try:
        write_report(
            verification, Path(os.path.realpath(job.report)), title=f"neoconvert {job.request.command}",
            provenance=provenance_of(job.output),
        )  # fmt: skip
    except Exception as error:
        what, where, _ = classified(error).lines()
        return (f"no report was written: {what} {where}",)
    return ()
