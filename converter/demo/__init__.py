"""The small trained GPT-Neo that ships in the package, and the tour on it."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""An HF directory: about a million parameters, trained on Python's standard library."""
