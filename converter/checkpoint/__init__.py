"""Checkpoints on disk: finding, reading, planning, writing and publishing them."""

from converter.checkpoint.checkpoint import EMBEDDING, HEAD, Checkpoint, open_checkpoint
from converter.checkpoint.config import NeoConfig

__all__ = ["EMBEDDING", "HEAD", "Checkpoint", "NeoConfig", "open_checkpoint"]
