"""Read this first: a whole run in plain calls. The flow makes the same calls as tasks.

rows -> prompts -> token ids -> [ engine ] -> answers, committed -> staged file -> audit ->
published file

Before the first row is asked, steps that changed are measured on labelled rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from glmbatch.report.counts import Proofs
from glmbatch.report.summary import Summary
from glmbatch.run.answer import answer
from glmbatch.run.canary import check_canary, check_canary_file
from glmbatch.run.lineage.events import traced
from glmbatch.run.models import prepare_models
from glmbatch.run.plan import assign, plan_run
from glmbatch.run.promotion.measure import measure_changes
from glmbatch.run.promotion.rule import passed
from glmbatch.run.publish import publish
from glmbatch.run.session import count_rows, session
from glmbatch.run.write import write_outputs
from glmbatch.settings.job import JobConfig


def run_job(job: JobConfig, others: Sequence[str] = ()) -> Summary:
    """Answer every row of the input, publish the answers, and return what happened.

    Known answers are also taken from the outputs `others`, where their keys are the same.
    Runs in this thread. Safe to repeat after a crash: committed answers are reused. InputError when
    the job or its input must change, AuditError when nothing was published, TransientError when the
    machine failed.
    """
    job = job.dated()
    with traced(job.lineage, job.data, job.steps, job.files_besides) as trace:
        check_canary_file(job)
        run = plan_run(job, others=others)  # which rows, in which fragments
        trace.planned(run)
        with session(run) as opened:  # the output's lock, engines, known answers, progress
            models = prepare_models(job)
            work = assign(job, run, models)  # a question and a key for each step and fragment
            trace.planned(work.run)
            measured = measure_changes(job.evaluate, job.data, work.run, work.questions)
            if not passed(measured):
                # Refuses, and says why.
                return publish(job, work.run, work.questions, [], Proofs(measured=measured))
            count_rows(work.run)
            receipts = {}  # by the key of the answers file, which bundles with the same rows share
            for assignment in work.in_passes():
                receipts[assignment.answers_keys.file] = answer(assignment)
            staged = []
            for bundle in work.bundles:
                keys = [assignment.answers_keys.file for assignment in bundle.assignments]
                staged += write_outputs(bundle, [receipts[key] for key in keys], opened.ledger)
            canaries = check_canary(job.canary, work.questions, run.context)
            proofs = Proofs(canaries=tuple(canaries), measured=measured)
            summary = publish(job, work.run, work.questions, staged, proofs)
            trace.published()
            return summary
