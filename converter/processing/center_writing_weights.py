"""`center_writing_weights`: what is written to the residual stream has mean zero.

LayerNorm subtracts the mean of its input, so a constant added to all of a residual vector
never reaches a layer. Equal to TransformerLens's with LN folded or not.
"""

from converter.layout import GPT_NEO
from converter.processing.centring import Centring


class CenterWritingWeights(Centring):
    name = "center_writing_weights"
    sentence = "weights that write to the residual stream lost their mean, which no LayerNorm sees"
    silence = "what is written to the residual stream is centred already"
    tensors = GPT_NEO.writers("d")


STEP = CenterWritingWeights()
