"""genai_config.json, by which onnxruntime-genai opens a graph with a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from converter.checkpoint import Checkpoint
from converter.checkpoint.record import UNSEALED, sealed
from converter.onnx.dialect import LOGITS, MASK, POSITIONS, TOKENS, past_name, present_name
from converter.strict_json import Json

GENAI = "genai_config.json"
MARK = b'"type": "decoder"'
"""Near its beginning."""


def genai_config(checkpoint: Checkpoint, graph: str) -> Json:
    """The file's content. `graph`: where the graph is, from the file's own directory.

    "decoder" is genai's type for any decoder with a cache, and its cache must grow: our graphs give
    `present` as long as it is. genai refuses a field that it does not know, so the seal is in the
    one that may say anything, the name that onnxruntime puts before its log.
    """
    config = checkpoint.config
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.d_vocab,
            "context_length": config.n_ctx,
            **_tokens(checkpoint),
            "decoder": {
                "filename": graph,
                "hidden_size": config.d_model,
                "head_size": config.d_head,
                "num_attention_heads": config.n_heads,
                "num_key_value_heads": config.n_heads,
                "num_hidden_layers": config.n_layers,
                "session_options": {"log_id": UNSEALED, "provider_options": []},
                "inputs": {
                    "input_ids": TOKENS,
                    "attention_mask": MASK,
                    "position_ids": POSITIONS,
                    "past_key_names": past_name("%d", "key"),
                    "past_value_names": past_name("%d", "value"),
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": present_name("%d", "key"),
                    "present_value_names": present_name("%d", "value"),
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.n_ctx,
            "past_present_share_buffer": False,
        },
    }


def _tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """Those that the configs name; genai pads with the end of text where there is none for it."""
    said = checkpoint.original_hf_config or {}
    said = said | (checkpoint.original_generation_config or {})
    tokens = {name: said.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    end = tokens["eos_token_id"]
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = end[0] if isinstance(end, list) and end else end
    return {name: token for name, token in tokens.items() if token is not None and token != []}


def write(path: Path, checkpoint: Checkpoint, graph: str) -> None:
    """Write it at `path`. `graph`: see `genai_config`."""
    text = json.dumps(genai_config(checkpoint, graph), indent=2) + "\n"
    path.write_bytes(sealed(text.encode()))
