"""What is asked for beside the route: how the result is stored, and how it is verified.

Every value is checked when it is given, so that none is refused after an hour's work.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from converter.checkpoint import Checkpoint
from converter.checkpoint.plan import split_by_size
from converter.choices import (
    Command,
    Effort,
    LedgerOption,
    LensLayout,
    Reverse,
    RuntimeName,
    flags,
    of_kind,
    one_of,
)
from converter.dtypes import NAMES, code_named
from converter.errors import BadInput, UsageError
from converter.layout import Layout
from converter.processing import parse
from converter.progress import Progress, silent
from converter.route import Processing, Route
from converter.routing import has_ledger, plain, processing, reversing
from converter.verification import Verification, verify
from converter.verification.loading import require_docstrings, resolve_device

if TYPE_CHECKING:
    import torch

    from converter.exporting import Graph

KEEP = "keep"
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def code_asked(dtype: str | torch.dtype | None) -> str | None:
    """The safetensors code of "float16" or `torch.float16`; None for None and "keep".

    Raises:
        UsageError: no dtype that weights are stored in.
    """
    if dtype is None or dtype == KEEP:
        return None
    name = str(dtype).removeprefix("torch.")
    one_of(name, (KEEP, *NAMES.values()), "--dtype")
    return code_named(name)


@dataclass(frozen=True)
class Writing:
    """How the result is stored; see `convert.hf_to_tl`."""

    dtype: str | torch.dtype | None = None
    ledger: LedgerOption = "compact"
    max_shard_size: str | int = "5GB"
    graph: Graph | None = None
    keep_weights: bool = False
    overwrite: bool = False
    dry_run: bool = False
    model_card: bool = False

    def __post_init__(self) -> None:
        from converter.exporting import Graph

        code_asked(self.dtype)
        one_of(self.ledger, get_args(LedgerOption), "--ledger")
        of_kind(self.max_shard_size, (str, int), "--max-shard-size", "Write it as 5GB or 100000.")
        split_by_size({}, self.max_shard_size)
        if self.graph is not None:
            of_kind(self.graph, Graph, "graph", "Give a converter.Graph, or nothing.")
        flags(
            {
                "keep_weights": self.keep_weights,
                "--overwrite": self.overwrite,
                "--dry-run": self.dry_run,
                "--model-card": self.model_card,
            }
        )

    @property
    def code(self) -> str | None:
        """The safetensors code to store in; None: each tensor keeps its own."""
        return code_asked(self.dtype)

    def to_json(self) -> dict[str, Any]:
        """What provenance keeps: what was asked for, as the command line has it."""
        formats = [] if self.graph_alone else ["safetensors"]
        return {
            "dtype": NAMES[self.code] if self.code else KEEP,
            "max_shard_size": str(self.max_shard_size),
            "ledger": self.ledger,
            "formats": [*formats, *(["onnx"] if self.graph else [])],
            "graph": self.graph.to_json() if self.graph else None,
            **({"model_card": True} if self.model_card else {}),
        }

    def keeps_ledger(self, route: Route) -> bool:
        return (
            self.ledger != "none"
            and not self.graph_alone
            and isinstance(route, Processing)
            and bool(route.pipeline)
        )

    @property
    def graph_alone(self) -> bool:
        """The graph has the weights itself, and no weight file is to be beside it."""
        return self.graph is not None and self.graph.weights != "shared" and not self.keep_weights


@dataclass(frozen=True)
class Checking:
    """How the files are verified before they are published; see `verification.verify`."""

    check: bool = True
    device: str | torch.device = "auto"
    runtime: RuntimeName | None = None
    effort: Effort = "standard"
    layers: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.runtime is not None:
            one_of(self.runtime, get_args(RuntimeName), "--runtime")
        one_of(self.effort, get_args(Effort), "--effort")
        flags({"check": self.check, "layers": self.layers})
        if self.progress is not None and not callable(self.progress):
            of_kind(
                self.progress, type(silent), "progress", "Give a function; see converter.progress."
            )
        if not _DEVICE.fullmatch(str(self.device)):
            one_of(self.device, ("auto", "cpu", "cuda", "cuda:0"), "--device")

    @property
    def say(self) -> Progress:
        return self.progress or silent

    def to_json(self) -> dict[str, Any] | None:
        """What provenance keeps: how much is proved. None: nothing is."""
        return {"runtime": self.runtime, "effort": self.effort} if self.check else None

    def require_possible(self) -> None:
        """
        Raises:
            CannotDoHere: the device asked for is not here, or no model can run; raised
                before an hour's work.
        """
        if self.check:
            require_docstrings()
            resolve_device(str(self.device))

    def verify(
        self, original: Checkpoint, artifact: Checkpoint, route: Route
    ) -> Verification | None:
        """None where no check was asked for."""
        if not self.check:
            return None
        return verify(
            original, artifact, route=route, device=str(self.device), runtime=self.runtime,
            effort=self.effort, layers=self.layers, progress=self.progress,
        )  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A converting command with its options; all but SOURCE and OUTPUT.

    Raises:
        UsageError: no such step, layout or other value.
    """

    command: Command
    writing: Writing
    checking: Checking
    layout: Layout = "hooked"
    """Of hf-to-tl."""
    process: str = "none"
    """Of hf-to-tl and bake."""
    reverse: Reverse = "auto"
    """Of tl-to-hf."""

    def __post_init__(self) -> None:
        one_of(self.layout, get_args(LensLayout), "--layout")
        one_of(self.reverse, get_args(Reverse), "--reverse")
        parse(self.process)
        graph, runtime = self.writing.graph, self.checking.runtime if self.checking.check else None
        if runtime == "onnxruntime" and graph is None:
            raise UsageError(
                "There is no graph that onnxruntime could run.",
                where="--runtime onnxruntime",
                do="Leave --runtime out, or have a graph written too: --format onnx.",
            )
        if runtime == "torch" and self.writing.graph_alone:
            raise UsageError(
                "There are no weights that torch could run: the graph has them.",
                where="--runtime torch",
                do="Leave --runtime out, or keep weight files too: --format safetensors.",
            )

    def to_json(self) -> dict[str, Any]:
        """What provenance keeps: what was asked for. Where it runs, and what it may replace, are
        left out: the result is the same."""
        own: dict[str, Any] = {"command": self.command}
        if self.command == "hf-to-tl":
            own["layout"] = self.layout
        if self.command in ("hf-to-tl", "bake"):
            own["process"] = [step.name for step in parse(self.process)]
        if self.command == "tl-to-hf":
            own["reverse"] = self.reverse
        return own | self.writing.to_json() | {"check": self.checking.to_json()}

    def target(self, source: Checkpoint) -> Layout:
        """The layout of OUTPUT."""
        if self.command == "export-onnx":
            return source.layout
        return self.layout if self.command == "hf-to-tl" else "hf"

    def route(self, source: Checkpoint) -> Route:
        """How it is done for this source.

        Raises:
            BadInput: SOURCE is of a layout that the command does not take, or not sound.
            CannotUndo: see `reversing`.
        """
        if self.command == "export-onnx":
            return plain(source)
        name = shlex.quote(source.source.given)
        if self.command == "tl-to-hf":
            if source.layout == "hf" and not has_ledger(source):
                raise BadInput(
                    "SOURCE is in Hugging Face's layout already.",
                    where=str(source.source.path),
                    do=f"For TransformerLens's layout: neoconvert hf-to-tl {name} OUTPUT",
                )
            return reversing(source, self.reverse, recast=self.writing.code is not None)
        if source.layout != "hf":
            raise BadInput(
                f"SOURCE is a TransformerLens checkpoint already (layout {source.layout}).",
                where=str(source.source.path),
                do="Bring it to Hugging Face's layout, and convert that:"
                f" neoconvert tl-to-hf {name} DIR"
                if self.command == "hf-to-tl"
                else "Bring it to Hugging Face's layout (--reverse functional keeps what TransformerLens"
                f" processed), and bake that: neoconvert tl-to-hf {name} DIR",
            )
        return processing(source, parse(self.process), self.target(source))
