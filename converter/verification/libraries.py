"""A checkpoint as a model of transformers or TransformerLens.

From local files, or from memory. Files are read by the libraries themselves (transformers,
safetensors.torch), not by our reader, so that the two check one another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from converter.checkpoint import Checkpoint
from converter.checkpoint.hf_config import ties, to_hf
from converter.checkpoint.reader import as_torch
from converter.checkpoint.tl_config import to_tl
from converter.dtypes import NAMES
from converter.errors import TensorMismatch
from converter.layout import GPT_NEO, expand
from converter.verification.loading import installed, require_docstrings
from converter.verification.quiet import quiet
from converter.verification.tokenizer import lens_tokenizer, placeholder_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.adapter import Merged

    State = dict[str, Tensor]


def hf_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    state: State | None = None,
) -> Any:
    """GPTNeoForCausalLM, by `from_pretrained`: of a directory, or of tensors in memory. With an
    adapter merged into it, the base with peft's own layers, where peft is installed.

    Args:
        dtype: None: float32.
        state: the tensors, which the model makes its own; None: read from the checkpoint.
    """
    require_docstrings()
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoForCausalLM

    if checkpoint.merged is not None and state is None and installed("peft"):
        return _with_peft(checkpoint.merged, device, dtype)
    kind: Any = AutoModelForCausalLM
    place: dict[str, Any] = {"pretrained_model_name_or_path": checkpoint.source.path}
    if not (checkpoint.as_saved and checkpoint.source.hf_config):
        kind, state = GPTNeoForCausalLM, state_dict(checkpoint) if state is None else state
        place = {"pretrained_model_name_or_path": None, "state_dict": state}
        place["config"] = transformers_config(checkpoint)
    new = tuple(map(int, installed("transformers").split(".")[:2])) >= (4, 56)
    with quiet():
        model, info = kind.from_pretrained(
            **place,
            local_files_only=True,
            output_loading_info=True,
            **{"dtype" if new else "torch_dtype": dtype or torch.float32},
        )
    # Missing weights would be random in silence.
    tied = {"lm_head.weight"} if checkpoint.headless else set()
    ignored = set(checkpoint.dropped)
    ignored |= {n.removeprefix("transformer.") for n in checkpoint.dropped}
    ignored |= {f"transformer.{n}" for n in checkpoint.dropped}
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    _refuse(missing - tied, unexpected - ignored, "transformers", checkpoint)
    model.config.return_dict = True  # else the logits come in a tuple
    return model.to(device).eval()


def _with_peft(merged: Merged, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The adapter as peft runs it, not merged: another arithmetic than ours."""
    from peft import PeftModel

    base = hf_model(merged.base, device, dtype)
    with quiet():
        directory = str(merged.adapter.directory)
        model = PeftModel.from_pretrained(base, directory, torch_device=str(device))
    return model.get_base_model().to(dtype).eval() if dtype else model.get_base_model().eval()


def transformers_config(checkpoint: Checkpoint) -> Any:
    """A GPTNeoConfig that says what these weights are."""
    from transformers import GPTNeoConfig

    base, name = checkpoint.original_hf_config, NAMES[checkpoint.dtype]
    return GPTNeoConfig(**to_hf(checkpoint.config, base, tied=checkpoint.tied, dtype=name))


def hooked_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    tokenizer: bool = False,
    state: State | None = None,
) -> Any:
    """HookedTransformer(cfg) with the file's weights, in `dtype` or the dtype that cfg states.
    Those that have it already stay where they are: in the file, mapped. `state`: see `hf_model`."""
    require_docstrings()
    import torch

    with quiet():
        from dataclasses import fields

        from transformer_lens import HookedTransformer, HookedTransformerConfig

        stored = NAMES[checkpoint.dtype]
        cfg = checkpoint.source.tl_config or to_tl(
            checkpoint.config, None, dtype=stored, model_name="gpt-neo"
        )
        stated = str(cfg.get("dtype") or stored).removeprefix("torch.")
        cfg = dict(cfg) | {
            "dtype": dtype or getattr(torch, stated),
            "device": str(device),
            "n_devices": 1,
            "init_weights": False,  # all weights are loaded: checked below
            "seed": None,  # would seed the process's random number generators
            "tokenizer_name": None,  # would be looked up on the hub
            "normalization_type": "LNPre" if checkpoint.config.folded else "LN",
        }
        known_here = {field.name for field in fields(HookedTransformerConfig)}
        cfg = {name: value for name, value in cfg.items() if name in known_here}
        words = lens_tokenizer(checkpoint) if tokenizer else None
        model = HookedTransformer(HookedTransformerConfig.from_dict(cfg), tokenizer=words)
        state = state_dict(checkpoint) if state is None else state
        own = model.state_dict()
        held = {n: t.to(own[n].device, own[n].dtype) if n in own else t for n, t in state.items()}
        result = model.load_state_dict(held, strict=False, assign=True)
    # TransformerLens 3.5 and later may leave identity LayerNorms in folded files.
    identity = {
        name
        for name in result.unexpected_keys
        if checkpoint.config.folded and _is_identity_norm(name, state[name])
    }
    known = GPT_NEO.buffers("hooked", checkpoint.config.n_layers)
    _refuse(
        set(result.missing_keys) - known,
        set(result.unexpected_keys) - known - identity,
        "HookedTransformer",
        checkpoint,
    )
    return model.eval()


def _is_identity_norm(name: str, tensor: Tensor) -> bool:
    _, _, norm = name.removesuffix(".w").removesuffix(".b").rpartition(".")
    neutral = 1 if name.endswith(".w") else 0
    return norm in GPT_NEO.norms and bool((tensor == neutral).all())


def bridge_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    state: State | None = None,
) -> Any:
    """TransformerBridge around the architecture that config.json describes, weights loaded.
    If none are tied, those that have its dtype already stay in the file, mapped. `state`: see
    `hf_model`.

    Raises:
        TensorMismatch: the bridge does not hold what was loaded into it (config.json ties
            embedding and head, the file does not).
    """
    require_docstrings()
    import torch

    dtype = dtype or getattr(torch, NAMES[checkpoint.dtype])
    tokenizer = lens_tokenizer(checkpoint)
    # Weights that are put in place of tied ones would no longer be tied, as a user's are.
    mapped = state is None and not ties(checkpoint.source.hf_config)
    state = state_dict(checkpoint) if state is None else state
    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        named: dict[str, Any] = {"device": str(device), "dtype": dtype}
        named["tokenizer"] = tokenizer or placeholder_tokenizer()
        if checkpoint.as_saved and checkpoint.source.hf_config:
            place = str(checkpoint.source.path)
            # Without weights, a bridge's dtype is that of config.json, whatever dtype= says.
            overrides = {"dtype": dtype, "torch_dtype": dtype}
            named |= {"load_weights": False, "hf_config_overrides": overrides}
        else:
            place, named["hf_model"] = "gpt-neo", _shell(checkpoint, state, dtype)
        bridge: Any = TransformerBridge.boot_transformers(place, **named)
        bridge.original_model.config.return_dict = True  # else it finds no cache in a tuple
        if checkpoint.biased:
            # A raw bridge has no q, k, v biases, and would be silently wrong without them.
            bridge.enable_compatibility_mode()
        # TL 3.9 makes the biases in float32. The bridge's own `to` lists its weights once for each.
        torch.nn.Module.to(bridge, device=device, dtype=dtype)
        state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
        bridge.load_state_dict(state, strict=True, assign=mapped)
        held = bridge.state_dict()
        wrong = [n for n, t in state.items() if not _equal(held[n], t)]
    if wrong:
        raise TensorMismatch(
            f"TransformerBridge does not hold the weights loaded into it: {', '.join(wrong[:4])}.",
            where=str(checkpoint.source.path),
            do='Embedding and head differ: config.json must say "tie_word_embeddings": false.',
        )
    if tokenizer is None:  # else text would become the placeholder's ids in silence
        bridge.tokenizer = None
    return bridge.eval()


def _shell(checkpoint: Checkpoint, state: State, dtype: torch.dtype) -> Any:
    """The GPTNeoForCausalLM that a bridge wraps, whose weights are loaded afterwards: those of
    `state` that it has a place for stand in for them, since random ones would cost time."""
    from transformers import GPTNeoForCausalLM

    neo: Any = GPTNeoForCausalLM
    config = checkpoint.config
    slots = expand("hf", config.sizes, config.n_layers)
    named = {str(checkpoint.slots[key].name): slot.name for key, slot in slots.items() if slot.name}
    held = {named[name]: tensor.clone() for name, tensor in state.items() if name in named}
    if checkpoint.tied:
        del held["lm_head.weight"]
    return neo.from_pretrained(None, config=transformers_config(checkpoint), state_dict=held).to(
        dtype
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """As torch.equal, but that NaN is NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What a user's own loader would load: the weights, and the buffers that the files hold beside
    them, by the layout's names. As safetensors.torch reads them from the files, or copied from
    where they are in memory."""
    from safetensors.torch import load_file

    files = dict.fromkeys(stored.file for stored in checkpoint.stored.values())
    saved = not checkpoint.source.live and checkpoint.merged is None
    if saved and all(file.suffix == ".safetensors" for file in files):
        loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
        named = {str(checkpoint.slots[k].name): s.name for k, s in checkpoint.stored.items()}
        named |= {name: name for name in checkpoint.buffers if name in loaded}
        return {name: loaded[own] for name, own in named.items()}
    return dict(_own(checkpoint)) | dict(_buffers(checkpoint))


def _own(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Stored weights by name in the layout's own axes, from our reader."""
    for key in checkpoint.stored:
        slot = checkpoint.slots[key]
        flat = slot.to_hub.inverse.apply(checkpoint.tensor(key), checkpoint.config.sizes)
        yield str(slot.name), as_torch(flat)


def _buffers(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for reader in checkpoint.source.readers:
        for name in set(reader.tensors) & set(checkpoint.buffers):
            yield name, as_torch(reader.read(name))


def _refuse(
    missing: Collection[str], unexpected: Collection[str], library: str, checkpoint: Checkpoint
) -> None:
    """A library that fills in or ignores weights runs another model: never in silence."""
    if missing or unexpected:
        what = "misses" if missing else "has no place for"
        names = sorted(missing or unexpected)
        raise TensorMismatch(
            f"{library} {what} {len(names)} tensor(s): {', '.join(names[:4])}.",
            where=str(checkpoint.source.path),
            do="The config beside the weights is not theirs; convert or download them again.",
        )
