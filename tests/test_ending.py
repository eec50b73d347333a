"""How commands end: the exit code says what happened, whatever broke, and printing decides nothing."""

from __future__ import annotations

import copy
import errno
import inspect
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors import SafetensorError

import converter.pipeline
from converter import demo, errors
from converter.cli import main
from converter.output import Steady, drawing, inert
from tests.checkpoints import Recipe, write_hf


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_hf(tmp_path / "hf", Recipe())
    return tmp_path / "hf"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def process(
    *arguments: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "converter", *arguments]
    return subprocess.run(command, capture_output=True, env=env)


def test_no_colour_where_none_is_wanted() -> None:
    for wanted, coloured in (("", True), ("1", False)):
        asked = ["inspect", "./nowhere"]
        ran = CliRunner().invoke(main, asked, env={"NO_COLOR": wanted}, color=True)
        assert ("[31m" in ran.stderr) is coloured, ran.stderr
        assert "There is no such file" in ran.stderr


PanicException = type("PanicException", (BaseException,), {})
"""What a library in Rust raises where it gives up."""

BROKEN: list[tuple[BaseException, int]] = [
    (KeyError("x"), 70),
    (AssertionError(), 70),
    (RecursionError("deep"), 70),
    (UnicodeError("odd"), 70),
    (OSError("without a number"), 70),
    (SafetensorError("from nowhere"), 70),
    (PanicException("called `Option::unwrap()` on a `None` value"), 70),
    (MemoryError("12 GB"), 4),
    (ModuleNotFoundError("No module named 'torch'", name="torch"), 4),
    (ModuleNotFoundError("No module named 'converter.x'", name="converter.x"), 70),
    (OSError(errno.ENOSPC, "No space left on device", "/full"), 3),
    (OSError(errno.EROFS, "Read-only file system", "/disc"), 3),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 3),
]


@pytest.mark.parametrize(("error", "code"), BROKEN, ids=lambda value: repr(value)[:50])
@pytest.mark.parametrize("where", ["make_plan", "stream"])
def test_whatever_breaks(
    error: BaseException, code: int, where: str, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(converter.pipeline, where, breaks)
    for more in ([], ["--json"], ["--debug"]):
        result = run("hf-to-tl", hf, hf.parent / "out", "--no-verify", *more)
        assert result.exit_code == code
        assert [line[:5] for line in result.stderr.splitlines()[-3:]] == ["Error", "   in", "   do"]
        assert ("Traceback" in result.stderr) == ("--debug" in more)
        if more == ["--json"]:
            assert json.loads(result.stdout)["exit_code"] == code
        assert sorted(p.name for p in hf.parent.iterdir()) == ["hf"]


KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.NeoconvertError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_error(
    kind: type[errors.NeoconvertError], hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise kind("a\nforged: line", where="\x1b]0;title\x07", do="\u202e" + "x" * 10**6)

    monkeypatch.setattr(converter.pipeline, "make_plan", breaks)
    result = run("hf-to-tl", hf, hf.parent / "out")
    assert result.exit_code == kind.exit_code
    assert (result.exit_code == 1) == (kind is errors.VerificationFailed)
    assert len(result.stderr.splitlines()) == 3
    assert len(result.stderr) < 3000
    assert not {"\x1b", "\x07", "\u202e"} & set(result.stderr)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_come_back_whole(kind: type[errors.NeoconvertError]) -> None:
    """From a copy, and from another process."""
    error = kind("what", where="where", do="do", details={"verification": {"passed": False}})
    error.transient = True
    for again in (copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(again) is kind
        assert (again.args, vars(again)) == (error.args, vars(error))


def test_after_publishing_errors_are_warnings(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converter.display import Display

    def breaks(*_: object) -> None:
        raise ValueError("markup")

    monkeypatch.setattr(Display, "conversion", breaks)
    result = run("hf-to-tl", hf, hf.parent / "out", "--no-verify", "--json")
    assert result.exit_code == 0
    assert "Warning" in result.stderr
    assert json.loads(result.stdout)["published"] is True


def test_a_report_that_fails_is_a_warning(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "r.html")

    report = ["--effort", "quick", "--report", hf.parent / "r.html"]
    monkeypatch.setattr("converter.verification.report.write_report", full)
    monkeypatch.setattr("converter.verification.report.page.write_report", full)
    result = run("hf-to-tl", demo.MODEL, hf.parent / "out", *report)
    assert (result.exit_code, "no report was written" in result.stderr) == (0, True), result.output
    assert run("verify", demo.MODEL, hf.parent / "out", *report).exit_code == 3


@pytest.mark.parametrize("place", ["hf/model.safetensors", "hf/config.json", "notes.html", "out"])
def test_a_report_replaces_no_file_but_a_report(place: str, hf: Path) -> None:
    (hf.parent / "notes.html").write_text("<p>mine")
    path = hf.parent / place
    before = path.exists() and path.read_bytes()
    result = run("hf-to-tl", hf, hf.parent / "out", "--report", path)
    assert result.exit_code == 2
    assert not (hf.parent / "out").exists()
    assert (path.exists() and path.read_bytes()) == before


def test_what_stands_alone_is_replaced_by_its_like(hf: Path) -> None:
    """A report, a reference file and a graph are all sealed, and none may take another's place."""
    write_hf(hf, Recipe(finite=True))
    out = hf.parent
    assert run("export-onnx", hf, out / "onx", "--no-verify").exit_code == 0
    assert run("reference", hf, out / "r", "--effort", "quick").exit_code == 0
    check = ["--check", "weights", "--report"]
    assert run("verify", hf, hf, *check, out / "r.html").exit_code == 0
    graph, record = out / "onx/model.onnx", out / "onx/neoconvert.json"
    sealed = [graph, record, out / "onx/genai_config.json", out / "r", out / "r.html"]
    before = {path: path.read_bytes() for path in sealed}
    for path in sealed:
        if path.suffix != ".html":
            assert run("verify", hf, hf, *check, path).exit_code == 2
            assert run("explain", hf, hf, "--report", path).exit_code == 2
        if path.name != "r":
            assert run("reference", hf, path, "--overwrite", "--effort", "quick").exit_code == 2
    assert {path: path.read_bytes() for path in sealed} == before
    export = ["export-onnx", hf, "--no-verify", "--overwrite"]
    assert run(*export).exit_code == 0
    shutil.copy(out / "r", hf / "model.onnx")
    shutil.copy(record, hf / "genai_config.json")
    assert run(*export).exit_code == 2
    shutil.copy(graph, hf / "model.onnx")
    assert run(*export).exit_code == 0
    assert (hf / "genai_config.json").read_bytes() == before[record]
    # Each by its like:
    assert run("explain", hf, hf, "--report", out / "r.html").exit_code == 0
    assert run("reference", hf, out / "r", "--overwrite", "--effort", "quick").exit_code == 0


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_no_encoding_fails(encoding: str, hf: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    for name in ("plain", "[/bold] [red]x", "\u0141\u00f3d\u017a"):
        done = process("hf-to-tl", hf, hf.parent / name, "--no-verify", env=env)
        assert (done.returncode, done.stderr) == (0, b"")
    assert b"[/bold] [red]x" in process("inspect", hf.parent / "[/bold] [red]x", env=env).stdout


def test_a_name_that_is_not_utf8(hf: Path) -> None:
    source, output = (os.fsdecode(os.fsencode(hf.parent) + name) for name in (b"/s\xff", b"/o\xff"))
    os.rename(hf, source)
    done = process("hf-to-tl", source, output, "--no-verify")
    assert (done.returncode, done.stderr) == (0, b"")
    assert (
        json.loads((Path(output) / "neoconvert.json").read_bytes())["source"]["given"] == "s\udcff"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("how", ["full", "closed", "no reader"])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_stdout_that_takes_nothing(how: str, more: list[str], hf: Path) -> None:
    command = [sys.executable, "-m", "converter", "hf-to-tl", str(hf), str(hf.parent / "o"), "--no-verify", *more]  # fmt: skip
    shell = {"full": '"$@" > /dev/full', "closed": '"$@" >&-', "no reader": '"$@" | true; exit ${PIPESTATUS[0]}'}[how]  # fmt: skip
    done = subprocess.run(["bash", "-c", shell, "-", *command], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (hf.parent / "o/neoconvert.json").exists()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("hangs", [False, True])
def test_interrupted(sign: signal.Signals, hangs: bool, hf: Path) -> None:
    """At once, also where a library holds the main thread and no handler runs."""
    wait = "__import__('ctypes').CDLL(None).sleep(60)" if hangs else "time.sleep(60)"
    program = (
        "import sys, time\n"
        "from converter.checkpoint.writer import Writer\n"
        f"Writer.write = lambda *a: (print('writing', flush=True), {wait})\n"
        "from converter.cli import main; main()"
    )
    arguments = ["hf-to-tl", str(hf), str(hf.parent / "out"), "--no-verify"]
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline() == b"writing\n"
        start = time.monotonic()
        running.send_signal(sign)
        assert running.wait(20) == 128 + sign
        assert time.monotonic() - start < 8
        assert b"Interrupted; nothing was published." in running.stderr.read()
    assert sorted(p.name for p in hf.parent.iterdir()) == ["hf"]


def test_nothing_is_imported_from_where_one_stands(tmp_path: Path) -> None:
    """The child of --python has our code, its own libraries, and no others."""
    model = tmp_path / "m"
    shutil.copytree(demo.MODEL, model)
    (model / "numpy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ImportError")
    here = Path(converter.__file__).resolve().parents[1]
    program = f"import sys; sys.path[0] = {str(here)!r}; from converter.cli import main; main()"
    arguments = ["verify", ".", ".", "--effort", "quick", "--python", sys.executable]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=model, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_broken_library(tmp_path: Path) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/transformer_lens.py").write_text("raise ImportError('broken')")
    assert run("hf-to-tl", demo.MODEL, tmp_path / "tl", "--no-verify").exit_code == 0
    path = os.pathsep.join([str(tmp_path / "stub"), str(Path(converter.__file__).parents[1])])
    env = {**os.environ, "PYTHONPATH": path}
    done = process("verify", demo.MODEL, tmp_path / "tl", "--effort", "quick", env=env)
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 3
    assert b"broken" in done.stderr


def test_inert() -> None:
    assert inert("Łódź → 深い") == "Łódź → 深い"
    assert inert("a\nb\x9b2J\u2028\u2066\udcff") == "a\\nb\\x9b2J\\u2028\\u2066\\udcff"
    assert len(inert("x" * 10**6, longest=100)) < 100


def test_a_terminal_keeps_styles_and_nothing_else(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w", encoding="utf-8") as file:
        stream = Steady(file)
        stream.isatty = lambda: True  # type: ignore[method-assign]
        stream.write("\x1b[1mbold\x1b[0m\x1b]0;title\x07 \x1bc\x1b[2J\n")
        drawing(stream).write("\x1b[1A\x1b[2K\x1bc\n")
        stream.flush()
    said, drawn = (tmp_path / "out").read_text().splitlines()
    assert said == "\x1b[1mbold\x1b[0m\\x1b]0;title\\x07 \\x1bc\\x1b[2J"
    assert drawn == "\x1b[1A\x1b[2K\\x1bc"


@pytest.mark.parametrize("arguments", [[""], ["inspect", "m", ""], ["inspect", "--"]])
def test_a_name_on_the_command_line_forges_nothing(arguments: list[str]) -> None:
    """As a shell's `*` may give it."""
    result = run(*arguments[:-1], f"{arguments[-1]}x\x1b[31m\nError: none\r")
    assert (result.exit_code, "Error: none" in result.stderr) == (2, True)
    assert not {"\x1b", "\r"} & set(result.stderr)
    assert "\nError: none" not in result.stderr


def test_python_without_docstrings(hf: Path) -> None:
    """Of which transformers makes code: what runs no model does all it does elsewhere."""
    env = {**os.environ, "PYTHONOPTIMIZE": "2"}
    done = process("hf-to-tl", hf, hf.parent / "o", "--effort", "quick", env=env)
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 3)
    assert b"PYTHONOPTIMIZE=2" in done.stderr
    assert not (hf.parent / "o").exists()
    assert process("hf-to-tl", hf, hf.parent / "o", "--no-verify", env=env).returncode == 0
    assert process("verify", hf, hf.parent / "o", "--check", "weights", env=env).returncode == 0
    assert process("verify", hf, hf.parent / "o", "--effort", "quick", env=env).returncode == 4
