"""The contract of `--json` as JSON Schema: one schema for the documents of every command.

`v1.json` is for `schema_version` 1. It names the keys that may be relied on, with their types;
documents may hold more.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from converter.choices import STEPS


def load() -> dict[str, Any]:
    """The schema, JSON Schema draft 2020-12; it refers to nothing outside itself."""
    schema: dict[str, Any] = json.loads((files(__package__) / "v1.json").read_text("utf-8"))
    schema["$defs"]["step"]["enum"] = list(STEPS)
    return schema
