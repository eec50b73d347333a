"""Every way a request can fail, with the exit code it gives.

An error says three things: what is wrong, where (file, tensor, expected and found), what to do.
It is raised where the fault is known and printed in one place, `converter.cli`.
"""

from __future__ import annotations

import copyreg
import errno
from pathlib import Path
from typing import Any, ClassVar

_PASSING = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EIO", "ENOMEM", "EMFILE", "ENFILE", "EAGAIN", "EBUSY", "EINTR", "ESTALE",
        "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EHOSTUNREACH", "ENETUNREACH",
        "ENETDOWN", "EPIPE",
    )
    if hasattr(errno, name)
}  # fmt: skip


def passing(error: OSError) -> bool:
    """Whether what the system refused may be granted later: a full disk, a lost network."""
    return error.errno in _PASSING or isinstance(error, (ConnectionError, TimeoutError))


def full(error: OSError) -> bool:
    """Whether there is no room for what is written: on the disk, in a quota, in one file."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NeoconvertError(Exception):
    """Base of all errors a user can cause; `exit_code` is the process's exit status."""

    exit_code: ClassVar[int] = 3
    transient: bool = False
    """The same request may succeed later, with nothing about it changed."""

    def __init__(
        self, what: str, *, where: str, do: str, details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.do = what, where, do
        self.details = details or {}
        """More for `--json`: the failed verification, say."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied, and sent from another process, with all that it says: an exception by itself is
        made again of its positional arguments alone."""
        return copyreg.__newobj__, (type(self), self.what), vars(self)  # type: ignore[attr-defined]

    def lines(self) -> tuple[str, str, str]:
        return self.what, self.where, self.do

    def __str__(self) -> str:
        return "\n".join(self.lines())


class VerificationFailed(NeoconvertError):
    """The artifact does not reproduce the original; nothing was published."""

    exit_code = 1


class UsageError(NeoconvertError):
    """The request cannot be carried out as typed."""

    exit_code = 2


class OutputExists(UsageError):
    """OUTPUT is there already, or is not something neoconvert may replace."""


class SamePlace(UsageError):
    """SOURCE and OUTPUT are, or contain, one another."""


class BadInput(NeoconvertError):
    """The input is unreadable, hostile, inconsistent or not what it claims to be."""


class NoSpace(NeoconvertError):
    """There is less space than will be written."""

    transient = True


class SystemRefused(NeoconvertError):
    """The operating system refused: a full disk, missing permission, a failing device."""


class SourceChanged(BadInput):
    """A file of SOURCE is not the one that was opened."""

    transient = True


class SourceNotFound(BadInput):
    """No checkpoint at the place named."""


class HubUnreachable(SourceNotFound):
    """The hub gave no answer, or none that says whether it has the model."""

    transient = True


class CorruptFile(BadInput):
    """A file is truncated or breaks its own format."""


class UnsafeReference(BadInput):
    """What is given leads to a file that is no plain one of its own directory."""


class MissingShard(BadInput):
    """The index names a file that is not there."""


class PickleRefused(BadInput):
    """A pickle file without --allow-pickle, or one that is not plain tensors."""


class ConfigError(BadInput):
    """A config that is malformed, inconsistent, or does not fit the weights."""


class UnknownTensor(BadInput):
    """The checkpoint holds a tensor that the layout has no place for."""


class MissingTensor(BadInput):
    """The layout needs a tensor that the checkpoint does not hold."""


class TensorMismatch(BadInput):
    """A tensor whose shape or dtype is not what the config says."""


class NotRepresentable(BadInput):
    """The target layout or dtype has no way to express what the source holds."""


class CannotUndo(BadInput):
    """The original bits were asked for, and what is here does not suffice."""


class CannotDoHere(NeoconvertError):
    """This machine lacks what was asked for explicitly (a device, a runtime)."""

    exit_code = 4


class Fault(NeoconvertError):
    """neoconvert itself is at fault."""

    exit_code = 70


def panicked(error: BaseException) -> bool:
    """Whether it is a library in Rust that gave up, which Python takes for no Exception."""
    return type(error).__name__ == "PanicException"


def classified(error: BaseException) -> NeoconvertError:
    """Any exception as one of these: what it means to the user."""
    if isinstance(error, NeoconvertError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        advice = "Free some space" if full(error) else "Check permissions and the disk"
        if error.errno == errno.EFBIG:
            advice = (
                "Write smaller files (--max-shard-size 1GB), raise the limit (ulimit -f unlimited)"
            )
        refused = SystemRefused(
            f"The system refused: {error.strerror}.",
            where=str(error.filename or error.filename2 or "no file named"),
            do=f"{advice}, or name another place. Nothing was published.",
        )
        refused.transient = passing(error)
        return refused
    if isinstance(error, MemoryError) or _is_torch_without_memory(error):
        lacking = CannotDoHere(
            "There is not enough memory.",
            where=str(error).partition("\n")[0] or "this machine",
            do="End other programs. Where models are run, --effort quick takes less memory; where files"
            " are written, --no-verify takes the least.",
        )
        lacking.transient = True
        return lacking
    if isinstance(error, ImportError) and not (error.name or "").startswith("converter"):
        return CannotDoHere(
            f"A library is installed here that cannot be imported: {error}.",
            where=error.name or _raised_in(error),
            do="Install that library again. With --debug you see where it fails.",
        )
    return Fault(
        f"A fault of neoconvert: {type(error).__name__}: {str(error) or 'no more is known'}.",
        where=_raised_in(error),
        do="Please report it, with what the same command prints with --debug.",
    )


def _is_torch_without_memory(error: BaseException) -> bool:
    """torch has no exception of its own for it on the CPU."""
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in said or "out of memory" in said
    )


def _raised_in(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "nowhere known"
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name}"
