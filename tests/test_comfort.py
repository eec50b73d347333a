"""Defaults of a project, and what a shell offers."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from converter import cli_defaults
from converter.cli import main
from converter.demo import MODEL
from converter.output import Steady


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "project" / "deep").mkdir(parents=True)
    shutil.copytree(MODEL, tmp_path / "project" / "deep" / "m")
    monkeypatch.chdir(tmp_path / "project" / "deep")
    return tmp_path / "project"


def say(here: Path, text: str) -> None:
    (here / "pyproject.toml").write_text(text)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def plan(*arguments: str) -> dict[str, Any]:
    ran = run("hf-to-tl", "m", "out", "--dry-run", "--json", *arguments)
    assert ran.exit_code == 0, ran.stderr
    document: dict[str, Any] = json.loads(ran.stdout)
    return document


def test_a_project_has_defaults_and_a_run_its_own_word(here: Path) -> None:
    assert plan()["layout"] == "hooked"
    say(
        here,
        "[tool.neoconvert]\nprocess = 'fold_ln'\n[tool.neoconvert.hf-to-tl]\nlayout = 'bridge'\n",
    )
    assert (plan()["layout"], plan()["steps"]) == ("bridge", ["fold_ln"])
    assert plan("--layout", "hooked")["layout"] == "hooked"
    ran = run("hf-to-tl", "m", "out", "--dry-run")
    assert "from pyproject.toml: --layout bridge --process fold_ln" in ran.stdout
    assert run("inspect", "m").exit_code == 0
    (Path.cwd() / "pyproject.toml").write_text("[tool.other]\nx = 1\n")  # nearer, and not for us
    assert plan()["layout"] == "bridge"
    (Path.cwd() / "pyproject.toml").write_text("[tool.neoconvert]\ndtype = 'float16'\n")
    assert (plan()["layout"], plan()["steps"]) == ("hooked", [])


def test_flags(here: Path) -> None:
    say(here, "[tool.neoconvert]\nmodel-card = true\n")
    assert run("hf-to-tl", "m", "out", "--no-verify").exit_code == 0
    assert (Path.cwd() / "out" / "README.md").is_file()


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("efort = 'quick'", "Did you mean effort?"),
        ("verify = false", "cannot say verify"),
        ("allow-pickle = true", "cannot say allow-pickle"),
        ("overwrite = true", "cannot say overwrite"),
        ("push-to = 'me/neo'", "cannot say push-to"),
        ("layout = 'brigde'", "layout cannot be 'brigde': 'brigde' is not one of"),
        (f"effort = 0x{'f' * 5000}", "is a number of thousands of digits"),
        (f"process = [0x{'f' * 5000}]", "is a number of thousands of digits"),
        ('"\\u001b[2J\\nError: x" = 1', "cannot say \\x1b[2J\\nError: x."),
        ("effort = true", "effort cannot be True"),
        ("model-card = 'perhaps'", "model-card cannot be 'perhaps'"),
        ("process = ['fold_ln', 'center_unembed']", 'in quotes: process = "fold_ln,center_unembed"'),
        ("[tool.neoconvert.hf-to-lt]\nlayout = 'bridge'", "Did you mean hf-to-tl?"),
        ("[tool.neoconvert.inspect]\nlayout = 'bridge'", "of a command that takes none"),
        ("[tool.neoconvert.hf-to-tl]\nreverse = 'auto'", "no option --reverse"),
        ("effort =", "not TOML, and has defaults for neoconvert: Invalid value (at line 2"),
    ],
)  # fmt: skip
def test_what_a_project_cannot_say(table: str, says: str, here: Path) -> None:
    say(here, f"[tool.neoconvert]\n{table}\n")
    ran = run("hf-to-tl", "m", "out", "--no-verify")
    assert ran.exit_code == 2
    assert says in ran.stderr
    assert [line[:7] for line in ran.stderr.splitlines()] == ["Error: ", "   in: ", "   do: "]
    assert f"in: {here / 'pyproject.toml'}" in ran.stderr
    assert not (Path.cwd() / "out").exists()
    assert run("env").exit_code == 0  # which takes no defaults


def test_a_file_that_says_something_to_us_and_nothing_sound(here: Path) -> None:
    for content in (
        b"[tool]\nneoconvert = 'quick'\n",
        b"[tool]\nneoconvert = 0x" + b"f" * 5000,
        b"[tool.neoconvert]\neffort = '\xff'\n",
    ):
        (here / "pyproject.toml").write_bytes(content)
        assert run("hf-to-tl", "m", "out", "--dry-run").exit_code == 2


def test_a_table_of_another_command_is_not_this_ones(here: Path) -> None:
    say(here, "[tool.neoconvert.tl-to-hf]\nlayout = 'bridge'\nreverse = 'sideways'\n")
    assert plan()["layout"] == "hooked"


def test_a_default_that_is_refused_is_a_document_too(here: Path) -> None:
    say(here, "[tool.neoconvert]\nefort = 'quick'\n")
    ran = run("hf-to-tl", "m", "out", "--json")
    document = json.loads(ran.stdout)
    assert (document["command"], document["exit_code"]) == ("hf-to-tl", 2)
    assert document["error"]["where"] == f"{here / 'pyproject.toml'}, [tool.neoconvert]"


@pytest.mark.parametrize(
    "content",
    [
        b"[tool", b"\xff\xfe", b"tool = 3\n",
        b"a = " + b"[" * 5000 + b"]" * 5000, b"a = " + b"9" * 5000,
    ],
    ids=lambda content: repr(content[:20]),
)  # fmt: skip
def test_a_file_that_says_nothing_to_us(content: bytes, here: Path) -> None:
    (here / "pyproject.toml").write_bytes(content)
    assert plan()["layout"] == "hooked"


def test_where_one_stands_is_gone(here: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)  # the fixture brings back where it was
    gone.rmdir()
    assert run("inspect", str(here / "deep/m")).exit_code == 0
    for _ in range(2):
        arguments = [str(here / "deep/m"), str(tmp_path / "out"), "--no-verify", "--overwrite"]
        assert run("hf-to-tl", *arguments).exit_code == 0
    ran = run("inspect", "m")
    assert (ran.exit_code, len(ran.stderr.splitlines())) == (3, 3)


def test_what_fails_before_a_command_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "pyproject.toml")

    monkeypatch.setattr(cli_defaults, "read", breaks)
    ran = run("inspect", "m")
    assert (ran.exit_code, len(ran.stderr.splitlines())) == (3, 3)
    assert "Traceback" in run("inspect", "m", "--debug").stderr


def offered(*words: str, incomplete: str) -> list[str]:
    complete = ShellComplete(main, {}, "neoconvert", "_NEOCONVERT_COMPLETE")
    return [item.value for item in complete.get_completions(list(words), incomplete)]


def test_what_a_shell_offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("models--EleutherAI--gpt-neo-125m", "models--me--a--b", "datasets--x--y", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert offered("hf-to-tl", incomplete="Ele") == ["Ele", "EleutherAI/gpt-neo-125m"]
    assert "me/a--b" in offered("verify", incomplete="")
    assert offered("hf-to-tl", "--process", incomplete="fold_l") == ["fold_ln"]
    assert offered("hf-to-tl", "--process", incomplete="fold_ln,fold") == [
        "fold_ln,fold_value_biases"
    ]
    assert "default" in offered("bake", "--process", incomplete="")
    assert offered("export-onnx", "--hook", incomplete="blocks.*.hook_resid_p") == [
        "blocks.*.hook_resid_pre", "blocks.*.hook_resid_post",
    ]  # fmt: skip
    assert offered("hf-to-tl", "--layout", incomplete="b") == ["bridge"]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    assert offered("inspect", incomplete="x") == ["x"]


def asked_for(instruction: str, **words: str) -> str:
    """What the command prints to a shell that asks it."""
    asked = {"_NEOCONVERT_COMPLETE": instruction, **words}
    code = "from converter.cli import main; main(prog_name='neoconvert')"
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=True)  # fmt: skip
    assert not ran.stderr
    return ran.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_answered(shell: str) -> None:
    script = asked_for(f"{shell}_source")
    assert f"_NEOCONVERT_COMPLETE={shell}_complete" in script
    if found := shutil.which(shell):
        subprocess.run([found, "-n"], input=script, text=True, check=True)
    word = "hf" if shell == "fish" else "1"  # fish says which it is, the others where
    offers = asked_for(f"{shell}_complete", COMP_WORDS="neoconvert hf", COMP_CWORD=word)
    assert "hf-to-tl" in offers
    assert "tl-to-hf" not in offers


def test_output_takes_text_and_bytes() -> None:
    """click writes some of its output as bytes, depending on its version."""
    for written in ("a\nb\x1b", b"a\nb\x1b"):
        stream = io.StringIO()
        Steady(stream).write(written)
        assert stream.getvalue() == "a\nb\\x1b"


def test_every_source_is_completed() -> None:
    for name, command in main.commands.items():
        for parameter in command.params:
            if isinstance(parameter, click.Argument) and parameter.name in ("source", "original", "converted", "path", "artifacts"):  # fmt: skip
                assert parameter._custom_shell_complete is not None, name
