"""The commands in README and docs/ run as they are printed, and answer what is printed there.

Hub ids are in a cache that holds the demo model under their names, so that nothing is fetched.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import converter
from converter.demo import MODEL
from tests.docs.pages import ROOT, TEXTS, blocks, make_models
from tests.marks import needs_hooked

HUB = {
    "EleutherAI/gpt-neo-125m": "model.safetensors",
    "roneneldan/TinyStories-1M": "pytorch_model.bin",
    "roneneldan/TinyStories-33M": "model.safetensors",
}
"""Models that pages name, and how their weights are stored in the cache here."""
COMMIT = "0" * 40


@dataclass
class Command:
    text: str
    answer: list[str] = field(default_factory=list)

    @property
    def makes(self) -> str | None:
        """The directory that a conversion writes."""
        words = shlex.split(self.text)
        converts = words[:2] in (["neoconvert", c] for c in ("hf-to-tl", "tl-to-hf", "bake"))
        return words[3] if converts else None

    @property
    def file(self) -> str | None:
        """The file whose text is shown."""
        return self.text.removeprefix("cat ") if self.text.startswith("cat ") else None


def commands(text: str) -> list[Command]:
    found: list[Command] = []
    for line in "".join(blocks(text, "console")).splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:]))
        else:
            found[-1].answer.append(line)
    return found


PAGES = {page: found for page, text in TEXTS.items() if (found := commands(text))}


def cached(directory: Path) -> None:
    """As huggingface_hub keeps what it has fetched."""
    for name, weights in HUB.items():
        model = directory / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / COMMIT
        shutil.copytree(MODEL, snapshot)
        if weights.endswith(".bin"):
            (snapshot / "model.safetensors").unlink()
            torch.save(load_file(MODEL / "model.safetensors"), snapshot / weights)
        (model / "refs").mkdir()
        (model / "refs/main").write_text(COMMIT)


def lora(directory: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj"]
    tuned = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False))
    tuned.save_pretrained(directory)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take as given."""
    root = tmp_path_factory.mktemp("pages")
    here = root / "here"
    here.mkdir()
    make_models(here)
    converter.hf_to_tl(
        MODEL, here / "python-neo-tl", process="default", ledger="exact", check=False
    )
    lora(here / "my-adapter")
    for i in range(2):
        shutil.copytree(MODEL, here / f"runs/checkpoint-{i}")
    cached(root / "cache")
    command = root / "bin/neoconvert"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m converter "$@"\n')
    command.chmod(0o755)
    return root


def run(command: str, root: Path, here: Path) -> list[str]:
    path = os.pathsep.join(
        [str(root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    )
    environment = os.environ | {
        "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_HUB_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", command], cwd=here, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, (command, done.stdout)
    return done.stdout.splitlines()


def bare(line: str) -> str:
    """A line without what may differ: measured figures, versions, the worst probe's name."""
    line = re.sub(r"\d+\.\d[\w.+-]*|\d+e[+-]\d+", "#", line)
    if line.lstrip().startswith(("✓ program", "✓ route")):
        line = re.sub(r"\([^()]+\)$", "", line)
    return " ".join(line.split())


def answers(found: list[str], shown: list[str]) -> bool:
    """Whether this is what was shown. `…` stands for any lines, and an answer that is not shown for
    any answer."""
    if not shown:
        return True
    lines = [bare(line) for line in shown if line.strip()]
    pattern = "".join(r"(?:.*\n)*" if x == "…" else re.escape(x) + "\n" for x in lines)
    text = "".join(bare(line) + "\n" for line in found if line.strip())
    return re.fullmatch(pattern, text) is not None


@needs_hooked
@pytest.mark.parametrize("page", PAGES)
def test_runs(page: str, prepared: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    made = [name for command in PAGES[page] if (name := command.makes)]
    shutil.copytree(prepared / "here", here, ignore=shutil.ignore_patterns(*made))
    for command in PAGES[page]:
        if command.file:
            (here / command.file).write_text("".join(f"{line}\n" for line in command.answer))
            continue
        found = run(command.text, prepared, here)
        assert answers(found, command.answer), (command.text, "\n".join(found))


def test_what_is_installed_is_there() -> None:
    """Of blocks that make an environment, the scripts."""
    for page in ("README.md", "docs/getting-started.md"):
        made = "".join(blocks(TEXTS[page], "sh"))
        for script in re.findall(r"\./(scripts/\w+)", made):
            assert os.access(ROOT / script, os.X_OK), (page, script)


def test_no_command_is_passed_over() -> None:
    """Commands stand in blocks that are run, but for those that install or sign."""
    for page, text in TEXTS.items():
        shown = re.findall(r"^\$ (neoconvert .*)$", text, re.MULTILINE)
        assert shown == [c.text for c in PAGES.get(page, []) if c.text.startswith("neoconvert")]


def test_another_answer_is_noticed() -> None:
    shown = ["a 70 of 70", "…", "  ✓ route, x: same: max 1.2e-14 (context)", "verified"]
    assert answers(["a 70 of 70", "b", "✓ route, x: same: max 3e-14 (text)", "verified"], shown)
    assert not answers(["a 69 of 70", "✓ route, x: same: max 3e-14 (text)", "verified"], shown)
    assert not answers(["a 70 of 70", "✓ route, x: same: max 3e-14", "not verified"], shown)
    assert not answers(["a 70 of 70", "b"], ["a 70 of 70"])
