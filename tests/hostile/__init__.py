"""Files made to harm, and files that are merely broken, by the kind of file they are."""

from __future__ import annotations

from tests.hostile import graphs, json_files, others, pickles, references, weights
from tests.hostile.trial import Input


def inputs() -> list[Input]:
    """All of them; the same ones every time."""
    return [
        *weights.inputs(),
        *json_files.inputs(),
        *pickles.inputs(),
        *graphs.inputs(),
        *references.inputs(),
        *others.inputs(),
    ]
