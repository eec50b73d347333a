"""Names and shapes of GPT-Neo's weights in each layout."""

from converter.layout.ops import Op, Rearrange, Sizes
from converter.layout.table import LAYOUTS, TABLE, Layout, Row, Slot, Unit, buffers, expand

__all__ = [
    "LAYOUTS",
    "TABLE",
    "Layout",
    "Op",
    "Rearrange",
    "Row",
    "Sizes",
    "Slot",
    "Unit",
    "buffers",
    "expand",
]
