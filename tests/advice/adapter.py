"""converter/adapter: an adapter that is missing, incomplete, or no LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import converter
from tests.advice.making import PREFIX, Q, changed, convert, edited, hf, lora, tl
from tests.advice.row import Asked, Row, again, command, instead, plus, run

FILE, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"
WTE = f"{PREFIX}transformer.wte"
ASKED = convert("--adapter", "adapter")


def ask(change: Callable[[], object], request: list[str] = ASKED) -> Callable[[], list[str]]:
    def make() -> list[str]:
        hf()
        lora()
        change()
        return request

    return make


def config(**fields: Any) -> Callable[[], list[str]]:
    return ask(lambda: changed(CONFIG, **fields))


def tensors(
    change: Callable[[dict[str, np.ndarray]], object], **fields: Any
) -> Callable[[], list[str]]:
    def damage() -> None:
        changed(CONFIG, **fields)
        edited(FILE, change)

    return ask(damage)


def _pickled() -> None:
    torch.save(load_file(FILE), "adapter/adapter_model.bin")
    Path(FILE).unlink()


def _inside() -> None:
    Path("adapter").rename("run")
    Path("adapter").mkdir()
    Path("run").rename("adapter/checkpoint 7")


def _by_peft(do: str, _: Asked) -> Asked:
    """peft merges as the command says; its directory converts."""
    command()(do, [])
    return convert(source="merged")


def _by_peft_anew(do: str, asked: Asked) -> Asked:
    """An initialisation that only peft knows: the command, of an adapter that peft itself wrote."""
    from tests.adapter.making import Recipe
    from tests.adapter.making import write as written

    written(Path("p"), Recipe({"target_modules": ["q_proj"]}))
    Path("p/base").rename("p/m")
    return _by_peft(do.replace("'adapter'", "'p/adapter'").replace("'m'", "'p/m'"), asked)


def _ia3() -> list[str]:
    from peft import IA3Config, get_peft_model
    from transformers import GPTNeoForCausalLM

    hf()
    made: Any = get_peft_model(
        GPTNeoForCausalLM.from_pretrained("m"),
        IA3Config(
            target_modules=["q_proj", "c_fc"], feedforward_modules=["c_fc"], task_type="CAUSAL_LM"
        ),
    )
    made.save_pretrained("adapter")
    return ASKED


def _graph() -> list[str]:
    hf()
    lora()
    run(["export-onnx", "m", "--no-verify"])
    return ["verify", "m/model.onnx", "m", "--adapter", "adapter", "--effort", "quick"]


def _of_the_checkpoint(*_: object) -> Asked:
    """Both read with the adapter, since `verify` adapts ORIGINAL alone."""
    run(convert("--adapter", "adapter", out="merged"))
    return ["verify", "m", "merged", "--check", "weights", "--adapter", "adapter"]


def _twice() -> Asked:
    hf()
    lora()
    return lambda: converter.with_adapter(converter.with_adapter(converter.open_checkpoint("m"), "adapter"), "adapter")  # fmt: skip


def _one_then_the_other(do: str, _: Asked) -> Asked:
    first = do.partition("(")[2].partition(")")[0].split()
    names = {"BASE": "m", "DIR": "merged", "FIRST": "adapter"}
    run([names.get(word, word) for word in first[1:]])
    return lambda: converter.with_adapter(converter.open_checkpoint("merged"), "adapter")


def _processed() -> list[str]:
    tl("tl", "--process", "default")
    lora()
    return ["tl-to-hf", "tl", "out", "--no-verify", "--adapter", "adapter"]


def _brought_back(do: str, asked: Asked) -> Asked:
    assert isinstance(asked, list)
    line = do.partition("(")[2].partition(")")[0].split()
    run([{"BASE": "tl", "DIR": "back"}.get(word, word) for word in line[1:]])
    return convert("--adapter", "adapter", source="back")


def _tied(*names: str, **fields: Any) -> Callable[[], list[str]]:
    def change(state: dict[str, np.ndarray]) -> None:
        for i, name in enumerate(names):
            state[PREFIX + name] = np.full((37, 16), i, np.float32)

    return tensors(change, **fields)


def _untied_base(do: str, asked: Asked) -> Asked:
    assert "tie_word_embeddings" in do
    assert "lm_head.weight" in do
    hf(tied=False)
    return asked


def _grown() -> list[str]:
    """Tokens were added before training; the adapter names the base as it was."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPTNeoForCausalLM

    hf()
    model: Any = GPTNeoForCausalLM.from_pretrained("m")
    model.resize_token_embeddings(41, mean_resizing=False)
    config = {"target_modules": ["q_proj"], "modules_to_save": ["wte", "lm_head"]}
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **config)).save_pretrained("adapter")  # fmt: skip
    return ASKED


def _resized(do: str, asked: Asked) -> Asked:
    from transformers import GPTNeoForCausalLM

    code = do.partition("resize the base first: ")[2].rstrip(".").replace(" and ", "; ")
    exec(code, {"model": GPTNeoForCausalLM.from_pretrained("m"), "DIR": "m"})
    return asked


SAVED = again(lambda: lora())  # what peft's save_pretrained writes, in the same place
FILES, MATCHING = "adapter/files.py", "adapter/matching.py"
MERGING, SETTINGS = "adapter/merging.py", "adapter/settings.py"

ROWS = [
    Row(FILES, "There is no such directory", ask(lambda: None, convert("--adapter", "nowhere")),
        instead("nowhere", "adapter"), "hf download"),
    Row(FILES, "The directory holds no", ask(_inside), instead("adapter"), "inside it"),
    Row(FILES, "The directory holds no", ask(lambda: Path(CONFIG).unlink()), SAVED),
    Row(FILES, "The adapter has a config and no", ask(lambda: Path(FILE).unlink()), SAVED),
    Row(FILES, "The adapter's file holds no weights", tensors(lambda t: t.clear()), SAVED),
    Row(FILES, "The adapter's weights are a pickle", ask(_pickled), plus("--allow-pickle")),
    Row(SETTINGS, ": expected ", config(r=0), SAVED),
    Row(SETTINGS, ": this is no adapter's config", config(peft_type=...), SAVED),
    Row(SETTINGS, ", which works beside the weights", config(peft_type="PREFIX_TUNING"), SAVED, "LoRA"),
    Row(SETTINGS, "; neoconvert merges LoRA", _ia3, _by_peft),
    Row(SETTINGS, "init_lora_weights ", config(init_lora_weights="pissa"), _by_peft_anew),
    Row(SETTINGS, " is set, which neoconvert does not merge", config(layer_replication=[[0, 1]]), _by_peft_anew),
    Row(MATCHING, " has no place in this base", tensors(lambda t: t.update({f"{PREFIX}transformer.h.9.attn.attention.q_proj.lora_A.weight": t[A]})),
        again(lambda: (hf(), lora())), ": m"),
    Row(MATCHING, "The adapter has two ", tensors(lambda t: t.update({f"{PREFIX}transformer.h.0.mlp.c_fc{end}.bias": np.full(24, i, np.float32) for i, end in enumerate(("", ".modules_to_save"))})), SAVED),
    Row(MATCHING, ", which its config does not name", config(target_modules=["c_fc"]), SAVED),
    Row(MATCHING, "The adapter has no ", tensors(lambda t: t.pop(A)), SAVED),
    Row(MATCHING, " has no place: its config does not say", tensors(lambda t: t.update({f"{PREFIX}{Q}.lora_magnitude_vector": np.ones(16, np.float32)})), SAVED),
    Row(MATCHING, "The adapter's lora_bias adds a bias", tensors(lambda t: t.update({f"{PREFIX}{Q}.lora_B.bias": np.ones(16, np.float32)}), lora_bias=True), SAVED, "without lora_bias"),
    Row(MATCHING, " has shape ", ask(lambda: hf(hidden_size=32)), again(lambda: hf()), "Give the base"),
    Row(MATCHING, " has shape ", _grown, _resized, "Was the vocabulary enlarged?"),
    Row(MATCHING, "ensure_weight_tying", tensors(lambda t: t.update({f"{WTE}.lora_embedding_A": np.ones((4, 37), np.float32), f"{WTE}.lora_embedding_B": np.ones((16, 4), np.float32)}), target_modules=[Q, "wte"], ensure_weight_tying=True), SAVED, "without ensure_weight_tying"),
    Row(MATCHING, "two different matrices", _tied("transformer.wte.weight", "lm_head.weight"), _untied_base),
    Row(MERGING, "An adapter is merged into a checkpoint's own", _graph, _of_the_checkpoint, "the graph was exported from"),
    Row(MERGING, "An adapter is merged into a checkpoint's own", _twice, _one_then_the_other),
    Row(MERGING, "The adapter was trained on other weights", _processed, _brought_back),
    Row(MERGING, "With the adapter, ", tensors(lambda t: t.update({A: np.full((4, 16), np.nan, np.float32)})), SAVED),
]  # fmt: skip
