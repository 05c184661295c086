"""The main job: every row answered by every step, beside its own columns in the output."""

from __future__ import annotations

from prefect import flow

from glmbatch.config import JobConfig
from glmbatch.report.summary import Summary
from glmbatch.run.session import session
from tasks.annotate import JobTasks
from tasks.cluster import places_of, with_whole_paths
from tasks.page import logged_on_page


@flow(name="annotate", flow_run_name="annotate {job.data.input}")
def annotate(job: JobConfig) -> Summary:
    """Run the job and return what happened; a run that fails publishes nothing."""
    tasks = JobTasks(with_whole_paths(job))
    with logged_on_page():
        run = tasks.ingest()
        with session(run):
            # A place is this process, or an engine process of a cluster.
            with places_of(run.context) as places:
                models = tasks.prepare_models(places[0])
                work = tasks.assign(run, models, places[0])
                outputs = tasks.answer_fragments(work, places)
                canaries = tasks.check_canary(run, work, places[0])
            # The engines are given back first.
            return tasks.publish(run, work, outputs, canaries)
