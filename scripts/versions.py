"""The lowest and the newest set of versions: installed, and run. The standard library only."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETS = ("lowest", "newest")
TESTS = (
    "tests/adapter", "tests/clients/test_transformer_lens_files.py",
    "tests/onnx_/test_function.py", "tests/onnx_/test_opening.py", "tests/onnx_/test_reading.py",
    "tests/processing/test_against_transformer_lens.py", "tests/processing/test_portable.py",
    "tests/test_api.py", "tests/test_bad_input.py", "tests/test_cli.py", "tests/test_config.py",
    "tests/test_export.py", "tests/test_hub.py", "tests/test_in_memory.py",
    "tests/test_open_model.py", "tests/docs/test_code.py", "tests/test_recognising.py",
    "tests/test_reversing.py", "tests/test_schema.py", "tests/test_sources.py",
    "tests/verification/test_probes.py", "tests/verification/test_program.py",
    "tests/verification/test_runtimes.py",
)  # fmt: skip
"""What calls a library: files of every kind, processing, verification in each runtime."""

TOOLS = ("pytest", "pytest-xdist", "hypothesis", "jsonschema", "pyyaml", "peft", "onnxscript")
"""What the tests take. The other tools of the dev extra have minima of their own."""


def minima() -> dict[str, str]:
    """The least version of each requirement, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("dependencies = [", 1)[1].split("\n]", 1)[0]
    lines = [line for line in map(str.strip, block.splitlines()) if line[:1] == '"']
    found = dict(re.findall(r'^"([\w-]+)>=([\d.]+)",$', "\n".join(lines), re.MULTILINE))
    if len(found) != len(lines):
        raise SystemExit("pyproject.toml: a requirement that is not NAME>=VERSION")
    return found


def made(name: str, torch: str | None) -> Path | None:
    """The interpreter of a set's environment, made anew; None where pip finds no such set."""
    place = ROOT / "build" / "versions" / name
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    pinned = minima() if name == "lowest" else {"torch": torch} if torch else {}
    (place / "set.txt").write_text("".join(f"{n}=={v}\n" for n, v in pinned.items()))
    install = [str(place / "bin/python"), "-m", "pip", "install", "-c", str(place / "set.txt")]
    with (place / "install.log").open("w") as log:
        for what in (["torch"], ["-e", ".", *TOOLS]):
            done = subprocess.run([*install, *what], cwd=ROOT, stdout=log, stderr=log, check=False)
            if done.returncode:
                print(f"{name}: pip cannot install it; see {log.name}", file=sys.stderr)
                return None
    return place / "bin/python"


def runs(name: str, python: Path) -> list[str]:
    """What of the set does not work."""
    place = python.parent.parent
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    commands = {
        "pip check": ["pip", "check"],
        "demo": ["converter", "demo", str(place / "demo")],
        "tests": ["pytest", "-n", "2", *TESTS],
    }
    failed = []
    for what, arguments in commands.items():
        print(f"{name}: {what}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [python, "-m", *arguments], cwd=ROOT, env=os.environ | quiet, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        print("".join(done.stdout.splitlines(keepends=True)[-3:]), file=sys.stderr)
        if done.returncode:
            log = place / f"{what}.log"
            log.write_text(done.stdout)
            print(f"{name}: {what} failed; see {log}", file=sys.stderr)
            failed.append(what)
    return failed


def versions(python: Path) -> dict[str, str]:
    code = (
        "import json; from importlib.metadata import version;"
        f" print(json.dumps({{name: version(name) for name in {list(minima())}}}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code], text=True))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/versions")
    parser.add_argument("sets", nargs="*", metavar="|".join(SETS))
    parser.add_argument("--torch", metavar="VERSION", help="of the newest set")
    asked = parser.parse_args()
    if unknown := set(asked.sets) - set(SETS):
        parser.error(f"no such set: {', '.join(sorted(unknown))}")
    columns: dict[str, dict[str, str]] = {}
    failed = False
    for name in asked.sets or SETS:
        python = made(name, asked.torch)
        if python is None:
            failed = True
            continue
        broken = runs(name, python)
        failed |= bool(broken)
        columns[name] = versions(python) | {"": f"{', '.join(broken)} failed" if broken else "✓"}
    if not columns:
        return 1
    today = datetime.datetime.now(datetime.timezone.utc).date()
    print(f"Python {platform.python_version()}, {today}\n")
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in (*minima(), ""):
        cells = " | ".join(column[row] for column in columns.values())
        print(f"| {row or 'pip check, demo, tests'} | {cells} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
