"""The sign that refactor_factored_attn_matrices leaves: heads in the basis of their singular vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from converter.explaining.operand import Operands
from converter.processing.step import Array

_NEGLIGIBLE = 1e-4
"""A singular vector with so small a part of the largest singular value is rounding's to choose."""


def in_singular_basis(unit: Operands, carried: bool) -> bool:
    """Whether the heads are in the basis of their singular vectors, one edited weight aside."""
    q, k, v, o = (
        np.concatenate([unit["attn.W_Q"].value, unit["attn.b_Q"].value[:, None]], 1),
        np.concatenate([unit["attn.W_K"].value, unit["attn.b_K"].value[:, None]], 1),
        unit["attn.W_V"].value,
        unit["attn.W_O"].value.swapaxes(1, 2),
    )
    slack = 4 * unit["attn.W_Q"].rounding.relative + 1e-5  # as for the step's own state
    gap = np.abs(np.linalg.norm(q, axis=1) - np.linalg.norm(k, axis=1)).max(1)
    even = gap <= slack * np.linalg.norm(q, axis=1).max(1)
    units = np.abs(np.linalg.norm(o, axis=1) - 1).max(1) <= slack
    signs = [
        even & _right_angles(q, slack) & _right_angles(k, slack),
        _right_angles(v, slack),
        units & _right_angles(o, slack),
    ]
    seen = [bool(sign.mean() > 0.5) for sign in signs]
    # Carrying a model's own biases folds LayerNorm after that; W_O alone still shows it then.
    return sum(seen) >= 2 or (carried and seen[2])


def _right_angles(columns: Array, slack: float) -> NDArray[np.bool_]:
    """For each head whether its columns are at right angles, negligible ones aside."""
    norms = np.linalg.norm(columns, axis=1)
    live = norms > _NEGLIGIBLE * norms.max(1, keepdims=True)
    unit = np.divide(columns, norms[:, None], out=np.zeros_like(columns), where=live[:, None])
    gram = np.abs(unit.swapaxes(1, 2) @ unit)
    gram[:, np.arange(gram.shape[1]), np.arange(gram.shape[1])] = 0
    result: NDArray[np.bool_] = (gram <= slack).all((1, 2)) & live.any(1)
    return result
