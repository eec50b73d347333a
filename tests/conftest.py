"""What all suites share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests import browser

# The same examples in every run, so that a failure is the change's. Others are drawn with
# --hypothesis-profile=random.
settings.register_profile("suite", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("suite")

# A shell's background job ignores Ctrl-C, and so would every command that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models: threads that wait for one another cost more than the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    """A page of a real browser."""
    path, why = browser.find()
    if path is None:
        pytest.skip(why)
    with browser.page(path, tmp_path_factory.mktemp("profile")) as tab:
        yield tab
