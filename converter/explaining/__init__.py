"""Why do these weights differ? The steps that separate two checkpoints, found from weights alone."""

from converter.explaining.explain import explain
from converter.explaining.explanation import Explanation, TensorFact

__all__ = ["Explanation", "TensorFact", "explain"]
