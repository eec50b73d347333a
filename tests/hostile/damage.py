"""What can be done to any file: other bytes in its place, or no file at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np

Bytes = Callable[[bytes], bytes]
Place = Callable[[Path], object]

DEEP = 200_000


def flipped(seed: int, begin: int = 0, end: int | None = None) -> Bytes:
    """A few bytes between two offsets, changed."""

    def change(data: bytes) -> bytes:
        rng, raw = np.random.default_rng(seed), bytearray(data)
        last = min(end or len(raw), len(raw))
        for _ in range(int(rng.integers(1, 4))):
            raw[int(rng.integers(begin, last))] = int(rng.integers(0, 256))
        return bytes(raw)

    return change


def cut(share: float) -> Bytes:
    return lambda data: data[: int(len(data) * share)]


NONSENSE: dict[str, Bytes] = {
    "empty": lambda _: b"",
    "one byte": lambda _: b"{",
    "zeros": lambda _: b"\0" * 4096,
    "all ones": lambda _: b"\xff" * 4096,
    "HTML": lambda _: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a Git LFS pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a zip archive": lambda _: b"PK\x05\x06" + b"\0" * 18,
    "a gzip stream": lambda _: b"\x1f\x8b\x08\0" + b"\0" * 60,
    "a pickle": lambda _: b"\x80\x04cos\nsystem\nX\x09\0\0\0touch ran\x85R.",
    "a program": lambda _: b"#!/bin/sh\ntouch ran\n",
    "noise": lambda _: np.random.default_rng(0).bytes(4096),
}

JSON: dict[str, Bytes] = {
    "cut in half": cut(0.5),
    "a list": lambda _: b"[]",
    "null": lambda _: b"null",
    "a number": lambda _: b"1e999",
    "text": lambda _: b'"config"',
    "deep lists": lambda _: b"[" * DEEP + b"]" * DEEP,
    "deep objects": lambda _: b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep, beside what is there": lambda data: data.rstrip()[:-1] + b',"x":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "over 64 MiB": lambda data: data + b" " * (65 * 2**20),
    "an integer of a million digits": lambda _: b'{"a":' + b"9" * 10**6 + b"}",
    "not UTF-8": lambda data: data + b'\xff\xfe"\xc3\x28"',
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "a null byte inside": lambda data: data[:20] + b"\0" + data[20:],
    "comments": lambda data: b"// mine\n" + data,
    "two documents": lambda data: data + data,
}  # fmt: skip
"""Never a sound document."""

ODD_JSON: dict[str, Bytes] = {
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "NaN and Infinity": lambda data: data.rstrip()[:-1] + b',"x":NaN,"y":-Infinity,"z":1e999}',
    "every key twice": lambda data: data.rstrip()[:-1] + b"," + data.strip()[1:],
    "lone surrogates": lambda data: data.rstrip()[:-1] + b',"\\ud800":"\\udfff"}',
    "escape sequences": lambda data: data.rstrip()[:-1] + b',"\\u001b]0;x\\u0007":"\\u202e\\n   do: rm"}',
    "100,000 more keys": lambda data: data.rstrip()[:-1] + b"".join(b',"k%d":%d' % (i, i) for i in range(100_000)) + b"}",
    "a long string": lambda data: data.rstrip()[:-1] + b',"x":"' + b"a" * 10**7 + b'"}',
}  # fmt: skip
"""Sound or not, as one reads it."""


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name must be short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def _holes(path: Path) -> None:
    """Four gigabytes that take no space."""
    with open(path, "wb") as file:
        file.truncate(2**32)


NO_FILE: dict[str, Place] = {
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a socket": _socket,
    "4 GB of holes": _holes,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to zeros without end": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to text elsewhere": lambda path: path.symlink_to("/etc/passwd"),
    "a link to a file of the system's": lambda path: path.symlink_to("/proc/self/environ"),
}


def rewrite(path: Path, change: Bytes) -> None:
    path.write_bytes(change(path.read_bytes()))


def replace(path: Path, place: Place) -> None:
    path.unlink()
    place(path)
