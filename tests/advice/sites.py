"""Every place in converter/ that gives an advice: a call with `do=`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import converter

ROOT = Path(converter.__file__).parent


@dataclass(frozen=True)
class Site:
    file: str
    first: int
    last: int
    says: tuple[str, ...]
    """The constant parts of its first line; without any, the function that it is in."""

    def __str__(self) -> str:
        return f"{self.file}, line {self.first}: {' … '.join(self.says)}"


@cache
def sites() -> tuple[Site, ...]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [_site(path, call, function) for function, call in _calls(tree, "")]
    return tuple(found)


def _calls(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
    if isinstance(node, ast.FunctionDef):
        function = node.name
    if isinstance(node, ast.Call) and any(word.arg == "do" for word in node.keywords):
        yield function, node
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, function)


def _site(path: Path, call: ast.Call, function: str) -> Site:
    says = tuple(
        part.value
        for part in ast.walk(call.args[0])
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and len(part.value) > 3
    )
    file = path.relative_to(ROOT).as_posix()
    return Site(file, call.lineno, call.end_lineno or call.lineno, says or (function,))


def of(file: str, says: str) -> list[Site]:
    """The sites that a row stands for: one, or some that say the same."""
    return [s for s in sites() if s.file == file and any(says in part for part in s.says)]
