"""What a person sees on the terminal. Data in, tables out; nothing is computed here."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from converter.display_progress import shown_on
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
    software,
    written,
)

if TYPE_CHECKING:
    from converter.explaining import Explanation
    from converter.exporting import Addition
    from converter.inspection import Inspection
    from converter.pipeline import Conversion
    from converter.verification import ProbeResult, RuntimeInfo, Verification
    from converter.verification.evidence import Evidence


ADDED = {
    "plain": "neutral; the source stores no such tensor",
    "processing": "made by processing",
    "functional": "the LayerNorms that carry biases",
    "undoing": "from the ledger",
}
"""Where tensors come from that the source does not have, by the route's name."""


class Display:
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

    def say(self, text: str = "") -> None:
        self.console.print(inert(text, keep="\n"))

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
        table = Table("tensor", "from", "dtype", "shape", "bytes", "file", box=None, pad_edge=False)
        for t in plan.tensors:
            shape = "×".join(map(str, t.shape))
            table.add_row(t.name, shown(t.source or "—"), t.code, shape, f"{t.nbytes:,}", t.shard)
        self.console.print(table)
        for line in self._remarks(done):
            self.say(line)
        self.say(
            f"[bold]{done.source.layout} → {plan.layout}[/]: {len(plan.tensors)} tensors, {plan.n_params:,}"
            f" parameters, {size(plan.nbytes)} in {files(plan)}. Dry run: nothing was written."
        )

    def verification(self, result: Verification) -> None:
        if self.console.quiet and not result.passed:
            self._failure(result)
        weights = result.weights
        if weights is not None:
            mark = "[green]✓[/]" if weights.passed else "[red]✗[/]"
            limited = result.criterion is not None and not weights.config
            if limited and weights.mismatches:
                mark = "[yellow]–[/]"
            self.say(
                f"  {mark} weights: {weights.compared - len(weights.mismatched)} of {weights.compared}"
                + (
                    " tensors that are there by name are as in the original"
                    if result.criterion
                    else " tensors as they must be, bit for bit"
                    if weights.explained is None
                    else " tensors accounted for"
                )
            )
            for name in weights.mismatched[:8]:
                self.say(f"      [red]differs[/] {shown(name)}")
        for ran in result.runtimes:
            results = [p for p in result.probes if p.runtime == ran.what]
            if ran.role == "artifact" and results:
                self._probes(result, ran, results)
        if result.reached is not None:
            self.say(f"    {result.reached}")
        for evidence in result.evidence:
            self._evidence(evidence)
        if result.probes:
            if not any(p.compared for p in result.probes):
                self.say(
                    "    [yellow]The original computes nothing but NaN and infinity; so does this."
                    " Only the weights prove anything.[/]"
                )
            costs = [p.storage_max_abs_logprob_diff for p in result.probes]
            if rounding := [cost for cost in costs if cost is not None]:
                self.say(
                    f"    Rounding the stored weights costs up to {max(rounding):.2e}; the table judges"
                    " conversion apart from it."
                )
        self._perplexities(result)
        for problem in result.problems:
            self.say(f"  [red]{shown(problem)}[/]")
        for remark in result.remarks:
            self.say(f"  [yellow]{shown(remark)}[/]")
        if result.divergences:
            self.say("  they part at " + "; ".join(shown(str(d)) for d in result.divergences[:8]))
        verdict = f"  [bold {'green' if result.passed else 'red'}]{shown(result.verdict)}[/]"
        left = dict.fromkeys(e.link for e in result.evidence if e.outcome == "not comparable")
        if left and result.passed and not result.criterion:
            verdict += f"; not compared: {', '.join(left)}"
        self.say(verdict)

    def _evidence(self, evidence: Evidence) -> None:
        """The links that have no table of their own, and whatever could not be compared."""
        tabled = evidence.link in ("weights", "arithmetic")
        if tabled and (
            evidence.outcome == "differs" or (evidence.outcome == "same" and evidence.why is None)
        ):
            return
        marks = {"same": "[green]✓[/]", "differs": "[red]✗[/]", "not comparable": "[yellow]–[/]"}
        mark = marks[evidence.outcome]
        self.say(f"  {mark} {evidence.link}, {shown(evidence.subject)}: {shown(str(evidence))}")

    def _failure(self, result: Verification) -> None:
        """What --quiet leaves of a failure: an exit code alone would help nobody."""
        part = result.first_divergence
        where = f" at {part.unit}" + (f", {part.tensor}" if part.tensor else "") if part else ""
        verdict = "Not within the stated limits" if result.criterion else "Not verified"
        lines = [f"{verdict}: {result.artifact} departs from {result.original}{where}."]
        print("\n".join([*lines, *result.problems]), file=sys.stderr)

    def _probes(self, result: Verification, ran: RuntimeInfo, probes: list[ProbeResult]) -> None:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("    probe")
        limits, limited = result.criterion, result.criterion is not None
        spared = [p for p in probes if p.passed and limits and limits.spares(p.top1_agreement)]
        measures = ("KL",) if limited else ("noise floor", "ratio")
        for column in ("max |Δ log p|", *measures, "top-1", ""):
            table.add_column(column, justify="right")
        for p in probes:
            table.add_row(
                f"    {shown(p.name)}",
                f"{p.max_abs_logprob_diff:.2e}",
                *(
                    [f"{p.kl:.2e}"]
                    if limited
                    else [
                        f"{p.noise_floor:.2e}",
                        f"{p.ratio:.2f}" if p.ratio < 100 else f"{p.ratio:.0e}",
                    ]
                ),
                f"{p.top1_agreement:.0%}" + ("*" if p in spared else " " if spared else ""),
                "[green]✓[/]" if p.passed else "[red]✗[/]",
            )
        mark = "[green]✓[/]" if all(p.passed for p in probes) else "[red]✗[/]"
        both = (ran, *(r for r in result.runtimes if r.role == "original"))
        named = " against ".join(software(r) for r in both)
        self.say(f"  {mark} function: log-probabilities of {named}")
        self._fitting(table)
        if spared:
            self.say(
                "    * below the limit by no more than chance allows so few positions; all together"
                " are held to it"
            )

    def _fitting(self, table: Table) -> None:
        """A table; where the terminal is too narrow for it, a few lines for each row: no number is
        shortened."""
        wide = self.console.options.update_width(1000)
        if self.console.measure(table, options=wide).maximum <= self.console.width:
            self.console.print(table)
            return
        _, *heads = [str(column.header) for column in table.columns]
        for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
            said = ", ".join(
                f"{head} {cell}" for head, cell in zip(heads, cells, strict=True) if head
            )
            self.console.print(
                Padding(f"{cells[-1]} {str(name).strip()}: {said}", (0, 0, 0, 4), expand=False)
            )

    def _perplexities(self, result: Verification) -> None:
        """Of each text once: runtimes agree to more digits than anyone reads."""
        told: set[str] = set()
        for p in result.probes:
            if p.perplexity and result.criterion is not None:
                before, after = p.perplexity.original, p.perplexity.artifact
                self.say(
                    f"    {shown(p.name)}: perplexity {before:.4f}, and {after:.4f} in {p.runtime}"
                )
            elif p.perplexity and p.storage_kl is not None and p.name not in told:
                told.add(p.name)
                self.say(
                    f"    {shown(p.name)}: perplexity {p.perplexity.original:.4f}, and"
                    f" {p.perplexity.artifact:.4f} with rounded weights (KL {p.storage_kl:.2e},"
                    f" top-1 {p.storage_top1_agreement:.1%})"
                )

    def explanation(self, result: Explanation) -> None:
        width = min(self.console.width, 100)
        self.console.print(
            inert(" ".join(result.headline())), markup=False, style="bold", width=width
        )
        self.say()
        for text in result.lines():
            self.console.print(inert(text), markup=False, soft_wrap=True)

    def inspection(self, result: Inspection) -> None:
        facts = result.to_json()
        config, checkpoint = facts["config"], result.checkpoint
        self.say(f"[bold]{shown(facts['path'])}[/]")
        local = config["attn_types"].count("local")
        rows = [
            ("layout", facts["layout"]),
            ("steps", ", ".join(facts["steps"]) or "none (raw weights)"),
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
