"""Checkpoints on disk and in memory: finding, reading, planning, writing and publishing them."""

from converter.checkpoint.checkpoint import Checkpoint
from converter.checkpoint.config import NeoConfig
from converter.checkpoint.live import open_model
from converter.checkpoint.opening import open_checkpoint

__all__ = ["Checkpoint", "NeoConfig", "open_checkpoint", "open_model"]
