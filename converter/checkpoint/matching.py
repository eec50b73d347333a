"""Which stored tensor is which weight: by the layout's table, for every tensor and every weight."""

from __future__ import annotations

from converter.checkpoint.checkpoint import Checkpoint
from converter.checkpoint.config import NeoConfig
from converter.checkpoint.fitting import mismatch
from converter.checkpoint.hf_config import ties
from converter.checkpoint.reader import Stored
from converter.checkpoint.source import Source
from converter.errors import MissingTensor, TensorMismatch, UnknownTensor
from converter.layout import EMBEDDING, GPT_NEO, HEAD, LAYOUTS, Layout, Slot

ZERO_BIAS = "zero; GPT-Neo has no such bias"
IGNORED_BIAS = "not zero, but GPT-Neo has no such bias: transformers ignores it too"


def match(slots: dict[str, Slot], found: dict[str, Stored], source: Source) -> dict[str, Stored]:
    by_name = {slot.name: slot for slot in slots.values() if slot.name is not None}
    unknown = sorted(set(found) - set(by_name))
    if unknown:
        raise UnknownTensor(
            f"{len(unknown)} tensor(s) have no place in this GPT-Neo model: {', '.join(unknown[:4])}.",
            where=f"{found[unknown[0]].file}: {unknown[0]} {list(found[unknown[0]].shape)}",
            do="Check that the config's number of layers is right, or remove what is not GPT-Neo's.",
        )
    for name, stored in found.items():
        if stored.shape != by_name[name].shape:
            raise mismatch(by_name[name], stored, source)
    return {by_name[name].key: stored for name, stored in found.items()}


def take_biases(
    layout: Layout,
    slots: dict[str, Slot],
    found: dict[str, Stored],
    config: NeoConfig,
    source: Source,
) -> dict[str, str]:
    """Take out the biases that GPT-Neo has no place for: their names, each with the reason."""
    taken: dict[str, str] = {}
    for name, key in GPT_NEO.no_biases(layout, config.n_layers).items():
        if name in found and found[name].shape == slots[key].shape:
            zero = not source.read(found.pop(name)).any()
            taken[name] = ZERO_BIAS if zero else IGNORED_BIAS
    return taken


def share_tied(layout: Layout, stored: dict[str, Stored], source: Source, notes: list[str]) -> None:
    """One tensor may be all that a file keeps of embedding and head where they are tied.

    safetensors.torch.save_model keeps one name of a shared tensor, and may keep the head's. HF and
    the bridge hold both in one orientation, so that the one tensor is the other.
    """
    head, embedding = stored.get(HEAD), stored.get(EMBEDDING)
    biased = any(key.endswith(".b_Q") for key in stored)  # processing unties
    if LAYOUTS[layout].by_head or not ties(source.hf_config) or biased:
        return
    if head is not None and embedding is None:
        notes.append(f"{head.name} is the embedding too: the file keeps one of the tied two")
    if head is not None and embedding in (None, head):
        stored[EMBEDDING] = stored.pop(HEAD)
    if not LAYOUTS[layout].ties and EMBEDDING in stored:  # its files always have both
        stored.setdefault(HEAD, stored[EMBEDDING])


def require_present(found: Checkpoint) -> None:
    """
    Raises:
        MissingTensor: a weight is not there that such a file has.
    """
    tied = LAYOUTS[found.layout].ties and ties(found.source.hf_config)
    missing = [
        str(slot.name)
        for key, slot in found.slots.items()
        if key not in found.stored
        and slot.in_file(folded=found.config.folded)
        and not (key == HEAD and tied)
    ]
    if missing:
        raise MissingTensor(
            f"{len(missing)} tensor(s) of the model are missing: {', '.join(missing[:4])}.",
            where=str(found.source.path),
            do="The checkpoint is incomplete, or its config is another model's."
            if missing != [found.slots[HEAD].name] or not LAYOUTS[found.layout].ties
            else "The config says tie_word_embeddings=false, so the head must be there; set it to true if it is tied.",
        )


def require_neutral_norms(found: Checkpoint) -> None:
    """Of a file whose LayerNorms are folded. TransformerLens 3.5 and later may leave identity norms
    in it; HookedTransformer ignores whatever is there.

    Raises:
        TensorMismatch: a LayerNorm would change something.
    """
    source = found.source
    for key, tensor in found.stored.items():
        norm, _, part = key.rpartition(".")
        if norm.split(".")[-1] not in GPT_NEO.norms:
            continue
        if (source.read(tensor) != (1.0 if part == "w" else 0.0)).any():
            raise TensorMismatch(
                f"normalization_type is LNPre, which has no LayerNorm weights, and {tensor.name} is"
                f" not {'one' if part == 'w' else 'zero'}: HookedTransformer ignores it.",
                where=f"{source.path}, with {source.config_path}",
                do='If these weights are not folded, the cfg must say "normalization_type": "LN"; if'
                " they are, save them without ln1, ln2 and ln_final.",
            )
