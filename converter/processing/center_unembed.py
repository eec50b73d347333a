"""`center_unembed`: the logits' mean over the vocabulary goes.

W_U [d, v] and b_U [v] lose their means over v. At each position all logits shift by the same
number, x̂·mean(W_U) + mean(b_U), and log-probabilities stay as they are.
"""

from converter.layout import GPT_NEO
from converter.processing.centring import Centring


class CenterUnembed(Centring):
    name = "center_unembed"
    sentence = (
        "the logits' mean over the vocabulary went; raw logits shift by one number"
        " at each position, log-probabilities do not"
    )
    silence = "the unembedding is centred already"
    tensors = GPT_NEO.writers("v")


STEP = CenterUnembed()
