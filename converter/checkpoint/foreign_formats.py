"""What other programs call their files, and how these begin: what each is, and what to do."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from converter.checkpoint.recipes import python_command, quoted

Advice = tuple[str, str]
"""What it is, and what to do."""

_AS_SAVED = "Give the checkpoint that it was made from, as transformers saves it."
_AGAIN = "Download it again; the hub may ask you to log in first (hf auth login)."
UNPACK = "Unpack it, and give the directory that comes out."

_BEGINNINGS: dict[bytes, Advice] = {
    b"<!doctype html": ("The file is a web page, not weights.", _AGAIN),
    b"<html": ("The file is a web page, not weights.", _AGAIN),
    b"gguf": ("The file is GGUF, which llama.cpp runs and neoconvert does not read.", _AS_SAVED),
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg"), ("The file is ggml's, which llama.cpp ran and neoconvert does not read.", _AS_SAVED)),
    b"\x89hdf": ("The file is HDF5: TensorFlow's weights; transformers has no GPT-Neo in TensorFlow.", _AS_SAVED),
    **dict.fromkeys((b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"(\xb5/\xfd", b"7z\xbc\xaf"), ("The file is a compressed archive.", UNPACK)),
}  # fmt: skip


def by_beginning(head: bytes) -> Advice | None:
    """What the first bytes of a file say it is, in any case of their letters."""
    if head[257:262] == b"ustar":
        return "The file is a tar archive.", UNPACK
    start = head.lstrip().lower()
    return next((found for begins, found in _BEGINNINGS.items() if start.startswith(begins)), None)


_NAMES: dict[str, Advice] = {
    r"tf_model.*|.*\.(h5|keras)": ("The weights are TensorFlow's ({name}); transformers has no GPT-Neo in TensorFlow.", _AS_SAVED),
    r"saved_model\.pb|group\d+-shard\d+of\d+\.bin|.*\.tflite": ("The weights are TensorFlow's ({name}), which neoconvert does not read.", _AS_SAVED),
    r"openvino_.*\.(xml|bin)": ("The weights are OpenVINO's ({name}), which neoconvert does not read.", _AS_SAVED),
    r"_CHECKPOINT_METADATA|manifest\.ocdbt": ("The weights are JAX's (orbax), which neoconvert does not read.", _AS_SAVED),
    r"ggml-.*\.bin|.*\.(gguf|ot|mlmodel|mlpackage|nemo|pdparams|engine|plan|pt2|pte|ptl|mar)": ("The weights are in {name}, a format that neoconvert does not read.", _AS_SAVED),
    r".*\.(zip|tar|tgz|gz|bz2|xz|zst|7z|rar)": ("The weights are in an archive, {name}.", UNPACK),
    r".*\.dvc": ("The weights are not here: {name} says where DVC keeps them.", "Run dvc pull there first."),
}  # fmt: skip


def by_name(path: Path) -> Advice | None:
    """What a file's name says it is; the directory that it is in has the others of its kind."""
    name, directory = path.name, path.parent
    if re.fullmatch(r"flax_model.*|.*\.msgpack", name):
        return f"The weights are Flax's ({name}).", from_flax(directory)
    if re.fullmatch(r".*ckpt.*\.(index|meta|data-\d+-of-\d+)", name):
        stem = re.sub(r"\.(index|meta|data-[\d-]+of-\d+)$", "", name)
        return (
            "The weights are a TensorFlow checkpoint (Mesh TensorFlow, as GPT-Neo was trained in).",
            "With transformers 4.40 and TensorFlow installed: python -m transformers.models.gpt_neo."
            f"convert_gpt_neo_mesh_tf_to_pytorch --tf_checkpoint_path {quoted(directory / stem)}"
            " --config_file CONFIG --pytorch_dump_path OUT, with the config.json that it was trained"
            " with; then convert OUT.",
        )
    if name.endswith(".npz"):
        code = f"import numpy, safetensors.numpy as s; s.save_file(dict(numpy.load({str(path)!r})), 'model.safetensors')"
        return (
            f"The weights are NumPy's arrays ({name}).",
            f"If they have the names of transformers: {python_command(code)}; then convert"
            " model.safetensors with --cfg config.json.",
        )
    for pattern, (what, do) in _NAMES.items():
        if re.fullmatch(pattern, name):
            return what.format(name=name), do
    return None


def from_flax(directory: Path) -> str:
    """What to do with a directory of Flax weights. transformers 5 has no Flax; from 4.57 on,
    `from_pretrained(…, from_flax=True)` fails."""
    code = (
        "from transformers import FlaxGPTNeoForCausalLM as F, GPTNeoForCausalLM as M;"
        " from transformers.modeling_flax_pytorch_utils import load_flax_weights_in_pytorch_model as load;"
        f" f = F.from_pretrained({str(directory)!r}); m = M(f.config); load(m, f.params);"
        " m.save_pretrained('OUT')"
    )
    return f'With "transformers<5" and flax installed: python -c {shlex.quote(code)}; then convert OUT.'
