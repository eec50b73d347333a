"""The HTML report: one inert file, read in a real browser in both colour schemes."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from converter.checkpoint import Checkpoint, publish
from converter.errors import OutputExists
from converter.verification import verify
from converter.verification.report import render, write_report
from tests import browser
from tests.browser import Page, Scheme

VOID = {"meta", "link", "input", "br", "img", "hr"}
UNITS = ("embed", "block 0", "block 1", "block 2", "final")
HOSTILE = """'"--></script></style></svg><img src=x onerror="window.owned = 1"><b>&amp;"""


def document(*, passed: bool = True) -> dict[str, Any]:
    """Every key that there can be; the artifact of the failing one parts at block 1."""

    def probe(name: str, length: int, scale: float) -> dict[str, Any]:
        error = [scale * 1e-6 * (1 + i % 7) for i in range(length)]
        return {
            "name": name, "runtime": "transformer_lens", "passed": passed, "reason": None,
            "max_abs_logprob_diff": max(error), "mean_abs_logprob_diff": 1e-6, "kl": 2.5e-13,
            "top1_agreement": 0.99996, "noise_floor": 7e-6, "ratio": scale, "compared": 9999,
            "storage_max_abs_logprob_diff": 1e-3, "storage_kl": 1e-7,
            "storage_top1_agreement": 0.75,
            "perplexity": {"original": 12.5, "stored": 12.625, "artifact": 12.75},
            "by_position": {"start": list(range(length)), "error": error, "floor": [7e-6] * length},
        }  # fmt: skip

    scale = 0.9 if passed else 4321.0
    errors = [1e-7, 1e-7, *([2e-7] * 3 if passed else [0.1, 0.2, 0.3])]
    names = [] if passed else ["blocks.1.attn.W_Q"]
    return {
        "passed": passed, "max_ratio": 8.0, "effort": "standard", "original": "neo",
        "artifact": "neo-tl", "remarks": ["Only the first 512 positions were run."],
        "runtimes": [
            {"name": "transformers", "what": "GPTNeoForCausalLM", "version": "5.0",
             "device": "cpu", "role": "original"},
            {"name": "transformer_lens", "what": "HookedTransformer", "version": "3.9.0",
             "device": "cpu", "role": "artifact"},
        ],
        "probes": [probe("length 1", 1, scale), probe("context", 64, scale / 2)],
        "layers": [{"runtime": "transformer_lens", "probe": "context", "units": [
            {"unit": unit, "error": error, "floor": 1e-7}
            for unit, error in zip(UNITS, errors, strict=True)
        ]}],
        "weights": {
            "compared": 70, "mismatched": names, "config": [] if passed else ["window_size"],
            "mismatches": [{"unit": "block 1", "key": n, "tensor": n} for n in names],
        },
        "first_divergence": None if passed else {"unit": "block 1", "tensor": names[0]},
        "problems": [] if passed else [f"Problem {i}." for i in range(6)],
    }  # fmt: skip


def provenance() -> dict[str, Any]:
    tensors = {"wte": {"dtype": "float32", "shape": [37, 16], "sha256": "ab" * 32}}
    return {
        "versions": {"neoconvert": "0.1.0", "torch": "2.13.0"},
        "source": {"given": "neo", "revision": None, "layout": "hf", "tensors": tensors},
        "output": {"layout": "hooked", "tensors": tensors},
        "steps": ["fold_ln"], "reverse": "none",
        "dropped": {"h.0.attn.bias": "mask buffer"}, "invented": ["unembed.b_U"],
    }  # fmt: skip


def poisoned(value: Any) -> Any:
    """Every string, and every key that is a name, made hostile."""
    if isinstance(value, dict):
        names = value.keys() & {"wte", "neoconvert", "torch", "h.0.attn.bias"}
        return {
            HOSTILE + key if key in names else key: item if key == "role" else poisoned(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return HOSTILE + value if isinstance(value, str) else value


class Structure(HTMLParser):
    """Tags closed in their order, ids unique; what loads, what is named, what would act."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


CASES = {
    "passing": (document(), provenance()),
    "failing": (document(passed=False), provenance()),
    "hostile": (poisoned(document(passed=False)), poisoned(provenance())),
}


@pytest.mark.parametrize("case", CASES)
def test_well_formed_and_self_contained(case: str) -> None:
    text = render(CASES[case][0], provenance=CASES[case][1])
    page = Structure(text)
    ids = page.named("id")
    assert len(ids) == len(set(ids))
    assert set(" ".join(page.named("for", "aria-labelledby")).split()) <= set(ids)
    assert [link[:5] for link in page.named("src", "href")] == ["data:"]
    assert not re.search(r"@import|url\(", text)
    assert (page.tags.count("script"), page.tags.count("style"), page.tags.count("img")) == (
        1,
        1,
        0,
    )
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "style"]
    assert page.tags.count("table") == page.tags.count("caption") >= 4
    assert page.tags.count("title") == 1 + 3, "the page's and one for each plot"


def test_it_says_what_the_document_says() -> None:
    text = render(document(passed=False), title="hf-to-tl", provenance=provenance())
    for fact in (
        "Not verified", "does not reproduce", "hf-to-tl", "block 1", "blocks.1.attn.W_Q",
        "window_size", "4,300", "&gt;99.99 %", "2.50e-13", "12.625", "transformer_lens 3.9.0",
        "Problem 5.", "512 positions", "ab" * 32, "mask buffer",
    ):  # fmt: skip
        assert fact in text, fact
    assert "1 of 70 tensors are not" in text


def test_same_document_same_bytes() -> None:
    first, second = (render(document(), provenance=provenance()) for _ in range(2))
    assert first == second


def test_an_older_document() -> None:
    old = document(passed=False)
    for key in ("effort", "original", "artifact", "layers", "remarks"):
        del old[key]
    for probe in old["probes"]:
        for key in ("storage_kl", "storage_top1_agreement", "perplexity", "by_position"):
            del probe[key]
    Structure(text := render(old))
    assert "Error by" not in text
    assert "The artifact" in text or "the artifact" in text


def test_only_one_of_the_checks() -> None:
    weights_only = document() | {"probes": [], "runtimes": [], "layers": []}
    Structure(text := render(weights_only))
    assert "all 70 tensors are what they must be" in text
    Structure(text := render(document() | {"weights": None}))
    assert "bit for bit" not in text


def test_nothing_is_finite() -> None:
    lost = document(passed=False)
    for probe in lost["probes"]:
        numbers = {key for key, value in probe.items() if isinstance(value, float)}
        probe |= dict.fromkeys(numbers)
        probe["by_position"]["error"] = [None] * len(probe["by_position"]["start"])
    for unit in lost["layers"][0]["units"]:
        unit["error"] = unit["floor"] = None
    Structure(text := render(lost))
    assert "not finite" in text
    assert "None" not in text


def test_exact_zeros_and_wide_bins() -> None:
    exact = document()
    exact["probes"][1]["by_position"] = {
        "start": [0, 4, 8], "error": [0.0, 0.0, None], "floor": [1e-6, 0.0, 1e-6],
    }  # fmt: skip
    text = render(exact)
    assert "positions 4–7: error 0.00e+00" in text
    assert "positions from 8: error not finite" in text


@pytest.mark.parametrize("wrong", [None, 1, "text", [1, None], {"a": [1]}])
def test_provenance_of_any_form(wrong: Any) -> None:
    assert render(document(), provenance=wrong)
    for key in provenance():
        Structure(render(document(), provenance=provenance() | {key: wrong}))


def test_a_real_verification(original: Checkpoint) -> None:
    Structure(text := render(verify(original, original).to_json()))
    assert "Verified" in text


def test_the_old_report_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    write_report(document(), path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(publish, "exchange", full)
        with pytest.raises(OSError, match="no space"):
            write_report(document(passed=False), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_report(document(passed=False), path)
    assert path.read_bytes() != before
    path.write_bytes(path.read_bytes() + b"a remark of mine")
    with pytest.raises(OutputExists):
        write_report(document(), path)
    assert path.read_bytes().endswith(b"mine")


def test_names_do_not_act_on_the_page(tmp_path: Path) -> None:
    hostile = "</script><b>\u202e\x1b]0;pwned\x07"
    write_report(document() | {"original": hostile, "problems": [hostile]}, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "\\u202e\\x1b]0;pwned\\x07" in page
    assert not {"\u202e", "\x1b", "\x07"} & set(page)
    assert "<b>\\u202e" not in page


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reports")
    for case, (given, origin) in CASES.items():
        write_report(given, root / f"{case}.html", provenance=origin)
    return {case: root / f"{case}.html" for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_loads_alone_and_can_be_read(
    case: str, scheme: Scheme, tab: Page, reports: dict[str, Path]
) -> None:
    tab.open(reports[case], scheme=scheme)
    assert tab.complaints == []
    assert {url.partition(":")[0] for url in tab.requested} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in tab.requested) == 1
    assert tab.run("window.owned") is None
    found = tab.run(browser.CONTRAST)
    assert found["seen"] > 100
    assert found["poor"] == []


def test_contrast_is_really_measured(tab: Page, reports: dict[str, Path]) -> None:
    tab.open(reports["passing"])
    tab.run("document.querySelector('.lede').style.color = '#aaa'")
    assert ["reproduces", pytest.approx(2, abs=0.2)] in tab.run(browser.CONTRAST)["poor"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [380, 1200])
def test_nothing_sticks_out(case: str, width: int, tab: Page, reports: dict[str, Path]) -> None:
    tab.open(reports[case], width=width)
    tab.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert tab.run("document.documentElement.scrollWidth") <= width


def test_the_failing_unit_is_shown(tab: Page, reports: dict[str, Path]) -> None:
    tab.open(reports["failing"])
    header = tab.run("document.querySelector('header').innerText")
    assert "Not verified" in header
    assert "block 1\nblocks.1.attn.W_Q" in header
    middle = "(({left, width}) => left + width / 2)(%s.getBoundingClientRect())"
    texts = "[...document.querySelectorAll('[aria-labelledby=layers] .axis .x')]"
    named = tab.run(middle % f"{texts}.find((text) => text.textContent === '1')")
    marked = tab.run(middle % "document.querySelector('.part line')")
    assert marked == pytest.approx(named, abs=1)


def test_plots_are_read_with_the_keyboard(tab: Page, reports: dict[str, Path]) -> None:
    tab.open(reports["passing"])
    shown = "[...document.querySelectorAll('.panel')].map((panel) => panel.offsetHeight > 0)"
    assert tab.run(shown) == [False, True, True], "the longest probe, and the layers"
    tab.run("document.querySelector('#position1').focus(), document.activeElement.click()")
    assert tab.run(shown) == [True, False, True]
    tab.run("document.querySelector('[aria-labelledby=layers] .plot').focus()")
    for key in ("End", "ArrowLeft"):
        tab.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    read = tab.run("document.activeElement.querySelector('output').textContent")
    assert read == "block 2: error 2.00e-07, noise floor 1.00e-07"


def test_a_foreign_script_does_not_run(tab: Page, tmp_path: Path) -> None:
    """The page's policy, should an escape ever be forgotten."""
    text = render(document()).replace("<main", "<script>window.owned = 1</script><main")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    tab.open(tmp_path / "page.html")
    assert tab.run("window.owned") is None
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)


def test_the_report_leaves_its_document_alone() -> None:
    given = document(passed=False)
    before = copy.deepcopy(given)
    render(given, provenance=provenance())
    assert given == before


def tone(text: str) -> str:
    """Of the page, which its icon shares."""
    (found,) = re.findall(r'<body class="(\w+)">', text)
    assert {"pass": "0b7a53", "fail": "b3261e", "open": "595f69"}[found] in text.partition(
        "<style"
    )[0]
    return str(found)


def test_the_colour_is_the_verdicts() -> None:
    """Whatever the probes say."""
    alone: dict[str, Any] = {"probes": [], "runtimes": [], "layers": []}
    for given in (dict[str, Any](), alone):
        assert tone(render(document() | given)) == "pass"
        assert tone(render(document(passed=False) | given)) == "fail"
    assert tone(render(document(passed=False) | {"probes": document()["probes"]})) == "fail"


def test_what_could_only_not_be_compared_is_neither_green_nor_red() -> None:
    link = {"subject": "x", "link": "structure", "outcome": "not comparable", "why": "y", "where": None,
            "error": None, "times": None, "required": True}  # fmt: skip
    given = document() | {"passed": False, "evidence": [link], "problems": ["x: y."]}
    text = render(given)
    assert tone(text) == "open"
    assert "Not verified" in text
    assert "does not reproduce" not in text
    assert tone(render(given | {"problems": ["x: y.", "Another."]})) == "fail"
    wrong = link | {"link": "route", "outcome": "differs", "times": 2694656805.0, "error": 1.0}
    text = render(given | {"evidence": [link, wrong], "problems": ["x: y.", "Another."]})
    assert "2.7e+09 times what is allowed" in text
    assert "% of what" not in text


def test_what_is_quantised_is_counted_and_few_positions_are_marked() -> None:
    given = document() | {
        "criterion": {"max_kl": 0.1, "min_top1": 0.9, "max_perplexity_ratio": None}
    }
    given["weights"] |= {"compared": 30, "absent": 27}
    assert "*" not in render(given).partition("<main")[2].partition("<script")[0]
    given["probes"][0]["top1_agreement"] = 0.75
    Structure(text := render(given))
    assert "30 <small>of 57" in text
    assert "30 of 57 tensors are what they must be" in text
    assert "75 %*" in text
    assert "* Below 90 %" in text


def test_the_program_is_named_once() -> None:
    for title in ("verify", "neoconvert verify"):
        assert "<b>neoconvert</b> verify<" in render(document(), title=title)
