"""Tokenizers, texts, configs given by name, code beside a model, and odd names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from converter import demo
from tests.hostile import sound
from tests.hostile.damage import JSON, NO_FILE, NONSENSE, ODD_JSON, Bytes, rewrite
from tests.hostile.json_files import EITHER
from tests.hostile.trial import Input, Make

CONVERT = ["hf-to-tl", "src", "out", "--no-verify"]
ROUND = ["verify", "src", "src", "--effort", "quick"]


def inputs() -> Iterator[Input]:
    yield from _tokenizers()
    yield from _texts()
    yield from _given_configs()
    yield from _places()


def _demo(place: Path) -> Path:
    return sound.copied(lambda: Path(demo.MODEL), place)


def _tokenizers() -> Iterator[Input]:
    for name, damage in {**NONSENSE, **JSON, **ODD_JSON}.items():
        yield _tokenizer(name, "tokenizer.json", damage, ROUND)
        yield _tokenizer(name, "tokenizer_config.json", damage, CONVERT)
    for field, value in {
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "tokenizer_class": "evil.Tokenizer",
        "chat_template": "{% for i in range(10**10) %}x{% endfor %}",
        "name_or_path": "/etc",
    }.items():
        yield _tokenizer(f"{field}", "tokenizer_config.json", _with(field, value), ROUND)
    for name, regex in {"a regex without end": "(a+)+$", "no regex": "(((("}.items():
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}  # fmt: skip
        yield _tokenizer(name, "tokenizer.json", _with("pre_tokenizer", split), ROUND)
    for name, other in NO_FILE.items():
        codes = EITHER if "elsewhere" not in name and "system" not in name else frozenset({3})
        for file in ("vocab.json", "merges.txt", "tokenizer.json"):
            yield _tokenizer_place(name, file, other, codes)


def _with(field: str, value: object) -> Bytes:
    return lambda data: json.dumps(json.loads(data) | {field: value}).encode()


def _tokenizer(name: str, file: str, damage: Bytes, command: list[str]) -> Input:
    def make(place: Path) -> list[str]:
        src = _demo(place / "src")
        rewrite(src / file, damage)
        (src / "evil.py").write_text("open('ran', 'w')")
        return command

    return Input("tokenizer files", f"{file}: {name}", make, EITHER)


def _tokenizer_place(
    name: str, file: str, other: Callable[[Path], object], codes: frozenset[int]
) -> Input:
    def make(place: Path) -> list[str]:
        path = sound.copied(sound.hf, place / "src") / file
        other(path)
        return CONVERT

    return Input("tokenizer files", f"{file}: {name}", make, codes)


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00once",
    "2 MiB": b"once upon a time " * 130_000,
    "50 MB": b"once upon a time " * 3_000_000,
}
ODD_TEXTS: dict[str, bytes] = {
    "null bytes": b"\0" * 1000,
    "escape sequences": b"\x1b]0;x\x07\x1b[2J" * 10,
    "marks of direction": "\u202e\u2066once".encode(),
    "cut within a character": "é".encode()[:1],
    "one long word": b"a" * 2000,
}


def _texts() -> Iterator[Input]:
    for name, text in TEXTS.items():
        yield _text(name, lambda path, text=text: path.write_bytes(text), frozenset({3}))  # type: ignore[misc]
    for name, text in ODD_TEXTS.items():
        yield _text(name, lambda path, text=text: path.write_bytes(text), EITHER)  # type: ignore[misc]
    for name, other in NO_FILE.items():
        if name != "a pipe":  # one may be meant, and waits for whoever writes
            codes = (
                frozenset({2, 3}) if "elsewhere" not in name and "system" not in name else EITHER
            )
            yield _text(name, other, codes)


def _text(name: str, write: Callable[[Path], object], codes: frozenset[int]) -> Input:
    def make(place: Path) -> list[str]:
        write(place / "text")
        model = str(demo.MODEL)
        return ["verify", model, model, "--effort", "quick", "--check", "function", "--text", "text"]  # fmt: skip

    return Input("--text", name, make, codes)


def _given_configs() -> Iterator[Input]:
    for name, damage in {**NONSENSE, **JSON}.items():
        yield _given(name, lambda path, damage=damage: rewrite(path, damage))  # type: ignore[misc]
    for name, other in NO_FILE.items():
        if name == "a pipe":  # one may be meant, and waits for whoever writes
            continue

        def place(path: Path, other: Callable[[Path], object] = other) -> None:
            path.unlink()
            other(path)

        yield _given(name, place, frozenset({2, 3}))


def _given(
    name: str, change: Callable[[Path], object], codes: frozenset[int] = frozenset({3})
) -> Input:
    def make(place: Path) -> list[str]:
        src = sound.copied(sound.hf, place / "src")
        (src / "config.json").rename(place / "given.json")
        change(place / "given.json")
        return ["hf-to-tl", "src/model.safetensors", "out", "--no-verify", "--cfg", "given.json"]

    return Input("--cfg", name, make, codes)


ODD_NAMES = [
    b"\x1b]0;x\x07\x1b[2J", b"a\n   do: rm -rf", b"[red]x[bold]", b"\xff\xfe", b" ", b"-x", b"%s%n", b"$(touch ran)",
    "\u202e\u2066".encode(), b"x" * 250, b"a;touch ran", b"'\"`", b"<script>alert(1)<",
]  # fmt: skip
CODE = ["numpy.py", "torch.py", "json.py", "modeling_gpt_neo.py", "conftest.py", "sitecustomize.py"]


def _places() -> Iterator[Input]:
    for odd in ODD_NAMES:
        yield _named(odd, sound=True)
        yield _named(odd, sound=False)
    for name in CODE:
        yield _with_code(name)
    makes: dict[str, Make] = {
        "no such place": lambda _: ["inspect", "./no such"],
        "a file in place of OUTPUT": _file_at_output,
        "a link in place of OUTPUT": _link_at_output,
        "OUTPUT in SOURCE": lambda p: _onto(p, "src/out"),
        "OUTPUT is SOURCE": lambda p: _onto(p, "src"),
        "a directory of itself": _circle,
        "a directory of 20,000 files": _crowd,
        "folders 500 deep": _depth,
    }  # fmt: skip
    for name, make in makes.items():
        codes = frozenset({2, 3})
        yield Input("names and places", name, make, codes)


def _sound(place: Path) -> Path:
    return sound.copied(sound.hf, place / "src")


def _named(name: bytes, *, sound: bool) -> Input:
    def make(place: Path) -> list[str]:
        src = place / os.fsdecode(name)
        _sound(place).rename(src)
        if not sound:
            (src / "config.json").write_text("{")
        return ["inspect", f"./{src.name}"] if sound else ["hf-to-tl", f"./{src.name}", "out"]

    shown = f"{repr(name)[:40]}, {'sound' if sound else 'broken'}"
    return Input("names and places", f"called {shown}", make, frozenset({0} if sound else {3}))


def _with_code(name: str) -> Input:
    def make(place: Path) -> list[str]:
        src = _sound(place)
        (src / name).write_text("open('ran', 'w')\nraise SystemExit(77)")
        (place / name).write_text("open('ran', 'w')\nraise SystemExit(77)")
        config = json.loads((src / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_gpt_neo.Model", "AutoConfig": "modeling_gpt_neo.C"}  # fmt: skip
        (src / "config.json").write_text(json.dumps(config))
        return ROUND

    return Input("names and places", f"{name} beside the weights", make, frozenset({0}))


def _onto(place: Path, output: str) -> list[str]:
    _sound(place)
    return ["hf-to-tl", "src", output, "--no-verify", "--overwrite"]


def _file_at_output(place: Path) -> list[str]:
    _sound(place)
    (place / "out").write_text("mine")
    return [*CONVERT, "--overwrite"]


def _link_at_output(place: Path) -> list[str]:
    _sound(place)
    (place / "mine").mkdir()
    (place / "mine/thesis").write_text("years")
    (place / "out").symlink_to("mine")
    return [*CONVERT, "--overwrite"]


def _circle(place: Path) -> list[str]:
    (place / "src").mkdir()
    (place / "src/src").symlink_to(".")
    return CONVERT


def _crowd(place: Path) -> list[str]:
    (place / "src").mkdir()
    for number in range(20_000):
        (place / "src" / f"{number}.json").touch()
    return CONVERT


def _depth(place: Path) -> list[str]:
    path = place / "src"
    for _ in range(500):
        path = path / "a"
        path.mkdir(parents=True)
    return CONVERT
