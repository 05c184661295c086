"""Read this first: the OpenLineage events of a run, from its plan to its end.

openlineage-python is imported only if the job asks for events.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import pyarrow as pa

import glmbatch
from glmbatch.errors import GlmbatchError, Interrupted
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.tables.table import table_over
from glmbatch.report.report import read_report
from glmbatch.run.lineage.columns import columns_used
from glmbatch.run.lineage.sending import Sender
from glmbatch.run.work import Run
from glmbatch.settings.conditions import columns_of, parse_condition
from glmbatch.settings.data import DataConfig
from glmbatch.settings.report import LineageConfig
from glmbatch.settings.steps.any_step import AnyStep

if TYPE_CHECKING:
    from openlineage.client.event_v2 import InputDataset, OutputDataset, RunEvent

    from glmbatch.run.lineage.datasets import Name

    Datasets = tuple[Sequence[InputDataset], OutputDataset]

STOPPED = "The run was stopped."
FAILED = "The run failed; its log says more."


@dataclass(frozen=True, slots=True)
class Trigger:
    """What started a run: when it was `scheduled`, and the run that it is a part of, if any."""

    scheduled: datetime | None = None
    parent: str | None = None
    parent_name: str | None = None


@dataclass(slots=True)
class _Events:
    """What the events of one run are made from.

    `run` is None until it is planned, and so are the `published` datasets until there are any.
    """

    config: LineageConfig
    data: DataConfig
    steps: Sequence[AnyStep]
    besides: Sequence[str]
    trigger: Trigger
    run: Run | None = None
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    id: uuid.UUID = field(default_factory=uuid.uuid4)
    published: Datasets | None = None


class Trace:
    """What the events of a run must know while it goes on; does nothing without a `sender`."""

    def __init__(self, events: _Events | None = None, sender: Sender | None = None) -> None:
        self._events = events
        self._sender = sender

    def planned(self, run: Run) -> None:
        """The run is planned, or planned again."""
        if self._events is None or self._sender is None:
            return
        is_first = self._events.run is None
        self._events.run, self._events.id = run, uuid.UUID(run.context.id)
        if is_first:
            self._sender.send(partial(_started, self._events))

    def published(self) -> None:
        """The run has published, and still holds its lock: no other has published since."""
        if self._events is not None and self._sender is not None:
            self._events.published = self._sender.made(partial(_datasets, self._events, ended=True))


@contextmanager
def traced(
    config: LineageConfig | None,
    data: DataConfig,
    steps: Sequence[AnyStep],
    besides: Sequence[str],
    trigger: Trigger | None = None,
) -> Iterator[Trace]:
    """Send the events of the run in the block, which tells the trace how far it is.

    Without a `config` there are none. `besides` are files of rows that are read besides the input.
    Nothing that goes wrong here fails the run, except that the package is missing: InputError.
    """
    if config is None:
        yield Trace()
        return
    sender = Sender(config)
    events = _Events(config, data, steps, besides, trigger or Trigger())

    error: BaseException | None = None
    try:
        yield Trace(events, sender)
    except BaseException as raised:
        error = raised
        raise
    finally:
        if events.run is None:
            sender.send(partial(_started, events))
        sender.send(partial(_ended, events, datetime.now(UTC), error))
        sender.close()


def _started(events: _Events) -> RunEvent:
    return _event("START", events, events.began, _datasets(events))


def _end(events: _Events) -> Datasets:
    return events.published or _datasets(events, ended=True)


def _ended(events: _Events, ended: datetime, error: BaseException | None) -> RunEvent:
    """The last event: COMPLETE, ABORT for a run that was stopped, or FAIL."""
    from openlineage.client.facet_v2 import error_message_run

    from glmbatch.run.lineage.datasets import facet

    if error is None:
        return _event("COMPLETE", events, ended, _end(events))
    is_stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)
    event = _event("ABORT" if is_stopped else "FAIL", events, ended, _end(events))
    message = facet(
        error_message_run.ErrorMessageRunFacet,
        message=_without_values(error, STOPPED if is_stopped else FAILED),
        programmingLanguage="python",
    )
    event.run.facets = {**(event.run.facets or {}), "errorMessage": message}
    return event


def _without_values(error: BaseException, otherwise: str) -> str:
    """What kind of error it was. Its own text may quote a row, and everyone reads a catalogue."""
    meaning = otherwise
    if isinstance(error, GlmbatchError) and not isinstance(error, Interrupted):
        meaning = f"{(type(error).__doc__ or '').splitlines()[0]} {FAILED}"
    return f"{type(error).__name__}: {meaning}"


def _event(kind: str, events: _Events, at: datetime, datasets: Datasets) -> RunEvent:
    from openlineage.client import event_v2

    from glmbatch.run.lineage.datasets import PRODUCER, bare_input

    inputs, output = datasets
    return event_v2.RunEvent(
        eventType=event_v2.RunState[kind],
        eventTime=at.isoformat(),
        producer=PRODUCER,
        run=event_v2.Run(runId=str(events.id), facets=_run_facets(events)),
        job=event_v2.Job(
            namespace=events.config.namespace,
            name=events.config.job_name or events.data.output,
            facets=_job_facets(),
        ),
        inputs=[*inputs, *chain.from_iterable(map(bare_input, events.besides))],
        outputs=[output],
    )


def _run_facets(events: _Events) -> dict[str, Any]:
    from openlineage.client.facet_v2 import nominal_time_run, parent_run, processing_engine_run

    from glmbatch.run.lineage.datasets import facet

    facets: dict[str, Any] = {
        "processing_engine": facet(
            processing_engine_run.ProcessingEngineRunFacet,
            name="glmbatch",
            version=glmbatch.__version__,
        )
    }
    trigger = events.trigger
    if trigger.scheduled is not None:
        facets["nominalTime"] = facet(
            nominal_time_run.NominalTimeRunFacet, nominalStartTime=trigger.scheduled.isoformat()
        )
    if trigger.parent is not None:
        facets["parent"] = facet(
            parent_run.ParentRunFacet,
            run=parent_run.Run(runId=trigger.parent),
            job=parent_run.Job(
                namespace=events.config.namespace, name=trigger.parent_name or "flow"
            ),
        )
    return facets


def _job_facets() -> dict[str, Any]:
    from openlineage.client.facet_v2 import job_type_job

    from glmbatch.run.lineage.datasets import facet

    kind = job_type_job.JobTypeJobFacet
    return {"jobType": facet(kind, processingType="BATCH", integration="GLMBATCH", jobType="JOB")}


def _datasets(events: _Events, *, ended: bool = False) -> Datasets:
    """The inputs and the output of the run, with what is known of them when it has `ended`."""
    from glmbatch.run.lineage import datasets

    output = datasets.bare_output(events.data.output)
    if events.run is None:
        return datasets.bare_input(events.data.input), output
    plan = events.run.plan
    manifest = Ledger(events.data.output).manifest()
    source = datasets.input_name(events.data.input, plan)
    digests = datasets.digests_of(plan, manifest)
    if not ended:
        return [datasets.input_dataset(source, plan, digests, None)], output
    schema = None
    with suppress(GlmbatchError, OSError):  # a file of tonight may be gone by now
        schema = datasets.input_schema(plan)
    if manifest is not None and manifest.run == events.run.context.id:
        files = [file for file in manifest.files if file.source in datasets.sources_of(plan)]
        own = [file for file in files if file.source not in plan.unchanged]
        datasets.add_publication(output, _version(events), own, manifest.format)
        if files:
            columns = datasets.output_schema(events.data.output, files[0], plan.version)
            schema = schema or _without_answers(events.run, columns)
            _add_columns(events, output, columns, schema, source)
    _add_assertions(events, output)
    return [datasets.input_dataset(source, plan, digests, schema)], output


def _version(events: _Events) -> str:
    """The version of the output: that of the table over it, else the run that published it."""
    assert events.run is not None
    data = events.data
    table = table_over(data.output, data.format, data.table or "")
    return events.run.context.id if table is None else str(table.read_version())


def _without_answers(run: Run, published: pa.Schema) -> pa.Schema:
    return pa.schema([field for field in published if field.name not in run.needs.written])


def _add_columns(
    events: _Events,
    output: OutputDataset,
    published: pa.Schema,
    read: pa.Schema,
    source: Name,
) -> None:
    """Add the columns of the `published` files, and of which columns that were `read` they are."""
    from glmbatch.run.lineage import datasets

    assert events.run is not None
    copied = [column for column in published.names if column in read.names]
    uses = columns_used(events.steps, events.run.inputs, events.run.needs.written, copied)
    where = events.data.where
    filters = [] if where is None else columns_of(parse_condition(where))
    datasets.add_columns(output, published, uses, filters, source)


def _add_assertions(events: _Events, output: OutputDataset) -> None:
    """Add what the run had to pass, from its report; nothing without one."""
    from glmbatch.run.lineage import datasets

    assert events.run is not None
    report = read_report(events.data.output, events.run.context.id)
    if report is not None:
        datasets.add_assertions(output, report.summary, [step.name for step in events.steps])
