"""Names of inputs, outputs and dynamic axes: those that optimum writes and its readers expect."""

from __future__ import annotations

DIALECT = "1"
"""Of the graphs that this version writes, and checks node by node. A number of its own: it changes
when they do, whatever the package's version."""

BATCH = "batch_size"
SEQUENCE = "sequence_length"
PAST = "past_sequence_length"
TOTAL = "past_sequence_length + sequence_length"

TOKENS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"


def past_name(layer: int | str, what: str) -> str:
    """`what`: "key" or "value"."""
    return f"past_key_values.{layer}.{what}"


def present_name(layer: int | str, what: str) -> str:
    return f"present.{layer}.{what}"
