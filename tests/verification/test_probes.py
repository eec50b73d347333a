"""Probes reach what they must, and fit every model."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converter.checkpoint import Checkpoint, NeoConfig
from converter.choices import Effort
from converter.errors import BadInput
from converter.verification import standard_probes
from converter.verification.measuring import measure, measure_rows
from converter.verification.original import _asked
from converter.verification.probes import (
    AFFORDABLE,
    MAX_LOGITS,
    Probe,
    cost,
    text_probes,
    wholes,
)
from converter.verification.reference import forward


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
    special = ("last positions", "vocabulary")
    lengths = [
        p.tokens.shape[1]
        for p in probes
        if p.mask is None and p.prefill is None and p.name not in special
    ]
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
        if p.name not in ("vocabulary", "length 1"):
            assert (p.tokens.min(), p.tokens.max()) == (0, d_vocab - 1)
        assert p.positions.shape == p.tokens.shape
        assert p.positions.max() < n_ctx
    assert max(int(p.positions.max()) for p in probes) == n_ctx - 1
    assert any(p.prefill and p.prefill < p.tokens.shape[1] for p in probes) == (n_ctx > 1)


def test_thorough_reaches_every_token_and_every_position() -> None:
    c = config(n_ctx=300, d_vocab=5000)
    probes = standard_probes(c, effort="thorough")
    rows = [np.unique(p.tokens) for p in probes if p.name.startswith("vocabulary")]
    assert np.array_equal(np.unique(np.concatenate(rows)), np.arange(5000))
    positions = [np.unique(p.positions) for p in probes]
    assert np.array_equal(np.unique(np.concatenate(positions)), np.arange(300))
    assert any(p.mask is not None and p.prefill is not None for p in probes)


def test_efforts_grow() -> None:
    c = config(n_ctx=300)
    sizes = [sum(p.tokens.size for p in standard_probes(c, effort=e)) for e in get_args(Effort)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] / 4


def test_a_users_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("fox she window fox " * 40)
    with pytest.raises(BadInput, match="tokenizer"):
        text_probes(config(), tmp_path, file)
    _tokenizer(tmp_path)
    probes = text_probes(config(), tmp_path, file)
    assert [p.name for p in probes] == ["mine.txt, 1 of 3", "mine.txt, 2 of 3", "mine.txt, 3 of 3"]
    assert sum(p.tokens.size for p in probes) == 160
    assert all(p.text for p in probes)
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(BadInput, match="cannot be read"):
        text_probes(config(), tmp_path, file)
    file.write_bytes("fox she window é".encode()[:-1])  # head -c cuts where it likes
    assert [p.name for p in text_probes(config(), tmp_path, file)] == ["mine.txt"]
    with open(file, "wb") as long:
        long.truncate(2**20 + 1)
    with pytest.raises(BadInput, match="longer than"):
        text_probes(config(), tmp_path, file)


def test_are_seeded() -> None:
    one, same, other = (standard_probes(config(), seed=s) for s in (0, 0, 1))
    pairs = list(zip(one, same, strict=True))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in pairs)
    assert not np.array_equal(one[2].tokens, other[2].tokens)


def test_left_padding_starts_each_row_at_position_zero() -> None:
    padded = next(p for p in standard_probes(config()) if p.mask is not None)
    assert padded.mask is not None
    assert not padded.mask.all()
    for mask, positions in zip(padded.mask, padded.positions, strict=True):
        assert positions[mask].tolist() == list(range(int(mask.sum())))


def _tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {w: i for i, w in enumerate(["?", "fox", "she", "window"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def test_text_where_there_is_a_tokenizer_that_fits(tmp_path: Path) -> None:
    _tokenizer(tmp_path)
    (text,) = (p for p in standard_probes(config(), tmp_path) if p.name == "text")
    assert text.tokens.shape[1] <= 64
    assert {0, 1} <= set(text.tokens.ravel().tolist())
    assert "text" not in [p.name for p in standard_probes(config(d_vocab=2), tmp_path)]
    (tmp_path / "tokenizer.json").write_text("{")
    assert "text" not in [p.name for p in standard_probes(config(), tmp_path)]


@pytest.mark.parametrize("effort", ["quick", "standard", "thorough"])
def test_short_sequences_begin_the_long_ones(effort: Effort) -> None:
    """A pass over these serves those, so that there is one pass for each kind of sequence."""
    probes = standard_probes(config(), effort=effort)
    found = wholes(probes)
    for probe, of in zip(probes, found, strict=True):
        batch, length = probe.tokens.shape
        assert np.array_equal(probes[of].tokens[:batch, :length], probe.tokens)
        assert found[of] == of
    plain = [i for i, p in enumerate(probes) if p.mask is None and not p.start]
    assert len({found[i] for i in plain}) < len(plain) / 2


def test_what_is_padded_or_starts_elsewhere_begins_nothing() -> None:
    tokens = np.zeros((1, 4), np.int64)
    padded = Probe("padded", tokens, mask=np.array([[False, True, True, True]]))
    assert wholes([Probe("long", tokens), padded, Probe("late", tokens[:, :2], start=1)]) == [
        0,
        1,
        2,
    ]


def test_another_mask_is_another_probe() -> None:
    tokens = np.zeros((2, 4), np.int64)
    masks = [None, np.ones((2, 4), bool), np.tri(2, 4, 2, dtype=bool)]
    probes = [Probe("one", tokens, mask) for mask in masks] + [Probe("one", tokens.reshape(1, 8))]
    assert len({_asked(probe) for probe in probes}) == 4


def test_a_part_is_measured_as_if_it_were_all(original: Checkpoint) -> None:
    """Of a sequence of two rows, what a shorter one of one row would have shown by itself."""
    config = original.config
    tokens = np.random.default_rng(0).integers(0, config.d_vocab, (2, config.n_ctx))
    whole = Probe("whole", tokens)
    part = Probe("part", tokens[:1, : config.n_ctx // 2])
    ran = forward(original, [whole], dtype=torch.float32)
    (rows,) = measure_rows(forward(original, [whole], dtype=torch.float64), 0, [ran.logits(0)])
    alone = forward(original, [part], dtype=torch.float64)
    (expected,) = measure(alone, 0, [ran.logits(0)[:1, : config.n_ctx // 2]], margin=1e-3)
    found = rows.part(*part.tokens.shape).errors(margin=1e-3)
    assert len(found.by_position) == part.tokens.shape[1]
    assert found.compared == expected.compared < rows.errors().compared
    for name in ("max_abs", "rms", "kl", "nll", "top1_agreement", "by_position"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-12
        )
