"""The token sequences on which an artifact is compared with its original."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converter.checkpoint import NeoConfig

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


@dataclass(frozen=True, eq=False)
class Probe:
    """A batch of token sequences of one length.

    `tokens` is int64 [batch, pos]. `mask` is bool [batch, pos], False at left padding, or
    None where nothing is padded.
    """

    name: str
    tokens: np.ndarray
    mask: np.ndarray | None = None

    @property
    def positions(self) -> np.ndarray:
        """Position ids, int64 [batch, pos]: the first real token of each row is at 0."""
        if self.mask is None:
            return np.tile(np.arange(self.tokens.shape[1]), (self.tokens.shape[0], 1))
        positions: np.ndarray = np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)
        return positions


def standard_probes(
    config: NeoConfig, tokenizer_directory: Path | None = None, seed: int = 0
) -> list[Probe]:
    """Probes that reach every mechanism of this architecture.

    Seeded random tokens over the whole vocabulary, its first and last token among them, at
    the lengths where something changes; one left-padded batch; a text where there is a
    `tokenizer.json` that fits the vocabulary. Never empty.
    """
    probes = []
    for name, length in _lengths(config):
        work, logits = cost(config, 2 * length), 2 * length * config.d_vocab
        batch = 2 if length <= 16 or (work <= AFFORDABLE and logits <= MAX_LOGITS) else 1
        probes.append(Probe(name, _random_tokens(config.d_vocab, batch, length, seed)))
    padded = min(config.n_ctx, 12)
    if padded > 1:
        mask = np.ones((2, padded), dtype=bool)
        mask[0, : padded // 2] = False
        tokens = _random_tokens(config.d_vocab, 2, padded, seed + 1)
        probes.append(Probe("left padding", tokens, mask))
    text = _text(config, tokenizer_directory)
    return probes if text is None else [*probes, text]


def _lengths(config: NeoConfig) -> Iterator[tuple[str, int]]:
    window = config.window_size
    wanted = [("length 1", 1), ("length 2", 2), ("length 16", 16)]
    if "local" in config.attn_types:
        wanted += [
            ("window - 1", window - 1),
            ("window", window),
            ("window + 1", window + 1),
            ("beyond two windows", 2 * window + 3),
        ]
    if cost(config, config.n_ctx) <= AFFORDABLE and config.n_ctx * config.d_vocab <= 2 * MAX_LOGITS:
        wanted.append(("context", config.n_ctx))
    seen = set()
    for name, length in wanted:
        clipped = min(length, config.n_ctx)
        if clipped >= 1 and clipped not in seen:
            seen.add(clipped)
            yield name if clipped == length else "context", clipped


def cost(config: NeoConfig, positions: int) -> float:
    """Multiply-adds of a forward pass over this many positions of one sequence."""
    d, f = config.d_model, config.d_mlp
    weights = config.n_layers * (4 * d * d + 2 * d * f) + d * config.d_vocab
    # An exponential costs as much as some twenty products: for each score, for each logit.
    softmax = 20 * (config.n_layers * config.n_heads * positions + config.d_vocab)
    return float(positions) * (weights + config.n_layers * positions * 2 * d + softmax)


def _random_tokens(d_vocab: int, batch: int, length: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, length])
    tokens = rng.integers(0, d_vocab, (batch, length), dtype=np.int64)
    tokens[0, 0] = 0
    tokens[-1, -1] = d_vocab - 1
    return tokens


def _text(config: NeoConfig, directory: Path | None) -> Probe | None:
    path = None if directory is None else directory / "tokenizer.json"
    if path is None or not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(path)).encode(TEXT).ids[: config.n_ctx]
    except (
        Exception
    ):  # tokenizers raises bare Exception; a broken tokenizer is not the weights' fault
        return None
    if not ids or max(ids) >= config.d_vocab:
        return None
    return Probe("text", np.asarray([ids], dtype=np.int64))
