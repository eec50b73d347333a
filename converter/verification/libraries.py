"""A checkpoint as a model of transformers, and what every library needs of one.

From local files, or from memory. Files are read by the libraries themselves (transformers,
safetensors.torch), not by our reader, so that the two check one another.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from converter.checkpoint import Checkpoint
from converter.checkpoint.hf_config import to_hf
from converter.checkpoint.reader import as_torch
from converter.checkpoint.source import TOKENIZER_FILES
from converter.dtypes import NAMES
from converter.errors import TensorMismatch
from converter.verification.loading import installed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from converter.adapter import Merged

    State = dict[str, Tensor]


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
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoForCausalLM

    if checkpoint.merged is not None and state is None and installed("peft"):
        return _with_peft(checkpoint.merged, device, dtype)
    kind: Any = AutoModelForCausalLM
    place: dict[str, Any] = {"pretrained_model_name_or_path": checkpoint.source.path}
    if not (checkpoint.as_saved and checkpoint.source.hf_config):
        kind, state = GPTNeoForCausalLM, state_dict(checkpoint) if state is None else state
        place = {"pretrained_model_name_or_path": None, "state_dict": state}
        place["config"] = hf_config(checkpoint)
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
    require_all(missing - tied, unexpected - ignored, "transformers", checkpoint)
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


def hf_config(checkpoint: Checkpoint) -> Any:
    """A GPTNeoConfig that says what these weights are."""
    from transformers import GPTNeoConfig

    base, name = checkpoint.original_hf_config, NAMES[checkpoint.dtype]
    return GPTNeoConfig(**to_hf(checkpoint.config, base, tied=checkpoint.tied, dtype=name))


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


def local_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer in the checkpoint's directory, or the one given with a model; or None.
    transformers makes up a one-token GPT-2 tokenizer for a directory that has none."""
    from transformers import AutoTokenizer

    source = checkpoint.source
    if source.live:
        return source.tokenizer
    if not source.is_directory or not any((source.path / n).is_file() for n in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(source.path, local_files_only=True)


def require_all(
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
