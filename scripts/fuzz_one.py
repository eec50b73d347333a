"""One parser, fuzzed by atheris for some seconds: PARSER FOLDER SECONDS. `scripts.fuzz` starts it.

Findings go to FOLDER/findings, one for each place where something came out that must not; inputs that
reached more of our code to FOLDER/corpus; the count to FOLDER/said.json.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["converter"]):
    from tests.fuzzing import TARGETS

from tests.fuzzing.target import Finding, Trial
from tests.hostile.trial import watched

_EVERY_S = 2.0
_LONGEST = 2**20


class Run:
    """What libFuzzer calls."""

    def __init__(self, trial: Trial, folder: Path, did: list[str], seconds: float) -> None:
        self.trial, self.folder, self.did = trial, folder, did
        self.executed = self.accepted = 0
        self.known: set[str] = set()
        self.said = 0.0
        self.until = time.monotonic() + seconds

    def one(self, data: bytes) -> None:
        self.executed += 1
        try:
            self.accepted += self.trial(data)
            if self.did:
                raise Finding(f"it {self.did.pop()}")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a library in Rust that gives up raises no Exception
            self.did.clear()
            self.keep(data, error)
        if time.monotonic() > self.said + _EVERY_S:
            self.say()

    def keep(self, data: bytes, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{type(error).__name__} {frames[-1].filename}:{frames[-1].lineno} {str(error)[:40] if isinstance(error, Finding) else ''}"  # fmt: skip
        if where in self.known:
            return
        self.known.add(where)
        name = hashlib.sha256(where.encode("utf-8", "replace")).hexdigest()[:12]
        (self.folder / "findings" / name).write_bytes(data)
        text = "".join(traceback.format_exception(error))
        print(f"FINDING {name}: {where}\n{text}", file=sys.stderr, flush=True)
        self.say()

    def say(self) -> None:
        self.said = time.monotonic()
        document = {"executed": self.executed, "accepted": self.accepted}
        (self.folder / "said.json").write_text(json.dumps(document))
        self.did.clear()

    def mutated(self, data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.05:
            return bytes(atheris.Mutate(data, longest))
        if not data or rng.random() < 0.5:  # else what is refused has offspring alone
            data = rng.choice(self.trial.seeds)
        changed = self.trial.target.mutated(data, rng)
        return changed if len(changed) <= longest else data


def main(name: str, folder: Path, seconds: int) -> None:
    shared = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None)).resolve()
    folder = folder.resolve()
    trial = Trial(TARGETS[name], place)
    did = watched(place)
    run = Run(trial, folder, did, seconds)
    for number, seed in enumerate(trial.seeds):
        (folder / "corpus" / f"seed{number}").write_bytes(seed)
    did.clear()
    arguments = [
        sys.argv[0], str(folder / "corpus"), f"-max_total_time={seconds}", f"-max_len={_LONGEST}",
        "-timeout=60", "-rss_limit_mb=6000", f"-artifact_prefix={folder}/findings/", "-print_final_stats=1",
        "-report_slow_units=60", "-len_control=0", "-reload=0",
    ]  # fmt: skip
    mutate: Any = run.mutated
    atheris.Setup(arguments, run.one, custom_mutator=mutate, internal_libfuzzer=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
