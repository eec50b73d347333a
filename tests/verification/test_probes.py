"""Probes reach what they must, and fit every model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from converter.checkpoint import NeoConfig
from converter.verification import standard_probes
from converter.verification.probes import AFFORDABLE, MAX_LOGITS, cost


def config(**fields: object) -> NeoConfig:
    base = {
        "n_layers": 2, "d_model": 8, "n_heads": 2, "d_mlp": 8, "n_ctx": 64, "d_vocab": 11,
        "window_size": 7, "attn_types": ("global", "local"), "act_fn": "gelu_new", "eps": 1e-5,
    }  # fmt: skip
    return NeoConfig(**(base | fields))  # type: ignore[arg-type]


@given(
    n_ctx=st.integers(1, 700),
    window=st.integers(1, 800),
    d_vocab=st.integers(1, 60000),
    local=st.booleans(),
    d_model=st.sampled_from([8, 2048]),
)
def test_fit_every_model(n_ctx: int, window: int, d_vocab: int, local: bool, d_model: int) -> None:
    c = config(
        n_ctx=n_ctx, window_size=window, d_vocab=d_vocab, d_model=d_model,
        attn_types=("global", "local" if local else "global"),
    )  # fmt: skip
    probes = standard_probes(c)
    assert probes
    lengths = [p.tokens.shape[1] for p in probes if p.mask is None]
    assert len(set(lengths)) == len(lengths)
    assert max(lengths) <= n_ctx
    assert {1, min(2, n_ctx), min(16, n_ctx)} <= set(lengths)
    if local:
        wanted = {window - 1, window, window + 1, 2 * window + 3}
        assert {min(w, n_ctx) for w in wanted if w} <= set(lengths)
    if cost(c, n_ctx) <= AFFORDABLE and n_ctx * d_vocab <= 2 * MAX_LOGITS:
        assert max(lengths) == n_ctx
    for p in probes:
        assert p.tokens.dtype == np.int64
        assert p.tokens.min() == 0
        assert p.tokens.max() == d_vocab - 1 or p.tokens.size == 1
        assert p.positions.shape == p.tokens.shape
        assert p.positions.max() < n_ctx


def test_are_seeded() -> None:
    one, same, other = (standard_probes(config(), seed=s) for s in (0, 0, 1))
    pairs = list(zip(one, same, strict=True))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in pairs)
    assert not np.array_equal(one[2].tokens, other[2].tokens)


def test_left_padding_starts_each_row_at_position_zero() -> None:
    (padded,) = (p for p in standard_probes(config()) if p.mask is not None)
    assert padded.mask is not None
    assert not padded.mask.all()
    for mask, positions in zip(padded.mask, padded.positions, strict=True):
        assert positions[mask].tolist() == list(range(int(mask.sum())))


def test_text_where_there_is_a_tokenizer_that_fits(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["?", "fox", "she", "window"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (text,) = (p for p in standard_probes(config(), tmp_path) if p.name == "text")
    assert text.tokens.shape[1] <= 64
    assert {0, 1} <= set(text.tokens.ravel().tolist())
    assert "text" not in [p.name for p in standard_probes(config(d_vocab=2), tmp_path)]
    (tmp_path / "tokenizer.json").write_text("{")
    assert "text" not in [p.name for p in standard_probes(config(), tmp_path)]
