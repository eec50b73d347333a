"""The pipeline: plan -> stream units -> export a graph -> verify -> publish."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint import Checkpoint, open_checkpoint, provenance, sidecar
from converter.checkpoint.ledger_file import LedgerWriter
from converter.checkpoint.plan import Plan, make_plan
from converter.checkpoint.publish import staging
from converter.checkpoint.replaceable import check_output
from converter.checkpoint.standard import WEIGHTS
from converter.checkpoint.writer import Writer
from converter.exporting import facts, require_verified
from converter.layout import LAYOUTS, Layout
from converter.model_card import model_card, write_card
from converter.opening import open_artifact
from converter.request import Checking, Writing
from converter.route import Route
from converter.streaming import stream
from converter.verification import Verification
from converter.verification.loading import opens_by

if TYPE_CHECKING:
    from converter.onnx import ExportResult


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, or with `published` False would do."""

    route: Route
    output: Path
    plan: Plan
    published: bool
    verification: Verification | None
    graph: ExportResult | None = None
    graph_alone: bool = False
    """The graph has the weights itself, and no weight file is beside it."""
    found: tuple[str, ...] = ()
    """What was seen in the weights while they were read, that a person should know."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was decided beforehand, what was found, and what opens the result."""
        here = () if self.graph_alone else opens_by(self.plan.layout)
        return (*self.route.remarks, *self.found, *here)

    def __repr__(self) -> str:
        state = "published" if self.published else "planned"
        if self.verification:
            state = "verified"
        return (
            f"<Conversion {self.source.layout} → {self.plan.layout}, {self.output}:"
            f" {len(self.plan.tensors)} tensors, {self.plan.nbytes:,} bytes, {state}>"
        )

    @property
    def source(self) -> Checkpoint:
        return self.route.source

    def to_json(self) -> dict[str, Any]:
        """The keys that DESIGN's JSON contract names, and the plan's figures."""
        return {
            "source": self.source.source.given,
            "output": str(self.output),
            "layout": self.plan.layout,
            "steps": list(self.plan.steps),
            "reverse": self.route.reverse,
            "notes": list(self.source.notes),
            "remarks": list(self.remarks),
            "published": self.published,
            "tensors": len(self.plan.tensors),
            "bytes": self.plan.nbytes,
            "shards": [] if self.graph_alone else list(self.plan.shards),
            "dropped": list(self.plan.dropped),
            "invented": list(self.plan.invented),
            "onnx": facts(self.graph) if self.graph else None,
            "verification": self.verification.to_json() if self.verification else None,
        }


def convert(
    route: Route,
    output: Path,
    layout: Layout,
    writing: Writing | None = None,
    checking: Checking | None = None,
    *,
    asked: dict[str, Any] | None = None,
) -> Conversion:
    """Convert by `route` to `layout` and publish at `output`, verified.

    Args:
        asked: what neoconvert.json is to say was asked for (`Request.to_json`).

    Raises:
        NotRepresentable: the target cannot hold what the source holds.
        UnsafeReference: a file that would be copied is a link out of SOURCE.
        OutputExists, SamePlace: see `replaceable.check_output`.
        VerificationFailed: the files do not reproduce the source; nothing was published.
    """
    source, writing, checking = route.source, writing or Writing(), checking or Checking()
    check_output(output, source.source.place, overwrite=writing.overwrite)
    if source.merged:
        check_output(output, source.merged.adapter.directory, overwrite=writing.overwrite)
    graph, code = writing.graph, writing.code
    plan = make_plan(route, layout, dtype=code, max_shard_size=writing.max_shard_size)
    sidecar.require_copyable(source.source)
    if LAYOUTS[layout].has_cfg:
        # an activation that TransformerLens lacks is refused before a weight is read
        sidecar.cfg(route, plan, recast=False)
    if graph is not None:
        graph.require_possible(plan.config, plan.nbytes)
    found: tuple[str, ...] = ()
    if writing.ledger == "exact" and not plan.steps:
        found = ("--ledger exact keeps nothing, since nothing is processed",)
    if writing.dry_run:
        return Conversion(route, output, plan, False, None, None, writing.graph_alone, found=found)
    checking.require_possible()
    with (
        staging(output, overwrite=writing.overwrite, needs=plan.nbytes) as staged,
        ExitStack() as opened,
    ):
        stage, book = staged.path, None
        if writing.keeps_ledger(route) and writing.ledger != "none":
            book = opened.enter_context(closing(LedgerWriter(writing.ledger, stage)))
        writer = Writer(stage, plan)
        sha256 = stream(route, plan, writer, book, checking.say)
        said = graph.config if graph else None
        sidecar.write(route, plan, stage, recast=code is not None, graph=said)
        if book:
            original = {
                str(source.slots[key].name): sha256.read[stored.name]
                for key, stored in source.stored.items()
            }
            book.save(tied=source.tied, original_sha256=original)
        artifact, exported = open_checkpoint(stage), None
        if graph:
            made = {"route": route.name, "steps": list(plan.steps)}
            made["source_sha256"] = provenance.digest(sha256.read)
            exported = graph.write(artifact, made)
        if writing.graph_alone:
            for name in (*plan.shards, f"{WEIGHTS}.index.json", "cfg.json"):
                (stage / name).unlink(missing_ok=True)
            artifact = open_artifact(stage)  # what is published is what is verified
        verification = checking.verify(source, artifact, route)
        if verification:
            verification = replace(verification, artifact=str(output))  # its name from now on
            require_verified(verification)
        if writing.model_card:
            path = exported.path.relative_to(stage).as_posix() if exported else None
            kind = book.kind if book else None
            alone = writing.graph_alone
            text = model_card(route, plan, verification, ledger=kind, graph=path, graph_alone=alone)
            write_card(stage, text)
        provenance.write(
            stage,
            route,
            plan,
            source_sha256=sha256.read,
            output_sha256=sha256.written,
            file_sha256=writer.files,
            options=asked or writing.to_json() | {"check": checking.to_json()},
            verification=verification.kept() if verification else None,
        )
        source.source.require_unchanged()
    if exported:
        exported = exported.moved(stage, output)
    return Conversion(
        route, output, plan, True, verification, exported, writing.graph_alone,
        found=(*found, *_unsound(sha256.not_finite), *staged.warnings),
    )  # fmt: skip


def _unsound(not_finite: dict[str, int]) -> tuple[str, ...]:
    """Weights that make a model compute NaN, by name: training in float16 leaves them."""
    if not not_finite:
        return ()
    few = [f"{name} ({count} elements)" for name, count in list(not_finite.items())[:3]]
    more = f" and {len(not_finite) - 3} more" if len(not_finite) > 3 else ""
    return (f"NaN or infinity in {', '.join(few)}{more}: kept as it is",)
