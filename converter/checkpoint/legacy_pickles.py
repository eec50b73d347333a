"""What torch.save wrote before it wrote archives (torch 1.5 and earlier).

torch makes memory for each storage that such a file names, of any size, and fills those that a second
list names. One that this list leaves out would hold whatever was in the process's memory before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.errors import CorruptFile

if TYPE_CHECKING:
    import torch


def load(path: Path) -> Any:
    """What the file holds, with `weights_only=True`.

    Raises:
        CorruptFile: it does not hold the bytes of all its tensors. Besides, whatever torch raises.
    """
    content, storages = _filled(path, 0)
    blank = [not storage.any() for storage in storages]
    if any(blank):  # zeros of the file's own, or none of its bytes
        _, again = _filled(path, 255)
        if any(b and bool((storage == 255).all()) for b, storage in zip(blank, again, strict=True)):
            raise _lacking(path)
    return content


def _filled(path: Path, value: int) -> tuple[Any, list[torch.Tensor]]:
    """The content, and every storage of it as bytes, each of `value` until the file fills it."""
    import torch

    left, storages = path.stat().st_size, []

    def place(storage: Any, _location: str) -> Any:
        nonlocal left
        left -= storage.nbytes()
        if left < 0:
            raise _lacking(path)
        found = torch.empty(0, dtype=torch.uint8).set_(storage).fill_(value)
        if found.numel():
            storages.append(found)
        return storage

    return torch.load(path, map_location=place, weights_only=True), storages


def _lacking(path: Path) -> CorruptFile:
    return CorruptFile(
        "The file does not hold the bytes of all its tensors.",
        where=str(path),
        do="Download or save it again.",
    )
