"""A model card beside an artifact: where it comes from, what was done, what was checked, how to load it.

The first lines are YAML that the hub reads. Like neoconvert.json it names no date and no place of this
machine: the same conversion writes the same bytes anywhere.
"""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint import hub
from converter.dtypes import NAMES
from converter.environment import versions
from converter.layout import LAYOUTS
from converter.output import inert
from converter.route import Undoing
from converter.verification.evidence import QUESTIONS
from converter.wording import few, software

if TYPE_CHECKING:
    from converter.checkpoint import Checkpoint
    from converter.checkpoint.plan import Plan
    from converter.route import Route
    from converter.verification import RuntimeInfo, Verification

CARD = "README.md"
_HANDED_ON = ("license", "license_name", "license_link", "language", "datasets")
"""What a source's own card says that is true of its conversion too."""
_LONGEST = 2**17
"""Bytes of a source's card that is read."""
_LAYOUTS = {
    "hf": "Hugging Face's layout",
    "hooked": "the layout of TransformerLens's HookedTransformer",
    "bridge": "the layout of TransformerLens's TransformerBridge",
}
_HF = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")
"""
_BOOTED = """\
from transformer_lens.model_bridge import TransformerBridge

bridge = TransformerBridge.boot_transformers(".")
"""
_HOOKED = """\
import json, torch
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

cfg = json.load(open("cfg.json"))
cfg["dtype"] = getattr(torch, cfg["dtype"])
model = HookedTransformer(HookedTransformerConfig.from_dict(cfg))
state = {key: weight for file in FILES for key, weight in load_file(file).items()}
model.load_state_dict(state, strict=False)  # only the masks are missing
"""
_BRIDGE = """\
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge

bridge = TransformerBridge.boot_transformers(".", load_weights=False)
bridge.enable_compatibility_mode()
state = {key: weight for file in FILES for key, weight in load_file(file).items()}
bridge.load_state_dict(state, strict=True)
"""
_SESSION = """\
import onnxruntime

session = onnxruntime.InferenceSession("GRAPH")
"""


def model_card(
    route: Route,
    plan: Plan,
    verification: Verification | None,
    *,
    ledger: str | None,
    graph: str | None,
    graph_alone: bool,
) -> str:
    """The card's text.

    Args:
        ledger: the kind that is kept beside the weights. graph: the ONNX file's path in the directory.
        graph_alone: no safetensors file is beside it.
    """
    loading = [] if graph_alone else list(_loading(plan))
    if graph:
        loading.append(("onnxruntime", _SESSION.replace("GRAPH", graph)))
    parts = [
        f"---\n{front_matter(route.source, plan, graph, graph_alone)}---\n",
        f"# {_name(route.source)}, by neoconvert\n",
        *_done(route, plan, ledger, graph, graph_alone),
        "## Loading it\n\nIn this directory:\n",
        *(f"{title}:\n\n```python\n{code}```\n" for title, code in loading),
        "## What was checked\n",
        *_checked(route.source, verification),
    ]
    return "\n".join(parts)


def front_matter(source: Checkpoint, plan: Plan, graph: str | None, alone: bool) -> str:
    from huggingface_hub import ModelCardData

    library = LAYOUTS[plan.layout].library
    tags = [
        "neoconvert",
        "gpt_neo",
        *(["transformer-lens"] if library == "transformer_lens" else []),
    ]
    data = ModelCardData(
        base_model=_base(source),
        library_name="onnx" if alone else library,
        pipeline_tag="text-generation",
        tags=tags + (["onnx"] if graph and not alone else []),
        **_handed_on(source),
    )
    text: str = data.to_yaml(line_break="\n")
    return f"{text}\n"


def _base(source: Checkpoint) -> str | None:
    """The model on the hub that the weights come from, as far as that is recorded."""
    if source.source.revision:
        return source.source.name
    before = (source.source.provenance or {}).get("source")
    said = before.get("given") if isinstance(before, dict) and before.get("revision") else None
    known = hub.named(said) if isinstance(said, str) else None
    return known[0] if known else None


def _handed_on(source: Checkpoint) -> dict[str, Any]:
    """Licence and training data, as the source's own card has them. A card that cannot be read says
    nothing."""
    from huggingface_hub import metadata_load

    path = source.source.path / CARD
    if not source.source.is_directory or not path.is_file() or path.stat().st_size > _LONGEST:
        return {}
    try:
        said = metadata_load(path) or {}
    except Exception:  # of two libraries, for a file that anyone may have written
        return {}
    return {n: v for n, v in said.items() if n in _HANDED_ON and _is_words(v)}


def _is_words(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(i, str) and inert(i) == i for i in items)


def _done(
    route: Route, plan: Plan, ledger: str | None, graph: str | None, alone: bool
) -> Iterator[str]:
    source = route.source
    revision = f" at revision `{source.source.revision}`" if source.source.revision else ""
    what = "an ONNX graph" if alone else _LAYOUTS[plan.layout]
    yield f"{_name(source)}{revision}, in {what}, made by neoconvert {versions(())['neoconvert']}.\n"
    dtypes = dict.fromkeys(NAMES[tensor.code] for tensor in plan.tensors)
    rows = [
        ("from", _LAYOUTS[source.layout]),
        ("processing", ", ".join(plan.steps) or "none"),
        *([("undone", _words(route.reverse))] if isinstance(route, Undoing) else []),
        ("weights", f"{len(plan.tensors)} tensors, {plan.n_params:,} parameters, {', '.join(dtypes)}"),
        *([("kept for undoing", f"`ledger.safetensors` ({ledger})")] if ledger else []),
        *([("graph", f"`{graph}`")] if graph else []),
        *([("left out", _words(few(tuple(plan.dropped))))] if plan.dropped else []),
        *([("added", _words(few(plan.invented)))] if plan.invented else []),
        *(("note", _words(note)) for note in (*source.notes, *route.remarks)),
    ]  # fmt: skip
    yield _table(("", ""), rows)
    yield "`neoconvert.json` has the SHA-256 of every tensor and of every file.\n"


def _loading(plan: Plan) -> Iterator[tuple[str, str]]:
    files = repr(sorted({tensor.shard for tensor in plan.tensors})).replace("'", '"')
    if plan.layout == "hf":
        yield "transformers", _HF
        yield "TransformerLens 3 or 4", _BOOTED
    elif plan.layout == "hooked":
        yield "TransformerLens 2 or 3", _HOOKED.replace("FILES", files)
        yield (
            "TransformerLens 4, which has no HookedTransformer",
            'from converter import to_bridge\n\nbridge = to_bridge(".")\n',
        )
    else:
        code = (
            _BRIDGE if plan.steps else _BRIDGE.replace("bridge.enable_compatibility_mode()\n", "")
        )
        yield "TransformerLens 3 or 4", code.replace("FILES", files)


def _checked(source: Checkpoint, verification: Verification | None) -> Iterator[str]:
    original = shlex.quote(source.source.name) if source.source.revision else "SOURCE"
    again = f"```bash\nneoconvert verify {inert(original)} .\n```\n"
    if verification is None:
        yield f"Nothing: it was converted with `--no-verify`. This checks it:\n\n{again}"
        return
    ran = {role: [r for r in verification.runtimes if r.role == role] for role in ("original", "artifact")}  # fmt: skip
    both = (", ".join(software(_short(r)) for r in ran[role]) for role in ("artifact", "original"))
    yield "Before it was published, the files were read back and run: {}, against {}.\n".format(
        *both
    )
    names = {r.what: _short(r).what for r in verification.runtimes}
    rows = [
        (QUESTIONS[e.link], _words(names.get(e.subject, e.subject)), _words(str(e)))
        for e in verification.evidence
    ]
    yield _table(("what", "of", ""), rows)
    for long, short in names.items():
        if long != short:
            yield f"In place of TransformerLens, {short} ran: {long.removeprefix(short)[2:-1]}.\n"
    if verification.probes:
        worst = max(verification.probes, key=lambda probe: probe.ratio)
        yield (
            f"The worst of {len(verification.probes)} probes ({_words(worst.name)}) is at {worst.ratio:.2f} times"
            f" float32's own noise, of {verification.max_ratio:g} that are allowed: max |Δ log p|"
            f" {worst.max_abs_logprob_diff:.2e}, KL {worst.kl:.1e}, the same most likely token in"
            f" {worst.top1_agreement:.0%}. {verification.reached or ''}\n"
        )
    yield f"To check it again:\n\n{again}"


def _short(runtime: RuntimeInfo) -> RuntimeInfo:
    """Without the reason why it is neoconvert's own forward that ran."""
    if runtime.name != "neoconvert":
        return runtime
    return replace(runtime, what=runtime.what.partition(" (")[0])


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = (f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))
    return "\n".join(lines) + "\n"


def _name(source: Checkpoint) -> str:
    return _words(source.source.name)


def _words(text: str) -> str:
    """Text from elsewhere as plain words in Markdown, within a line and a cell of a table."""
    escaped = html.escape(inert(text), quote=False)
    return "".join(f"\\{c}" if c in r"\`*_[]|#!" else c for c in escaped)


def write_card(directory: Path, text: str) -> None:
    (directory / CARD).write_bytes(text.encode("utf-8", "backslashreplace"))
