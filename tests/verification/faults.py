"""The deliberate faults that verification must catch, and the controls it must not flag.

Each says which artifacts can have it and which unit it touches. Most sit in block 1, a local
layer: what is wrong there passes through a sound block before, and must not be blamed on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converter.checkpoint import NeoConfig
from converter.layout import EMBEDDING, HEAD
from tests.verification.fault import (
    ALL,
    FOLDED,
    RAW,
    Artifact,
    Edit,
    Fault,
    brain,
    copy_block,
    doubled,
    each,
    everywhere,
    exchange,
    flip,
    folded_bias,
    folded_mean_left,
    gain_again,
    half,
    one,
    own_head,
    permuted,
    put,
    roll,
    row,
    square,
    swap_blocks,
    tie,
    tied,
    transposed,
    uncentred,
    untie,
    untied,
    value_bias,
)
from tests.verification.graph_faults import GRAPH_FAULTS
from tests.verification.software import SOFTWARE_FAULTS

B = "blocks.1."
POSITIONS = "pos_embed.W_pos"
TL: tuple[Artifact, ...] = ("hooked", "bridge")
HF: tuple[Artifact, ...] = ("hf", "onnx")


def weights(name: str, edit: Edit, *, on: tuple[Artifact, ...] = ALL, **more: Any) -> Fault:
    more = {"unit": "block 1"} | more
    return Fault(name, on, weights=edit, **more)


def config(name: str, unit: str | None, /, **fields: Any) -> Fault:
    return Fault(name, ALL, unit, config=lambda _: fields)


def _swapped(config: NeoConfig) -> Mapping[str, Any]:
    other = {"global": "local", "local": "global"}
    return {"attn_types": tuple(other[t] for t in config.attn_types)}


def _all_global(config: NeoConfig) -> Mapping[str, Any]:
    return {"attn_types": ("global",) * config.n_layers}


ATTENTION: tuple[Fault, ...] = (
    *(weights(f"heads of W_{x} permuted", put(f"{B}attn.W_{x}", roll())) for x in "QKVO"),
    weights("W_Q and W_K exchanged", exchange(f"{B}attn.W_Q", f"{B}attn.W_K")),
    weights("W_K and W_V exchanged", exchange(f"{B}attn.W_K", f"{B}attn.W_V")),
    weights("W_O transposed", put(f"{B}attn.W_O", transposed)),
    weights("W_Q transposed", put(f"{B}attn.W_Q", transposed)),
    weights("W_in transposed", put(f"{B}mlp.W_in", transposed), needs=square),
    weights("scaled by 1/√h", everywhere(lambda w: w / np.sqrt(w.shape[-1]), ".W_Q"), unit="block 0"),
    Fault("scaled by 1/√h by the config", ("hooked",), "block 0", document={"use_attn_scale": True}),
    weights("a head's values lost", put(f"{B}attn.W_V", row(1, 0))),
)  # fmt: skip

BIASES: tuple[Fault, ...] = (
    *(weights(f"{b.split('.')[1]} dropped", put(B + b, np.zeros_like)) for b in ("attn.b_O", "mlp.b_in", "mlp.b_out")),
    *(weights(f"{b.split('.')[1]} doubled", put(B + b, doubled)) for b in ("attn.b_O", "mlp.b_in", "mlp.b_out")),
    weights("one element of b_in dropped", put(f"{B}mlp.b_in", one(0))),
    *(weights(f"folded b_{x} dropped", put(f"{B}attn.b_{x}", np.zeros_like), on=("processed",)) for x in "QK"),
    *(weights(f"folded b_{x} doubled", put(f"{B}attn.b_{x}", doubled), on=("processed",)) for x in "QK"),
    weights("folded b_U dropped", put("unembed.b_U", np.zeros_like), on=("processed",), unit="final"),
    weights("folded b_U doubled", put("unembed.b_U", doubled), on=("processed",), unit="final"),
)  # fmt: skip

NORMS: tuple[Fault, ...] = (
    weights("ln1 gain lost", put(f"{B}ln1.w", np.ones_like), on=RAW),
    weights("ln2 bias lost", put(f"{B}ln2.b", np.zeros_like), on=RAW),
    weights("ln_final gain lost", put("ln_final.w", np.ones_like), on=RAW, unit="final"),
    weights("ln_final bias lost", put("ln_final.b", np.zeros_like), on=(*RAW, "baked"), unit="final"),
    weights("carrying bias of ln1 lost", put(f"{B}ln1.b", np.zeros_like), on=("baked",)),
    weights("ln1 and ln2 exchanged", each(exchange(f"{B}ln1.w", f"{B}ln2.w"), exchange(f"{B}ln1.b", f"{B}ln2.b")), on=RAW),
    weights("gain and bias of ln1 exchanged", exchange(f"{B}ln1.w", f"{B}ln1.b"), on=RAW),
    config("epsilon 1e-6", None, eps=1e-6),
    config("epsilon 1e-12", None, eps=1e-12),
)  # fmt: skip

CONFIG: tuple[Fault, ...] = (
    Fault("window lost", ALL, "block 1", config=_all_global),
    config("window + 1", "block 1", window_size=6),
    config("window − 1", "block 1", window_size=4),
    config("window as long as the context", "block 1", window_size=256),
    Fault("global and local swapped", ALL, "block 0", config=_swapped),
    config("gelu for gelu_new", "block 0", act_fn="gelu"),
    config("relu for gelu_new", "block 0", act_fn="relu"),
    config("heads counted otherwise", "block 0", n_heads=2),
)

EMBEDDINGS: tuple[Fault, ...] = (
    weights("positions shifted by one", put(POSITIONS, roll(-1)), unit="embed"),
    weights("last position zero", put(POSITIONS, row(-1, 0)), unit="embed"),
    weights("first position is the second", put(POSITIONS, row(0, lambda w: w[1])), unit="embed"),
    weights("a token's embedding is its neighbour's", put(EMBEDDING, row(3, lambda w: w[4])), unit="embed"),
    weights("last token's embedding lost", put(EMBEDDING, row(-1, 0)), unit="embed"),
    weights("a token's unembedding is its neighbour's", put(HEAD, row(3, lambda w: w[4], 1)), unit="final", needs=own_head),
    weights("last token's unembedding lost", put(HEAD, row(-1, 0, 1)), unit="final", needs=own_head),
    weights("stale head", put(HEAD, lambda w: w * np.float32(1.001)), unit="final", needs=own_head),
    weights("a stale head of its own", untie, on=HF, unit="final", needs=tied, document={"tie_word_embeddings": False}),
    weights("head tied though it is not", tie, on=HF, unit="final", needs=untied, document={"tie_word_embeddings": True}),
)  # fmt: skip

PROCESSING: tuple[Fault, ...] = (
    weights("centring missed on W_E", uncentred(EMBEDDING), on=FOLDED, unit="embed"),
    weights("centring missed on W_pos", uncentred(POSITIONS), on=FOLDED, unit="embed"),
    *(weights(f"centring missed on {k.split('.')[1]}", uncentred(B + k), on=FOLDED) for k in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")),
    weights("centring missed on W_U", uncentred(HEAD), on=FOLDED, unit="final"),
    weights("folded W_Q not centred", folded_mean_left(f"{B}attn.W_Q", f"{B}ln1.w"), on=FOLDED),
    weights("folded W_in not centred", folded_mean_left(f"{B}mlp.W_in", f"{B}ln2.w"), on=FOLDED),
    weights("gain folded twice into W_in", gain_again(f"{B}mlp.W_in", f"{B}ln2.w"), on=FOLDED),
    weights("gain folded twice into W_V", gain_again(f"{B}attn.W_V", f"{B}ln1.w"), on=FOLDED),
    weights("ln2 bias not folded", folded_bias(f"{B}mlp.b_in", f"{B}mlp.W_in", f"{B}ln2.b", -1), on=FOLDED),
    weights("ln2 bias folded twice", folded_bias(f"{B}mlp.b_in", f"{B}mlp.W_in", f"{B}ln2.b", 1), on=FOLDED),
    weights("ln_final bias not folded", folded_bias("unembed.b_U", HEAD, "ln_final.b", -1), on=("processed",), unit="final"),
    weights("value bias not folded", value_bias(1, -1), on=FOLDED),
    weights("value bias folded twice", value_bias(1, 1), on=FOLDED),
)  # fmt: skip

ROUNDING: tuple[Fault, ...] = (
    weights("float16 detour of all", everywhere(half), unit="embed"),
    weights("bfloat16 detour of W_in", put(f"{B}mlp.W_in", brain)),
    weights("float16 detour of W_V", put(f"{B}attn.W_V", half)),
    weights("float16 detour of b_out", put(f"{B}mlp.b_out", half)),
    weights("float16 detour of the head", put(HEAD, half), unit="final", needs=own_head),
    weights("an exponent bit of W_out", put(f"{B}mlp.W_out", flip(23))),
    weights("an exponent bit of W_K", put(f"{B}attn.W_K", flip(24))),
    weights("an exponent bit of b_O", put(f"{B}attn.b_O", flip(23))),
    weights("an exponent bit of a gain", put(f"{B}ln2.w", flip(23)), on=(*RAW, "baked")),
    weights("the top exponent bit of W_V", put(f"{B}attn.W_V", flip(30))),
    weights("the last bit of W_in", put(f"{B}mlp.W_in", flip(0))),
    weights("a sign of W_in", put(f"{B}mlp.W_in", one(lambda x: -x))),
    weights("a sign of W_Q", put(f"{B}attn.W_Q", one(lambda x: -x))),
    weights("a row of W_out zero", put(f"{B}mlp.W_out", row(2, 0))),
    weights("a channel of W_V zero", put(f"{B}attn.W_V", row(2, 0, 1))),
    weights("NaN in W_in", put(f"{B}mlp.W_in", one(np.nan))),
    weights("NaN in a token's embedding", put(EMBEDDING, row(5, np.nan)), unit="embed"),
    weights("infinity in b_out", put(f"{B}mlp.b_out", one(np.inf))),
    weights("float16 detour of W_O", put(f"{B}attn.W_O", half)),
)  # fmt: skip

ORDER: tuple[Fault, ...] = (
    weights("block 1 is block 0 again", copy_block(0, 1)),
    weights("blocks 0 and 1 swapped", swap_blocks(0, 1), unit="block 0"),
    weights("block 1 skipped", each(*(put(B + k, np.zeros_like) for k in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")))),
    weights("MLP skipped", each(*(put(B + k, np.zeros_like) for k in ("mlp.W_out", "mlp.b_out")))),
    weights("rows of W_in permuted without W_out", permuted({f"{B}mlp.W_in": 1, f"{B}mlp.b_in": 0})),
    weights("rows of W_out permuted without W_in", permuted({f"{B}mlp.W_out": 0})),
)  # fmt: skip

CONTROLS: tuple[Fault, ...] = (
    weights("control: nothing", each(), unit=None, harmless=True),
    weights("control: neurons permuted", permuted({f"{B}mlp.W_in": 1, f"{B}mlp.b_in": 0, f"{B}mlp.W_out": 0}, 3), harmless=True),
    weights("control: heads permuted", permuted({f"{B}attn.{x}": 0 for x in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")}), harmless=True),
    weights("control: a sign moved from W_V to W_O", each(put(f"{B}attn.W_V", np.negative), put(f"{B}attn.W_O", np.negative)), on=("hf", "hooked", "bridge", "onnx", "baked"), harmless=True),
    weights("control: queries doubled, keys halved", each(put(f"{B}attn.W_Q", doubled), put(f"{B}attn.W_K", lambda w: w / 2)), on=(*RAW, "baked"), harmless=True),
    Fault("control: gelu by another name", ALL, config=lambda _: {"act_fn": "gelu_pytorch_tanh"}, harmless=True),
)  # fmt: skip

FAULTS: tuple[Fault, ...] = (
    *ATTENTION, *BIASES, *NORMS, *CONFIG, *EMBEDDINGS, *PROCESSING, *ROUNDING, *ORDER,
    *GRAPH_FAULTS, *SOFTWARE_FAULTS, *CONTROLS,
)  # fmt: skip
BY_NAME = {fault.name: fault for fault in FAULTS}
