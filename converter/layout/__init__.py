"""Names and shapes of GPT-Neo's weights in each layout."""

from converter.layout.architecture import Architecture, Row, Slot, UnitKind
from converter.layout.layouts import LAYOUTS, Layout
from converter.layout.ops import Rearrange, Sizes, axes
from converter.layout.table import ALSO_HEAD, EMBEDDING, GPT_NEO, HEAD, TABLE, expand, is_tied_head

__all__ = [
    "ALSO_HEAD",
    "EMBEDDING",
    "GPT_NEO",
    "HEAD",
    "LAYOUTS",
    "TABLE",
    "Architecture",
    "Layout",
    "Rearrange",
    "Row",
    "Sizes",
    "Slot",
    "UnitKind",
    "axes",
    "expand",
    "is_tied_head",
]
