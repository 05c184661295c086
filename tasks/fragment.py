"""Submit the tasks of one fragment: each step after those before it, then the output file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect.futures import PrefectFuture

from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.report.progress import PROGRESS
from glmbatch.run.planning import FragmentWork
from glmbatch.settings.job import JobConfig
from glmbatch.store.paths import is_remote
from tasks.artifacts import FragmentProgress
from tasks.classify import classify
from tasks.generate import generate
from tasks.policies import configured
from tasks.write import write

ASK = {"classify": classify, "generate": generate}

# The submitted steps by the name of their fragment, and each by the index of its step.
Answers = dict[str, dict[int, PrefectFuture[Any]]]


def submit_fragment(
    job: JobConfig, steps: Sequence[int], answers: Answers, work: FragmentWork, engine: Any
) -> list[PrefectFuture[Any]]:
    """Submit the given steps, adding them to `answers`, and the output file once every step is among them.

    What the ledger no longer holds whole runs again, whatever the cache says. So does all of an output in a store: the
    results that Prefect keeps in its own home may be of another output, or older than what another machine wrote.
    """
    anew = is_remote(job.data.output)
    ledger = Ledger(job.data.output)
    receipts = [
        ledger.find_answers(each.key, work.run, each.earlier, retry_failed=job.retry_failed)
        for each in work.assignments
    ]
    asked = answers.setdefault(work.fragment.name, {})
    submitted: list[PrefectFuture[Any]] = []
    for index in steps:
        ask = configured(ASK[job.steps[index].kind], job, refresh=anew or receipts[index] is None)
        asked[index] = ask.submit(job, work.assignments[index], list(asked.values()), engine)
        submitted.append(asked[index])
    if len(asked) == len(job.steps):
        found = [receipt for receipt in receipts if receipt is not None and receipt.run != work.run]
        gone = len(found) < len(receipts) or ledger.find_output(work.key, found) is None
        in_order = [asked[index] for index in sorted(asked)]
        submitted.append(configured(write, job, refresh=anew or gone).submit(job, work, in_order))
    return submitted


def count_answers(
    progress: FragmentProgress, work: FragmentWork, engine: Any, results: Sequence[Any]
) -> None:
    """Count a fragment as finished, and in this process what the engine of another has answered."""
    progress.add()
    for receipt in results:
        if engine is not None and isinstance(receipt, AnswersReceipt):
            computed = receipt.computed_rows if receipt.run == work.run else 0
            PROGRESS.add(computed, computed=True)
            PROGRESS.add(receipt.rows - computed, computed=False)
