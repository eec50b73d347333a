"""A sweep: checked first, done once, gone on with after whatever ended it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

import converter.batch.job
import converter.convert
from converter import schema
from converter.cli import main
from tests.checkpoints import Recipe, read_all, same, write_hf

VALIDATOR = Draft202012Validator(schema.load())
Lines = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoints(*steps: int) -> None:
    for step in steps:
        write_hf(Path(f"runs/checkpoint-{step}"), Recipe(seed=step, finite=True))


def manifest(*rows: dict[str, Any]) -> Path:
    path = Path("manifest.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(source: str = "runs/checkpoint-*", output: str = "tl/{name}", **more: Any) -> dict[str, Any]:  # fmt: skip
    return {"command": "hf-to-tl", "source": source, "output": output, "verify": False} | more


def batch(*arguments: object, code: int = 0) -> Lines:
    """The lines of JSON that a run prints, each as the schema has it."""
    result = CliRunner().invoke(main, ["batch", *map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [error.message for line in lines for error in VALIDATOR.iter_errors(line)] == []
    assert lines[-1]["exit_code"] == code
    return lines


def status(lines: Lines) -> dict[str, str]:
    return {Path(line["source"]).name: line["status"] for line in lines if "status" in line}


def files(root: Path | str = "tl") -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def test_a_second_run_does_nothing() -> None:
    checkpoints(1, 2, 10)
    path = manifest(row(process="default"))
    lines = batch(path)
    assert [Path(line["source"]).name for line in lines[:-1]] == [
        "checkpoint-1", "checkpoint-2", "checkpoint-10",
    ]  # fmt: skip
    assert lines[-1]["summary"]["converted"] == 3
    before, touched = files(), os.stat("tl/checkpoint-1").st_mtime_ns
    assert Counter(status(batch(path)).values()) == {"there": 3}
    assert (files(), os.stat("tl/checkpoint-1").st_mtime_ns) == (before, touched)
    # One that was converted by a command of its own is there just as well.
    shutil.rmtree("tl/checkpoint-2")
    alone = ["hf-to-tl", "runs/checkpoint-2", "tl/checkpoint-2", "--process", "default"]
    assert CliRunner().invoke(main, [*alone, "--no-verify"]).exit_code == 0
    assert Counter(status(batch(path)).values()) == {"there": 3}


def flip(path: str) -> Callable[[], None]:
    def change() -> None:
        data = bytearray(Path(path).read_bytes())
        data[-1] ^= 1
        kept = os.stat(path)
        Path(path).write_bytes(data)
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # size and date are as they were

    return change


CHANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "a bit of the source": (
        flip("runs/checkpoint-1/model.safetensors"), "the source's transformer.",
    ),
    "the source's config": (
        lambda: Path("runs/checkpoint-1/config.json").write_text(
            json.dumps(Recipe(window=4, finite=True).config)
        ),
        "the source's config.json is another now",
    ),
    "a tokenizer that was added": (
        lambda: Path("runs/checkpoint-1/tokenizer.json").write_text("{}"),
        "the source's tokenizer.json is another now",
    ),
    "a bit of the output": (flip("tl/checkpoint-1/model.safetensors"), "model.safetensors was changed"),
    "a file of the output": (lambda: os.remove("tl/checkpoint-1/cfg.json"), "cfg.json is missing"),
    "the record": (flip("tl/checkpoint-1/neoconvert.json"), "neoconvert.json is missing, or"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_noticed(change: str) -> None:
    checkpoints(1, 2)
    path = manifest(row())
    batch(path)
    change_it, said = CHANGES[change]
    change_it()
    before = files()
    lines = batch(path, code=2)
    assert status(lines) == {"checkpoint-1": "failed", "checkpoint-2": "there"}
    assert said in lines[0]["error"]["what"]
    assert "overwrite" in lines[0]["error"]["do"]
    assert lines[0]["transient"] is False
    assert files() == before
    if change.endswith("of the output") or change == "the record":
        return  # what is not as neoconvert wrote it is never replaced
    assert status(batch(path, "--overwrite")) == {
        "checkpoint-1": "converted", "checkpoint-2": "there",
    }  # fmt: skip
    assert Counter(status(batch(path)).values()) == {"there": 2}


def test_an_adapter_that_changed_is_noticed() -> None:
    from tests.adapter import making

    making.write(Path(), making.Recipe({"target_modules": ["q_proj"]}))
    path = manifest(row("base", "tl", adapter="adapter"))
    assert status(batch(path)) == {"base": "converted"}
    assert status(batch(path)) == {"base": "there"}
    flip("adapter/adapter_model.safetensors")()
    assert "the adapter's tensors is another now" in batch(path, code=2)[0]["error"]["what"]
    flip("adapter/adapter_model.safetensors")()
    flip("base/model.safetensors")()
    assert "source's model.safetensors" in batch(path, code=2)[0]["error"]["what"]


def test_a_way_back_and_its_ledger() -> None:
    checkpoints(1)
    batch(manifest(row(process="default", ledger="exact")))
    back = row("tl/*", "hf/{name}", command="tl-to-hf", reverse="exact")
    assert status(batch(manifest(back))) == {"checkpoint-1": "converted"}
    assert status(batch(manifest(back))) == {"checkpoint-1": "there"}
    assert same(read_all(Path("hf/checkpoint-1")), read_all(Path("runs/checkpoint-1")))
    flip("tl/checkpoint-1/ledger.safetensors")()
    assert "ledger.safetensors is another" in batch(manifest(back), code=2)[0]["error"]["what"]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("process", "fold_ln", "process was none, and fold_ln is asked for"),
        ("layout", "bridge", "layout was hooked, and bridge is asked for"),
        ("dtype", "float16", "dtype was keep, and float16 is asked for"),
        ("verify", True, "check was none, and runtime none effort standard is asked for"),
        ("ledger", "exact", "ledger was compact, and exact is asked for"),
        ("max-shard-size", 1000, "max_shard_size was 5GB, and 1000 is asked for"),
        ("format", ["safetensors", "onnx"], "formats was safetensors, and safetensors,onnx is"),
    ],
)
def test_another_option_is_noticed(option: str, value: Any, said: str) -> None:
    checkpoints(1)
    batch(manifest(row()))
    lines = batch(manifest(row(**{option: value})), code=2)
    assert said in lines[0]["error"]["what"]


def test_another_version_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints(1)
    batch(manifest(row()))
    monkeypatch.setattr("converter.batch.there.versions", lambda: {"neoconvert": "9.0"})
    lines = batch(manifest(row()), code=2)
    assert "made it, and this is 9.0" in lines[0]["error"]["what"]


def test_csv() -> None:
    checkpoints(1, 2)
    text = (
        "\ufeffcommand,source,output,--process,no_verify,overwrite\r\n"
        "hf-to-tl,runs/checkpoint-1,tl/one,\"fold_ln,center_unembed\",yes,\r\n"
        "\r\n"
        "bake,runs/checkpoint-2,baked/{parent}/{name},,true,no\r\n"
    )  # fmt: skip
    Path("m.csv").write_bytes(text.encode())
    lines = batch("m.csv")
    assert [line["line"] for line in lines[:-1]] == [2, 4]
    assert lines[0]["conversion"]["steps"] == ["fold_ln", "center_unembed"]
    assert Path("baked/runs/checkpoint-2/config.json").exists()


@pytest.mark.parametrize(
    ("rows", "where", "said", "do"),
    [
        ([row(), row(proces="default")], "line 2", "The column 'proces' is no option", "process?"),
        ([row(Layuot="hooked")], "line 1", "'Layuot'", "layout?"),
        ([row(layout="hoked")], "line 1", "hoked", "--help"),
        ([row(process="fold_lm")], "line 1", "'fold_lm' is not a processing step", "fold_ln"),
        ([row(reverse="exact")], "line 1", "'reverse'", "tl-to-hf"),
        ([row(json=True)], "line 1", "'json'", "batch itself"),
        ([row(command="hf-to-lt")], "line 1", "'hf-to-lt' is no command", "hf-to-tl?"),
        ([row("runs/chekpoint-*")], "line 1", "Nothing matches", "pattern"),
        ([row(output="tl")], "line 1", "OUTPUT is that of line 1 too", "{name}"),
        ([row(output="tl/{nmae}")], "line 1", "{nmae} stands for nothing", "{name}?"),
        ([row(), row("runs/checkpoint-1", "tl/checkpoint-2/x")], "line 2", "inside", "its own"),
        ([row(), row("tl/checkpoint-1", "hf", command="tl-to-hf")], "line 2", "writes", "second"),
        ([row(verify="maybe")], "line 1", "'maybe'", "true or false"),
        ([row(**{"max-shard-size": "lots"})], "line 1", "'lots' is not a size", "5GB"),
        ([{"command": "hf-to-tl", "output": "x"}], "line 1", "no source", "pattern"),
        ([{"command": "hf-to-tl", "source": "x"}], "line 1", "no output", "{name}"),
    ],
)
def test_every_line_is_checked_first(rows: Any, where: str, said: str, do: str) -> None:
    checkpoints(1, 2)
    (line,) = batch(manifest(*rows), code=2)
    assert said in line["error"]["what"]
    assert where in line["error"]["where"]
    assert do in line["error"]["do"]
    assert not Path("tl").exists()


ONE, TWO = "runs/checkpoint-1", "runs/checkpoint-2"


@pytest.mark.parametrize(
    ("rows", "where", "said"),
    [
        ([row(report="r")], "line 1: r", "The report is that of line 1 too"),
        ([row(ONE, "a", report="r"), row(ONE, "r")], "line 2: r", "OUTPUT is the report of line 1"),
        ([row(ONE, "a", report="r"), row(ONE, "r/b")], "line 2: r/b", "inside the report of line 1"),
        ([row(TWO, ONE), row(TWO, "a", report=f"{ONE}/r")], "line 2: runs", "inside OUTPUT of line 1"),
    ],
)  # fmt: skip
def test_reports_are_checked_too(rows: Any, where: str, said: str) -> None:
    checkpoints(1, 2)
    (line,) = batch(manifest(*(cells | {"verify": True} for cells in rows)), code=2)
    assert said in line["error"]["what"]
    assert where in line["error"]["where"]
    assert "of its own" in line["error"]["do"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "m.csv"),
        ("command,source,output\n", "m.csv"),
        ("command,source,output\nhf-to-tl,a,b,c\n", "line 2"),
        ("command,source,source\nhf-to-tl,a,b\n", "line 1"),
        ('{"command": "hf-to-tl"}\n{"command":\n', "line 2"),
        ("[1]\n", "line 1"),
        ("hf-to-tl,neo,tl\nhf-to-tl,neo,tl2\n", "line 1"),
    ],
)
def test_a_manifest_that_is_none(text: str, where: str) -> None:
    Path("m.csv").write_text(text)
    (line,) = batch("m.csv", code=2)
    assert where in line["error"]["where"]


def test_lines_end_where_json_lines_do() -> None:
    """A name may hold what ends a line for Python alone."""
    checkpoints(1)
    names = ["a\u2028b", "c\x85d", "e\u2029f"]
    rows = [row("runs/checkpoint-1", name) for name in names]
    text = "\r\n".join(json.dumps(cells, ensure_ascii=False) for cells in rows)
    Path("m.jsonl").write_text(text, encoding="utf-8", newline="")
    lines = batch("m.jsonl")
    assert [line["output"] for line in lines[:-1]] == names
    assert [line["line"] for line in lines[:-1]] == [1, 2, 3]


def test_not_every_line_of_what_is_no_manifest() -> None:
    Path("m.csv").write_text("command\n" + "x\n" * 100_000)
    start = time.monotonic()
    (line,) = batch("m.csv", code=2)
    assert time.monotonic() - start < 10
    assert "After 100 such findings" in line["error"]["what"]
    assert len(line["lines"]) == 100


def test_what_fails_stops_nothing_else() -> None:
    checkpoints(1, 2, 3)
    weights = Path("runs/checkpoint-2/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    path = manifest(row(), row("runs/not/there", "tl/nothing"))
    lines = batch(path, code=3)
    assert status(lines) == {
        "checkpoint-1": "converted", "checkpoint-2": "failed", "checkpoint-3": "converted",
        "there": "failed",
    }  # fmt: skip
    assert lines[1]["error"]["type"] == "CorruptFile"
    assert lines[-1]["summary"]["failed"] == {"transient": 0, "permanent": 2}
    assert sorted(os.listdir("tl")) == ["checkpoint-1", "checkpoint-3"]
    shutil.rmtree("tl")
    assert status(batch(path, "--stop", code=3)) == {
        "checkpoint-1": "converted", "checkpoint-2": "failed",
    }  # fmt: skip
    # The line that another process was at is let go, and nothing of it stays.
    batch(manifest(row("runs/not/there", "tl/0"), row()), "--stop", "--jobs", 2, code=3)
    assert not any(name.startswith(".") for name in os.listdir("tl"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        OSError(errno.ESTALE, "Stale file handle", "x"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset"),
        MemoryError("12 GB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=repr,
)
def test_what_may_pass_is_told_apart(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints(1, 2)
    path = manifest(row())
    run = converter.convert.run

    def breaks(request: Any, source: Any, output: Path) -> Any:
        if output.name == "checkpoint-1":
            raise error
        return run(request, source, output)

    with monkeypatch.context() as patch:
        patch.setattr(converter.batch.job, "run", breaks)
        lines = batch(path, code=75)
    assert [line.get("transient") for line in lines[:-1]] == [True, None]
    assert lines[-1]["summary"]["failed"] == {"transient": 1, "permanent": 0}
    assert status(batch(path)) == {"checkpoint-1": "converted", "checkpoint-2": "there"}


def test_the_exit_code_says_whether_to_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints(1, 2)
    Path("runs/checkpoint-2/config.json").write_text("{")
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    with monkeypatch.context() as patch:
        patch.setattr(converter.batch.job, "run", lambda *_: (_ for _ in ()).throw(full))
        both = batch(manifest(row()), code=75)[-1]
    assert both["summary"]["failed"] == {"transient": 1, "permanent": 1}
    assert batch(manifest(row()), code=3)[-1]["summary"]["converted"] == 1


def test_a_place_that_leads_nowhere_fails_its_line_alone(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints(1)
    monkeypatch.setenv("HOME", str(there / "home"))
    Path("loop").symlink_to("loop")
    path = manifest(
        row("~nobody-of-this-name/x", "a"), row("runs/checkpoint-1", "loop/x"),
        row("runs/checkpoint-1", "~/{name}"),
    )  # fmt: skip
    *lines, _ = batch(path, code=3)
    assert [line["status"] for line in lines] == ["failed", "failed", "converted"]
    assert Path("home/checkpoint-1/neoconvert.json").exists()
    assert sorted(os.listdir()) == ["home", "loop", "manifest.jsonl", "runs"]


def test_equal_sources_are_reported() -> None:
    checkpoints(1, 2)
    shutil.copytree("runs/checkpoint-1", "runs/checkpoint-3")
    for _ in range(2):  # converted, and there
        lines = batch(manifest(row()))
        same_as = {Path(x["source"]).name: x["same_weights_as"] for x in lines[:-1]}
        assert same_as == {
            "checkpoint-1": None, "checkpoint-2": None, "checkpoint-3": "runs/checkpoint-1",
        }  # fmt: skip
        assert lines[-1]["summary"]["same_weights"] == [["runs/checkpoint-1", "runs/checkpoint-3"]]


def test_dry_run() -> None:
    checkpoints(1, 2)
    batch(manifest(row("runs/checkpoint-1")))
    before = sorted(Path().rglob("*"))
    assert status(batch(manifest(row()), "--dry-run")) == {
        "checkpoint-1": "there", "checkpoint-2": "planned",
    }  # fmt: skip
    assert sorted(Path().rglob("*")) == before


def test_verified_with_a_report() -> None:
    checkpoints(1)
    asked = row(verify=True, effort="quick", report="{name}.html")
    (line, _) = batch(manifest(asked))
    assert line["conversion"]["verification"]["passed"] is True
    assert "<html" in Path("checkpoint-1.html").read_text()
    assert status(batch(manifest(asked | {"report": None}))) == {"checkpoint-1": "there"}


def test_what_a_person_reads() -> None:
    checkpoints(1, 2)
    shutil.copytree("runs/checkpoint-1", "runs/checkpoint-3")
    Path("runs/checkpoint-2/config.json").write_text("{")
    path = str(manifest(row()))
    result = CliRunner().invoke(main, ["batch", path])
    assert result.exit_code == 3
    assert result.stderr == ""
    assert "✗ runs/checkpoint-2 → tl/checkpoint-2: permanent\n    line 1: " in result.stdout
    assert "2 converted, 1 failed for good, in" in result.stdout
    assert "1 source has the weights of another:\n  runs/checkpoint-1 = runs/checkpoint-3" in result.stdout  # fmt: skip
    result = CliRunner().invoke(main, ["batch", path, "--quiet"])
    assert (result.exit_code, result.stdout) == (3, "")
    assert [line[:5] for line in result.stderr.splitlines()] == ["Error", "   in", "   do"]


def test_defaults_of_a_project_are_for_lines_too() -> None:
    checkpoints(1)
    Path("pyproject.toml").write_text("[tool.neoconvert]\nlayout = 'hooked'\nprocess = 'default'\n")
    path = manifest(row())
    said = CliRunner().invoke(main, ["batch", str(path)])
    assert "hf-to-tl, from pyproject.toml: --layout hooked --process default\n" in said.stdout
    record = json.loads(Path("tl/checkpoint-1/neoconvert.json").read_text())
    assert (record["steps"][0], record["output"]["layout"]) == ("fold_ln", "hooked")
    assert status(batch(path)) == {"checkpoint-1": "there"}
    Path("pyproject.toml").write_text("[tool.neoconvert]\nlayout = 'brigde'\n")
    refused = CliRunner().invoke(main, ["batch", str(path)])
    assert refused.exit_code == 2
    assert "layout cannot be 'brigde'" in refused.stderr


def test_two_at_a_time() -> None:
    checkpoints(*range(6))
    weights = Path("runs/checkpoint-2/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    lines = batch(manifest(row()), "--jobs", 2, code=3)
    assert Counter(status(lines).values()) == {"converted": 5, "failed": 1}
    alone = batch(manifest(row(output="alone/{name}")), code=3)
    digests = [{x["output"][-1]: x["source_sha256"] for x in ran[:-1]} for ran in (lines, alone)]
    assert digests[0] == digests[1]
    for step in (0, 1, 3, 4, 5):
        assert same(*(read_all(Path(f"{at}/checkpoint-{step}")) for at in ("tl", "alone")))


def test_closed_from_the_start() -> None:
    """No pipe between processes gets the number of stdout, which a worker gives to stderr."""
    checkpoints(1, 2)
    command = [sys.executable, "-m", "converter", "batch", str(manifest(row())), "--jobs", "2"]
    env = {**os.environ, "PYTHONPATH": str(Path(converter.__file__).parents[1])}
    done = subprocess.run(
        ["bash", "-c", '"$@" <&- >&-', "-", *command], capture_output=True, text=True, env=env
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir("tl")) == ["checkpoint-1", "checkpoint-2"]


PROGRAM = """
import os, sys, time
from converter.checkpoint.writer import Writer
write = Writer.write
def slow(self, *args):
    if "checkpoint-2" in str(self.directory):
        open("reached", "w").close()
        ACTION
    write(self, *args)
Writer.write = slow
from converter.cli import main
if __name__ == "__main__":
    main()
"""


def start(action: str, *arguments: object) -> subprocess.Popen[str]:
    Path("program.py").write_text(PROGRAM.replace("ACTION", action))
    root = str(Path(converter.__file__).parents[1])
    command = [sys.executable, "program.py", "batch", *map(str, arguments), "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle(sign: signal.Signals, jobs: int) -> None:
    checkpoints(1, 2, 3)
    path = manifest(row())
    with start("time.sleep(60)", path, "--jobs", jobs) as running:
        assert running.stdout is not None
        assert json.loads(running.stdout.readline())["output"] == "tl/checkpoint-1"
        deadline = time.monotonic() + 60
        while not Path("reached").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        running.send_signal(sign)
        _, err = running.communicate(timeout=30)
    assert running.returncode == (-9 if sign == signal.SIGKILL else 128 + sign)
    assert "Traceback" not in err
    if sign != signal.SIGKILL:
        assert "tl/checkpoint-1" in err
    deadline = time.monotonic() + 20
    while (sign, jobs) != (signal.SIGKILL, 1) and any(n.startswith(".") for n in os.listdir("tl")):
        assert time.monotonic() < deadline, "what was begun is not tidied up"
        time.sleep(0.05)
    before = {name: data for name, data in files().items() if "/checkpoint-1/" in name}
    again = status(batch(path))
    assert again["checkpoint-1"] == "there"
    assert again["checkpoint-2"] == "converted"
    assert {name: data for name, data in files().items() if "/checkpoint-1/" in name} == before
    assert sorted(os.listdir("tl")) == [f"checkpoint-{i}" for i in (1, 2, 3)]


def test_what_a_dead_run_left_goes_where_nothing_is_left_to_do() -> None:
    checkpoints(1)
    batch(manifest(row()))
    os.mkdir("tl/.checkpoint-1.abcdefgh.partial")
    batch(manifest(row()), "--dry-run")
    assert len(os.listdir("tl")) == 2
    assert status(batch(manifest(row()))) == {"checkpoint-1": "there"}
    assert os.listdir("tl") == ["checkpoint-1"]


def test_a_worker_that_is_killed_takes_none_along() -> None:
    """As the system does where memory is short."""
    checkpoints(1, 2, 3, 4)
    path = manifest(row())
    with start("os.kill(os.getpid(), 9)", path, "--jobs", 2) as running:
        out, err = running.communicate(timeout=60)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [error.message for line in lines for error in VALIDATOR.iter_errors(line)] == []
    assert running.returncode == 75, err
    assert status(lines) == {
        "checkpoint-1": "converted", "checkpoint-2": "failed", "checkpoint-3": "converted",
        "checkpoint-4": "converted",
    }  # fmt: skip
    lost = next(line for line in lines if line.get("status") == "failed")
    assert "SIGKILL" in lost["error"]["what"]
    assert lost["transient"] is True
    assert status(batch(path))["checkpoint-2"] == "converted"
    assert sorted(os.listdir("tl")) == [f"checkpoint-{i}" for i in (1, 2, 3, 4)]
