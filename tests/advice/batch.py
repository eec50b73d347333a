"""converter/batch and cli_manifest: manifests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from click.testing import CliRunner

from converter.batch import Job, running
from converter.batch import manifest as manifests
from converter.cli import main
from converter.errors import NeoconvertError
from tests.advice.making import convert, hf
from tests.advice.row import Asked, Follow, Row, again, run, write

BATCH = ["batch", "m.csv"]
HEAD = "command,source,output,layout,verify"
GOOD = f"{HEAD}\nhf-to-tl,m,out,bridge,no\n"


def manifest(text: str | bytes, name: str = "m.csv") -> Callable[[], list[str]]:
    def ask() -> list[str]:
        hf()
        write(name, text)
        return ["batch", name]

    return ask


def line(**cells: Any) -> str:
    full = {
        "command": "hf-to-tl",
        "source": "m",
        "output": "out",
        "layout": "bridge",
        "verify": False,
    }
    return json.dumps({k: v for k, v in (full | cells).items() if v is not None})


def rewritten(*lines: str) -> Follow:
    return again(lambda: write("m.csv", "\n".join(lines)))


def meant(**cells: Any) -> Callable[[str, Asked], Asked]:
    """The line, with what the advice says is meant."""

    def follow(do: str, asked: Asked) -> Asked:
        for name, value in cells.items():
            assert name in do or str(value).rpartition("-")[2] in do, do
        write("m.csv", line(**cells))
        return asked

    return follow


def _failed(*arguments: str) -> Callable[[], Any]:
    """A batch as a call that raises what its only line failed with."""

    def call() -> None:
        result = CliRunner().invoke(main, ["batch", "m.csv", "--json", *arguments])
        said = json.loads(result.stdout.splitlines()[0]).get("error")
        if said:
            raise Failed(said["what"], where=said["where"], do=said["do"])
        assert result.exit_code == 0, result.output

    return call


class Failed(NeoconvertError):
    """What a line failed with."""


def _there() -> Asked:
    hf()
    write("m.csv", GOOD)
    run(convert("--dtype", "bfloat16"))
    return _failed()


def _overwriting(do: str, _: Asked) -> Asked:
    assert "--overwrite" in do
    return _failed("--overwrite")


def _in_its_line(do: str, _: Asked) -> Asked:
    assert "overwrite" in do
    write("m.csv", f"{HEAD},overwrite\nhf-to-tl,m,out,bridge,no,true\n")
    return _failed()


def _killed() -> Asked:
    hf()

    def call() -> None:
        write("m.csv", GOOD)
        job = Job("m", Path("out"), mock.Mock(), 2)
        raise running._killed(job, -9)

    return call


def _fewer(do: str, _: Asked) -> Asked:
    assert "--jobs" in do
    return ["batch", "m.csv", "--jobs", "1"]


def _to_batch_itself(do: str, _: Asked) -> Asked:
    write("m.csv", line())
    return ["batch", *[word for word in do.split() if word.startswith("--")], "m.csv"]


def _one_after_the_other(_: str, asked: Asked) -> Asked:
    write("m.csv", line())
    run(asked)
    write("m.csv", line(command="tl-to-hf", source="out", output="back", layout=None))
    return asked


RUNNING, MANIFEST, JOB, CLI = (
    "batch/running.py",
    "batch/manifest.py",
    "batch/job.py",
    "cli_manifest.py",
)
SOUND = rewritten(GOOD)

ROWS = [
    Row(JOB, "OUTPUT is there, and is not what is asked for", _there, _overwriting),
    Row(JOB, "OUTPUT is there, and is not what is asked for", _there, _in_its_line),
    Row(MANIFEST, "The manifest cannot be read", manifest(b"\xff\xfe\0"), SOUND, "in UTF-8"),
    Row(MANIFEST, "The manifest is over", manifest(f"{HEAD}\n".ljust(manifests._MOST + 1)), SOUND),
    Row(MANIFEST, "There is nothing to do", manifest(HEAD), SOUND),
    Row(MANIFEST, " of the manifest ", manifest(f"{HEAD},layout\n"), SOUND),
    Row(MANIFEST, " of the manifest ", manifest('{"command": \n'), rewritten(line()), "JSON object"),
    Row(MANIFEST, "Nothing matches", manifest(line(source="n*")), rewritten(line(source="m*")), "Check the pattern"),
    Row(MANIFEST, " stands for nothing here", manifest(line(output="out/{nam}")), meant(output="out-{name}")),
    Row(RUNNING, "The process that did this was ended", _killed, _fewer),
    Row(CLI, "There is no source", manifest(line(source=None)), rewritten(line())),
    Row(CLI, "There is no output", manifest(line(output=None)), meant(output="out-{name}")),
    Row(CLI, "The revision is named twice", manifest(line(source="me/neo@main", revision="v1")), rewritten(line())),
    Row(CLI, "_job", manifest(line(dtype="float8")), lambda do, _: do.removeprefix("See neoconvert ").rstrip(".").split(), "--help"),
    Row(CLI, "_refused", manifest(line(source=None)), rewritten(line())),
    Row(CLI, " holds a character that no path", manifest(line(output="o\0ut")), rewritten(line()), "Leave that character out"),
    Row(CLI, " is no command of a batch", manifest(line(command="hf-to-lt")), meant(command="hf-to-tl")),
    Row(CLI, "There is no command.", manifest(line(command=None)), meant(command="hf-to-tl")),
    Row(CLI, " is no option of this command", manifest(line(layuot="bridge")), meant(layout="bridge")),
    Row(CLI, " is no option of this command", manifest(line(quiet=True)), _to_batch_itself, "--quiet"),
    Row(CLI, " is no option of this command", manifest(line(reverse="exact")), meant(reverse="")),
    Row(CLI, " is no option of this command", manifest(line(flavour="sweet")), meant(layout="bridge")),
    Row(CLI, " is ", manifest(line(source=["m"])), rewritten(line())),
    Row(CLI, " is ", manifest(line(verify="maybe")), meant(verify="false")),
    Row(CLI, "jobs_of", manifest(line() + "\n" + line()), rewritten(line(output="{name}-1"), line(output="{name}-2")), "{name}"),
    Row(CLI, "jobs_of", manifest(line() + "\n" + line(command="tl-to-hf", source="out", output="back", layout=None)), _one_after_the_other, "second manifest"),
]  # fmt: skip
