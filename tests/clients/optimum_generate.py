"""Greedy generation by optimum-onnx: a request a line on stdin, an answer a line on stdout.

Runs in an environment without neoconvert. See tests/clients/generation.py for the fields.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM  # type: ignore[import-not-found]


def answer(
    directory: str,
    tokens: list[list[int]],
    mask: list[list[int]],
    new_tokens: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    model = ORTModelForCausalLM.from_pretrained(Path(directory), local_files_only=True, **options)
    assert model.can_use_cache
    attention_mask = torch.tensor(mask)
    generated = model.generate(
        input_ids=torch.tensor(tokens),
        attention_mask=attention_mask,
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    rest = attention_mask.new_ones(len(tokens), generated.shape[1] - attention_mask.shape[1])
    whole = torch.cat([attention_mask, rest], dim=1)
    # As in transformers, generate() derives positions from the mask, and a plain call does not.
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=generated, attention_mask=whole, position_ids=positions).logits
    return {"tokens": generated.tolist(), "logits": logits.tolist()}


for line in sys.stdin:
    print(json.dumps(answer(**json.loads(line))), flush=True)
