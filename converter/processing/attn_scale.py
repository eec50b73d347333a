"""Scaled attention of models trained in TransformerLens, absorbed into the weights.

HookedTransformer computes (q · k) / s with s = attn_scale (√d_head by default), times the
layer's number where `scale_attn_by_inverse_layer_idx` is set. GPT-Neo has no s; it gets
W_Q / s and b_Q / s.
"""

from __future__ import annotations

import numpy as np

from converter.checkpoint import Checkpoint, NeoConfig
from converter.dtypes import cast
from converter.layout import Slot


def absorb(array: np.ndarray, config: NeoConfig, slot: Slot, code: str) -> np.ndarray:
    """A weight in `hooked` axes as unscaled GPT-Neo needs it, stored as `code`.

    W_Q and b_Q of a scaled layer are divided in float64 and cast once; all else is only cast.
    """
    scaled = slot.layer is not None and slot.key.endswith((".W_Q", ".b_Q"))
    if scaled and config.score_divisors:
        array = array.astype(np.float64) / config.score_divisors[slot.layer or 0]
    return cast(array, code)


def hub_tensor(checkpoint: Checkpoint, key: str, code: str | None = None) -> np.ndarray:
    """`absorb` on a checkpoint's weight, by its `hooked` name; `code` None: its own dtype."""
    slot = checkpoint.slots[key]
    return absorb(checkpoint.tensor(key), checkpoint.config, slot, code or checkpoint.code(key))
