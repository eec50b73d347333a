"""What a person sees of a verification on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from converter.output import inert, shown
from converter.wording import software

if TYPE_CHECKING:
    from converter.verification import ProbeResult, RuntimeInfo, Verification
    from converter.verification.evidence import Evidence


class VerificationShown:
    """A table for each runtime, a line for each other link, the verdict last."""

    console: Console

    def say(self, text: str = "") -> None:
        """Text with rich's markup, wrapped below where it begins."""
        for line in inert(text, keep="\n").split("\n"):
            body = line.lstrip(" ")
            first = " " * (len(line) - len(body))
            rest = first + "  " if first else ""
            width = max(self.console.width - len(rest), 20)
            for i, part in enumerate(Text.from_markup(body).wrap(self.console, width) or [Text()]):
                self.console.print(Text(rest if i else first) + part, soft_wrap=True)

    def verification(self, result: Verification) -> None:
        if self.console.quiet and not result.passed:
            self._failure(result)
        weights = result.weights
        if weights is not None and weights.compared:
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
                + (f"; the config differs in {', '.join(weights.config)}" if weights.config else "")
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
            self.say("  They part at " + "; ".join(shown(str(d)) for d in result.divergences[:8]))
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
        where = f" at {part.unit}" + (f", {part.named}" if part.named else "") if part else ""
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
                        f"{p.ratio:.2f}" if p.ratio < 100 else f"{p.ratio:.3g}",
                    ]
                ),
                f"{p.top1_agreement:.0%}" + ("*" if p in spared else " " if spared else ""),
                "[green]✓[/]" if p.passed else "[red]✗[/]",
            )
        mark = "[green]✓[/]" if all(p.passed for p in probes) else "[red]✗[/]"
        both = (ran, *(r for r in result.runtimes if r.role == "original"))
        named = " against ".join(software(r) for r in both)
        link = "function" if limited else "arithmetic"
        self.say(f"  {mark} {link}: log-probabilities of {named}")
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
        printed: set[str] = set()
        for p in result.probes:
            if p.perplexity and result.criterion is not None:
                before, after = p.perplexity.original, p.perplexity.artifact
                self.say(
                    f"    {shown(p.name)}: perplexity {before:.4f}, and {after:.4f} in {p.runtime}"
                )
            elif p.perplexity and p.storage_kl is not None and p.name not in printed:
                printed.add(p.name)
                self.say(
                    f"    {shown(p.name)}: perplexity {p.perplexity.original:.4f}, and"
                    f" {p.perplexity.artifact:.4f} with rounded weights (KL {p.storage_kl:.2e},"
                    f" top-1 {p.storage_top1_agreement:.1%})"
                )
