"""The flow of a job: every step answers every row, and the answers are published."""

from __future__ import annotations

from prefect import flow
from prefect.runtime import flow_run

from glmbatch.config import JobConfig
from glmbatch.report.summary import Summary
from glmbatch.run.lineage.events import Trigger, traced
from glmbatch.run.promotion.rule import passed
from glmbatch.run.session import session
from tasks.annotate import JobTasks
from tasks.cluster import places_of, with_whole_paths
from tasks.page import logged_on_page


@flow(name="annotate", flow_run_name="annotate {job.data.input}")
def annotate(job: JobConfig) -> Summary:
    """Run a job and return its summary. A run that fails publishes nothing."""
    # Of a run that is late or repeated too, so that it reads the same day.
    job = job.dated(flow_run.scheduled_start_time)
    tasks = JobTasks(with_whole_paths(job))
    trigger = Trigger(flow_run.scheduled_start_time, flow_run.id, flow_run.flow_name)
    traced_run = traced(job.lineage, job.data, job.steps, job.files_besides, trigger)
    with logged_on_page(), traced_run as trace:
        run = tasks.ingest()
        trace.planned(run)
        with session(run):
            # A place is this process, or an engine process of a cluster.
            with places_of(run.context) as places:
                models = tasks.prepare_models(places[0])
                work = tasks.assign(run, models, places)
                trace.planned(work.run)
                measured = tasks.measure(work, places[0])
                if not passed(measured):
                    return tasks.publish(work, [], [], measured)  # refuses, and says why
                outputs = tasks.answer_fragments(work, places)
                canaries = tasks.check_canary(work, places[0])
            # Publishing needs no engine, so the cluster is released first.
            summary = tasks.publish(work, outputs, canaries, measured)
            trace.published()
            return summary
