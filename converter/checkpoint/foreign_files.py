"""Naming what a file is that is no weight file which neoconvert reads, and what to do.

Each kind is one that people have been seen to pass to such a converter. The advice is a command
where there is one.
"""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

from converter.checkpoint.foreign_folders import put_together
from converter.checkpoint.foreign_formats import UNPACK, Advice, by_beginning, by_name
from converter.checkpoint.recipes import quoted
from converter.checkpoint.standard import PICKLES, holds_weights
from converter.errors import BadInput, CorruptFile, SourceNotFound, UnsafeReference

_LFS = "version https://git-lfs.github.com/spec/"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9c"  # torch.save before 1.6
_REFERENCE = b'{"__metadata__":{"neoconvert_reference":'
_HEAD, _LARGEST = 512, 128 * 2**20


def refuse_foreign_file(path: Path) -> None:
    """
    Raises:
        CorruptFile: a file whose first bytes show that it is not what its suffix says.
        SourceNotFound: not a file: a pipe or a device.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise SourceNotFound(
            "This is a pipe or a device, not a file.",
            where=str(path),
            do="Write what it holds to a file first, and give that.",
        )
    head = _head(path)
    if error := pointer(path, head):
        raise error
    weights = path.suffix in (".safetensors", *PICKLES)
    found = by_beginning(head) or (_text(head) if weights else None)
    if found is None and head[:4] == b"PK\3\4" and weights:
        found = _zip(path)
    if head[8:].startswith(_REFERENCE):
        found = (
            "This is a reference file, which holds no weights.",
            f"verify takes it in ORIGINAL's place: neoconvert verify {quoted(path)} ARTIFACT",
        )
    elif found is None and head[8:9] == b"{" and path.suffix != ".safetensors":
        found = "The file is one of safetensors, whatever its name says.", _named(path, ".safetensors")  # fmt: skip
    if found:
        raise CorruptFile(found[0], where=str(path), do=found[1])


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _text(head: bytes) -> Advice | None:
    """What a server says in place of a file is saved under the file's name."""
    if not head:
        return "The file is empty.", "Download or save it again."
    text = head.decode("utf-8", "replace")
    if not all(c.isprintable() or c.isspace() for c in text) or "\ufffd" in text[:-1]:
        return None
    begins = text.strip().splitlines()[0][:60] if text.strip() else ""
    return f"The file is text, not weights: {begins!r}.", "Download or save it again."


def _zip(path: Path) -> Advice | None:
    """torch's files are zip archives, and so are NumPy's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return None  # the reader says what is wrong
    if any(name.endswith("/data.pkl") for name in names):
        if path.suffix in PICKLES:
            return None
        return _saved_by_torch(path)
    if any(name.endswith(".npy") for name in names):
        return "The file is NumPy's (.npz), whatever its name says.", _named(path, ".npz")
    return "The file is a zip archive.", UNPACK


def _saved_by_torch(path: Path) -> Advice:
    return "The file is one of torch.save, whatever its name says.", _named(path, ".bin")


def _named(path: Path, suffix: str) -> str:
    """What to call a file. The hub's cache has its files under digests: other names lead to them."""
    if path.parent.name == "blobs":
        links = sorted(path.parent.parent.glob("snapshots/*/*"))
        if here := next(
            (link for link in links if os.path.realpath(link) == os.path.realpath(path)), None
        ):
            return (
                f"Give the snapshot in the hub's cache that it is a file of: {quoted(here.parent)}"
            )
    return f"Rename it to {path.stem}{suffix}."


def pointer(path: Path, head: bytes | str) -> CorruptFile | None:
    """The error for a Git LFS pointer: three lines of text where the file itself should be."""
    text = head if isinstance(head, str) else head.decode("utf-8", "replace")
    if not text.startswith(_LFS):
        return None
    return CorruptFile(
        "The file is a Git LFS pointer: the repository was cloned without its large files.",
        where=str(path),
        do=f"Run `git lfs pull` in {path.parent}, or download the model with `hf download`.",
    )


def refuse_pointers(files: list[Path]) -> None:
    """
    Raises:
        CorruptFile: a file that would be copied is a Git LFS pointer.
    """
    for path in files:
        if error := pointer(path, _head(path)):
            raise error


def refuse_to_copy(files: list[Path], directory: Path) -> None:
    """
    Args:
        directory: whose files they are, below it or in it.

    Raises:
        UnsafeReference: a file that would be copied is a link out of its directory: to a secret,
            say, which OUTPUT would publish.
        CorruptFile: it is larger than any tokenizer's.
    """
    for path in files:
        if (size := path.stat().st_size) > _LARGEST:
            raise CorruptFile(
                f"{path.name} is {size:,} bytes large, as no tokenizer's file is.",
                where=str(path),
                do="Download it again, or take it out of the directory.",
            )
        if _leads_away(path, directory):
            link = path if path.is_symlink() else path.parent
            own, there = quoted(link), quoted(link.resolve())
            raise UnsafeReference(
                f"{link.name} is a link to a file elsewhere, which would be copied into OUTPUT."
                if link == path
                else f"{link.name} is a link to a folder elsewhere; its files would be copied into OUTPUT.",
                where=f"{link} -> {link.resolve()}",
                do=f"If it is meant to be: cp --remove-destination {there} {own}"
                if link == path
                else f"If it is meant to be: rm {own} && cp -r {there} {own}",
            )


def _leads_away(path: Path, directory: Path) -> bool:
    """Whether a file lies outside the directory. The hub's cache keeps those of snapshots/COMMIT
    in blobs."""
    home, target = directory.resolve(), path.resolve()
    caches = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    return not any(target.is_relative_to(place) for place in (home, *caches))


def not_weights(path: Path) -> BadInput:
    """The error for a file whose suffix is none that is read."""
    kind = f"A file with the suffix {path.suffix!r}" if path.suffix else "A file without a suffix"
    what = f"{kind} is not one that neoconvert reads weights from."
    do = f"Give a .safetensors file, or {', '.join(PICKLES)} with --allow-pickle."
    head = _head(path)
    if found := by_name(path):
        what, do = found
    elif path.suffix == ".distcp":
        what = "The file is a part of a distributed checkpoint (DCP): each file has a part of it."
        do = put_together(path.parent)
    elif path.suffix == ".onnx":
        do = "Give the checkpoint that the graph was exported from; `verify` and `inspect` read graphs."
    elif head.startswith(_LEGACY):
        what, do = _saved_by_torch(path)
    elif head[:2] == b"PK" and (found := _zip(path)):
        what, do = found
    elif head[:1] == b"\x80":
        what = "The file is a pickle of Python's own, which is not read."
        do = "Where it was made, save with torch: torch.save(model.state_dict(), 'model.pt')."
    elif holds_weights(path.parent):
        do = f"Name the directory that it is in: {quoted(path.parent)}"
    return CorruptFile(what, where=str(path), do=do)
