"""The documentation is built, strictly; its links lead somewhere; its reference lacks nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest

import converter
from converter import errors
from converter.cli import main
from tests.docs.pages import ROOT, TEXTS

needs_mkdocs = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("mkdocs", "mkdocstrings", "mkdocs_click", "material")),
    reason="needs mkdocs-material, mkdocstrings and mkdocs-click (the docs extra)",
)


def build(sources: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    built = build(ROOT, out)
    assert built.returncode == 0, built.stderr
    return out


class Page(HTMLParser):
    """Where a page's links lead, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.links += [given[name] for name in ("href", "src") if name in given]
        self.anchors |= {given[name] for name in ("id", "name") if name in given}


read = cache(Page)


def dead(page: Path) -> list[str]:
    """Links of a page, within the site, that lead nowhere."""
    found = []
    for link in read(page).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        target = target / "index.html" if target.is_dir() else target
        there = target.is_file()
        if there and parts.fragment and target.suffix == ".html":
            there = unquote(parts.fragment) in read(target).anchors
        if not there:
            found.append(link)
    return found


@needs_mkdocs
def test_links_lead_somewhere(site: Path) -> None:
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) > 15
    assert {str(page.relative_to(site)): wrong for page in pages if (wrong := dead(page))} == {}


@needs_mkdocs
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", text)


@needs_mkdocs
def test_the_reference_is_whole(site: Path) -> None:
    """Every exported name, and every command with every option."""
    api = read(site / "reference/api/index.html").anchors
    documented = {anchor.rsplit(".", 1)[-1] for anchor in api if anchor.startswith("converter.")}
    assert set(converter.__all__) <= documented
    assert {name for name in vars(errors) if name in converter.__all__} <= documented
    text = (site / "reference/cli/index.html").read_text(encoding="utf-8")
    for name, command in main.commands.items():
        assert f"neoconvert {name}" in text
        for option in (one for one in command.params if isinstance(one, click.Option)):
            assert any(spelt in text for spelt in option.opts), (name, option.opts)


@needs_mkdocs
@pytest.mark.parametrize("fault", ["[there](nowhere.md)", "[there](limits.md#nowhere)", "::: converter.nothing"])  # fmt: skip
def test_a_fault_fails_the_build(fault: str, tmp_path: Path) -> None:
    for name in ("docs", "converter"):
        ignored = shutil.ignore_patterns("__pycache__", "model")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("mkdocs.yml", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs/index.md").open("a") as index:
        index.write(f"\n{fault}\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert "nowhere" in built.stderr or "nothing" in built.stderr


def test_readmes_links_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXTS[page]):
            assert link.startswith("https:") or (ROOT / link).exists(), (page, link)


def test_scripts_that_are_named_are_there() -> None:
    for page, text in TEXTS.items():
        for name in re.findall(
            r"(?<![\w/.])(?:\./)?((?:scripts|tests|converter)/[\w./-]*\w)", text
        ):
            assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), (page, name)


def test_every_command_is_in_the_table() -> None:
    page = TEXTS["docs/getting-started.md"]
    assert set(re.findall(r"^\| `neoconvert ([\w-]+)", page, re.MULTILINE)) == set(main.commands)


def test_the_citation_is_of_this_version() -> None:
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == converter.__version__
    assert set(cited) >= {"cff-version", "message", "title", "authors"}
