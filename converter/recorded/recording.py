"""Recording an original, and the original that such a record stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from converter.checkpoint import Checkpoint
from converter.checkpoint.reader import Stored
from converter.checkpoint.replaceable import require_free
from converter.checkpoint.signature import signature
from converter.checkpoint.source import Source
from converter.choices import Effort, flags, one_of, place, seed_of
from converter.environment import versions
from converter.errors import UsageError
from converter.layout import expand
from converter.opening import Given, open_artifact
from converter.progress import Progress, silent
from converter.recorded import file
from converter.recorded.recipes import RecordedRoute, recipe_of, route_to, routes_of
from converter.recorded.sampled import Sampled, tables_of
from converter.route import Route
from converter.verification.evidence import Evidence, NotComparable
from converter.verification.judge import MAX_RATIO, pooled_floor
from converter.verification.original import Original, Pass
from converter.verification.probes import Probe
from converter.verification.verify import require_readable

if TYPE_CHECKING:
    import torch


def reference(
    original: Given,
    path: str | Path,
    *,
    effort: Effort = "standard",
    text: str | Path | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what verifying artifacts needs of an original to one file of a few megabytes, which
    `verify` takes in the original's place.

    Args:
        effort: how much is probed; see `verify`.
        text: a file of text that is probed too.
        seed: of the probes.
        overwrite: a reference file that neoconvert wrote may be replaced.

    Returns: plain JSON: the file, its bytes, its probes, and the steps whose weights it knows.

    Raises:
        OutputExists: there is a file that may not be replaced.
        NotRepresentable: the original's log-probabilities are not all finite.
        Others: see `verify`.
    """
    target = place(path, "FILE", "Name a file.")
    words = None if text is None else place(text, "--text", "Give a file of UTF-8 text.")
    flags({"--overwrite": overwrite})
    seed = seed_of(seed)
    one_of(effort, get_args(Effort), "--effort")
    checkpoint = open_artifact(original)
    require_readable(checkpoint)
    require_free(target, mark=file.MARK, overwrite=overwrite)
    if not target.absolute().parent.is_dir():
        raise UsageError(
            "There is no such directory for the file.",
            where=str(path),
            do="Name a file in a directory that is there.",
        )
    contents = _record(Original(checkpoint), effort, words, str(device), seed, progress or silent)
    checkpoint.source.require_unchanged()
    size = file.write(target.absolute(), contents, overwrite=overwrite)
    return {
        "file": str(target),
        "bytes": size,
        "effort": effort,
        "probes": [probe.name for probe in contents.probes],
        "steps": [list(recipe.steps) for recipe in contents.recipes],
    }


def _record(
    original: Original, effort: Effort, text: Path | None, device: str, seed: int, say: Progress
) -> file.Contents:
    from converter.verification.logits import Forward
    from converter.verification.passes import threads_for
    from converter.verification.probes import cost

    checkpoint = original.checkpoint
    probes = original.probes(checkpoint, seed, effort, text)
    with threads_for(cost(checkpoint.config, sum(probe.tokens.size for probe in probes))):
        known = original.run(probes, device, seed, say)
        assert isinstance(known.true, Forward)
        tables = tables_of(known.true)
        recipes = tuple(
            recipe_of(route, carried, _examined(route, known, seed, say), say)
            for route, carried in routes_of(checkpoint)
        )
    stored = {key: tensor.code for key, tensor in checkpoint.stored.items()}
    return file.Contents(
        checkpoint.source.name, checkpoint.layout, checkpoint.config, stored, effort, seed,
        versions(), probes, tables, known.own, known.noise, known.info, known.strange, recipes,
    )  # fmt: skip


def _examined(route: Route, known: Pass, seed: int, say: Progress) -> Evidence:
    """The route link of artifacts that are, bit for bit, what a route makes."""
    from converter.verification.route_link import examine_route
    from converter.verification.standard import Standard
    from converter.verification.subjects import THE_WEIGHTS

    draws = [[*([o] if o else []), *more] for o, more in zip(known.own, known.noise, strict=True)]
    floors = [pooled_floor(runs) for runs in draws]
    standard = Standard(known.true, floors, [runs[0] for runs in draws], [None] * len(draws))
    return examine_route(
        route, THE_WEIGHTS, route.source, known.true, standard, known.true, None,
        same=True, explained=None, known=True, limit=MAX_RATIO, seed=seed, say=say,
    )  # fmt: skip


class _Checkpoint(Checkpoint):
    """Of which only headers are here."""

    def tensor(self, key: str, dtype: str | None = None) -> np.ndarray:
        raise NotComparable("the original's weights are not in the reference file")


class Recorded(Original):
    """The original that a reference file stands for.

    Raises:
        CorruptFile, ConfigError: the file is damaged, or no sound reference file.
    """

    here = False

    def __init__(self, path: Path) -> None:
        self._contents = contents = file.read(path)
        self.effort = contents.effort
        self._last: tuple[Checkpoint, RecordedRoute] | None = None
        slots = expand(contents.layout, contents.config.sizes, contents.config.n_layers)
        stored = {
            key: Stored(key, code, slots[key].shape, path)
            for key, code in contents.codes.items()
            if key in slots
        }
        source = Source(str(path), path, (), None, None, None, None, opened={path: signature(path)})
        super().__init__(
            _Checkpoint(source, contents.layout, contents.config, slots, stored, dropped={})
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Original`."""
        of = self._contents
        some = any(table.logp.shape[1] < of.config.d_vocab for table in of.tables.values())
        return (
            f"The original is a reference file of {of.given}, written by neoconvert"
            f" {of.versions.get('neoconvert', '?')}; the original ran in {of.info.what}"
            f" ({of.info.name} {of.info.version}, {of.info.device}) then."
            + (" KL is estimated from some of the tokens." if some else ""),
        )

    def probes(
        self,
        artifact: Checkpoint,
        seed: int,
        effort: Effort,
        text: Path | None = None,
        given: Sequence[Probe] | None = None,
    ) -> list[Probe]:
        """See `Original`.

        Raises:
            UsageError: other probes are asked for than those of the file.
        """
        of = self._contents
        if given is not None:
            raise UsageError(
                "A reference file has its own probes.", where="probes", do="Leave them out."
            )
        if text is not None:
            raise UsageError(
                "A reference file has its own probes, and this text is none of them.",
                where=f"--text {text}",
                do="Give --text to neoconvert reference, or name the original itself here.",
            )
        if effort != of.effort:
            raise UsageError(
                f"The reference file was written with --effort {of.effort}.",
                where=f"--effort {effort}",
                do=f"Leave --effort out, or write the file again with --effort {effort}.",
            )
        return list(of.probes)

    def route(self, artifact: Checkpoint) -> RecordedRoute:
        """See `Original`."""
        if self._last is None or self._last[0] is not artifact:
            self._last = artifact, route_to(self.checkpoint, self._contents.recipes, artifact)
        return self._last[1]

    def judged_as_stored(self, artifact: Checkpoint) -> tuple[str, ...] | None:
        """See `Original`."""
        route = self.route(artifact)
        return None if route.settled else route.steps

    def examined(self, artifact: Checkpoint) -> Evidence | None:
        """See `Original`."""
        route = self.route(artifact)
        return route.recipe.evidence if route.settled and route.recipe else None

    def run(self, probes: Sequence[Probe], device: str, seed: int, say: Progress) -> Pass:
        """See `Original`."""
        from converter.verification.loading import resolve_device

        of = self._contents
        true = Sampled.of(of.probes, of.tables, resolve_device(device))
        return Pass(true, of.own, of.noise, of.info, of.strange)
