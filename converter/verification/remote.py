"""A runtime in another Python environment: its TransformerLens, its transformers, its torch.

The other interpreter runs this module, with neoconvert's own code from here, and answers one line
for each probe. Tokens and logits pass through files in a directory that both see.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converter.checkpoint import Checkpoint
from converter.errors import BadInput, CannotDoHere, Fault, UsageError, classified
from converter.verification.evidence import NotComparable
from converter.verification.probes import Probe
from converter.verification.runtime import Runtime
from converter.verification.runtimes import open_runtime

if TYPE_CHECKING:
    from torch import Tensor

_PROBE, _LOGITS, _LOG = "probe.npz", "logits.npy", "stderr.txt"


@dataclass
class Remote(Runtime):
    """The same software as here would run the layout, in the versions found there."""

    process: subprocess.Popen[str]
    folder: tempfile.TemporaryDirectory[str]

    def logits(self, probe: Probe) -> Tensor:
        return self._logits(probe, exact=False)

    def exact_logits(self, probe: Probe) -> Tensor:
        return self._logits(probe, exact=True)

    def _logits(self, probe: Probe, *, exact: bool) -> Tensor:
        import torch

        folder = Path(self.folder.name)
        arrays = {"tokens": probe.tokens, "start": np.array(probe.start)}
        if probe.mask is not None:
            arrays["mask"] = probe.mask
        if probe.prefill is not None:
            arrays["prefill"] = np.array(probe.prefill)
        np.savez(folder / _PROBE, allow_pickle=False, **arrays)
        answer = _ask(self.process, {"name": probe.name, "exact": exact}, folder)
        if "not_comparable" in answer:
            raise NotComparable(answer["not_comparable"])
        return torch.from_numpy(np.load(folder / _LOGITS)).to(self.device)

    def runs(self, probe: Probe) -> bool:
        return super().runs(probe) and self._takes(probe)

    def runs_exactly(self, probe: Probe) -> bool:
        return self._takes(probe)

    def _takes(self, probe: Probe) -> bool:
        return not (probe.start and self.what.startswith("HookedTransformer"))

    def __del__(self) -> None:
        _end(self.process)


def open_remote(checkpoint: Checkpoint, python: Path, device: str = "auto") -> Remote:
    """Open the checkpoint in the environment of another interpreter.

    Raises:
        CannotDoHere: the interpreter cannot run neoconvert (it lacks torch, say), or the device.
        BadInput: the software there refuses the checkpoint.
        UsageError: the checkpoint is in memory, which the other process does not see.
    """
    import torch

    if checkpoint.source.live:
        raise UsageError(
            "Another interpreter does not see a model that is in the memory of this one.",
            where=checkpoint.source.given,
            do="Write it to a directory first, and verify that.",
        )

    folder = tempfile.TemporaryDirectory(prefix="neoconvert.")
    # The child has our code, its own environment's libraries, and nothing of where we stand.
    library = Path(folder.name) / "library"
    _bring(Path(__file__).resolve().parents[1], library)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [os.path.abspath(python), "-m", "converter.verification.remote"]
    arguments = [str(checkpoint.source.path.resolve()), folder.name, device]
    try:
        with open(Path(folder.name) / _LOG, "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env=kept | {"PYTHONPATH": str(library)}, cwd=library,
            )  # fmt: skip
    except OSError as error:
        raise CannotDoHere(
            f"The interpreter cannot be started: {error.strerror}.",
            where=f"--python {python}",
            do="Name the python of an environment, such as .venvs/tl4/bin/python.",
        ) from error
    try:
        info = _ask(process, None, Path(folder.name))
    except BaseException:
        _end(process)
        raise
    cpu = torch.device("cpu")
    name, what, version = (str(info[key]) for key in ("name", "what", "version"))
    if name != "neoconvert":  # which is the same in both
        what += f" ({name} {version})"
    return Remote(name, what, version, cpu, process, folder)


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.kill()
    process.wait()


def _bring(package: Path, library: Path) -> None:
    """Have a directory hold our package and nothing else."""
    library.mkdir()
    try:
        (library / package.name).symlink_to(package, target_is_directory=True)
    except OSError:  # Windows, without the right to make links
        shutil.copytree(package, library / package.name)


def _ask(
    process: subprocess.Popen[str], request: dict[str, Any] | None, folder: Path
) -> dict[str, Any]:
    """One request, one answer; None waits for the answer that comes unasked, at the start."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if request is not None:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline() or "null") or {}
    except (OSError, ValueError):
        answer = {}
    where = str(process.args[0]) if isinstance(process.args, list) else "--python"
    if "refused" in answer:
        what, place, do = answer["refused"]
        kind = CannotDoHere if answer["exit_code"] == CannotDoHere.exit_code else BadInput
        raise kind(what, where=f"{place}, run by {where}", do=do)
    if "stopped" in answer:
        raise RuntimeError(answer["stopped"])
    if not answer:
        printed = (folder / _LOG).read_text(encoding="utf-8", errors="replace").strip()
        last = printed.splitlines()[-1] if printed else "it printed nothing"
        raise CannotDoHere(
            f"The other interpreter ended without an answer: {last}",
            where=f"--python {where}",
            do="Its environment needs torch, transformers or TransformerLens, and neoconvert's dependencies.",
        )
    return answer


def _serve(path: str, folder: Path, device: str) -> None:
    """The other side: open, say what runs it, then answer until the pipe closes."""
    from converter.checkpoint import open_checkpoint

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer

    def answer(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    try:
        runtime = open_runtime(open_checkpoint(path, allow_pickle=True), device)
        answer({"name": runtime.name, "what": runtime.what, "version": runtime.version})
        for line in sys.stdin:
            asked = json.loads(line)
            with np.load(folder / _PROBE) as given:
                prefill = int(given["prefill"]) if "prefill" in given else None
                probe = Probe(
                    asked["name"], given["tokens"], given.get("mask"), int(given["start"]), prefill
                )
            try:
                run = runtime.exact_logits if asked["exact"] else runtime.logits
                np.save(folder / _LOGITS, run(probe).cpu().numpy())
                answer({"done": probe.name})
            except NotComparable as error:
                answer({"not_comparable": error.why})
            except Exception as error:
                if not isinstance(classified(error), Fault):
                    raise
                answer({"stopped": str(error).strip() or type(error).__name__})
    except Exception as error:
        if isinstance(said := classified(error), Fault):
            raise
        answer({"refused": said.lines(), "exit_code": said.exit_code})


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
