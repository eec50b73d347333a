"""The layout table: GPT-Neo's weights, one row each; and the fields of its configs.

`hooked` is `HookedTransformer.state_dict()` (TransformerLens <= 3), `bridge` is
`TransformerBridge.state_dict()` (TransformerLens >= 3), `hf` is `GPTNeoForCausalLM`.
HF and bridge share one orientation (`nn.Linear`: [out, in]), the column `flat`.

Axes: v vocabulary, c context, d d_model, n heads, h d_head, f d_mlp.
"""

from converter.layout.architecture import Absence, Architecture, Field, Row, UnitKind
from converter.layout.layouts import LAYOUTS

GAIN = Absence(1.0, raw=(), folded=("hooked",))
SHIFT = Absence(0.0, raw=(), folded=("hooked",))
QKV_BIAS = Absence(0.0, raw=("hf", "bridge"), folded=("hf",))
HEAD_BIAS = Absence(0.0, raw=("hf",), folded=("hf",))
HEAD, EMBEDDING = "unembed.W_U", "embed.W_E"


def _rows(
    unit: UnitKind, *rows: tuple[str | None, str, str | None, str, str, Absence | None]
) -> tuple[Row, ...]:
    return tuple(Row(unit, *row) for row in rows)


# fmt: off
TABLE: tuple[Row, ...] = (
    *_rows(UnitKind.EMBED,
        # HF                                     hooked            bridge                flat       hooked   absent
        ("transformer.wte.weight",               "embed.W_E",      "embed.weight",       "v d",     "v d",   None),
        ("transformer.wpe.weight",               "pos_embed.W_pos", "pos_embed.weight",  "c d",     "c d",   None)),
    *_rows(UnitKind.BLOCK,
        ("transformer.h.{i}.ln_1.weight",        "blocks.{i}.ln1.w", "blocks.{i}.ln1.weight", "d",  "d",     GAIN),
        ("transformer.h.{i}.ln_1.bias",          "blocks.{i}.ln1.b", "blocks.{i}.ln1.bias",   "d",  "d",     SHIFT),
        ("transformer.h.{i}.attn.attention.q_proj.weight",
                                                 "blocks.{i}.attn.W_Q", "blocks.{i}.attn.q.weight", "(n h) d", "n d h", None),
        ("transformer.h.{i}.attn.attention.k_proj.weight",
                                                 "blocks.{i}.attn.W_K", "blocks.{i}.attn.k.weight", "(n h) d", "n d h", None),
        ("transformer.h.{i}.attn.attention.v_proj.weight",
                                                 "blocks.{i}.attn.W_V", "blocks.{i}.attn.v.weight", "(n h) d", "n d h", None),
        ("transformer.h.{i}.attn.attention.out_proj.weight",
                                                 "blocks.{i}.attn.W_O", "blocks.{i}.attn.o.weight", "d (n h)", "n h d", None),
        (None,                                   "blocks.{i}.attn.b_Q", "blocks.{i}.attn.q.bias", "(n h)", "n h", QKV_BIAS),
        (None,                                   "blocks.{i}.attn.b_K", "blocks.{i}.attn.k.bias", "(n h)", "n h", QKV_BIAS),
        (None,                                   "blocks.{i}.attn.b_V", "blocks.{i}.attn.v.bias", "(n h)", "n h", QKV_BIAS),
        ("transformer.h.{i}.attn.attention.out_proj.bias",
                                                 "blocks.{i}.attn.b_O", "blocks.{i}.attn.o.bias", "d",  "d",     None),
        ("transformer.h.{i}.ln_2.weight",        "blocks.{i}.ln2.w", "blocks.{i}.ln2.weight", "d",  "d",     GAIN),
        ("transformer.h.{i}.ln_2.bias",          "blocks.{i}.ln2.b", "blocks.{i}.ln2.bias",   "d",  "d",     SHIFT),
        ("transformer.h.{i}.mlp.c_fc.weight",    "blocks.{i}.mlp.W_in", "blocks.{i}.mlp.in.weight", "f d", "d f", None),
        ("transformer.h.{i}.mlp.c_fc.bias",      "blocks.{i}.mlp.b_in", "blocks.{i}.mlp.in.bias", "f", "f",   None),
        ("transformer.h.{i}.mlp.c_proj.weight",  "blocks.{i}.mlp.W_out", "blocks.{i}.mlp.out.weight", "d f", "f d", None),
        ("transformer.h.{i}.mlp.c_proj.bias",    "blocks.{i}.mlp.b_out", "blocks.{i}.mlp.out.bias", "d", "d", None)),
    *_rows(UnitKind.FINAL,
        ("transformer.ln_f.weight",              "ln_final.w",     "ln_final.weight",    "d",       "d",     GAIN),
        ("transformer.ln_f.bias",                "ln_final.b",     "ln_final.bias",      "d",       "d",     SHIFT),
        ("lm_head.weight",                       "unembed.W_U",    "unembed.weight",     "v d",     "d v",   None),
        (None,                                   "unembed.b_U",    "unembed.bias",       "v",       "v",     HEAD_BIAS)),
)

# fmt: on
GPT_NEO = Architecture(
    TABLE,
    masks={
        "hf": (
            "transformer.h.{i}.attn.attention.bias",
            "transformer.h.{i}.attn.attention.masked_bias",
        ),
        "hooked": ("blocks.{i}.attn.mask", "blocks.{i}.attn.IGNORE"),
        "bridge": (),
    },
    norms={
        "ln1": (("attn.W_Q", "attn.b_Q"), ("attn.W_K", "attn.b_K"), ("attn.W_V", "attn.b_V")),
        "ln2": (("mlp.W_in", "mlp.b_in"),),
        "ln_final": (("unembed.W_U", "unembed.b_U"),),
    },
    fields=(
        Field("n_layers", "num_layers", 24, alias="num_hidden_layers"),
        Field("d_model", "hidden_size", 2048, "d"),
        Field("n_heads", "num_heads", 16, "n", alias="num_attention_heads"),
        Field("n_ctx", "max_position_embeddings", 2048, "c"),
        Field("d_vocab", "vocab_size", 50257, "v"),
        Field("window_size", "window_size", 256),
        Field("act_fn", "activation_function", "gelu_new"),
        Field("eps", "layer_norm_epsilon", 1e-5),
        Field("d_mlp", "intermediate_size", None, "f"),
    ),
)
expand = GPT_NEO.expand

ALSO_HEAD = " (also the head)"
"""Behind the name of the embedding's tensor, where it is meant as the head."""
_EMBEDDINGS = frozenset(GPT_NEO.name(EMBEDDING, layout) for layout in LAYOUTS)


def is_tied_head(tensor: str | None, key: str) -> bool:
    """Whether the tensor of a weight, by its `hooked` name, is the embedding's, and the weight the
    head."""
    return key == HEAD and tensor in _EMBEDDINGS
