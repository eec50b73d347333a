"""The words and rows that the display shows: facts in, text out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.dtypes import NAMES
from converter.output import shown

if TYPE_CHECKING:
    from converter.checkpoint import Checkpoint
    from converter.checkpoint.plan import Plan
    from converter.onnx import ExportResult
    from converter.verification import RuntimeInfo


def size(nbytes: int) -> str:
    """Bytes for people: 3.7 MB."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Time for people: 8 s, 3 min, 1 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def software(ran: RuntimeInfo) -> str:
    if ran.version in ran.what:
        return ran.what
    library = "" if ran.name == ran.what else f"{ran.name} "
    tf32 = "" if ran.tf32 is None else f", TF32 {'on' if ran.tf32 else 'off'}"
    return f"{ran.what} ({library}{ran.version}, {ran.device}{tf32})"


def written(graph: ExportResult) -> str:
    where = {
        "shared": f"shares the weights in {', '.join(p.name for p in graph.shared[:2])}"
        + (f" and {len(graph.shared) - 2} more" if len(graph.shared) > 2 else ""),
        "external": f"{size(graph.weight_bytes)} of weights in {graph.written[-1].name}",
        "inline": f"{size(graph.weight_bytes)} of weights inside",
    }[graph.weights]
    hooks = f"; {len(graph.hooks)} hook points as outputs" if graph.hooks else ""
    return f"{graph.path.name}: {graph.nodes} nodes, {size(graph.graph_bytes)}; {where}{hooks}"


def graph_line(facts: dict[str, Any]) -> str:
    cache = "with" if facts["with_past"] else "without"
    files = ", ".join(facts["weight_files"]) or "the graph itself"
    hooks = f", hooks {few(tuple(facts['hooks']))}" if facts["hooks"] else ""
    return (
        f"{Path(facts['path']).name} by {facts['producer'] or 'unknown'}: opset {facts['opset']},"
        f" {facts['nodes']} nodes, {cache} cache, weights in {files}{hooks}"
    )


def files(plan: Plan) -> str:
    return "one file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"


def few(names: tuple[str, ...], most: int = 2) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def left_out(dropped: dict[str, str]) -> str:
    """What a checkpoint holds beside its weights, by reason."""
    reasons = dict.fromkeys(dropped.values())
    named = {r: tuple(name for name, why in dropped.items() if why == r) for r in reasons}
    return "; ".join(f"{few(names)} ({reason})" for reason, names in named.items())


def by_block(checkpoint: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Name, dtype and shape of every stored tensor; what all blocks have alike is one line."""
    lines: dict[tuple[str, str, str], list[int]] = {}
    kept = checkpoint.kept
    for key, slot in checkpoint.slots.items():
        if stored := kept.get(key):
            name = stored.name
            if slot.layer is not None:
                name = name.replace(f".{slot.layer}.", ".{}.", 1)
            line = (name, NAMES[stored.code], " × ".join(map(str, stored.shape)))
            lines.setdefault(line, []).append(slot.layer or 0)
    for (name, dtype, shape), layers in lines.items():
        spans = runs(layers)
        yield name.replace("{}", spans if spans.isdigit() else f"{{{spans}}}"), dtype, shape


def runs(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def departures(changed_files: dict[str, str]) -> Iterator[str]:
    """What is no longer as neoconvert.json recorded it."""
    for name, what in changed_files.items():
        if what == "missing":
            yield f"{name}, which neoconvert.json lists, is not there"
        else:
            yield f"{name} was changed since neoconvert wrote it"


def environment(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of `environment.describe`."""
    yield "neoconvert", facts["neoconvert"]
    yield "Python", facts["python"]
    yield "system", facts["system"]
    memory = f", {size(facts['memory'])} of memory" if facts["memory"] else ""
    yield "machine", f"{facts['cores']} cores{memory}"
    yield "devices", shown(", ".join(facts["devices"]))
    yield "onnxruntime", ", ".join(facts["onnxruntime"]) or "none"
    yield "TransformerLens", f"has {' and '.join(facts['transformer_lens']) or 'neither class'}"
    yield "variables", ", ".join(f"{k}={v}" for k, v in facts["variables"].items()) or "none"
    for problem in facts["problems"]:
        yield "[red]problem[/]", shown(problem)
    yield from facts["libraries"].items()


def origin(provenance: dict[str, object] | None) -> str:
    source = (provenance or {}).get("source")
    if not isinstance(source, dict):
        return "none recorded"
    revision = f" at {source['revision']}" if source.get("revision") else ""
    return f"{source.get('layout')} {source.get('given')}{revision}"


def size_of_change(share: float) -> str:
    """A share of a tensor's norm, or of what changed in it."""
    if not math.isfinite(share):
        return "not finite"
    if share >= 0.01 or share == 0:
        return f"{share:.0%}"
    return f"{100 * share:.1g}%" if share >= 1e-6 else f"{100 * share:.0e}%"
