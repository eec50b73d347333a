"""Running the original: what it computes, and what float32 costs it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from converter.checkpoint import Checkpoint
from converter.errors import BadInput, Fault, VerificationFailed, classified
from converter.progress import Progress
from converter.verification.judge import MAX_RATIO, pooled_floor
from converter.verification.loading import installed, resolve_device
from converter.verification.logits import Forward
from converter.verification.measuring import Errors, Rows, measure_rows
from converter.verification.original import Pass
from converter.verification.probes import Probe, cost
from converter.verification.program import examine_program, few_of
from converter.verification.reference import forward
from converter.verification.result import RuntimeInfo
from converter.verification.runtime import Runtime
from converter.verification.runtimes import open_runtime
from converter.verification.standard import noise_of

_SMALL = 1e10
"""Multiply-adds that are over before anything clever pays."""


def run_original(
    original: Checkpoint, probes: Sequence[Probe], device: str, seed: int, say: Progress
) -> Pass:
    say("reference: float64")
    where = resolve_device(device)
    true = forward(original, probes, dtype=torch.float64, device=where).keeping()
    runtime = open_runtime(original, device)
    own = _own(runtime, true, say)
    say("noise floor")
    noise = noise_of(original, true, seed)
    strange = _strange(runtime, true, own, noise, seed, say)
    ran = info(runtime, "original")
    del runtime
    release(cost(original.config, sum(probe.tokens.size for probe in probes)))
    return Pass(true, own, noise, ran, strange)


def _own(runtime: Runtime, true: Forward, say: Progress) -> list[Errors | None]:
    """The original's own run, of whole probes: what float32 costs it there. It needs no cache to
    be the standard of those that have one."""
    of = true.wholes
    found: dict[int, Rows] = {}
    for index in sorted(set(of)):
        probe = replace(true.probes[index], prefill=None)
        if runtime.runs(probe):
            logits = logits_of(runtime, probe, say, original=True)
            (found[index],) = measure_rows(true, index, [logits])
    shapes = (probe.tokens.shape for probe in true.probes)
    return [
        found[whole].part(*shape).errors() if whole in found else None
        for whole, shape in zip(of, shapes, strict=True)
    ]


def logits_of(
    runtime: Runtime, probe: Probe, say: Progress, *, original: bool = False
) -> torch.Tensor:
    say(f"{runtime.what}: {probe.name}")
    try:
        return runtime.logits(probe)
    except Exception as error:  # of any library that runs what a file tells it to
        if not isinstance(classified(error), Fault):
            raise  # the system's, or this machine's: no verdict on the artifact
        raise _stopped(runtime, probe, error, original) from error


def _stopped(
    runtime: Runtime, probe: Probe, error: Exception, original: bool
) -> BadInput | VerificationFailed:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = f"{runtime.what} cannot run the {'original' if original else 'artifact'}: {reason[:200]}"
    kind = BadInput if original else VerificationFailed
    do = "Convert or export it again; its config or graph does not fit its weights."
    return kind(what, where=f"probe {probe.name!r}, tokens {list(probe.tokens.shape)}", do=do)


def _strange(
    runtime: Runtime,
    true: Forward,
    own: Sequence[Errors | None],
    noise: Sequence[Sequence[Errors]],
    seed: int,
    say: Progress,
) -> tuple[float, str] | None:
    """The original must itself run as its file says, or its error is no measure of noise. What
    is strange in float32 may be bad luck: float64 decides, where the software runs in it."""
    ratios = [
        run.ratio(pooled_floor(more)) if run else 0.0 for run, more in zip(own, noise, strict=True)
    ]
    worst = max(range(len(ratios)), key=ratios.__getitem__)
    if ratios[worst] <= MAX_RATIO:
        return None
    say(f"{runtime.what}: float64")
    few = few_of(true.source.config, true.probes)
    floors = [pooled_floor(more) for more in noise]
    exact = examine_program(runtime, true.part(few), floors, runtime.what, seed=seed)
    if exact.outcome == "same":
        return None
    return ratios[worst], (
        f"The original, run in {runtime.what}, departs from its own file and config"
        f" (probe {true.probes[worst].name!r}, {ratios[worst]:.3g} times float32's noise)."
    )


def info(runtime: Runtime, role: str) -> RuntimeInfo:
    version = runtime.version or installed(runtime.name)
    # exact_float32() for torch, use_tf32=0 for onnxruntime's provider
    tf32 = False if runtime.device.type == "cuda" else None
    return RuntimeInfo(runtime.name, runtime.what, version, str(runtime.device), role, tf32)


@contextlib.contextmanager
def threads_for(work: float) -> Iterator[None]:
    """One thread for small models: on a busy machine, threads that wait for one another cost
    more than all the arithmetic."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if work < _SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def release(work: float) -> None:
    """Give a model's memory back before the next is loaded. (Small ones can wait: collecting
    takes longer than running them.)"""
    if work >= _SMALL:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
