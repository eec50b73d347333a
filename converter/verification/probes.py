"""The token sequences on which an artifact is compared with its original."""

from __future__ import annotations

import codecs
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from converter.checkpoint import NeoConfig
from converter.choices import Effort
from converter.errors import BadInput, panicked

AFFORDABLE = 5e10
"""What one probe may cost, in multiply-adds: some ten seconds in float64 on two cores."""
MAX_LOGITS = 2**26
"""Logits of a probe of two rows: 256 MiB in float32. Libraries return them all at once."""

TEXT = """\
Once upon a time there was a little fox who counted everything she saw: 3 apples, 12 birds,
1,024 stars. "Why do you count?" asked the owl. "So that nothing is lost," she said.

def window(position: int, size: int = 256) -> range:
    # A local layer sees itself and the size - 1 tokens before it.
    return range(max(0, position - size + 1), position + 1)

Größe, naïve café, 東京, Ελλάδα — and\ttabs  and   spaces…
"""


_VOCABULARY = "vocabulary"


@dataclass(frozen=True, eq=False)
class Probe:
    """A batch of token sequences of one length.

    `tokens` is int64 [batch, pos]. `mask` is bool [batch, pos], False at left padding, or
    None where nothing is padded.
    """

    name: str
    tokens: np.ndarray
    mask: np.ndarray | None = None
    start: int = 0
    """The position of the first token: other than 0 only for runtimes that take position ids."""
    prefill: int | None = None
    """With a cache of keys and values: so many tokens at once, then one at a time. Only for
    runtimes that have a cache; the result must be that of one pass."""
    text: bool = False
    """Whether the tokens are a text, so that its perplexity means something."""

    @property
    def of_vocabulary(self) -> bool:
        """Whether it is of those that hold every token together."""
        return self.name.startswith(_VOCABULARY)

    @property
    def positions(self) -> np.ndarray:
        """Position ids, int64 [batch, pos]: the first real token of each row is at `start`."""
        if self.mask is None:
            row = np.arange(self.start, self.start + self.tokens.shape[1])
            return np.tile(row, (self.tokens.shape[0], 1))
        positions: np.ndarray = np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)
        return positions

    def repeated(self, count: int) -> Probe:
        """So many of it, one under the other."""
        mask = None if self.mask is None else np.tile(self.mask, (count, 1))
        return replace(self, tokens=np.tile(self.tokens, (count, 1)), mask=mask)


def wholes(probes: Sequence[Probe]) -> list[int]:
    """For each probe, which begins with it; itself, if none does. What is behind a position changes
    nothing at it, so that a pass over the whole serves its parts. Runtimes run each all the same:
    it is they that might see it otherwise."""
    found = list(range(len(probes)))
    order = sorted(found, key=lambda i: probes[i].tokens.size, reverse=True)
    for place, index in enumerate(order):
        part = probes[index]
        for other in order[:place]:
            if found[other] == other and _begins(probes[other], part):
                found[index] = other
                break
    return found


def _begins(whole: Probe, part: Probe) -> bool:
    if whole.mask is not None or part.mask is not None or whole.start != part.start:
        return False
    batch, length = part.tokens.shape
    return np.array_equal(whole.tokens[:batch, :length], part.tokens)


def standard_probes(
    config: NeoConfig,
    tokenizer_directory: Path | None = None,
    seed: int = 0,
    effort: Effort = "standard",
) -> list[Probe]:
    """Probes that reach every mechanism of this architecture. Never empty.

    quick: lengths 1, 2, 16 and one more than the window; left padding; a step-by-step run with a
    cache; the last positions.
    standard: every length at which something changes, in batches; fifty cached steps across the
    window; a text where there is a `tokenizer.json`; the whole context and the whole vocabulary
    as far as they are affordable.
    thorough: all of these whatever they cost, batches of three, and padding and cache
    together where the window is long.

    Random tokens are seeded, from the whole vocabulary, its first and last among them. Shorter
    sequences begin the longer ones (`wholes`).
    """
    probes = []
    for name, length in _lengths(config, effort):
        batch = _batch(config, length, effort)
        probes.append(Probe(name, _random_tokens(config.d_vocab, batch, length, seed)))
    longest = max(probe.tokens.shape[1] for probe in probes)
    if config.n_ctx > 1 and longest < config.n_ctx:
        length = min(16, config.n_ctx - 1)
        tokens = _random_tokens(config.d_vocab, 2, length, seed + 2)
        probes.append(Probe("last positions", tokens, start=config.n_ctx - length))
    if config.n_ctx > 1:
        probes.append(_padded("left padding", config, 2, min(config.n_ctx, 12), seed + 1))
        probes += _cached(config, seed, effort)
    if effort == "thorough" and config.n_ctx > 2:
        length = min(config.n_ctx, config.window_size + 9)
        probes.append(_padded("left padding beyond the window", config, 3, length, seed + 5))
    if effort != "quick":
        probes += _vocabulary(config, seed, effort)
        probes += _text(config, tokenizer_directory)
    return probes


def _lengths(config: NeoConfig, effort: Effort) -> Iterator[tuple[str, int]]:
    window = config.window_size
    wanted = [("length 1", 1), ("length 2", 2), ("length 16", 16)]
    if "local" in config.attn_types:
        around = [("window - 1", window - 1), ("window", window), ("window + 1", window + 1)]
        wanted += around[2:] if effort == "quick" else around
        wanted += [("beyond two windows", 2 * window + 3)] if effort != "quick" else []
    affordable = (
        cost(config, config.n_ctx) <= AFFORDABLE and config.n_ctx * config.d_vocab <= 2 * MAX_LOGITS
    )
    if effort == "thorough" or (effort == "standard" and affordable):
        wanted.append(("context", config.n_ctx))
    seen = set()
    for name, length in wanted:
        clipped = min(length, config.n_ctx)
        if clipped >= 1 and clipped not in seen:
            seen.add(clipped)
            yield name if clipped == length else "context", clipped


def _batch(config: NeoConfig, length: int, effort: Effort) -> int:
    if length <= 16:
        return 3 if effort == "thorough" else 2
    work, logits = cost(config, 2 * length), 2 * length * config.d_vocab
    return 2 if work <= AFFORDABLE and logits <= MAX_LOGITS else 1


def _padded(name: str, config: NeoConfig, batch: int, length: int, seed: int) -> Probe:
    """The first row half padding, the others less and less, the last none."""
    mask = np.ones((batch, length), dtype=bool)
    for row in range(batch - 1):
        mask[row, : length // (2 + row)] = False
    return Probe(name, _random_tokens(config.d_vocab, batch, length, seed), mask)


def _cached(config: NeoConfig, seed: int, effort: Effort) -> Iterator[Probe]:
    """Single steps with a cache, from before the window's end to beyond it."""
    steps = 8 if effort == "quick" else 50
    length = max(2, min(config.n_ctx, config.window_size + steps // 2))
    prefill = max(1, length - steps)
    tokens = _random_tokens(config.d_vocab, 1, length, seed)
    yield Probe("cache, step by step", tokens, prefill=prefill)
    if effort == "thorough" or length <= 128:
        padded = _padded("cache and padding", config, 2, length, seed + 4)
        yield replace(padded, prefill=max(1, prefill))


def _vocabulary(config: NeoConfig, seed: int, effort: Effort) -> Iterator[Probe]:
    """Every token once. (Every row of the head is in each log-probability anyway.)"""
    length = min(config.n_ctx, 64)
    rows = -(-config.d_vocab // length)
    if effort != "thorough" and (
        cost(config, length) * rows > AFFORDABLE or rows * length * config.d_vocab > MAX_LOGITS
    ):
        return
    order = np.random.default_rng([seed, 7]).permutation(config.d_vocab)
    order = np.resize(order, rows * length).reshape(rows, length).astype(np.int64)
    batch = max(1, MAX_LOGITS // (length * config.d_vocab))
    for start in range(0, rows, batch):
        count = -(-rows // batch)
        name = _VOCABULARY if count == 1 else f"{_VOCABULARY} {start // batch + 1} of {count}"
        yield Probe(name, order[start : start + batch])


def cost(config: NeoConfig, positions: int) -> float:
    """Multiply-adds of a forward pass over this many positions of one sequence."""
    d, f = config.d_model, config.d_mlp
    weights = config.n_layers * (4 * d * d + 2 * d * f) + d * config.d_vocab
    # An exponential costs as much as some twenty products: for each score, for each logit.
    softmax = 20 * (config.n_layers * config.n_heads * positions + config.d_vocab)
    return float(positions) * (weights + config.n_layers * positions * 2 * d + softmax)


def _random_tokens(d_vocab: int, batch: int, length: int, seed: int) -> np.ndarray:
    """The same numbers at the same places, whatever the length."""
    rngs = (np.random.default_rng([seed, row]) for row in range(batch))
    tokens = np.stack([rng.integers(0, d_vocab, length, dtype=np.int64) for rng in rngs])
    tokens[0, 0] = 0
    tokens[1:, 0] = d_vocab - 1
    tokens[0, 1:2] = d_vocab - 1
    return tokens


MAX_TEXT_BYTES = 2**20


def text_probes(config: NeoConfig, directory: Path | None, path: Path) -> list[Probe]:
    """A user's own text, in pieces of the context's length.

    Raises:
        BadInput: it cannot be read, or there is no tokenizer that fits the vocabulary.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise BadInput(
                f"The text is longer than {MAX_TEXT_BYTES:,} bytes, which would take hours to run.",
                where=str(path),
                do=f"Give a part of it: head -c {MAX_TEXT_BYTES} {shlex.quote(str(path))} > PART",
            )
        # The end may be cut within a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(content)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"The text cannot be read: {error}.",
            where=str(path),
            do="Give a file of UTF-8 text.",
        ) from error
    ids = _tokens(config, directory, text)
    if not ids:
        raise BadInput(
            "There is no tokenizer.json beside the weights that fits their vocabulary."
            if text
            else "The text is empty.",
            where=str(path) if directory is None else str(directory),
            do="Put the model's tokenizer.json beside the original's weights."
            if text
            else "Give a text of some length.",
        )
    length = min(config.n_ctx, MAX_LOGITS // config.d_vocab + 1)
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [
        Probe(
            path.name if len(pieces) == 1 else f"{path.name}, {i} of {len(pieces)}",
            np.asarray([piece], dtype=np.int64),
            text=True,
        )
        for i, piece in enumerate(pieces, start=1)
    ]


def _text(config: NeoConfig, directory: Path | None) -> Iterator[Probe]:
    if ids := _tokens(config, directory, TEXT):
        yield Probe("text", np.asarray([ids[: config.n_ctx]], dtype=np.int64), text=True)


def _tokens(config: NeoConfig, directory: Path | None, text: str) -> list[int]:
    """The text's tokens; none where no tokenizer fits the vocabulary."""
    path = None if directory is None else directory / "tokenizer.json"
    if path is None or not path.is_file():
        return []
    from tokenizers import Tokenizer

    try:
        ids: list[int] = Tokenizer.from_file(str(path)).encode(text).ids
    except BaseException as error:
        # tokenizers raises bare Exception; a broken tokenizer is not the weights' fault.
        if not (isinstance(error, Exception) or panicked(error)):
            raise
        return []
    return [] if not ids or max(ids) >= config.d_vocab else ids
