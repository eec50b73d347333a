"""The page of `explain`: the map, the heads, inert, readable in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import converter
from converter.demo import MODEL
from converter.explaining.page import render, write_page
from converter.layout import Layout
from tests import browser
from tests.browser import Page, Scheme

HEAD = "transformer.h.1.attn.attention.out_proj.weight"
NEURON = "transformer.h.2.mlp.c_fc.weight"


def _edited(directory: Path) -> Path:
    """Head 2 of block 1 gone, a neuron 1 % larger, one cell of a token's embedding changed."""
    copy = Path(shutil.copytree(MODEL, directory))
    tensors = {n: np.array(a) for n, a in load_file(copy / "model.safetensors").items()}
    tensors[HEAD][:, 64:96] = 0
    tensors[NEURON][17] *= 1.01
    tensors["transformer.wte.weight"][5, 3] += 0.5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, converter.Explanation]:
    root = tmp_path_factory.mktemp("pairs")
    edited = _edited(root / "edited")
    processed = converter.hf_to_tl(MODEL, root / "tl", process="default", check=False).output
    both = converter.hf_to_tl(edited, root / "both", process="all", check=False).output
    found = {"same": MODEL, "edited": edited, "processed": processed, "both": both}
    return {name: converter.explain(MODEL, other) for name, other in found.items()}


def test_heads_and_their_shares(pairs: dict[str, converter.Explanation]) -> None:
    facts = {fact.name: fact for fact in pairs["edited"].tensors}
    assert np.allclose(facts[HEAD].by_head, [0, 0, 1, 0])
    assert not facts[NEURON].by_head
    assert facts[NEURON].place == "neuron 17"
    assert 0 < facts[NEURON].relative < 1e-2
    assert "0%" not in facts[NEURON].to_json()["line"]
    assert not any(fact.by_head for fact in pairs["processed"].tensors)


def test_the_map_shows_every_tensor(pairs: dict[str, converter.Explanation]) -> None:
    for name, found in pairs.items():
        text = render(found)
        cells = re.findall(r'<td class="cell" title="[^"]*"><svg[^>]*><title>[^<]*</title><rect class="(\w+)" width="100%" height="100%"(?: fill-opacity="([\d.]+)")?/>', text)  # fmt: skip
        states = [state for state, _ in cells][: len(found.tensors)]
        assert len(states) == len(found.tensors), name
        assert states.count("same") == sum(fact.same for fact in found.tensors)
        odd = [fact for fact in found.tensors if not fact.explained]
        assert states.count("changed") + states.count("free") == len(odd)
    assert "Different models" in render(pairs["edited"])
    assert "Same function" in render(pairs["processed"])
    assert "Same weights" in render(pairs["same"])


@pytest.mark.parametrize("layout", ["hf", "hooked", "bridge"])
@pytest.mark.parametrize("other", ["hf", "bridge"])
def test_names_are_those_of_the_file(layout: Layout, other: Layout, tmp_path: Path) -> None:
    """Of the converted one, on the map, in the lines and in JSON; and it is said whose they are."""

    def written(name: str, layout: Layout) -> Path:
        source = _edited(tmp_path / "hf") if name == "converted" else MODEL
        if layout == "hf":
            return source
        made = converter.hf_to_tl(source, tmp_path / name, layout=layout, check=False)
        return Path(made.output)

    found = converter.explain(written("original", other), written("converted", layout))
    assert found.layouts == (other, layout)
    names = set(load_file(Path(found.converted) / "model.safetensors"))
    if (other, layout) == ("bridge", "hf"):
        names.add("unembed.bias")  # which HF's form has no place for
    document = found.to_json()
    assert {fact["name"] for fact in document["tensors"]} == names
    assert set(found.unexplained) < names
    page = render(found)
    table = page[page.index('aria-label="Map of the model"') :]
    columns = re.findall(r'<th scope="col"><span>([^<]+)</span>', table)
    tails = {re.sub(r"^(transformer\.h|blocks)\.\d+\.", "", name) for name in names}
    assert set(columns) == tails
    said = "Tensors are named as in " in document["headline"]
    assert said == (layout != other)


def test_a_head_that_is_the_embedding_has_its_name(tmp_path: Path) -> None:
    """The original has a head of its own; the other's file has no lm_head.weight."""
    untied = Path(shutil.copytree(MODEL, tmp_path / "untied"))
    tensors = dict(load_file(untied / "model.safetensors"))
    head = tensors["transformer.wte.weight"].copy()
    head[5, 3] += 0.5
    save_file(tensors | {"lm_head.weight": head}, untied / "model.safetensors")
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    found = converter.explain(untied, MODEL)
    assert found.unexplained == ("transformer.wte.weight",)
    (line,) = found.lines()
    assert line.startswith("transformer.wte.weight (also the head) differs by up to 0.5")
    said = " ".join(found.headline()) + render(found) + json.dumps(found.to_json())
    assert "lm_head" not in said
    assert "transformer.wte.weight (also the head) at token 5" in said
    back = converter.explain(MODEL, untied)
    assert back.unexplained == ("lm_head.weight",)


def test_the_larger_change_is_the_darker(pairs: dict[str, converter.Explanation]) -> None:
    text = render(pairs["edited"])
    shades = {
        name: float(re.search(rf'<title>{name} [^<]*</title><rect class="changed"[^>]*fill-opacity="([\d.]+)"', text)[1])  # type: ignore[index]
        for name in (HEAD, NEURON, "transformer.wte.weight")
    }  # fmt: skip
    assert shades[NEURON] < shades["transformer.wte.weight"] < shades[HEAD] <= 1


def test_names_do_not_act_on_the_page(tmp_path: Path) -> None:
    hostile = tmp_path / "<b onclick=x>\u202e"
    found = converter.explain(MODEL, _edited(hostile))
    write_page(found, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b onclick" not in text
    assert "\u202e" not in text


def test_a_page_replaces_a_page_and_nothing_else(
    tmp_path: Path, pairs: dict[str, converter.Explanation]
) -> None:
    path = tmp_path / "page.html"
    for name in ("same", "edited"):
        write_page(pairs[name], path)
    path.write_text("mine")
    with pytest.raises(converter.OutputExists):
        write_page(pairs["same"], path)
    assert path.read_text() == "mine"


def _explain(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "converter", "explain", str(MODEL), *arguments, "--json"]
    return subprocess.run(command, capture_output=True, text=True)


def test_exit_code(tmp_path: Path) -> None:
    edited = _edited(tmp_path / "edited")
    tl = converter.hf_to_tl(MODEL, tmp_path / "tl", process="default", check=False).output
    for other, code in {str(edited): 1, str(tl): 0, str(MODEL): 0}.items():
        assert _explain(other).returncode == 0
        ran = _explain(other, "--exit-code", "--report", str(tmp_path / "page.html"))
        assert ran.returncode == json.loads(ran.stdout)["exit_code"] == code
        assert (tmp_path / "page.html").is_file()
    (tmp_path / "mine.html").write_text("mine")
    refused = _explain(str(edited), "--exit-code", "--report", str(tmp_path / "mine.html"))
    assert refused.returncode == 2
    assert (tmp_path / "mine.html").read_text() == "mine"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("case", ["same", "edited", "processed", "both"])
def test_it_can_be_read(
    case: str, scheme: Scheme, tab: Page, pairs: dict[str, converter.Explanation], tmp_path: Path
) -> None:
    write_page(pairs[case], tmp_path / "page.html")
    for width in (380, 1200):
        tab.open(tmp_path / "page.html", scheme=scheme, width=width)
        assert tab.complaints == []
        found = tab.run(browser.CONTRAST)
        assert found["seen"] > 20
        assert found["poor"] == []
        assert tab.run("document.documentElement.scrollWidth") <= width
