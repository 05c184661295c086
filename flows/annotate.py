"""The main job: every row of the input, answered by every step, beside its own columns in the output."""

from __future__ import annotations

from functools import partial

from prefect import flow
from prefect.utilities.annotations import quote

from glmbatch.report.summary import Summary
from glmbatch.run.planning import Work, job_models
from glmbatch.run.publish import release
from glmbatch.settings.job import JobConfig
from tasks.artifacts import FragmentProgress
from tasks.cluster import engines_of, whole_paths
from tasks.fragment import Answers, count_answers, submit_fragment
from tasks.ingest import assign, ingest
from tasks.model import locate_model, prepare_model
from tasks.policies import configured, in_window
from tasks.write import check_canary, publish


@flow(name="annotate", flow_run_name="annotate {job.data.input}")
def annotate(job: JobConfig) -> Summary:
    """Run the job and return what happened; a run that fails publishes nothing."""
    job = whole_paths(job)
    run = configured(ingest, job)(job)
    try:
        with engines_of(job) as engines:
            located = [
                configured(locate_model, job)(model, job.runtime, engines[0])
                for model in job_models(job)
            ]
            models = [configured(prepare_model, job)(model) for model in located]
            # Quoted: Prefect would walk each fragment of a large object.
            work: Work = configured(assign, job)(job, quote(run), models, engines[0])
            answers: Answers = {}
            count = partial(count_answers, FragmentProgress(len(work.passes) * len(work.fragments)))
            for steps in work.passes:
                submit = partial(submit_fragment, job, steps, answers)
                seats = engines * job.runtime.fragments_in_flight
                finished = in_window(work.fragments, submit, seats, count)
            outputs = quote([results[-1] for results in finished])
            frozen = quote(work.fragments[0].assignments)
            canaries = configured(check_canary, job)(job, frozen, engines[0]) if job.canary else []
        summary: Summary = configured(publish, job)(job, quote(run), outputs, canaries)
        return summary
    finally:
        release(job, run)
