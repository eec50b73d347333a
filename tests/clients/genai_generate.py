"""Greedy generation by onnxruntime-genai: a request a line on stdin, an answer a line on stdout.

Runs in an environment without neoconvert. See tests/clients/generation.py for the fields.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime_genai as genai  # type: ignore[import-not-found]


def answer(directory: str, tokens: list[list[int]], new_tokens: int, **_: object) -> dict[str, Any]:
    model = genai.Model(directory)
    generator = start(model, len(tokens), len(tokens[0]) + new_tokens)
    generator.append_tokens(np.array(tokens, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    generated = [
        [int(token) for token in generator.get_sequence(row)] for row in range(len(tokens))
    ]
    whole = start(model, len(tokens), len(generated[0]) + 1)
    whole.append_tokens(np.array(generated, np.int32))
    return {"tokens": generated, "logits": whole.get_output("logits").tolist()}


def start(model: Any, rows: int, length: int) -> Any:
    params = genai.GeneratorParams(model)
    params.set_search_options(batch_size=rows, max_length=length)
    return genai.Generator(model, params)


for line in sys.stdin:
    print(json.dumps(answer(**json.loads(line))), flush=True)
