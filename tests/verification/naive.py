"""GPT-Neo written a second time, naively, in numpy's long double: loops, one query at a time.

Shares nothing with the code under test but the names of the weights.
"""

from __future__ import annotations

import numpy as np

from converter.checkpoint import Checkpoint

Real = np.longdouble


def logits(checkpoint: Checkpoint, tokens: list[int], first: int = 0) -> np.ndarray:
    """[pos, v] for one sequence; the tokens before `first` are padding and get no row."""
    c = checkpoint.config
    get = {k: checkpoint.tensor(k).astype(Real) for k in checkpoint.slots}
    kept = tokens[first:]
    r = [get["embed.W_E"][t] + get["pos_embed.W_pos"][p] for p, t in enumerate(kept)]
    for i in range(c.n_layers):
        b = {k.split(".", 2)[2]: v for k, v in get.items() if k.startswith(f"blocks.{i}.")}
        x = [norm(row, b["ln1.w"], b["ln1.b"], c.eps) for row in r]
        divisor = Real(c.score_divisors[i]) if c.score_divisors else Real(1)
        out = []
        for here in range(len(r)):
            total = b["attn.b_O"].copy()
            start = max(0, here - c.window_size + 1) if c.attn_types[i] == "local" else 0
            for n in range(c.n_heads):
                q = x[here] @ b["attn.W_Q"][n] + b["attn.b_Q"][n]
                k = [x[j] @ b["attn.W_K"][n] + b["attn.b_K"][n] for j in range(start, here + 1)]
                v = [x[j] @ b["attn.W_V"][n] + b["attn.b_V"][n] for j in range(start, here + 1)]
                s = np.array([q @ key for key in k]) / divisor
                p = np.exp(s - s.max())
                p /= p.sum()
                total += sum(w * value for w, value in zip(p, v, strict=True)) @ b["attn.W_O"][n]
            out.append(total)
        r = [row + add for row, add in zip(r, out, strict=True)]
        for here, row in enumerate(r):
            y = norm(row, b["ln2.w"], b["ln2.b"], c.eps) @ b["mlp.W_in"] + b["mlp.b_in"]
            cubic = np.sqrt(2 / Real(np.pi)) * (y + Real("0.044715") * y**3)
            y = y / 2 * (1 + np.tanh(cubic))
            r[here] = row + y @ b["mlp.W_out"] + b["mlp.b_out"]
    final = [norm(row, get["ln_final.w"], get["ln_final.b"], c.eps) for row in r]
    return np.array(final) @ get["unembed.W_U"] + get["unembed.b_U"]


def norm(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float) -> np.ndarray:
    x = x - x.mean()
    result: np.ndarray = x / np.sqrt((x * x).mean() + Real(eps)) * w + b
    return result
