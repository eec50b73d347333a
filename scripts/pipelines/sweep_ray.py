"""A sweep over a Ray cluster whose machines see the same files: python sweep_ray.py"""

from collections import Counter
from pathlib import Path

import ray

from converter.batch import Job, Outcome, attempt
from converter.request import Checking, Request, Writing

ASKED = Request("hf-to-tl", Writing(), Checking(effort="quick"), process="default")


@ray.remote(num_cpus=1, max_retries=3)  # a worker that is killed: elsewhere, once more
def convert(job: Job) -> Outcome:
    return attempt(job)


if __name__ == "__main__":
    ray.init()
    here = Path.cwd()
    sources = sorted(here.glob("runs/checkpoint-*"))
    jobs = [Job(str(path), here / "tl" / path.name, ASKED) for path in sources]
    outcomes = ray.get([convert.remote(job) for job in jobs])
    print(dict(Counter(outcome.status for outcome in outcomes)))
    for outcome in outcomes:
        if outcome.error:
            print(outcome.job.given, "may pass" if outcome.transient else "stays", outcome.error)
