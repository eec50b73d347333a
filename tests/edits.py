"""A processed artifact, edited in its file and brought back: does it compute what was edited?

Everything goes through files. The judge is our float64 reference on both files, and the limit is what
storing both costs: their weights moved at random by up to half a unit in the last place.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import converter
from converter.checkpoint import Checkpoint, open_checkpoint
from converter.dtypes import CODES, cast
from converter.errors import NotRepresentable
from converter.processing import STEPS
from converter.verification.judge import pooled_floor
from converter.verification.measuring import measure
from converter.verification.probes import Probe
from converter.verification.reference import forward
from converter.verification.route_link import Moved
from tests.models import TINY, random_hf

SUBSETS = tuple(
    ",".join(step.name for bit, step in enumerate(STEPS) if number >> bit & 1)
    for number in range(1, 2 ** len(STEPS))
)
MODELS = ("plain", "untied", "zero gain", "zero gains", "tiny gain", "dead head", "low rank")
EDITS = ("noise", "large", "zero", "element", "row")
MAX_RATIO = 8.0
_TOKENS = np.random.default_rng(5).integers(0, TINY["vocab_size"], (2, 24))
_PROBE = Probe("24 tokens, window 5", _TOKENS)


@dataclass(frozen=True)
class Edit:
    """One trial; its fields say everything."""

    model: str = "plain"
    seed: int = 0
    dtype: str = "float32"
    layout: Literal["hooked", "bridge", "baked"] = "hooked"
    steps: str = SUBSETS[-1]
    ledger: str = "compact"
    stored: str | None = None
    """Dtype of the processed file; None: the original's."""
    tensor: int | None = 0
    """Which of the stored tensors is edited, modulo their number; None: all."""
    kind: str = "noise"


def edits(layout: Literal["hooked", "bridge", "baked"]) -> st.SearchStrategy[Edit]:
    dtypes = ("float32", "float32", "float16", "bfloat16")
    return st.builds(
        Edit,
        model=st.sampled_from(MODELS),
        seed=st.integers(0, 99),
        dtype=st.sampled_from(dtypes),
        layout=st.just(layout),
        steps=st.sampled_from(SUBSETS),
        ledger=st.sampled_from(("compact", "exact")),
        stored=st.sampled_from((None, *dtypes)),
        tensor=st.none() | st.integers(0, 99),
        kind=st.sampled_from(EDITS),
    )


def drawn(seed: int) -> Edit:
    """The trial of this seed."""
    rng = random.Random(seed)
    dtypes = ("float32", "float32", "float16", "bfloat16")
    return Edit(
        model=rng.choice(MODELS),
        seed=rng.randrange(2**31),
        dtype=rng.choice(dtypes),
        layout=rng.choice(("hooked", "bridge", "baked")),
        steps=rng.choice(SUBSETS),
        ledger=rng.choice(("compact", "exact")),
        stored=rng.choice((None, *dtypes)),
        tensor=None if rng.random() < 0.2 else rng.randrange(100),
        kind=rng.choice(EDITS),
    )


@dataclass(frozen=True)
class Outcome:
    """What came of a trial."""

    names: tuple[str, ...]
    """The tensors edited."""
    ratio: float
    """How many times what storing costs the result is off; 0 where it was refused."""
    effect: float
    """How many times that the edit itself changed the function."""
    moved: tuple[str, ...]
    """HF tensors that no edit touched, and that an exact ledger did not give back bit for bit."""
    refused: str | None = None


def run(trial: Edit, root: Path) -> Outcome:
    """Process, edit one tensor (or all), bring back, compare."""
    original = _model(trial, root / "hf")
    processed, edited, back = root / "processed", root / "edited", root / "back"
    options: dict[str, Any] = {"process": trial.steps, "ledger": trial.ledger, "check": False}
    options["dtype"] = trial.stored
    try:
        if trial.layout == "baked":
            converter.bake(original, processed, **options)
        else:
            converter.hf_to_tl(original, processed, layout=trial.layout, **options)
    except NotRepresentable as error:
        return Outcome((), 0.0, 0.0, (), error.what)
    shutil.copytree(processed, edited)
    names = edit_file(edited / "model.safetensors", trial)
    try:
        converter.tl_to_hf(edited, back, check=False)
    except NotRepresentable as error:  # float16 ends at 65504
        return Outcome(names, 0.0, 0.0, (), error.what)
    before, after, result = (open_checkpoint(path) for path in (processed, edited, back))
    true = forward(after, [_PROBE], dtype=torch.float64)
    jittered: list[Checkpoint | Moved] = [
        Moved(one, None, 10 * trial.seed + draw) for one in (after, result) for draw in range(3)
    ]
    runs = [forward(one, [_PROBE], dtype=torch.float64) for one in (*jittered, result, before)]
    *noise, found, effect = measure(true, 0, [partial(one.at, 0) for one in runs])
    floor = pooled_floor(noise)
    return Outcome(
        names,
        found.ratio(floor),
        effect.ratio(floor),
        _moved(trial, original, result, before, names),
    )


def edit_file(path: Path, trial: Edit) -> tuple[str, ...]:
    """Change the file's tensors; returns the names of those that are other than they were."""
    tensors = load_file(path)
    names = sorted(tensors)
    chosen = names if trial.tensor is None else [names[trial.tensor % len(names)]]
    rng = np.random.default_rng([trial.seed, 17])
    changed = []
    for name in chosen:
        old = tensors[name]
        wide = old.astype(np.float64)
        size = float(np.abs(wide).mean()) or 0.1
        if trial.kind == "zero":
            wide = np.zeros_like(wide)
        elif trial.kind == "element":
            wide.reshape(-1)[rng.integers(wide.size)] += 3 * size
        elif trial.kind == "row":
            wide[rng.integers(len(wide))] += size
        else:
            scale = {"noise": 0.05, "large": 1.0}[trial.kind]
            wide = wide + scale * size * rng.standard_normal(wide.shape)
        code = next(code for code, dtype in CODES.items() if dtype == old.dtype)
        tensors[name] = cast(wide, code)
        if tensors[name].tobytes() != old.tobytes():
            changed.append(name)
    save_file(tensors, path, metadata={"format": "pt"})
    return tuple(changed)


def _model(trial: Edit, path: Path) -> Path:
    random_hf(
        path, seed=trial.seed, tied=trial.model != "untied", dtype=trial.dtype, gain_decades=0.4
    )
    file = path / "model.safetensors"
    tensors = load_file(file)
    first, block = "transformer.h.1.", "transformer.h.1.attn.attention."
    norms = [name for name in tensors if "ln_" in name and name.endswith("weight")]
    if trial.model in ("zero gain", "zero gains"):
        for name in norms:
            tensors[name][: 1 if trial.model == "zero gain" else 3] = 0
    elif trial.model == "tiny gain":
        for name in norms:
            tensors[name][2] = 3e-4
    elif trial.model == "dead head":
        for part in "qkv":
            tensors[f"{block}{part}_proj.weight"][4:8] = 0
    elif trial.model == "low rank":
        tensors[f"{block}k_proj.weight"][5:8] = 0
        tensors[f"{block}v_proj.weight"][0] = 0
        tensors[f"{first}mlp.c_fc.weight"][3] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def _moved(
    trial: Edit, original: Path, result: Checkpoint, processed: Checkpoint, names: tuple[str, ...]
) -> tuple[str, ...]:
    """An edit stays in its unit: every other unit is the original's, bit for bit."""
    if trial.ledger != "exact" or trial.tensor is None:
        return ()
    touched = {slot.prefix for slot in processed.slots.values() if slot.name in names}
    if processed.headless and "embed." in touched:
        touched.add("final.")
    start = open_checkpoint(original)
    return tuple(
        key
        for key, slot in start.slots.items()
        if slot.prefix not in touched
        and slot.name
        and start.tensor(key).tobytes() != result.tensor(key).tobytes()
    )
