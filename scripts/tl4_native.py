"""A saved HookedTransformer GPT-Neo in TransformerLens 4: by its own converter, and by neoconvert."""

from __future__ import annotations

import datetime
import json
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import converter
from converter.demo import MODEL

POSITIONS = 200


@dataclass(frozen=True)
class Found:
    """What one way of loading gave, beside transformers on the original, on the same random tokens."""

    way: str
    keys: str
    """What loading the state dict answered."""
    within: float
    """The largest |Δ log p| at positions that no window cuts."""
    beyond: float
    """The same at the other positions."""


def natively(directory: Path, *, rescaled: bool) -> tuple[Any, str]:
    """The bridge that TransformerLens's `convert_tl_checkpoint` and `boot_native` make of the
    directory, and what loading it answered. `rescaled`: W_Q times √d_head, which makes up for the
    division by it that its attention always does."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.conversion_utils import convert_tl_checkpoint
    from transformer_lens.model_bridge import TransformerBridge

    cfg = json.loads((directory / "cfg.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    if rescaled:
        for i in range(cfg["n_layers"]):
            tensors[f"blocks.{i}.attn.W_Q"] *= cfg["d_head"] ** 0.5
    config = TransformerBridgeConfig.from_dict(cfg | {"dtype": torch.float32})
    bridge = TransformerBridge.boot_native(config)
    return bridge, str(bridge.load_state_dict(convert_tl_checkpoint(tensors, config), strict=True))


def measure(scratch: Path) -> list[Found]:
    """The ways there are, on the demo model."""
    from transformer_lens.model_bridge import TransformerBridge

    hooked, back = scratch / "hooked", scratch / "hf"
    converter.hf_to_tl(MODEL, hooked, check=False)
    converter.tl_to_hf(hooked, back, check=False)
    original: Any = AutoModelForCausalLM.from_pretrained(MODEL)
    window = original.config.window_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, original.config.vocab_size, (1, POSITIONS), generator=generator)
    with torch.no_grad():
        true = original(tokens).logits.log_softmax(-1)

    def found(way: str, model: Any, keys: str) -> Found:
        model.eval()
        with torch.no_grad():
            error = (model(tokens).log_softmax(-1) - true).abs().amax(-1)[0]
        return Found(way, keys, float(error[:window].max()), float(error[window:].max()))

    ways = {
        "TransformerLens 4: `convert_tl_checkpoint`, `boot_native`": False,
        "the same, W_Q times √d_head first": True,
    }
    rows = [found(way, *natively(hooked, rescaled=scaled)) for way, scaled in ways.items()]
    ours = "neoconvert: `tl-to-hf`, `boot_transformers`"
    bridge = TransformerBridge.boot_transformers(str(back))
    return [*rows, found(ours, bridge, "loaded by boot_transformers")]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Path(scratch))
    print("| way | loading says | up to the window | beyond it |")
    print("|---|---|---|---|")
    for row in rows:
        print(f"| {row.way} | {row.keys} | {row.within:.2g} | {row.beyond:.2g} |")
    print(
        f"\nmax |Δ log p| against transformers {version('transformers')}, {POSITIONS} random tokens;"
        f" TransformerLens {version('transformer-lens')}, {datetime.date.today()},"
        f" {platform.machine()}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
