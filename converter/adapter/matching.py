"""An adapter's tensors, by name, to the weights of the base that they change. All must be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from converter.adapter.changes import Change, LowRank, Read, Replacement, Shift
from converter.adapter.files import Adapter
from converter.checkpoint.checkpoint import Checkpoint
from converter.dtypes import same_bits
from converter.errors import MissingTensor, NotRepresentable, TensorMismatch, UnknownTensor
from converter.layout import EMBEDDING, HEAD, Slot, expand

PREFIX = "base_model.model."
_EMBEDDINGS = ("transformer.wte", "transformer.wpe")
_PARTS = {
    # Ends of the names that peft gives -> the part; longer ends before the shorter.
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "B bias",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    # With bias="all", or where the vocabulary grew, peft writes what it saved of a whole module
    # twice, and what that replaced.
    ".modules_to_save.weight": "weight again",
    ".original_module.weight": "weight before",
    ".modules_to_save.bias": "bias again",
    ".original_module.bias": "bias before",
    ".base_layer.weight": "weight",
    ".base_layer.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}


@dataclass
class Module:
    """What an adapter has for one module of the base."""

    name: str
    weight: Slot
    bias: Slot | None
    parts: dict[str, str] = field(default_factory=dict)
    """Part -> name of the adapter's tensor."""

    def takes(self, end: str, part: str) -> bool:
        """Whether peft gives such a module such a tensor."""
        if part.startswith("weight"):
            return True
        if part.startswith("bias"):
            return self.bias is not None
        factor = end.startswith((".lora_A", ".lora_B", ".lora_embedding"))
        kind = not factor or ("embedding" in end) is (self.name in _EMBEDDINGS)
        return len(self.weight.shape) == 2 and kind

    @property
    def updated(self) -> bool:
        return "A" in self.parts or "B" in self.parts


def changes_of(adapter: Adapter, base: Checkpoint) -> dict[str, list[Change]]:
    """What becomes of the base's weights, by `hooked` name.

    Where embedding and head are one matrix, a change of one of them is that one's alone, as in the
    model that the adapter was trained in; but what peft saved of the base itself is both's.

    Raises:
        UnknownTensor: a tensor of the adapter has no place in the base.
        MissingTensor: half of an update, or a module that the config names, is missing.
        TensorMismatch: shapes that are not the base's or the config's.
        NotRepresentable: a change that GPT-Neo has no tensor for.
    """
    modules = _sorted_out(adapter, base)
    _require_all_there(adapter, modules)
    found: dict[str, list[Change]] = {}
    for module in modules.values():
        weight, bias = _weight_changes(adapter, module), _bias_changes(adapter, module)
        if weight:
            found[module.weight.key] = weight
        if bias and module.bias is not None:
            found[module.bias.key] = bias
    if base.tied:
        _share(adapter, modules, found)
    return found


def _sorted_out(adapter: Adapter, base: Checkpoint) -> dict[str, Module]:
    """Every module of the base that has a weight, with the adapter's tensors for it."""
    slots = {s.name: s for s in expand("hf", base.config.sizes, base.config.n_layers).values()}
    modules = {
        name.removesuffix(".weight"): Module(
            name.removesuffix(".weight"), slot, slots.get(name.removesuffix("weight") + "bias")
        )
        for name, slot in slots.items()
        if name is not None and name.endswith(".weight")
    }
    for name in (*adapter.reader.tensors, *adapter.reader.other):
        module, part = _place(name, modules)
        if module is None or name in adapter.reader.other or part in module.parts:
            raise UnknownTensor(
                f"The adapter's tensor {name} has no place in this base"
                f" ({base.config.n_layers} layers, GPT-Neo with a language-model head).",
                where=str(adapter.directory),
                do="Give the base that the adapter was trained on"
                + (f": {adapter.settings.base}." if adapter.settings.base else "."),
            )
        module.parts[part] = name
    for module in modules.values():
        for part in ("weight", "bias"):
            again = module.parts.get(f"{part} again")
            if again and not _same(adapter, again, module.parts.get(part)):
                raise TensorMismatch(
                    f"The adapter has two {part} tensors for {module.name}, which differ.",
                    where=f"{adapter.file}: {again}",
                    do="Save the adapter again with peft's save_pretrained.",
                )
    return modules


def _same(adapter: Adapter, one: str, other: str | None) -> bool:
    return other is not None and same_bits(adapter.reader.read(one), adapter.reader.read(other))


def _place(name: str, modules: Mapping[str, Module]) -> tuple[Module | None, str]:
    """The module that a tensor of the adapter belongs to, and as what."""
    local = name.removeprefix(PREFIX)
    if local == name:
        return None, ""
    for end, part in _PARTS.items():
        stem = local.removesuffix(end)
        # Trained on a GPTNeoModel, the names lack its prefix.
        module = modules.get(stem) or modules.get(f"transformer.{stem}")
        if stem != local and module is not None and module.takes(end, part):
            return module, part
    return None, ""


def _require_all_there(adapter: Adapter, modules: Mapping[str, Module]) -> None:
    settings = adapter.settings
    for module in modules.values():
        whole = settings.is_saved(module.name)
        target = settings.is_target(module.name) and len(module.weight.shape) == 2 and not whole
        wanted = {"A", "B"} if target or module.updated or "magnitude" in module.parts else set()
        if settings.dora and wanted:
            wanted.add("magnitude")
        if settings.lora_bias and wanted:
            wanted.add("B bias")
        if whole:
            wanted |= {"weight", "bias"} if module.bias else {"weight"}
        elif module.updated and settings.targets and not target:  # peft would not read them
            raise UnknownTensor(
                f"The adapter changes {module.name}, which its config does not name"
                f" (target_modules: {', '.join(settings.targets)}).",
                where=str(adapter.directory),
                do="Config and weights are of different adapters; get both again.",
            )
        missing = sorted(wanted - set(module.parts))
        if missing:
            raise MissingTensor(
                f"The adapter has no {' and no '.join(missing)} for {module.name}, which its config says it changes.",
                where=str(adapter.file),
                do="The adapter is incomplete: save or download it again.",
            )
        stray = "magnitude" if "magnitude" in module.parts and not settings.dora else None
        if "B bias" in module.parts and not settings.lora_bias:
            stray = "B bias"
        if stray:
            raise UnknownTensor(
                f"The adapter's tensor {module.parts[stray]} has no place: its config does not say"
                f" {'use_dora' if stray == 'magnitude' else 'lora_bias'}.",
                where=str(adapter.directory),
                do="Config and weights are of different adapters; get both again.",
            )


def _weight_changes(adapter: Adapter, module: Module) -> list[Change]:
    found: list[Change] = []
    rows_columns = module.weight.shape
    if name := module.parts.get("weight"):
        found.append(Replacement(_reader(adapter, name, rows_columns, module)))
    if not module.updated:
        return found
    rank, (rows, columns) = adapter.settings.rank_of(module.name), rows_columns
    embedding = module.name in _EMBEDDINGS
    a_shape = (rank, rows if embedding else columns)
    b_shape = (columns if embedding else rows, rank)
    a = _reader(adapter, module.parts["A"], a_shape, module)
    b = _reader(adapter, module.parts["B"], b_shape, module)
    magnitude = None
    if adapter.settings.dora:
        shape = (columns if embedding else rows,)
        magnitude = _reader(adapter, module.parts["magnitude"], shape, module)
    left, right = ((lambda: a().T), (lambda: b().T)) if embedding else (b, a)
    scale = adapter.settings.scale_of(module.name)
    found.append(LowRank(left, right, scale, magnitude, along=0 if embedding else 1))
    return found


def _bias_changes(adapter: Adapter, module: Module) -> list[Change]:
    found: list[Change] = []
    if (name := module.parts.get("bias")) and module.bias is not None:
        found.append(Replacement(_reader(adapter, name, module.bias.shape, module)))
    if name := module.parts.get("B bias"):
        if module.bias is None:
            raise NotRepresentable(
                f"The adapter's lora_bias adds a bias to {module.name}, and GPT-Neo has none there.",
                where=f"{adapter.file}: {name}",
                do="Train it without lora_bias, or without this module; peft cannot merge it either.",
            )
        scale = adapter.settings.scale_of(module.name)
        found.append(Shift(_reader(adapter, name, module.bias.shape, module), scale))
    return found


def _reader(adapter: Adapter, name: str, shape: tuple[int, ...], module: Module) -> Read:
    found = adapter.reader.tensors[name].shape
    if found != shape:
        raise TensorMismatch(
            f"The adapter's tensor {name} has shape {list(found)}; for {module.name}"
            f" {list(module.weight.shape)} and rank {adapter.settings.rank_of(module.name)} it is"
            f" {list(shape)}.",
            where=str(adapter.file),
            do="Give the base that the adapter was trained on, and the config that belongs to it."
            + _resized(module, found, shape),
        )
    return partial(adapter.read, name)


def _resized(module: Module, found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    vocabulary = module.name in ("transformer.wte", "lm_head") and found[1:] == shape[1:]
    if not vocabulary:
        return ""
    return (
        f" Was the vocabulary enlarged? Then resize the base first: model.resize_token_embeddings({found[0]})"
        " and model.save_pretrained(DIR)."
    )


def _share(adapter: Adapter, modules: Mapping[str, Module], found: dict[str, list[Change]]) -> None:
    """The tied matrix, as peft saved it of the base, becomes that of embedding and head."""
    ends = {EMBEDDING: modules["transformer.wte"], HEAD: modules["lm_head"]}
    if adapter.settings.ties and any(module.updated for module in ends.values()):
        raise NotRepresentable(
            "ensure_weight_tying with an update of the tied embedding: peft computes one thing"
            " before merging and another after.",
            where=f"{adapter.directory}: ensure_weight_tying",
            do="Train it without ensure_weight_tying, or without an update of the embedding.",
        )
    saved = {
        key: module.parts["weight"]
        for key, module in ends.items()
        if "weight" in module.parts and not adapter.settings.is_saved(module.name)
    }
    if len(saved) == 2:
        if not _same(adapter, *saved.values()):
            raise TensorMismatch(
                "The adapter holds two different matrices for the base's one embedding and head.",
                where=f"{adapter.file}: {', '.join(saved.values())}",
                do="Save the base untied (tie_word_embeddings false, with lm_head.weight), or save the adapter again.",
            )
    elif len(saved) == 1:
        ((key, name),) = saved.items()
        other = HEAD if key == EMBEDDING else EMBEDDING
        if not adapter.settings.is_saved(ends[other].name):
            shape = ends[other].weight.shape
            whole = Replacement(_reader(adapter, name, shape, ends[other]))
            found[other] = [whole, *found.get(other, [])]
