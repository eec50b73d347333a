"""The layouts: whose weights they are, and what goes with them; their names and axes are the table's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["hf", "hooked", "bridge"]


@dataclass(frozen=True)
class Convention:
    """What a layout is like."""

    title: str
    """For people."""
    library: str
    """The package that opens it."""
    config: str
    """The file that says what the model is like, beside the weights."""
    by_head: bool = False
    """Attention's weights have an axis for the heads, and matrices are [in, out]."""
    ties: bool = False
    """A head that is the embedding is left out of the files."""
    folds: bool = False
    """A model may have its LayerNorms folded, and say so."""

    @property
    def has_cfg(self) -> bool:
        """Whether its config is TransformerLens's own."""
        return self.config == "cfg.json"


LAYOUTS: dict[Layout, Convention] = {
    "hf": Convention("Hugging Face", "transformers", "config.json", ties=True),
    "hooked": Convention(
        "HookedTransformer", "transformer_lens", "cfg.json", by_head=True, folds=True
    ),
    "bridge": Convention("TransformerBridge", "transformer_lens", "config.json", folds=True),
}
