"""The tasks of one job, with the job's retries; their results are stored in the job's output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote

from glmbatch.ledger.receipts import AnswersReceipt, OutputReceipt
from glmbatch.report.counts import Audit, Measured, Proofs
from glmbatch.report.summary import Summary
from glmbatch.run.answer import find_answers
from glmbatch.run.models import job_models
from glmbatch.run.session import count_rows, session_of
from glmbatch.run.work import Bundle, Model, Run, Work
from glmbatch.run.write import all_written
from glmbatch.settings.job import JobConfig
from tasks import answer, prepare, publish
from tasks.artifacts import FragmentProgress
from tasks.cluster import HERE, Place
from tasks.policies import configured
from tasks.window import in_window


class JobTasks:
    """The task runs of one job, called in the order of the flow.

    Large values are passed to Prefect with `quote`; otherwise it would walk all their fragments.
    """

    def __init__(self, job: JobConfig) -> None:
        self._job = job

    def ingest(self) -> Run:
        """Plan the run: check the input files and cut them into fragments."""
        run: Run = self._configured(prepare.ingest)(self._job)
        return run

    def prepare_models(self, place: Place) -> list[Model]:
        """The job's checkpoints, located and checked."""
        models = []
        for model in job_models(self._job.model, self._job.steps):
            located = self._configured(prepare.locate_model)(model, self._job.runtime, place)
            prepared = self._configured(prepare.prepare_model)(located)
            # A stored result may have been swapped with another one.
            if not isinstance(prepared, Model) or prepared.config != located:
                prepared = self._configured(prepare.prepare_model, refresh=True)(located)
            models.append(prepared)
        return models

    def assign(self, run: Run, models: Sequence[Model], places: Sequence[Place]) -> Work:
        """The work of each bundle of fragments: its questions and step keys."""
        work: Work = self._configured(prepare.assign)(
            self._job, quote(run), models, places[0], len(places)
        )
        count_rows(work.run)
        return work

    def measure(self, work: Work, place: Place) -> tuple[Measured, ...]:
        """How the changed steps score on labelled rows; () if the job names none."""
        if self._job.evaluate is None:
            return ()
        measured: tuple[Measured, ...] = self._configured(prepare.measure)(
            self._job.evaluate, self._job.data, quote(work.run), quote(work.questions), place
        )
        count_rows(work.run)
        return measured

    def answer_fragments(self, work: Work, places: Sequence[Place]) -> list[OutputReceipt]:
        """Answer and write every bundle, pass by pass; the receipts of the outputs, in order.

        Each of `places` works on several bundles at once.
        """
        progress = FragmentProgress(len(work.passes) * len(work.run.plan.fragments))
        # Round-robin, so that every engine has one bundle before any has two.
        seats = [*places] * self._job.runtime.fragments_in_flight
        # The answer tasks submitted for each bundle, by step. Later steps wait for them.
        answers: dict[str, dict[int, PrefectFuture[Any]]] = defaultdict(dict)
        results: list[list[Any]] = []
        for steps in work.passes:

            def submit(bundle: Bundle, place: Place) -> list[PrefectFuture[Any]]:
                # Only called within this pass, so `steps` is the right one.
                return self._submit(bundle, steps, answers[bundle.name], place)  # noqa: B023

            def ended(bundle: Bundle, place: Place, receipts: list[list[Any]]) -> None:
                progress.add(len(bundle.fragments))
                if place is not HERE:
                    _tell_answers(bundle, receipts)

            results = in_window(work.bundles, submit, seats, ended)
        return list(chain(*(receipts[-1] for receipts in results)))

    def check_canary(self, work: Work, place: Place) -> list[Audit]:
        """The audits of the canary, which the loaded models answer; [] without a canary."""
        if self._job.canary is None:
            return []
        audits: list[Audit] = self._configured(publish.check_canary)(
            self._job.canary, quote(work.questions), work.run.context, place
        )
        return audits

    def publish(
        self,
        work: Work,
        outputs: list[OutputReceipt],
        canaries: list[Audit],
        measured: tuple[Measured, ...],
    ) -> Summary:
        """Audit the staged outputs and publish them. AuditError, with nothing published, if one
        fails.
        """
        proofs = Proofs(canaries=tuple(canaries), measured=measured)
        summary: Summary = self._configured(publish.publish)(
            self._job, quote(work.run), quote(work.questions), quote(outputs), proofs
        )
        return summary

    def _submit(
        self,
        bundle: Bundle,
        steps: Sequence[int],
        answers: dict[int, PrefectFuture[Any]],
        place: Place,
    ) -> list[PrefectFuture[Any]]:
        """Submit the given steps of a bundle, and its output files once every step is submitted.

        Bypasses Prefect's cache if a file is missing or damaged, and always for outputs in object
        stores.
        """
        ledger = session_of(bundle.run).ledger
        # Results in Prefect's own home may belong to another output, or be older than what another
        # machine wrote.
        in_store = ledger.results_folder() is None
        receipts = []
        for assignment in bundle.assignments:
            receipts.append(find_answers(assignment, ledger))
        submitted: list[PrefectFuture[Any]] = []
        for index in steps:
            answering = self._configured(answer.answer, refresh=in_store or receipts[index] is None)
            # Prefect waits for these and shows them as the task's parents.
            earlier = [answers[before] for before in sorted(answers)]
            answers[index] = answering.submit(bundle.assignments[index], earlier, place)
            submitted.append(answers[index])
        if len(answers) == len(bundle.assignments):
            # With receipts of this run, the outputs cannot exist yet.
            old = [receipt for receipt in receipts if receipt and receipt.run != bundle.run.id]
            missing = len(old) < len(receipts) or not all_written(bundle, old, ledger)
            writing = self._configured(publish.write, refresh=in_store or missing)
            earlier = [answers[index] for index in sorted(answers)]
            submitted.append(writing.submit(bundle, earlier))
        return submitted

    def _configured(self, task: Any, *, refresh: bool = False) -> Any:
        output = self._job.data.output
        return configured(task, self._job.runtime, output, refresh=refresh)


def _tell_answers(bundle: Bundle, results: Sequence[list[Any]]) -> None:
    """Count and log what an engine process answered. In this process, the answer itself does so."""
    session = session_of(bundle.run)
    for receipts in results:
        answered = [receipt for receipt in receipts if isinstance(receipt, AnswersReceipt)]
        rows = sum(receipt.rows for receipt in answered)
        # Fragments with the same rows share one receipt.
        distinct = list({receipt.key: receipt for receipt in answered}.values())
        own = [receipt.computed_rows for receipt in distinct if receipt.run == bundle.run.id]
        session.progress.add(sum(own), computed=True)
        session.progress.add(rows - sum(own), computed=False)
        session.log.add(distinct)
