"""TransformerLens's hook points, by its own names: what may be asked for as an extra output."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from converter.checkpoint import NeoConfig
from converter.errors import UsageError

BLOCK = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
"""Hook points of a block, without `blocks.{i}.`, in the order of the forward pass.

As HookedTransformer 3.x defines them: `hook_normalized` is before the gain (2.x: after it), and
`hook_attn_scores` is -inf where a query does not see a key. TransformerBridge gives the pattern
once more under the latter's name.
"""


def hook_names(config: NeoConfig) -> tuple[str, ...]:
    """Every hook point of the model, in the order of the forward pass."""
    return (
        "hook_embed",
        "hook_pos_embed",
        *(f"blocks.{i}.{name}" for i in range(config.n_layers) for name in BLOCK),
        "ln_final.hook_scale",
        "ln_final.hook_normalized",
    )


def hooks_matching(patterns: Sequence[str], config: NeoConfig) -> tuple[str, ...]:
    """The hook points that any of these glob patterns names, in the order of the forward pass.

    Raises:
        UsageError: a pattern names none; the message lists names close to it.
    """
    names = hook_names(config)
    wanted: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            close = _close(pattern, names)
            raise UsageError(
                f"No hook point of this model is called {pattern!r}.",
                where="--hook",
                do=f"Close to it: {', '.join(close)}." if close else
                "Use TransformerLens's names, such as blocks.*.hook_resid_post.",
                details={"close": close},
            )  # fmt: skip
        wanted.update(found)
    return tuple(name for name in names if name in wanted)


def _close(pattern: str, names: Sequence[str]) -> list[str]:
    """Names that were perhaps meant. Layers are alike: a block's names are compared once."""
    layers = {name: name for name in names}
    layers |= {f"blocks.*.{name}": f"blocks.*.{name}" for name in BLOCK}
    # What is wrong may be the beginning only ("block.0.hook_q", "resid_post").
    last = pattern.rpartition(".")[2]
    ends = [f"blocks.*.{name}" for name in BLOCK if last and last in name]
    close = difflib.get_close_matches(pattern, list(layers), n=4, cutoff=0.7)
    return list(dict.fromkeys([*close, *ends]))[:6]
