"""Names and shapes of GPT-Neo's weights in each layout."""

from converter.layout.ops import Op, Rearrange, Sizes, axes
from converter.layout.table import (
    BUFFERS,
    EMBEDDING,
    HEAD,
    LAYOUTS,
    NO_BIAS,
    TABLE,
    Layout,
    Row,
    Slot,
    Unit,
    buffers,
    expand,
    no_biases,
)

__all__ = [
    "BUFFERS",
    "EMBEDDING",
    "HEAD",
    "LAYOUTS",
    "NO_BIAS",
    "TABLE",
    "Layout",
    "Op",
    "Rearrange",
    "Row",
    "Sizes",
    "Slot",
    "Unit",
    "axes",
    "buffers",
    "expand",
    "no_biases",
]
