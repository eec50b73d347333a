"""Many checkpoints in one run: what is there already is left, what fails is named, the rest is done.

from converter.batch import Job, attempt, outcomes

for outcome in outcomes(jobs, processes=2):
    print(outcome.job.output, outcome.status)
"""

from converter.batch.job import Job, Outcome, attempt
from converter.batch.running import outcomes
from converter.batch.tally import Tally

__all__ = ["Job", "Outcome", "Tally", "attempt", "outcomes"]
