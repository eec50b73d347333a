"""Digests of what routes make of an original: which artifacts are its weights, bit for bit.

The steps are portable (`converter.processing.step`): the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from converter.checkpoint import Checkpoint, NeoConfig
from converter.dtypes import sha256
from converter.layout import GPT_NEO, HEAD, Layout
from converter.piecewise import Piecewise, stored_as
from converter.processing import DEFAULT, STEPS
from converter.progress import Progress
from converter.route import Array, Route
from converter.routing import already_applied, plain, processing
from converter.verification.evidence import Evidence, NotComparable

_USUAL = ("F32", "F16", "BF16")
"""The dtypes that artifacts are stored in."""
_MADE_FOR: tuple[Layout, ...] = ("hooked", "hf")


@dataclass(frozen=True)
class Recipe:
    """What one route makes, by digests."""

    steps: tuple[str, ...]
    carried: bool
    """Made for HF: what folding leaves as biases rides on the LayerNorms."""
    folded: bool
    scale: tuple[float, ...]
    computed: bool
    """Whether weights are computed, not moved."""
    sha256: Mapping[str, Mapping[str, str]]
    """By dtype code and `hooked` name."""
    neutral: frozenset[str]
    """`hooked` names of weights that a file may leave out: all zeros, or all ones."""
    evidence: Evidence
    """The route link, as it was found where the original was."""

    def claimed_by(self, artifact: Checkpoint) -> bool:
        said = artifact.source.provenance or {}
        steps = said.get("steps")
        carried = bool(self.steps and GPT_NEO.carriers(artifact.layout))
        return list(self.steps) == steps and self.carried == carried


def routes_of(source: Checkpoint) -> Iterator[tuple[Route, bool]]:
    """The routes that most artifacts have taken, and whether each is for HF."""
    yield plain(source), False
    if source.config.score_divisors:
        yield replace(plain(source), scale=source.config.score_divisors), False
    seen: set[tuple[tuple[str, ...], bool]] = set()
    for steps in (DEFAULT, STEPS):
        for layout in _MADE_FOR:
            route = processing(source, steps, layout)
            carried = bool(GPT_NEO.carriers(layout))
            key = route.steps, carried
            if route.whole_units and key not in seen:
                seen.add(key)
                yield route, carried


def recipe_of(route: Route, carried: bool, evidence: Evidence, say: Progress) -> Recipe:
    """Make all of a route's weights, and take their digests."""
    codes = [*_USUAL, *sorted({s.code for s in route.source.stored.values()} - set(_USUAL))]
    digests: dict[str, dict[str, str]] = {code: {} for code in codes}
    neutral = set()
    for slots, _, made in route.run():
        for slot in slots:
            say(f"digests: {slot.key}")
            array = made.tensors[slot.local]
            if isinstance(array, Piecewise):  # computed once, not for each dtype
                array = np.asarray(array)
            for code in codes:
                digests[code][slot.key] = sha256(stored_as(array, code))
            if slot.absence and np.all(np.asarray(stored_as(array, "F64")) == slot.absence.value):
                neutral.add(slot.key)
    return Recipe(
        route.steps, carried, route.folded, route.scale, route.whole_units, digests,
        frozenset(neutral), evidence,
    )  # fmt: skip


@dataclass(frozen=True)
class RecordedRoute(Route):
    """A route from an original that is not here, to one artifact."""

    recipe: Recipe | None = None
    """None: the artifact is none of those that there are digests of."""
    whole_units: bool = False
    settled: bool = False
    """Whether the artifact is, bit for bit, what the recipe says."""
    artifact: Checkpoint | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the artifact's tensors, by `hooked` name: taken once."""

    name = "recorded"

    def into(self, artifact: Checkpoint) -> _Digests:
        """See `Route`."""
        return _Digests(self, artifact)


@dataclass(frozen=True)
class _Digests:
    """The weights of an artifact, which digests tell to be the route's."""

    route: RecordedRoute
    artifact: Checkpoint

    @property
    def config(self) -> NeoConfig:
        return self.route.target_config

    def tensor(self, key: str) -> Array:
        if not self.route.settled:
            raise NotComparable("the original's weights are not in the reference file")
        return self.artifact.tensor(key)

    def is_(self, key: str, found: Array, *, bitwise: bool) -> bool:
        """See `converter.route.Weights`."""
        recipe = self.route.recipe
        assert recipe is not None
        if not bitwise:
            return key in recipe.neutral
        same = self.artifact is self.route.artifact
        digest = self.route.digests.get(key) if same else None
        return recipe.sha256[self.artifact.code(key)].get(key) == (digest or sha256(found))


def route_to(
    original: Checkpoint, recipes: tuple[Recipe, ...], artifact: Checkpoint
) -> RecordedRoute:
    """The route that an artifact's weights show: what it says only counts where they do not.

    Where it says nothing, and most of its tensors are what a recipe makes and show that recipe's
    steps, the others are wrong.
    """
    digests = _digests_of(artifact) if artifact.complete else {}
    found = _differing(original, recipes, artifact, digests) if artifact.complete else []
    exact = [recipe for recipe, count in found if not count]
    claimed = [recipe for recipe, _ in found if recipe.claimed_by(artifact)]
    chosen = next(iter([*exact, *claimed]), None)
    steps = already_applied(artifact, STEPS) if chosen is None and artifact.complete else set()
    if chosen is None and not (artifact.source.provenance or {}).get("route"):
        near = [r for r, n in sorted(found, key=lambda f: f[1])[:1] if 2 * n < len(artifact.slots)]
        chosen = next((recipe for recipe in near if set(recipe.steps) == steps), None)
    if chosen is None:
        return RecordedRoute(
            original,
            folded=artifact.config.folded,
            tied=False,
            scale=artifact.config.score_divisors,
            steps=tuple(step.name for step in STEPS if step.name in steps),
            unknown="the reference file has digests of the original's weights and of those that the"
            " default steps and all steps make, and these are others",
        )
    return RecordedRoute(
        original,
        folded=chosen.folded,
        tied=False,
        scale=chosen.scale,
        steps=chosen.steps,
        recipe=chosen,
        whole_units=chosen.computed,
        settled=bool(exact),
        artifact=artifact,
        digests=digests,
    )


def _digests_of(artifact: Checkpoint) -> dict[str, str]:
    return {
        key: sha256(artifact.tensor(key))
        for key in artifact.slots
        if key in artifact.stored or key == HEAD
    }


def _differing(
    original: Checkpoint,
    recipes: tuple[Recipe, ...],
    artifact: Checkpoint,
    digests: Mapping[str, str],
) -> list[tuple[Recipe, int]]:
    """How many tensors of the artifact are not what each recipe makes."""
    absent = [key for key in artifact.slots if key not in digests and key in original.stored]
    known = [r for r in recipes if {artifact.code(key) for key in digests} <= r.sha256.keys()]
    return [
        (
            recipe,
            sum(recipe.sha256[artifact.code(k)].get(k) != d for k, d in digests.items())
            + sum(key not in recipe.neutral for key in absent),
        )
        for recipe in known
    ]
