"""TransformerLens's own processing, in its own float32."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from converter.checkpoint.config import NeoConfig
from converter.processing import STEPS, Step
from tests.explaining.artifacts import Weights


def process_in_transformer_lens(
    weights: Weights, neo: NeoConfig, steps: Sequence[Step], dtype: str = "float32"
) -> Weights:
    import torch
    from transformer_lens.weight_processing import ProcessWeights

    cfg = SimpleNamespace(
        n_layers=neo.n_layers,
        d_model=neo.d_model,
        n_heads=neo.n_heads,
        d_head=neo.d_head,
        d_mlp=neo.d_mlp,
        d_vocab=neo.d_vocab,
        n_ctx=neo.n_ctx,
        normalization_type="LN",
        positional_embedding_type="standard",
        act_fn=neo.act_fn,
        n_key_value_heads=None,
    )
    state: dict[str, Any] = {
        key: torch.tensor(value, dtype=getattr(torch, dtype)) for key, value in weights.items()
    }
    options: dict[str, Any] = {step.name: step in steps for step in STEPS}
    done = ProcessWeights.process_weights(state, cfg, **options)
    return {key: done[key].to(torch.float64).numpy().astype(np.float64) for key in weights}
