"""What all suites share."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from tests import browser

if TYPE_CHECKING:
    from tests.verification.faulty import Workshop

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


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Verification collects garbage twice; the libraries, imported on the way, are none."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def workshops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workshop]:
    """Where faults are put into artifacts, by the name of the model."""
    from tests.verification.faulty import Workshop

    directory = tmp_path_factory.mktemp("faults")
    return {name: Workshop(directory / name, name) for name in ("tied", "untied", "quiet")}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    """A page of a real browser."""
    path, why = browser.find()
    if path is None:
        pytest.skip(why)
    with browser.page(path, tmp_path_factory.mktemp("profile")) as tab:
        yield tab
