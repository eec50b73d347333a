"""Pages for people: HTML in one file that loads nothing, and in which nothing but its own style and
script acts. What a page says may be anyone's words."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from converter.checkpoint.publish import adding
from converter.checkpoint.record import UNSEALED, sealed
from converter.output import inert

MARK = b"<!doctype html>"
"""At the beginning of a page, which may be replaced by another."""
Filters = dict[str, Callable[..., Any]]


def render(
    package: str,
    template: str,
    script: str = "",
    *,
    filters: Filters,
    **facts: Any,
) -> str:
    """A page from a package's template, which extends base.html, and its script. Same facts, same bytes.

    The facts name a `tone`, which templates must not set: "pass" makes the page green, "fail" red and
    "open" neither. The template is also given `style`, `script` and `policy`, which lets these two act
    and nothing else that got onto the page.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: _asset(__package__, name)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_inert,
    )
    environment.filters |= filters
    style, code = _asset(__package__, "page.css"), _asset(package, script) if script else ""
    allowed = f" script-src '{_hash(code)}';" if code else ""
    page: str = environment.from_string(_asset(package, template)).render(
        **facts,
        style=Markup(style),
        script=Markup(code),
        policy=f"default-src 'none'; style-src '{_hash(style)}';{allowed}"
        " img-src data:; base-uri 'none'; form-action 'none'",
    )
    return page


def write(path: Path, page: str) -> None:
    """Put a page at `path`, which holds the old page or the whole new one.

    Raises:
        OutputExists: there is a file that is no page of ours, or was changed since.
    """
    content = f"{page}<!-- {UNSEALED} -->\n".encode("utf-8", "replace")
    with adding(path, mark=MARK, overwrite=True) as stage:
        stage.path.write_bytes(sealed(content))


def _inert(value: Any) -> Any:
    """Names and paths may be anyone's: without control characters and marks of direction."""
    return inert(value, keep="\n\t") if type(value) is str else value


@functools.cache
def _asset(package: str, name: str) -> str:
    return (files(package) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names inline code."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
