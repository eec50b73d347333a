"""Proof that an artifact is its original: weights bit for bit, and function within float32's noise.

Importing this package imports neither torch nor a library that runs models.
"""

from converter.verification.judge import MAX_RATIO
from converter.verification.loading import load_bridge, load_hooked
from converter.verification.original import Original
from converter.verification.probes import Probe, standard_probes
from converter.verification.result import Divergence, ProbeResult, RuntimeInfo, Verification
from converter.verification.verify import CHECKS, verify
from converter.verification.weights import WeightCheck, compare_weights

__all__ = [
    "CHECKS",
    "MAX_RATIO",
    "Divergence",
    "Original",
    "Probe",
    "ProbeResult",
    "RuntimeInfo",
    "Verification",
    "WeightCheck",
    "compare_weights",
    "load_bridge",
    "load_hooked",
    "standard_probes",
    "verify",
]
