"""A checkpoint as a model of transformers or TransformerLens.

Always from local files. Weights are read by the libraries themselves (transformers,
safetensors.torch), not by our reader, so that the two check one another.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converter.checkpoint import Checkpoint
from converter.checkpoint.hf_config import to_hf
from converter.checkpoint.source import TOKENIZER_FILES
from converter.checkpoint.tl_config import to_tl
from converter.dtypes import NAMES
from converter.errors import TensorMismatch
from converter.layout import buffers
from converter.verification.loading import installed

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the libraries print while they load. stdout is the user's JSON."""
    from transformers.utils import logging as library

    chatter: Any = library  # its functions carry no types
    root = logging.getLogger()
    level, verbosity = root.level, chatter.get_verbosity()
    bars = chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()


def hf_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    """GPTNeoForCausalLM in float32: `from_pretrained` of a directory, or of a bare file's tensors."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

    model: Any
    neo: Any = GPTNeoForCausalLM  # torch.nn.Module.float carries no types
    given = checkpoint.source.hf_config if checkpoint.source.is_directory else None
    with quiet():
        if given is not None:
            new = tuple(map(int, installed("transformers").split(".")[:2])) >= (4, 56)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.source.path,
                local_files_only=True,
                output_loading_info=True,
                **{"dtype" if new else "torch_dtype": torch.float32},
            )
            model, info = loaded
            # Missing weights would be random in silence.
            tied = {"lm_head.weight"} if checkpoint.headless else set()
            ignored = set(checkpoint.dropped)
            ignored |= {n.removeprefix("transformer.") for n in checkpoint.dropped}
            missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
            _refuse(missing - tied, unexpected - ignored, "transformers", checkpoint)
        else:
            config = to_hf(
                checkpoint.config,
                checkpoint.original_hf_config,
                tied=checkpoint.tied,
                dtype="float32",
            )
            model = neo(GPTNeoConfig(**config)).float()
            state = {str(checkpoint.slots[key].name): tensor for key, tensor in _own(checkpoint)}
            if checkpoint.headless:
                state["lm_head.weight"] = state["transformer.wte.weight"]
            model.load_state_dict(state, strict=True)
    return model.to(device).eval()


def hooked_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    tokenizer: bool = False,
) -> Any:
    """HookedTransformer(cfg) with the file's weights, in `dtype` or the dtype that cfg states."""
    import torch

    with quiet():
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
        model = HookedTransformer(
            HookedTransformerConfig.from_dict(cfg),
            tokenizer=local_tokenizer(checkpoint) if tokenizer else None,
        )
        state = state_dict(checkpoint)
        result = model.load_state_dict(state, strict=False)
    # TransformerLens 3.5 and later may leave identity LayerNorms in folded files.
    identity = {
        name
        for name in result.unexpected_keys
        if checkpoint.config.folded and _is_identity_norm(name, state[name])
    }
    known = buffers("hooked", checkpoint.config.n_layers)
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
    return norm in ("ln1", "ln2", "ln_final") and bool((tensor == neutral).all())


def bridge_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None = None
) -> Any:
    """TransformerBridge around the architecture that config.json describes, weights loaded.

    Raises:
        TensorMismatch: the bridge does not hold what was loaded into it (config.json ties
            embedding and head, the file does not).
    """
    import torch

    with quiet(), tempfile.TemporaryDirectory() as scratch:
        from transformer_lens.model_bridge import TransformerBridge

        directory = checkpoint.source.path
        if not (checkpoint.source.is_directory and checkpoint.source.hf_config):
            directory = Path(scratch)
            stored = NAMES[checkpoint.dtype]
            config = checkpoint.source.hf_config or to_hf(
                checkpoint.config, None, tied=checkpoint.tied, dtype=stored
            )
            (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        # Without weights, a bridge's dtype is that of config.json, whatever dtype= says.
        dtype = dtype or getattr(torch, NAMES[checkpoint.dtype])
        bridge: Any = TransformerBridge.boot_transformers(
            str(directory),
            hf_config_overrides={"dtype": dtype, "torch_dtype": dtype},
            device=str(device),
            dtype=dtype,
            tokenizer=local_tokenizer(checkpoint) or _placeholder_tokenizer(),
            load_weights=False,
        )
        if checkpoint.biased:
            # A raw bridge has no q, k, v biases, and would be silently wrong without them.
            bridge.enable_compatibility_mode()
        state = state_dict(checkpoint)
        bridge.load_state_dict(state, strict=True)
        bridge.to(device)
        held = bridge.state_dict()
        wrong = [n for n, t in state.items() if not _equal(held[n].cpu(), t.to(dtype))]
    if wrong:
        raise TensorMismatch(
            f"TransformerBridge does not hold the weights loaded into it: {', '.join(wrong[:4])}.",
            where=str(checkpoint.source.path),
            do='Embedding and head differ: config.json must say "tie_word_embeddings": false.',
        )
    return bridge.eval()


def _equal(a: Tensor, b: Tensor) -> bool:
    """As torch.equal, but that NaN is NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def state_dict(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights under the names in the files, as safetensors.torch reads them."""
    from safetensors.torch import load_file

    files = dict.fromkeys(stored.file for stored in checkpoint.stored.values())
    if any(file.suffix != ".safetensors" for file in files):
        return {str(checkpoint.slots[key].name): tensor for key, tensor in _own(checkpoint)}
    names = {stored.name for stored in checkpoint.stored.values()}
    return {k: t for file in files for k, t in load_file(file).items() if k in names}


def _own(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Stored weights by `hooked` name in the layout's own axes, float32, from our reader."""
    import torch

    for key in checkpoint.stored:
        slot = checkpoint.slots[key]
        hub = checkpoint.tensor(key, "F32")
        array = slot.to_hub.inverse.apply(hub, checkpoint.config.sizes)
        yield key, torch.from_numpy(np.array(array, order="C"))


def local_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer in the checkpoint's directory, or None. transformers makes up a one-token
    GPT-2 tokenizer for a directory that has none."""
    from transformers import AutoTokenizer

    source = checkpoint.source
    if not source.is_directory or not any((source.path / n).is_file() for n in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(source.path, local_files_only=True)


def _placeholder_tokenizer() -> Any:
    """boot_transformers insists on one; verification only ever passes token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    core = Tokenizer(WordLevel({end: 0}, unk_token=end))
    # No bos_token: TransformerLens would load the tokenizer a second time, from its files.
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=core, eos_token=end, pad_token=end)


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
