"""An original as a few megabytes: what verifying artifacts needs of it, in one file.

The file says what `converter.verification.original.Original` would find out by reading and running
the original: probes, the float64 reference at some columns of the vocabulary, float32's noise, and
digests of the weights and of what the usual steps make of them.
"""

from converter.recorded.recording import Recorded, reference

__all__ = ["Recorded", "reference"]
