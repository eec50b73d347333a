"""Train the demo model, a GPT-Neo of a million parameters, on Python's standard library."""

import argparse
import math
import platform
import sys
import sysconfig
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Tokenizer, GPTNeoConfig, GPTNeoForCausalLM, set_seed

OUTPUT = Path(__file__).resolve().parent.parent / "converter" / "demo" / "model"
END = "<|endoftext|>"  # token 0: the one special token
VOCAB, CONTEXT, WINDOW, WIDTH, LAYERS, HEADS = 1280, 256, 8, 128, 4, 4
BATCH, PEAK_RATE, WARMUP, DECAY = 8, 2e-3, 0.04, 0.1
# Tests are left out, and folders of tables (code pages, topics of help) that teach no Python.
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings"}
SKIPPED |= {"turtledemo"}
PROMPTS = ["class Queue:\n    def __init__(self", "def read_file(path", '"""Support for']
PYTHON = platform.python_version()
LICENSE = f"""The weights and tokenizer are Copyright (c) 2026 the neoconvert authors, under
the MIT licence (https://opensource.org/license/mit). They are derived from the source text of
the standard library of Python {PYTHON}, made into a vocabulary and the weights of a language model.
That text is used under the PSF License Version 2, which is, with the notices of parts that have
other licences, at https://docs.python.org/3/license.html. The text's notice:

{sys.copyright}
"""


def read_library() -> tuple[list[str], list[str]]:
    """Return the texts to train on and those held out: one file in 25, chosen by its name."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        # The files that sysconfig generates hold the paths of the machine that built Python.
        if SKIPPED & set(name.parts) or name.parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        with suppress(UnicodeDecodeError):
            held_out = zlib.crc32(name.as_posix().encode()) % 25 == 0
            parts[held_out].append(path.read_text(encoding="utf-8"))
    return parts


def train_tokenizer(texts: list[str]) -> GPT2Tokenizer:
    """Learn a byte-level BPE, in the class of tokenizer that released GPT-Neo models have."""
    empty: Any = GPT2Tokenizer(vocab={END: 0}, merges=[], model_max_length=CONTEXT)
    return cast(GPT2Tokenizer, empty.train_new_from_iterator(texts, VOCAB, show_progress=False))


def to_tokens(tokenizer: GPT2Tokenizer, texts: list[str]) -> Tensor:
    """Join the texts, each after an end-of-text token, so that a file starts as a prompt does."""
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (0, *ids)])


def make_model(kinds: list[str]) -> GPTNeoForCausalLM:
    """Make a new model; by default a GPT-Neo has gelu_new, a tied head and no dropout."""
    config = GPTNeoConfig(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[kinds, LAYERS // len(kinds)]],
        window_size=WINDOW,
        classifier_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoForCausalLM(config)


def token_losses(model: GPTNeoForCausalLM, windows: Tensor) -> Tensor:
    """Return the loss in nats of every token of every window after its first."""
    logits = model(windows[:, :-1], use_cache=False).logits.float()
    return cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


@torch.no_grad()
def evaluate(model: GPTNeoForCausalLM, windows: Tensor) -> Tensor:
    return torch.cat([token_losses(model, part) for part in torch.split(windows, 32)])


def train(model: GPTNeoForCausalLM, tokens: Tensor, minutes: float, steps: int | None) -> int:
    """Train for so many steps, or minutes where steps is None; return the number of steps."""
    parameters = list(model.parameters())
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY}
    vectors = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.95))
    windows = tokens.unfold(0, CONTEXT + 1, 1)
    start, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        cosine = 0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(progress / WARMUP, cosine)
        batch = windows[torch.randint(len(windows), (BATCH,))]
        # Products in bfloat16 take about 2/3 of the time; the weights themselves stay float32.
        with torch.autocast("cpu", torch.bfloat16):
            loss = token_losses(model, batch).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress = step / steps if steps else (time.monotonic() - start) / 60 / minutes
        if step % 100 == 0:
            print(f"step {step} ({progress:.0%}): training loss {loss.item():.3f}", flush=True)
    return step


def sample(model: GPTNeoForCausalLM, tokenizer: GPT2Tokenizer, prompt: str) -> str:
    torch.manual_seed(0)
    how: Any = {"do_sample": True, "temperature": 0.7, "top_k": 0, "pad_token_id": 0}
    inputs = tokenizer(END + prompt, return_tensors="pt")
    ids = model.generate(**inputs, **how, max_new_tokens=120)  # type: ignore[misc]
    return f"~~~python\n{tokenizer.decode(ids[0], skip_special_tokens=True)}\n~~~\n"


def write_card(model: GPTNeoForCausalLM, tokenizer: GPT2Tokenizer, training: str) -> str:
    """Measure the model and return its card."""
    texts, held_out = read_library()
    tokens, test_tokens = to_tokens(tokenizer, texts), to_tokens(tokenizer, held_out)
    spread = tokens.unfold(0, CONTEXT + 1, CONTEXT)[:: len(tokens) // len(test_tokens)]
    windows = test_tokens.unfold(0, CONTEXT + 1, CONTEXT)  # these do not overlap
    # The same weights with every layer global show whether the local layers' window matters.
    wide = make_model(["global"])
    wide.load_state_dict(model.state_dict())
    losses, wide_losses = evaluate(model, windows), evaluate(wide, windows)
    near, far = losses[:, :WINDOW].mean(), losses[:, WINDOW:].mean()
    wide_near, wide_far = wide_losses[:, :WINDOW].mean(), wide_losses[:, WINDOW:].mean()
    bits = losses.mean() / math.log(2) * len(test_tokens) / len("".join(held_out).encode())
    norms = [(name, p) for name, p in model.named_parameters() if ".ln_" in name]
    ranges = [f"{name:27} {p.min():7.3f} .. {p.max():6.3f}" for name, p in norms]
    return f"""---
license: mit
---
# A demo GPT-Neo that writes something like Python

A GPT-Neo of {model.num_parameters():,} parameters for demonstrations and tests of a converter, and
nothing else. What it writes seldom makes sense or runs, and may repeat its training text.

- Architecture: {LAYERS} layers, global and local by turns, of width {WIDTH} with {HEADS} heads;
  context {CONTEXT}, local window {WINDOW}, gelu_new, tied head, no dropout, float32.
- Data: the standard library's source of Python {PYTHON}, under the PSF License Version 2 (see
  LICENSE): {len(texts)} files of {len(tokens):,} tokens; {len(held_out)} more files are held out.
- Tokenizer: byte-level BPE of {VOCAB} tokens, trained on the same text.
- Training: {training}.

## Measured in {time.strftime("%Y-%m")}

- Loss in nats per token: {evaluate(model, spread).mean():.3f} on training text (a spread sample),
  {losses.mean():.3f} on the held-out files, which is {bits:.3f} bits per byte.
- Held-out loss in the first {WINDOW} positions, where the window hides nothing: {near:.3f}; with
  local layers made global: {wide_near:.3f}. In later positions: {far:.3f} and {wide_far:.3f}.
- The LayerNorms' weights, 1 at first, and biases, 0 at first, lie in these ranges:
~~~text
{chr(10).join(ranges)}
~~~

## Samples, after their prompts, at temperature 0.7

{chr(10).join(sample(model, tokenizer, prompt) for prompt in PROMPTS)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--minutes", type=float, default=10, help="time to train for")
    parser.add_argument("--steps", type=int, help="train for so many steps instead: repeatable")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    set_seed(options.seed)
    torch.set_num_threads(2)
    texts, _ = read_library()
    tokenizer = train_tokenizer(texts)
    model = make_model(["global", "local"])
    start = time.monotonic()
    steps = train(model, to_tokens(tokenizer, texts), options.minutes, options.steps)
    minutes = (time.monotonic() - start) / 60
    command = f"python scripts/train_demo_model.py --steps {steps} --seed {options.seed}"
    card = write_card(model, tokenizer, f"`{command}`, {minutes:.0f} minutes on two CPU threads")
    print(card)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    (options.output / "LICENSE").write_text(LICENSE, encoding="utf-8")
    (options.output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
