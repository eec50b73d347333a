"""Scaled attention of models trained in TransformerLens, absorbed into the weights.

HookedTransformer computes (q · k) / s with s = attn_scale (√d_head by default), times the
layer's number where `scale_attn_by_inverse_layer_idx` is set. GPT-Neo has no s; it gets
W_Q / s and b_Q / s.
"""

from __future__ import annotations

import numpy as np

SCALED = ("attn.W_Q", "attn.b_Q")


def unscaled(name: str, array: np.ndarray, divisor: float) -> np.ndarray:
    """A block's weight, by its `hooked` name within the block, for scores divided by nothing.

    W_Q and b_Q are divided in float64 and returned so; all else is returned as it is.
    """
    if name not in SCALED or divisor == 1:
        return array
    result: np.ndarray = array.astype(np.float64) / divisor
    return result
