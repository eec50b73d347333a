"""A model in memory as a checkpoint: its weights are read where they are, one at a time.

Nothing is copied whole, nothing is written, and the model stays as it is: its hooks, its mode, its
device, its weights. An edit made before a conversion reads them is converted with the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint.checkpoint import Checkpoint
from converter.checkpoint.hf_config import ties
from converter.checkpoint.opening import read_checkpoint
from converter.checkpoint.reader import TorchReader, plain_cfg
from converter.checkpoint.source import LEDGER, Source
from converter.choices import place
from converter.dtypes import NAMES
from converter.errors import (
    BadInput,
    ConfigError,
    MissingTensor,
    SourceNotFound,
    TensorMismatch,
    UnknownTensor,
    UsageError,
)
from converter.layout import EMBEDDING, GPT_NEO, HEAD, LAYOUTS
from converter.strict_json import Json

if TYPE_CHECKING:
    import torch

_INSIDE = "_original_component."
"""In the names of a model that a bridge has wrapped, module by module."""
_WRAPPED = ("_orig_mod", "module")
"""Where torch.compile and the parallel wrappers keep the model they wrap."""


def open_model(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    config: Any = None,
    *,
    ledger: str | Path | None = None,
    tokenizer: Any = None,
) -> Checkpoint:
    """A live model, or a state dict with its config, as a checkpoint. Nothing is changed or copied.

    Args:
        model: a GPTNeoForCausalLM, a HookedTransformer, a TransformerBridge (raw, or after
            enable_compatibility_mode), on any device; or a state dict in any of their layouts.
        config: of a state dict, which needs one: a GPTNeoConfig, a HookedTransformerConfig, or
            either as a dict. With a HookedTransformer: the HF config it was once made from, whose
            further fields (token ids, dropout) then come back.
        ledger: the directory that these weights were loaded from, if it holds the ledger of their
            processing: it brings the original basis back, and what was not edited as it was.
        tokenizer: written beside the weights where a conversion goes to disk, and given to the
            TransformerLens models that are built. None: the model's own, which is given to those,
            but not written: TransformerLens has made it prepend a token.

    Raises:
        UsageError: a state dict without its config. SourceNotFound: no such ledger.
        ConfigError: a config that is none; or it is not the weights'.
        MissingTensor: weights on the meta device, which are not there.
        BadInput: neither a model nor a state dict, or one that is not GPT-Neo; see also
            `open_checkpoint`.
    """
    hf: Json | None = None
    tl: Json | None = None
    generation: Json | None = None
    if isinstance(model, Mapping):
        name, state = "state dict", dict(model)
        if config is None:
            raise UsageError(
                "A state dict does not say what its heads, window and layers are.",
                where="open_model(state_dict)",
                do="Give its config too: converter.open_model(state_dict, config).",
            )
        hf, tl = _config(config)
    else:
        live = _unwrapped(model)
        name = type(live).__name__
        if _is_a(live, "transformer_lens", "HookedTransformer"):
            state, tl = live.state_dict(), plain_cfg(live.cfg.to_dict())
            hf = _config(config)[0] if config is not None else None
        elif _is_a(live, "transformer_lens", "TransformerBridge"):
            # Not bridge.cfg: it says that GPT-Neo scales its scores and sees everything.
            state, hf = live.state_dict(), _hf_of(live.original_model)
        else:
            state, hf = live.state_dict(), _hf_of(live)
            if getattr(live, "generation_config", None) is not None:
                generation = json.loads(live.generation_config.to_json_string())
    where = Path(f"{name} in memory")
    _require_there(state, where)
    if hf is not None and tl is None:
        _tie(state, hf)
    source = Source(
        given=str(where),
        path=where,
        readers=(TorchReader(state, where),),
        hf_config=hf,
        tl_config=tl,
        generation_config=generation,
        provenance=None,
        config_path=Path(f"the config of the {name}"),
        live=True,
        ledger_of=_with_ledger(ledger),
        tokenizer=getattr(model, "tokenizer", None) if tokenizer is None else tokenizer,
        tokenizer_is_own=tokenizer is not None,
    )
    try:
        found = read_checkpoint(source)
    except (MissingTensor, UnknownTensor) as error:
        if not any(_INSIDE in tensor for tensor in state):
            raise
        raise BadInput(
            "These are the weights of a model inside a TransformerBridge, which renames them.",
            where=error.where,
            do="Give the bridge itself, or its own state_dict().",
        ) from error
    # After `model.half()` the config still states the old dtype.
    config = (hf if tl is None else tl) or {}
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = NAMES[found.dtype]
    return found


def _with_ledger(given: str | Path | None) -> Path | None:
    if given is None:
        return None
    directory = place(given, "--ledger", "Name the directory that holds it.")
    if not (directory / LEDGER).is_file():
        raise SourceNotFound(
            f"There is no {LEDGER}.",
            where=str(directory),
            do="Name the directory that the processed weights were written to, with --ledger"
            " compact or exact; or leave ledger out: the function comes back without it.",
        )
    return directory


def _is_a(value: Any, package: str, name: str) -> bool:
    """Whether it is an instance of a class of this name there, without importing the package."""
    return any(
        kind.__name__ == name and kind.__module__.split(".")[0] == package
        for kind in type(value).__mro__
    )


def _unwrapped(model: Any) -> Any:
    seen = model
    while True:
        if _is_a(seen, "peft", "PeftModel"):
            raise BadInput(
                "The model is wrapped in a PEFT adapter, whose weights are not merged.",
                where=type(seen).__name__,
                do="Merge a copy of it: copy.deepcopy(model).merge_and_unload().",
            )
        if (
            _is_a(seen, "transformers", "PreTrainedModel")
            or _is_a(seen, "transformer_lens", "HookedTransformer")
            or _is_a(seen, "transformer_lens", "TransformerBridge")
        ):
            return seen
        inner = next((getattr(seen, name) for name in _WRAPPED if hasattr(seen, name)), None)
        if inner is None:
            raise BadInput(
                f"What is given, of type {type(model).__name__}, is no model that neoconvert knows.",
                where=type(model).__module__,
                do="Give a GPTNeoForCausalLM, a HookedTransformer or a TransformerBridge; or a"
                " state dict with its config, to converter.open_model.",
            )
        seen = inner


def _config(config: Any) -> tuple[Json | None, Json | None]:
    """A config in whatever form, as (HF's, None) or (None, TransformerLens's)."""
    if hasattr(config, "to_diff_dict"):
        return _of_transformers(config), None
    fields = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(fields, Mapping):
        raise ConfigError(
            f"What is given, of type {type(config).__name__}, is no config.",
            where="open_model(state_dict, config)",
            do="Give a GPTNeoConfig, a HookedTransformerConfig, or either as a dict.",
        )
    found = plain_cfg(dict(fields))
    return (found, None) if "model_type" in found else (None, found)


def _hf_of(model: Any) -> Json:
    """A live model's config, as `save_pretrained` writes it."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        raise BadInput(
            "The model around these weights is not of Hugging Face's transformers.",
            where=type(model).__name__,
            do="neoconvert takes bridges of Hugging Face GPT-Neo models (boot_transformers).",
        )
    return _of_transformers(config) | {"architectures": [type(model).__name__]}


def _of_transformers(config: Any) -> Json:
    """What `config.save_pretrained` would write. A bridge's may hold what JSON cannot."""
    return plain_cfg(config.to_diff_dict())


def _require_there(state: Mapping[str, Any], place: Path) -> None:
    """Plain tensors, with values."""
    import torch

    for name, tensor in state.items():
        where = f"{place}: {name}"
        if not isinstance(tensor, torch.Tensor):
            raise BadInput(
                f"{name} is a {type(tensor).__name__}, not a tensor.",
                where=where,
                do="Give the state dict itself: a mapping from names to torch tensors.",
            )
        if tensor.is_meta:
            raise MissingTensor(
                f"{name} is on the meta device: it has a shape and no values.",
                where=where,
                do="Load the model whole, without init_empty_weights or offloading to disk.",
            )
        if tensor.layout is not torch.strided or type(tensor) not in (
            torch.Tensor,
            torch.nn.Parameter,
        ):
            raise TensorMismatch(
                f"{name} is a {type(tensor).__name__} ({tensor.layout}), not a plain tensor.",
                where=where,
                do="Gather sharded and unpack quantised or sparse weights first.",
            )


def _tie(state: dict[str, Any], hf: Json) -> None:
    """The config says of the head what is true of the weights. A shared head is left out of HF's
    state dict, as it is of HF's files."""
    import torch

    for layout in LAYOUTS:
        embedding, head = (GPT_NEO.name(key, layout) for key in (EMBEDDING, HEAD))
        if LAYOUTS[layout].by_head or embedding not in state or head not in state:
            continue
        a, b = state[embedding], state[head]
        shared = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.device == b.device
        hf["tie_word_embeddings"] = shared or (
            ties(hf) and a.shape == b.shape and torch.equal(a, b.to(a.device))
        )
        if shared and LAYOUTS[layout].ties:
            del state[head]
