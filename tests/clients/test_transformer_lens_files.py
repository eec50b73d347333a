"""Files that real TransformerLens saved, on their way to stock transformers and to TL 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from converter.checkpoint import open_checkpoint
from converter.convert import hf_to_tl, tl_to_hf
from converter.demo import MODEL
from converter.verification import load_hooked
from converter.verification.loading import has_hooked_transformer
from tests.checkpoints import read_all

STEPS = {
    "fold_ln": True,
    "center_writing_weights": True,
    "center_unembed": True,
    "fold_value_biases": True,
    "refactor_factored_attn_matrices": False,
}
needs_hooked = pytest.mark.skipif(
    not has_hooked_transformer(), reason="HookedTransformer was removed in TransformerLens 4"
)


def _tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, open_checkpoint(MODEL).config.d_vocab, (2, 200), generator=generator)


def _transformers(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info  # strictly: nothing missing, unexpected or mismatched
    return model.eval()


def _log_probs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens)
    logits: torch.Tensor = getattr(out, "logits", out)
    return logits.double().log_softmax(-1)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return _log_probs(_transformers(MODEL), _tokens())


def _close(directory: Path, expected: torch.Tensor, *, bound: float = 1e-4) -> None:
    """In transformers, again after save_pretrained, and in TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge

    model = _transformers(directory)
    assert (_log_probs(model, _tokens()) - expected).abs().max() < bound
    model.save_pretrained(directory / "again")
    assert (
        _log_probs(_transformers(directory / "again"), _tokens()) - expected
    ).abs().max() < bound
    bridge = TransformerBridge.boot_transformers(str(directory))
    assert (_log_probs(bridge, _tokens()) - expected).abs().max() < bound


@needs_hooked
@pytest.mark.parametrize("refactor", [False, True])
@pytest.mark.parametrize("style", ["3.9", "2.16", "identity"])
def test_saved_after_from_pretrained(
    style: str, refactor: bool, expected: torch.Tensor, tmp_path: Path
) -> None:
    """`from_pretrained` folds LayerNorm; files of TL 2 hold masks, some hold identity LN keys."""
    hf_to_tl(MODEL, tmp_path / "raw", check=False)
    model = load_hooked(tmp_path / "raw")
    state = dict(model.state_dict())
    model.load_and_process_state_dict(
        state, **{**STEPS, "refactor_factored_attn_matrices": refactor}
    )
    state, cfg = dict(model.state_dict()), dict(model.cfg.to_dict())
    assert cfg["normalization_type"] == "LNPre"
    assert not any(".ln1." in name for name in state)
    if style == "2.16":
        for layer in range(cfg["n_layers"]):
            mask = torch.ones(cfg["n_ctx"], cfg["n_ctx"], dtype=torch.bool).tril()
            state[f"blocks.{layer}.attn.mask"] = mask
    if style == "identity":
        for layer in range(cfg["n_layers"]):
            for norm in ("ln1", "ln2"):
                state[f"blocks.{layer}.{norm}.w"] = torch.ones(cfg["d_model"])
                state[f"blocks.{layer}.{norm}.b"] = torch.zeros(cfg["d_model"])
        state |= {
            "ln_final.w": torch.ones(cfg["d_model"]),
            "ln_final.b": torch.zeros(cfg["d_model"]),
        }
    torch.save((cfg, state), tmp_path / "model.pt")
    source = open_checkpoint(tmp_path / "model.pt", allow_pickle=True)
    done = tl_to_hf(source, tmp_path / "hf")
    assert done.route.reverse == "functional"
    assert done.verification is not None
    assert done.verification.passed
    _close(tmp_path / "hf", expected)


@pytest.mark.parametrize("layout", ["hooked", "bridge"])
@pytest.mark.parametrize("process", ["none", "default", "all"])
def test_every_layout_and_back(
    layout: str, process: str, expected: torch.Tensor, tmp_path: Path
) -> None:
    """Processed by us, run by TransformerLens, and back without a ledger."""
    hf_to_tl(MODEL, tmp_path / "tl", layout=layout, process=process, ledger="none")  # type: ignore[arg-type]
    done = tl_to_hf(tmp_path / "tl", tmp_path / "hf")
    assert done.route.reverse == ("none" if process == "none" else "functional")
    _close(tmp_path / "hf", expected)


@pytest.mark.parametrize("biased", ["b_Q", "b_K", "b_V", "b_U"])
def test_raw_model_with_biases_that_hf_lacks(biased: str, tmp_path: Path) -> None:
    """As a model trained in TL has them. The verification is against HookedTransformer (TL 3)."""
    from safetensors.torch import load_file, save_file

    hf_to_tl(MODEL, tmp_path / "tl", check=False)
    weights = load_file(tmp_path / "tl/model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if name.endswith(biased):
            tensor.normal_(0, 0.5, generator=generator)
    save_file(weights, tmp_path / "tl/model.safetensors", metadata={"format": "pt"})
    done = tl_to_hf(tmp_path / "tl", tmp_path / "hf")
    assert done.route.reverse == "functional"
    assert done.verification is not None
    assert done.verification.passed
    assert set(read_all(MODEL)) <= set(read_all(tmp_path / "hf"))
    _transformers(tmp_path / "hf")
