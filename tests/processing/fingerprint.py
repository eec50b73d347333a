"""Prints a digest of everything that processing computes, in float64: run under other kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from converter.processing import STEPS, Carry, absorb, apply_all, undo_all
from converter.processing.jacobi import svd
from converter.processing.portable import matmul, mean, qr, total
from converter.processing.step import Array, Record
from tests.processing.weights import Sizes, block, embed, final

SPECTRA = ("ordinary", "equal", "zeros", "low rank", "steep", "huge", "tiny", "dependent")


def spectrum(kind: str, rng: np.random.Generator, n: int, d: int, h: int) -> Array:
    """Heads [n, d, h] whose singular values are hard for a decomposition."""
    x = rng.normal(size=(n, d, h))
    if kind == "equal":
        x[:] = np.eye(d, h)
        x[1:] = np.roll(x[1:], 1, 1)
    elif kind == "zeros":
        x[0] = 0
        x[1:, :, ::2] = 0
    elif kind == "low rank":
        x[:, :, 2:] = x[:, :, :1] * np.arange(2, h)
    elif kind == "steep":
        x *= np.ldexp(1.0, -np.linspace(0, 80, h).astype(int))
        x[:, :, 0] += 1e3 * x[:, :, 1]
    elif kind == "huge":
        x *= 1e30
    elif kind == "tiny":
        x *= 1e-30
        x[0] *= 1e-70
    elif kind == "dependent":
        x[:, :, 1] = x[:, :, 0] * (1 + 1e-13)
        x[:, :, 2] = x[:, :, 3] + 1e-9 * x[:, :, 2]
    return x


def computed() -> Iterator[Array | Record]:
    rng = np.random.default_rng(0)
    for n, d, h in ((3, 24, 8), (2, 331, 33), (2, 768, 64)):
        for kind in SPECTRA:
            x, other = spectrum(kind, rng, n, d, h), rng.normal(size=(n, d, h))
            basis, r = qr(x)
            yield from (r, basis.times(np.broadcast_to(np.eye(h), r.shape)))
            yield from svd(matmul(r, qr(other)[1].swapaxes(1, 2)))
            yield from (matmul(other.swapaxes(1, 2), x), total(x, 1, x[0, :, 0]), mean(x, -1))
    sizes = Sizes(d=96, n=3, f=161, v=1037, c=12)
    for steps in (STEPS, STEPS[:4], (*STEPS, Carry())):
        for make in (embed, block, final):
            unit = make(rng, sizes)
            for kind in SPECTRA if make is block else ("ordinary",):
                if make is block:
                    unit["attn.W_K"] = spectrum(kind, rng, 3, 96, 32)
                    unit["attn.W_O"] = spectrum(kind, rng, 3, 96, 32).swapaxes(1, 2)
                processed, records = apply_all(unit, steps)
                yield from (processed, *records, undo_all(processed, steps, records))
                processed["attn.W_Q" if make is block else "extra"] = np.ones((3, 96, 32))
                yield absorb(undo_all(processed, steps, records))


def digest() -> str:
    found = hashlib.sha256()
    for each in computed():
        for name, array in sorted(each.items()) if isinstance(each, dict) else [("", each)]:
            found.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(digest())
