"""Making faulty artifacts, and judging what verification says of them."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.numpy import save_file

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.checkpoint.hf_config import to_hf
from converter.checkpoint.tl_config import to_tl
from converter.dtypes import NAMES, cast
from converter.errors import NeoconvertError
from converter.onnx import export
from converter.onnx.opening import CONFIG
from converter.opening import Given, open_artifact
from converter.verification import MAX_RATIO, Verification, standard_probes, verify
from converter.verification.judge import Floor, pooled_floor, widest
from converter.verification.loading import has_hooked_transformer
from converter.verification.logits import Forward
from converter.verification.measuring import measure
from converter.verification.reference import forward
from tests.models import random_hf
from tests.verification.fault import ALL, RAW, Artifact, Fault, Weights
from tests.verification.graph import Exact, Graph

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"seed": 1, "tied": True, "intermediate_size": 16},
    "untied": {
        "seed": 2, "tied": False, "num_layers": 4, "hidden_size": 24, "num_heads": 6,
        "intermediate_size": 40, "vocab_size": 61,
    },
    "quiet": {
        "seed": 3, "tied": False, "num_layers": 3, "hidden_size": 32, "intermediate_size": 32,
        "vocab_size": 131, "max_position_embeddings": 48,
    },
}  # fmt: skip
"""Window 5, attention of some units, gains within one power of ten: what float32 loses is little.
The residual stream of "quiet" is a hundredth as large, as those of trained models may be: there
a LayerNorm's epsilon counts."""
_WRITING = ("embed.W_E", "pos_embed.W_pos", "attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")

VISIBLE = MAX_RATIO + 4
"""A change of the function that verification cannot miss, in units of the noise floor: the
artifact's own float32 error, 3 at most where it is honest, may take from what is measured."""


def here() -> tuple[Artifact, ...]:
    """The artifacts whose software this environment is for."""
    lacking = {"bridge"} if has_hooked_transformer() else {"hooked", "processed"}
    return tuple(artifact for artifact in ALL if artifact not in lacking)


class NothingChanges(Exception):
    """The fault is too small for the dtype in which the weights are stored."""


@dataclass(frozen=True)
class Outcome:
    """What verification said of one faulty artifact."""

    fault: Fault
    artifact: Artifact
    ratio: float
    """The worst probe's, over MAX_RATIO: above 1 is caught. Infinite where refused, or NaN."""
    by: str | None
    """Who departs where all probes pass: "original"."""
    function: bool
    """Whether the function check alone flags it."""
    weights: bool
    """Whether the weight check alone does."""
    unit: str | None
    """The unit that the function check alone names."""
    weights_unit: str | None
    change: float | None
    """How much the function changes in float64, in units of the noise floor; None: unknown."""

    @property
    def faint(self) -> bool:
        """Missed, and as small as the fault says it may be."""
        small = self.change is not None and self.change <= VISIBLE
        return self.fault.faint and small and not (self.function or self.weights)

    @property
    def wrong(self) -> str | None:
        """Why this outcome speaks against the verifier."""
        if self.fault.harmless:
            return "flagged, though harmless" if self.function else None
        visible = self.change is None or not self.change <= VISIBLE
        if visible and not self.function:
            return "missed by function"
        if not self.function and not self.weights and not self.faint:
            return "missed by both"
        expected = self.fault.unit
        for found in (self.unit, self.weights_unit):
            if expected is not None and found is not None and found != expected:
                return f"located in {found}, not {expected}"
        return None


class Workshop:
    """One model, its honest artifacts, each made once, and spoiled copies of them."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.original = open_checkpoint(
            random_hf(directory / "original", scale=1.5, **MODELS[name])
        )
        if name == "quiet":
            weights = {k: np.array(self.original.tensor(k)) for k in self.original.stored}
            softer = {k: w / 128 if k.endswith(_WRITING) else w for k, w in weights.items()}
            _save(self.original, softer, self.original.directory)
            self.original = open_checkpoint(self.original.directory)
        self._made: dict[Artifact, Path] = {}

    def applies(self, fault: Fault, artifact: Artifact) -> bool:
        return artifact in fault.on and (
            fault.needs is None or fault.needs(self.original, artifact)
        )

    def honest(self, artifact: Artifact) -> Path:
        if artifact not in self._made:
            output = self.directory / artifact
            makers: dict[Artifact, Callable[[], Any]] = {
                "hf": lambda: converter.tl_to_hf(self.honest("hooked"), output, check=False),
                "hooked": partial(converter.hf_to_tl, self.original, output, check=False),
                "bridge": partial(
                    converter.hf_to_tl, self.original, output, layout="bridge", check=False
                ),
                "baked": partial(converter.bake, self.original, output, check=False),
                "processed": partial(
                    converter.hf_to_tl, self.original, output, process="default", check=False
                ),
                "onnx": lambda: export(self.original, output, weights="external"),
            }
            makers[artifact]()
            self._made[artifact] = output
        return self._made[artifact]

    def spoil(self, fault: Fault, artifact: Artifact, output: Path) -> Checkpoint:
        """A faulty artifact, and nothing about it says so."""
        if artifact != "onnx":
            return _spoiled(self.original, self.honest(artifact), fault, output)
        claimed = self.original.config
        source = _spoiled(self.original, self.original.directory, fault, output.with_name("source"))
        if fault.config:
            # The weights, in a graph of another architecture.
            copy = open_checkpoint(shutil.copytree(self.honest("hf"), output.with_name("copy")))
            source = replace(copy, config=replace(claimed, **fault.config(claimed)))
        path = export(source, output, weights="external").path
        honest = onnx.load_model(str(self.honest("onnx") / path.name), load_external_data=False)
        said = {entry.key: entry.value for entry in honest.metadata_props}
        model = onnx.load_model(str(path), load_external_data=False)
        for entry in model.metadata_props:
            entry.value = said[entry.key] if entry.key == CONFIG else entry.value
        if fault.graph:
            fault.graph(Graph(model))
        path.write_bytes(model.SerializeToString())
        return open_artifact(path)

    @cached_property
    def reference(self) -> Path:
        """A reference file of the original."""
        path = self.directory / "original.reference"
        converter.reference(self.original.directory, path, device="cpu")
        return path

    def judge(self, fault: Fault, artifact: Artifact, *, recorded: bool = False) -> Outcome:
        """Both layers of verification, each alone. `recorded`: by a reference file."""
        original: Given = self.reference if recorded else self.original
        with tempfile.TemporaryDirectory(dir=self.directory) as scratch:
            try:
                spoiled = self.spoil(fault, artifact, Path(scratch) / "artifact")
            except NeoconvertError:  # refused before verification looks at it
                return Outcome(fault, artifact, math.inf, None, True, True, None, None, None)
            with fault.software() if fault.software else contextlib.nullcontext():
                function = _verified(original, spoiled, "function")
            weights = _verified(original, spoiled, "weights")
            return Outcome(
                fault, artifact,
                ratio=math.inf if function is None else _ratio(function),
                by="original" if function and _only_the_original(function) else None,
                function=function is None or not function.passed,
                weights=weights is None or not weights.passed,
                unit=_unit(function), weights_unit=_unit(weights),
                change=self._change(fault, spoiled),
            )  # fmt: skip

    def _change(self, fault: Fault, spoiled: Checkpoint) -> float | None:
        """The largest change over the probes, in units of float32's noise floor; None where no
        forward of ours shows it."""
        return _largest(self._true, self._computed(fault, spoiled, fault.faint), self._floors)

    def change_in_float64(
        self, fault: Fault, artifact: Artifact, spoiled: Checkpoint
    ) -> float | None:
        """The same against the honest artifact, in units of float64's noise floor."""
        honest = self._true
        if artifact not in RAW:
            opened = open_artifact(self.honest(artifact))
            honest = forward(opened, honest.probes, dtype=torch.float64)
        alone = "cache" not in fault.name  # a graph is run in one pass
        floor = widest(self._floors, share=2.0**-29)
        return _largest(honest, self._computed(fault, spoiled, alone), [floor] * len(honest.probes))

    def _computed(self, fault: Fault, spoiled: Checkpoint, run_graph: bool) -> list[Any] | None:
        """The spoiled artifact's logits for each probe, in float64."""
        probes = self._true.probes
        config = spoiled.config
        if fault.config:
            config = replace(config, **fault.config(config))
        if fault.graph and run_graph:
            exact = Exact(spoiled.source.path)
            return [torch.from_numpy(exact(probe)) for probe in probes]
        if fault.graph or fault.software or config.n_heads != self.original.config.n_heads:
            return None
        found = forward(replace(spoiled, config=config), probes, dtype=torch.float64)
        return [partial(found.at, index) for index in range(len(probes))]

    @cached_property
    def _true(self) -> Forward:
        return forward(self.original, standard_probes(self.original.config), dtype=torch.float64)

    @cached_property
    def _floors(self) -> list[Floor]:
        probes, draws = self._true.probes, 5
        runs = forward(
            self.original, [*probes] * draws, dtype=torch.float32, jitter=range(draws * len(probes))
        )
        every = range(len(probes))
        return [
            pooled_floor(
                measure(
                    self._true, i, [partial(runs.at, i + d * len(probes)) for d in range(draws)]
                )
            )
            for i in every
        ]


def for_fault(workshops: Mapping[str, Workshop], fault: Fault, artifact: Artifact) -> Workshop:
    """The first whose model can have the fault; a faint one shows only in the quiet model."""
    models = ["quiet"] if fault.faint else ["tied", "untied"]
    return next(w for name in models if (w := workshops[name]).applies(fault, artifact))


def _largest(true: Forward, runs: list[Any] | None, floors: Sequence[Floor]) -> float | None:
    if runs is None:
        return None
    errors = [measure(true, index, [run])[0] for index, run in enumerate(runs)]
    if any(error.classes for error in errors):
        return math.inf  # NaN or infinity
    return max(e.ratio(floor) for e, floor in zip(errors, floors, strict=True))


def _verified(original: Given, artifact: Checkpoint, check: str) -> Verification | None:
    """One layer's verdict; None where verification refuses the artifact outright."""
    try:
        return verify(original, artifact, checks=[check], device="cpu")
    except NeoconvertError:
        return None


def _only_the_original(result: Verification) -> bool:
    return not result.passed and all(probe.passed for probe in result.probes)


def _ratio(result: Verification) -> float:
    if any(not p.passed and p.ratio <= result.max_ratio for p in result.probes):
        return math.inf  # NaN where the original has none
    return max(probe.ratio for probe in result.probes) / result.max_ratio


def _unit(result: Verification | None) -> str | None:
    return result.first_divergence.unit if result and result.first_divergence else None


def _spoiled(original: Checkpoint, honest: Path, fault: Fault, output: Path) -> Checkpoint:
    """A copy of a checkpoint directory with other weights or another config."""
    shutil.copytree(honest, output)
    checkpoint = open_checkpoint(honest)
    weights: Weights = {key: np.array(checkpoint.tensor(key)) for key in checkpoint.stored}
    before = dict(weights)
    if fault.weights:
        fault.weights(weights, original)
        same = weights.keys() == before.keys() and all(
            np.array_equal(cast(np.asarray(weights[k]), checkpoint.code(k)), before[k])
            for k in weights
        )
        if same and not fault.harmless:
            raise NothingChanges(fault.name)
    _save(checkpoint, weights, output)
    fields = fault.config(checkpoint.config) if fault.config else {}
    if fields or fault.document:
        name, document = _document(checkpoint, fields)
        (output / name).write_text(json.dumps(document | dict(fault.document)), encoding="utf-8")
    return open_checkpoint(output)


def _document(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    config, dtype = replace(checkpoint.config, **fields), NAMES[checkpoint.dtype]
    if checkpoint.layout == "hooked":
        base = checkpoint.source.tl_config
        return "cfg.json", to_tl(config, base, dtype=dtype, model_name="tiny")
    base = checkpoint.original_hf_config
    tied = (base or {}).get("tie_word_embeddings", True)
    return "config.json", to_hf(config, base, tied=tied, dtype=dtype)


def _save(checkpoint: Checkpoint, weights: Weights, directory: Path) -> None:
    """Weights in `hooked` axes, in the checkpoint's layout and dtypes."""
    tensors = {}
    for key, weight in weights.items():
        stored = cast(np.asarray(weight), checkpoint.code(key))
        slot = checkpoint.slots[key]
        own = slot.to_hub.inverse.apply(stored, checkpoint.config.sizes)
        tensors[str(slot.name)] = np.ascontiguousarray(own)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
