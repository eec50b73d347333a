"""Why do these weights differ? The steps that separate two checkpoints, found from weights alone."""

from converter.explaining.explanation import Explanation, TensorFact
from converter.explaining.judging import explain

__all__ = ["Explanation", "TensorFact", "explain"]
