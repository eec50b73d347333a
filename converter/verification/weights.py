"""What the files hold, compared: weights bit for bit, configs, the nodes of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from converter.checkpoint import Checkpoint
from converter.checkpoint.config import SIZES
from converter.checkpoint.hf_config import from_hf
from converter.checkpoint.standard import STANDARD, weights_name
from converter.dtypes import CODES, NAMES, cast
from converter.errors import NotRepresentable, TensorMismatch
from converter.layout import GPT_NEO, HEAD
from converter.progress import Progress, silent
from converter.route import Route


@dataclass(frozen=True)
class Mismatch:
    """A tensor that is not what the original makes it."""

    unit: str
    """"embed", "block i" or "final"."""
    key: str
    """Its `hooked` name."""
    tensor: str
    """See `Checkpoint.tensor_name`."""

    @staticmethod
    def of(artifact: Checkpoint, key: str) -> Mismatch:
        place, name = artifact.slots[key].place, artifact.tensor_name(key)
        return Mismatch(place, key, name)


@dataclass(frozen=True)
class WeightCheck:
    """What comparing all weights and the architecture gave. Units are in forward order."""

    compared: int
    mismatches: tuple[Mismatch, ...]
    config: tuple[str, ...] = ()
    """Fields of the config that mean something else in the artifact."""
    nodes: tuple[str, ...] = ()
    """Nodes of an ONNX graph that are not what its config makes them."""
    unlike: str | None = None
    """Why the nodes could not be compared, as a clause."""
    ours: bool = False
    """Whether neoconvert wrote the graph, as it says or by its looks."""
    explained: tuple[str, ...] | None = None
    """Where the artifact does not say how it was made: the steps that, as its weights themselves
    show, separate it from the original, and beside which nothing differs beyond rounding."""

    unknown: str | None = None
    """Why nobody here knows what the weights must be, as a clause."""
    absent: int = 0
    """Tensors that a lossy artifact does not have by name, and that could not be compared."""

    @property
    def mismatched(self) -> tuple[str, ...]:
        return tuple(m.tensor for m in self.mismatches)

    @property
    def passed(self) -> bool:
        return self.compared > 0 and not (self.mismatches or self.config or self.nodes)


def joined(checks: Sequence[WeightCheck]) -> WeightCheck:
    """Several checks as one."""
    return WeightCheck(
        sum(check.compared for check in checks),
        tuple(m for check in checks for m in check.mismatches),
        tuple(dict.fromkeys(name for check in checks for name in check.config)),
        tuple(name for check in checks for name in check.nodes),
        explained=next((check.explained for check in checks if check.explained is not None), None),
    )


def require_same_sizes(original: Checkpoint, artifact: Checkpoint) -> None:
    """
    Raises:
        TensorMismatch: the two cannot be the same model; the message names the field.
    """
    for field in SIZES:
        expected, found = getattr(original.config, field), getattr(artifact.config, field)
        if expected != found:
            raise TensorMismatch(
                f"{field} is {found} in the artifact and {expected} in the original.",
                where=f"{original.source.given} and {artifact.source.given}",
                do="These are different models; name the artifact that was made from this original.",
            )


def compare_weights(
    route: Route,
    artifact: Checkpoint,
    progress: Progress = silent,
    *,
    partial: bool = False,
) -> WeightCheck:
    """Every tensor of the artifact against what `route` makes of the original, cast to the
    artifact's dtype.

    Args:
        partial: what the artifact does not hold by name is passed over, and no mismatch.

    Raises:
        TensorMismatch: the sizes differ.
    """
    original = route.source
    require_same_sizes(original, artifact)
    made = route.into(artifact)
    mismatches = []
    compared = done = 0
    total = sum(stored.nbytes for stored in artifact.stored.values())
    for key, slot in artifact.slots.items():
        if key not in artifact.stored and key not in original.stored:
            continue  # neither file holds it: nothing to compare
        if partial and key not in artifact.stored:
            continue
        compared += 1
        if key not in artifact.stored and slot.absence is None and key != HEAD:
            mismatches.append(Mismatch.of(artifact, key))  # a graph without it
            continue
        done += artifact.stored[key].nbytes if key in artifact.stored else 0
        progress(f"weights: {artifact.tensor_name(key)}", done, total)
        found = artifact.tensor(key)
        # A tensor left out as neutral stands for a value, and has no bits of its own.
        if not made.is_(key, found, bitwise=key in artifact.stored or key == HEAD):
            mismatches.append(Mismatch.of(artifact, key))
    config = route.target_config.differences(artifact.config)
    if not mismatches and route.target_config.folded != artifact.config.folded:
        config += ("normalization_type",) if _norms_matter(artifact) else ()
    return WeightCheck(compared, tuple(mismatches), config)


def rounded_when_loaded(route: Route, artifact: Checkpoint) -> tuple[str, ...]:
    """The dtype that the artifact's config states, where loading rounds its weights to that."""
    stated = _stated_dtype(artifact)
    if stated is None or stated == route.source.stated_dtype:
        return ()
    for key, stored in artifact.stored.items():
        if stored.code == stated or CODES[stored.code].itemsize < CODES[stated].itemsize:
            continue
        own = artifact.tensor(key)
        if not np.array_equal(cast(own, stated).astype(np.float64), own, equal_nan=True):
            return (f"dtype: {NAMES[stated]} is stated, to which loading rounds the weights",)
    return ()


@dataclass(frozen=True)
class Astray:
    """Weights that stock transformers does not find where they were found."""

    where: str
    """The first of the names that it looks for."""
    said: str
    """In a sentence."""
    fails: bool
    """A directory is what `from_pretrained` opens: it fills in what it does not find at random, and
    goes on, so that a pipeline needs a failure. Who names a file opens it in a way of their own, and
    gets a remark."""


def astray(artifact: Checkpoint) -> Astray | None:
    """Of an artifact in HF's layout: what `from_pretrained` would not find there, if anything."""
    source = artifact.source
    if artifact.layout != "hf" or artifact.graph is not None or source.live or artifact.merged:
        return None
    fails = source.is_directory and (source.path / "config.json").is_file()
    if renamed := artifact.renamed:
        said = f"{len(renamed)} of its tensors are not there under the names that transformers looks for, first {renamed[0]}"
        more = "from_pretrained would fill them in at random" if fails else "the file is verified under its own"  # fmt: skip
        return Astray(renamed[0], f"{said}: {more}.", fails)
    name = weights_name(source.path) if source.is_directory else source.path.name
    if name in STANDARD:
        return None
    what = f"a file called {name}" if name else "shards without their index"
    return Astray(STANDARD[0], f"from_pretrained does not look for {what}.", fails)


def _stated_dtype(checkpoint: Checkpoint) -> str | None:
    """The dtype that its library loads it in by default. TransformerBridge goes by none."""
    loaded = checkpoint.graph is None and checkpoint.layout != "bridge"
    return checkpoint.stated_dtype if loaded else None


def _norms_matter(checkpoint: Checkpoint) -> bool:
    """Whether a LayerNorm has a gain or a bias that leaving it out would lose."""
    gains = {".w": 1.0, ".b": 0.0}
    return any(
        bool(np.any(checkpoint.tensor(key) != gains[key[-2:]]))
        for key, slot in checkpoint.slots.items()
        if slot.local.split(".")[0] in GPT_NEO.norms
    )


def compare_structure(route: Route, graph: Checkpoint) -> WeightCheck:
    """An ONNX graph against the one its config makes, and that config against the original's and
    against the config.json beside it, which is what the graph's clients read. No weight is read.
    """
    from converter.onnx.structure import Nodes, compare_nodes

    try:
        nodes = compare_nodes(graph)
    except NotRepresentable as error:
        nodes = Nodes(ours=False, unknown=error.what.rstrip("."))
    config = [*route.target_config.differences(graph.config)]
    if graph.source.hf_config is not None:
        said = from_hf(graph.source.hf_config, str(graph.directory / "config.json"))
        plain = replace(graph.config, score_divisors=())
        sizes = [f for f in SIZES if getattr(said, f) != getattr(plain, f)]
        config += [f"config.json: {f}" for f in (*sizes, *said.differences(plain))]
    return WeightCheck(0, (), tuple(config), nodes.differing, nodes.unknown, nodes.ours)
