"""PEFT adapters: opened, matched with a base's weights, merged as these are read."""

from converter.adapter.files import Adapter
from converter.adapter.merging import Merged, with_adapter

__all__ = ["Adapter", "Merged", "with_adapter"]
