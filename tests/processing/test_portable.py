"""The same bits whatever the processor: sums, products and decompositions, and all processing."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.convert import hf_to_tl
from converter.demo import MODEL
from converter.processing.jacobi import svd
from converter.processing.portable import matmul, mean, qr, total
from converter.processing.step import Array
from tests.processing.fingerprint import SPECTRA, digest, spectrum

ROOT = Path(__file__).parents[2]
CONFIG: Any = np.show_config(mode="dicts")
DISPATCHED = " ".join(CONFIG["SIMD Extensions"].get("found", []))
"""The vector instructions that this NumPy uses here beyond what it takes for granted."""
KERNELS = {
    "Haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "Sandybridge": {"OPENBLAS_CORETYPE": "Sandybridge", "OMP_NUM_THREADS": "2"},
    "Prescott, no vectors": {
        "OPENBLAS_CORETYPE": "Prescott",
        "NPY_DISABLE_CPU_FEATURES": DISPATCHED,
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
    },
    "two threads": {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
}


@pytest.fixture(scope="module")
def here() -> str:
    return digest()


def run(kernel: str, *arguments: str) -> str:
    """What Python prints with these arguments, under another kernel."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**os.environ, **KERNELS[kernel], "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("kernel", KERNELS)
def test_processing_gives_the_same_bits_under_other_kernels(kernel: str, here: str) -> None:
    assert run(kernel, "-m", "tests.processing.fingerprint") == here


def test_a_directory_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    """Weights, ledger and provenance of every step, for the trained model."""
    options = ("--process", "all", "--ledger", "exact", "--no-verify", "--quiet")
    command = ("-m", "converter", "hf-to-tl", str(MODEL))
    run("Prescott, no vectors", *command, str(tmp_path / "there"), *options)
    hf_to_tl(MODEL, tmp_path / "here", process="all", ledger="exact", check=False)
    for file in ("model.safetensors", "ledger.safetensors", "neoconvert.json"):
        there, own = (tmp_path / place / file for place in ("there", "here"))
        assert there.read_bytes() == own.read_bytes(), file


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 20), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_each_head_is_computed_by_itself(seed: int, n: int, h: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    d = h + more
    x = np.concatenate([spectrum(str(rng.choice(SPECTRA)), rng, n, d, max(h, 4)) for _ in range(2)]) if d > 4 else rng.normal(size=(2 * n, d, h))  # fmt: skip
    x = x[:, :, :h]
    together = qr(x)[1], *svd(x[:, :h])
    alone = [(qr(one[None])[1], *svd(one[None, :h])) for one in x]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))
    turned = np.asfortranarray(x)  # another layout in memory
    np.testing.assert_array_equal(qr(turned)[1], together[0])
    weights = rng.normal(size=d)
    np.testing.assert_array_equal(total(turned, 1, weights), total(x, 1, weights))
    np.testing.assert_array_equal(mean(turned, -1), mean(x, -1))


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("d", "h"), [(9, 1), (24, 8), (101, 33), (200, 64)])
def test_decompositions_are_what_they_say(kind: str, d: int, h: int) -> None:
    rng = np.random.default_rng(1)
    x = spectrum(kind, rng, 3, d, max(h, 4))[:, :, :h]
    basis, r = qr(x)
    q = basis.times(np.broadcast_to(np.eye(h), r.shape))
    _orthonormal(q)
    size = np.abs(x).max(1, keepdims=True)  # each column to its own size
    assert (np.abs(matmul(q, r) - x) <= 1e-14 * d**0.5 * size).all()
    assert not np.tril(r, -1).any()
    square = matmul(r, qr(rng.normal(size=(3, d, h)))[1].swapaxes(1, 2))
    u, s, vt = svd(square)
    _orthonormal(u)
    _orthonormal(vt.swapaxes(1, 2))
    largest = s[:, :1, None]
    assert (np.diff(s) <= 1e-14 * s[:, :1]).all()
    assert (np.abs(matmul(u * s[:, None], vt) - square) <= 1e-13 * largest).all()
    for one, values in zip(square, s, strict=True):
        scale = np.abs(one).max() or 1.0
        known = np.linalg.svd(one / scale, compute_uv=False)
        np.testing.assert_allclose(values / scale, known, rtol=0, atol=1e-13 * known.max())


def _orthonormal(columns: Array) -> None:
    gram = columns.swapaxes(1, 2) @ columns
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[1]), gram.shape), atol=1e-14)


@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 3000))
@settings(max_examples=40, deadline=None)
def test_sums_and_products_against_exact_ones(seed: int, columns: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    left = rng.normal(size=(1, 2, k)) * np.ldexp(1.0, rng.integers(-20, 20, (1, 2, k)))
    right = rng.normal(size=(1, k, columns)) * np.ldexp(1.0, rng.integers(-20, 20, (1, 1, columns)))
    product, size = (
        matmul(left, right)[0],
        np.abs(left[0]).max(1)[:, None] * np.abs(right[0]).max(0),
    )
    for row, column in ((0, 0), (1, columns - 1)):
        terms = [
            Fraction(a) * Fraction(b)
            for a, b in zip(left[0, row], right[0, :, column], strict=True)
        ]
        assert abs(product[row, column] - float(sum(terms))) <= 2**-52 * k**0.5 * size[row, column]
    exact = sum(map(Fraction, left[0, 0]))
    assert abs(total(left, 2)[0, 0] - float(exact)) <= 2**-48 * np.abs(left[0, 0]).sum()
