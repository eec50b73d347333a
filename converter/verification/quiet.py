"""The libraries without what they print."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the libraries print while they load. stdout is the user's JSON."""
    from transformers.utils import logging as library

    chatter: Any = library  # its functions carry no types
    root = logging.getLogger()
    level, verbosity = root.level, chatter.get_verbosity()
    bars = chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
