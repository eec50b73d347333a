"""What a person sees on the terminal. Data in, tables out; nothing is computed here."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from converter.display_progress import shown_on
from converter.display_verification import VerificationShown
from converter.dtypes import NAMES
from converter.output import LONGEST, drawing, inert, shown
from converter.progress import Progress
from converter.wording import (
    by_block,
    departures,
    few,
    files,
    graph_line,
    left_out,
    origin,
    size,
    written,
)

if TYPE_CHECKING:
    from converter.explaining import Explanation
    from converter.exporting import Addition
    from converter.inspection import Inspection
    from converter.pipeline import Conversion
    from converter.verification import Verification


ADDED = {
    "plain": "neutral; the source stores no such tensor",
    "processing": "made by processing",
    "functional": "the LayerNorms that carry biases",
    "undoing": "from the ledger",
}
"""Where tensors come from that the source does not have, by the route's name."""


class Display(VerificationShown):
    """Tables on stdout (on stderr where stdout is for JSON), progress on stderr."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        out = sys.stderr if as_json else sys.stdout
        # A pipe has no width; names must not be cut to rich's guess of 80.
        width = None if out.isatty() else 160
        self.console = Console(stderr=as_json, quiet=quiet, highlight=False, width=width)
        self._stderr = Console(file=drawing(sys.stderr), quiet=quiet)

    def progress(self) -> AbstractContextManager[Progress]:
        """A function that shows what is going on."""
        return shown_on(self._stderr)

    def warn(self, text: str) -> None:
        """On stderr, also where all else is quiet."""
        print(f"Warning: {inert(text, longest=LONGEST)}", file=sys.stderr)

    def conversion(self, done: Conversion | Addition) -> None:
        from converter.exporting import Addition

        if isinstance(done, Addition):
            self._addition(done)
            return
        plan, source = done.plan, done.source
        if not done.published:
            self._plan(done)
            return
        what = (
            f"{plan.layout}[/]: {len(plan.tensors)} tensors, {size(plan.nbytes)} in {files(plan)}"
        )
        if done.graph_alone:
            what = f"onnx[/]: {len(plan.tensors)} tensors, {size(plan.nbytes)}, in the graph"
        self.say(f"[bold]{source.layout} → {what} → [bold]{shown(done.output)}[/]")
        for line in self._remarks(done):
            self.say(f"  {line}")
        if done.graph:
            self.say(f"  {shown(written(done.graph))}")
        self._verified(done.verification)

    def _addition(self, done: Addition) -> None:
        if done.result is None:
            self.say(f"Would add [bold]{shown(done.path)}[/]. Dry run: nothing was written.")
            return
        self.say(f"[bold]{done.source.layout} → onnx[/]: added [bold]{shown(done.path)}[/]")
        for line in map(shown, (*done.source.notes, *done.warnings)):
            self.say(f"  {line}")
        self.say(f"  {shown(written(done.result))}")
        self._verified(done.verification)

    def _verified(self, verification: Verification | None) -> None:
        if verification is None:
            self.say("  [yellow]not verified[/] (--no-verify)")
        else:
            self.verification(verification)

    def _remarks(self, done: Conversion) -> Iterator[str]:
        plan = done.plan
        if plan.steps and done.route.reverse == "none":
            yield f"processed: {', '.join(plan.steps)}"
        yield from map(shown, done.source.notes)
        yield from map(shown, done.remarks)
        reasons = dict.fromkeys(plan.dropped.values())
        for reason in reasons:
            names = tuple(name for name, why in plan.dropped.items() if why == reason)
            yield shown(f"left out {few(names)} ({reason})")
        if plan.invented:
            yield f"added {few(plan.invented)} ({ADDED[done.route.name]})"
        if plan.layout == "hf":
            yield (
                "head tied to the embedding"
                if plan.tied
                else "head stored: it is not the embedding"
            )

    def _plan(self, done: Conversion) -> None:
        plan = done.plan
        table = Table(box=None, pad_edge=False)
        several = len(plan.shards) > 1
        for column in ("tensor", "from", "dtype", "shape", "bytes", *(["file"] if several else [])):
            table.add_column(column, overflow="fold")  # a name that is cut says nothing
        for t in plan.tensors:
            shape = " × ".join(map(str, t.shape))
            cells = [t.name, shown(t.source or "—"), NAMES[t.code], shape, f"{t.nbytes:,}"]
            table.add_row(*cells, *([t.shard] if several else []))
        self.console.print(table)
        for line in self._remarks(done):
            self.say(line)
        self.say(
            f"[bold]{done.source.layout} → {plan.layout}[/]: {len(plan.tensors)} tensors, {plan.n_params:,}"
            f" parameters, {size(plan.nbytes)} in {files(plan)}. Dry run: nothing was written."
        )

    def explanation(self, result: Explanation) -> None:
        width = min(self.console.width, 100)
        self.console.print(
            inert(" ".join(result.headline())), markup=False, style="bold", width=width
        )
        lines = list(result.lines())
        if lines:
            self.say()
        for text in lines:
            self.console.print(inert(text), markup=False, soft_wrap=True)

    def inspection(self, result: Inspection) -> None:
        facts = result.to_json()
        config, checkpoint = facts["config"], result.checkpoint
        self.say(f"[bold]{shown(facts['path'])}[/]")
        local = config["attn_types"].count("local")
        rows = [
            ("layout", facts["layout"]),
            ("steps", ", ".join(facts["steps"]) or "none (raw weights)"),
            *([("ledger", facts["ledger"])] if facts["ledger"] else []),
            ("model", f"{config['n_layers']} layers, d_model {config['d_model']}, {config['n_heads']} heads"
                      f" of {config['d_head']}, d_mlp {config['d_mlp']}, {config['act_fn']}"),
            ("context", f"{config['n_ctx']}; {local} of {config['n_layers']} layers local, window {config['window_size']}"),
            ("vocabulary", f"{config['d_vocab']}; head {facts['head']}"),
            ("stored", f"{len(facts['tensors'])} tensors, {facts['n_params']:,} parameters, {size(facts['bytes'])},"
                       f" {', '.join(f'{d} ×{n}' for d, n in facts['dtypes'].items())}"),
            ("left out", shown(left_out(checkpoint.dropped)) or "none"),
            ("tokenizer", ", ".join(facts["tokenizer_files"]) or "none"),
            ("provenance", shown(origin(facts["provenance"]))),
            *(("[yellow]not as written[/]", shown(line)) for line in departures(facts["changed_files"])),
            *(("note", shown(note)) for note in checkpoint.notes),
        ]  # fmt: skip
        if graph := facts["onnx"]:
            rows.append(("graph", shown(graph_line(graph))))
        self.rows(rows)
        names = Table("  tensor", "dtype", "shape", box=None, pad_edge=False)
        for name, dtype, shape in by_block(checkpoint):
            names.add_row(f"  {shown(name)}", dtype, shape)
        self.console.print(names)

    def rows(self, rows: Iterable[tuple[str, str]]) -> None:
        """Names and values, the values as rich's markup."""
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in rows:
            table.add_row(f"  {name}", value)
        self.console.print(table)
