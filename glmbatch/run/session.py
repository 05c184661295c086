"""What a run holds while it is active: the output's lock, engines, known answers and progress.

A session begins and ends with one `with` block; no other state of a run outlives a call. Prefect
runs the tasks of a run on threads of their own, where they find the session by the run's id. Only
loaded engines stay in the process afterwards, so the next run with the same weights reuses them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import TypeVar

from glmbatch.errors import GlmbatchError, InputError, Interrupted, TransientError, UnusableFile
from glmbatch.glm.engine.loading import load_engine
from glmbatch.glm.engine.pool import EnginePool
from glmbatch.glm.engine.protocol import Engine
from glmbatch.ledger.fragments import Fragment
from glmbatch.ledger.known.answers import Hold, KnownAnswers
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.report.log import AnswersLog
from glmbatch.report.progress import Progress, Snapshot
from glmbatch.run.models import describe_model, stamp_checkpoint
from glmbatch.run.work import Question, Run, RunContext
from glmbatch.steps.answers import answers_schema
from glmbatch.steps.prompt import RowFault

logger = logging.getLogger(__name__)

Read = TypeVar("Read")

# The engines loaded in this process, shared by all runs.
_ENGINES = EnginePool()
# The open sessions of this process, by run id, in the order in which they began.
_SESSIONS: dict[str, Session] = {}
_CHANGING = threading.Lock()


class Session:
    """The state that the tasks of one run share in one process. Safe to use from several threads.

    `ledger` is the run's view of its output. `progress` counts the rows done, and `log` tells
    of them.
    """

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.ledger = Ledger(run.output)
        self.progress = Progress()
        self.log = AnswersLog(run.id, self.progress)
        self._stopped = False
        # By step key: steps with the same question share an index, so that it is asked once.
        self._known: dict[str, KnownAnswers] = {}
        # Fragments on which the model failed entirely, and their rows, by step key and reason.
        self._hopeless: dict[tuple[str, str], tuple[int, int]] = {}
        # By file and first row: why a fragment's rows cannot be read, or None if all of them can.
        # Not by name, because a file of labelled rows may have the name of an input file.
        self._read: dict[tuple[str, int], str | None] = {}
        self._reading: dict[tuple[str, int], threading.Lock] = {}
        # By step key: the likelihoods of its labels without a row.
        self._priors: dict[str, Sequence[float]] = {}
        self._asking_prior = threading.Lock()
        # Receipts of assignments that were answered beside another, by the key of their file.
        self.answered_beside: dict[str, list[AnswersReceipt]] = {}
        self._holding = threading.Lock()
        self._lock = threading.Lock()

    def start(self, stage: str, answers: int) -> None:
        """Begin a stage with so many `answers` to give; nothing of an earlier one counts."""
        self.progress.start(stage, answers)
        self.log = AnswersLog(self.run.id, self.progress)

    def known_answers(self, question: Question) -> KnownAnswers:
        """The index of all committed answers to `question`; the run's fragments add theirs.

        Its columns may have the names of another step with the same question.
        """
        key = question.key
        with self._lock:  # built once, even if many fragments begin together
            if key not in self._known:
                self._known[key] = index_answers(self.ledger, question, others=self.run.others)
            return self._known[key]

    @contextmanager
    def hold(self, wanted: Sequence[tuple[Question, Collection[bytes]]]) -> Iterator[list[Hold]]:
        """Hold row keys of several questions until the block ends; see `KnownAnswers.hold`."""
        indexes = [(self.known_answers(question), keys) for question, keys in wanted]
        with ExitStack() as entered:
            with self._holding:  # all at once, so that a caller waits only for those before it
                holds = [entered.enter_context(known.hold(keys)) for known, keys in indexes]
            yield holds

    def count_hopeless(
        self, question: Question, reason: str, fragments: int, rows: int
    ) -> tuple[int, int]:
        """Count `fragments` in which the model failed on all `rows` for the same reason.

        Returns the number of such fragments and of their rows so far.
        """
        with self._lock:
            before = self._hopeless.get((question.key, reason), (0, 0))
            counted = (before[0] + fragments, before[1] + rows)
            self._hopeless[question.key, reason] = counted
            return counted

    def read_once(self, fragment: Fragment, read: Callable[[], Read]) -> Read | None:
        """What `read` returns, for the first step that comes to `fragment`; None for the others.

        An UnusableFile from `read` is remembered and raised again for the other steps. Other errors
        are not: the next step calls its own `read`.
        """
        rows = (fragment.path, fragment.first_row)
        with self._lock:
            reading = self._reading.setdefault(rows, threading.Lock())
        with reading:  # another step of the same fragment may be reading
            if rows not in self._read:
                try:
                    values = read()
                    self._read[rows] = None
                    return values
                except UnusableFile as error:
                    self._read[rows] = str(error)
                    raise
        reason = self._read[rows]
        if reason is not None:
            raise UnusableFile(reason)
        return None

    def prior(
        self, question: Question, ask: Callable[[], Sequence[float] | RowFault]
    ) -> Sequence[float] | RowFault:
        """What `ask` returns, called once for each question of the run; again after a fault."""
        with self._asking_prior:
            if question.key not in self._priors:
                asked = ask()
                if isinstance(asked, RowFault):
                    return asked
                self._priors[question.key] = asked
            return self._priors[question.key]

    @contextmanager
    def engine(self, question: Question) -> Iterator[Engine]:
        """The engine that answers `question`, loaded if needed.

        InputError when the checkpoint changed after it was digested, TransientError when loading
        failed, Interrupted when the run was stopped.
        """
        model, runtime = question.model, self.run.runtime

        def load() -> Engine:
            logger.info("loading %s (%s)", describe_model(model.config), model.config.dtype)
            start = time.monotonic()
            arenas_bytes = _ENGINES.arenas_bytes
            engine = load_engine(model.config, runtime, question.models_at_once, arenas_bytes)
            seconds = time.monotonic() - start
            logger.info("%s: loaded in %.1f s", describe_model(model.config), seconds)
            # Checked after loading: the files may have changed between digest and load.
            if stamp_checkpoint(model.config) != model.stamp:
                engine.close()
                raise InputError(
                    f"{describe_model(model.config)}: was changed after this run digested it. "
                    "Run again."
                )
            return engine

        # All that tells two engines apart; another run with the same key reuses this engine.
        speed = (
            runtime.device,
            runtime.engine_process,
            runtime.max_batch_tokens,
            runtime.max_slots,
        )
        key = (model.identity, *speed)
        with _ENGINES.lease(key, load, question.models_at_once, self) as engine:
            yield engine

    def discard(self, engine: Engine) -> None:
        """Close an engine that failed, so that a retry loads a new one."""
        _ENGINES.discard(engine)

    def check_running(self) -> None:
        """Raise Interrupted if the run was stopped."""
        if self._stopped:
            raise Interrupted("the run was stopped")

    def stop(self) -> None:
        """Stop this run's inference and prevent more; returns at once. Other runs continue."""
        self._stopped = True
        # On a thread of its own, because closing waits for the engine's current forward.
        threading.Thread(
            target=_ENGINES.close_unshared, args=(self,), name="stop-engines", daemon=True
        ).start()


@contextmanager
def session(run: Run) -> Iterator[Session]:
    """Lock the output of `run`, and keep the state that its tasks share, until the block ends.

    A block that fails or is interrupted stops the run's inference in this process. InputError when
    the output cannot be written or another run holds it; TransientError when the lock cannot be
    taken after `runtime.retries` retries.
    """
    opened = Session(run.context)
    _lock(opened)  # first: nothing else may begin without the lock
    opened.ledger.keep_private({fragment.path for fragment in run.plan.fragments})
    with _CHANGING:
        _SESSIONS[run.context.id] = opened
    count_rows(run)
    try:
        yield opened
    except BaseException:  # includes interrupts and cancellations
        opened.stop()
        raise
    finally:
        with _CHANGING:
            del _SESSIONS[run.context.id]
        opened.ledger.close(run.context.id)


def count_rows(run: Run) -> None:
    """Set the progress of the open session of `run` to none of its rows; nothing without one."""
    opened = _SESSIONS.get(run.context.id)
    if opened is not None:
        opened.start("annotate", run.plan.rows * len(run.inputs))


def _lock(opened: Session) -> None:
    """Lock the output. Retries here, because a session begins outside of any Prefect task."""
    run = opened.run
    delay = run.runtime.retry_delay_seconds
    for _ in range(run.runtime.retries):
        try:
            opened.ledger.open(run.id, shared=run.runtime.cluster is not None)
            return
        except TransientError as error:
            logger.warning("%s; trying again in %.1f s", error, delay)
            time.sleep(delay)
            delay *= 2
    # The last attempt: its error goes to the caller.
    opened.ledger.open(run.id, shared=run.runtime.cluster is not None)


def join(run: RunContext) -> None:
    """Open a session of `run` without the lock, as a cluster's engine process does."""
    with _CHANGING:
        _SESSIONS[run.id] = Session(run)


def session_of(run: RunContext) -> Session:
    """The open session of `run`; Interrupted when the run has ended."""
    opened = _SESSIONS.get(run.id)
    if opened is None:  # a task may outlive its flow
        raise Interrupted(f"{run.output}: the run {run.id} has ended")
    return opened


def ledger_of(run: RunContext) -> Ledger:
    """The ledger of the open session of `run`; Interrupted when the run has ended.

    The light processes that submit to a cluster's engines write output files but have no session:
    they get a ledger without the lock.
    """
    # Without a cluster, a missing session means that the run has ended and released its lock.
    if run.runtime.cluster is not None and run.id not in _SESSIONS:
        return _ledger_at(run.output, run.id)
    return session_of(run).ledger


@lru_cache(1)
def _ledger_at(output: str, run: str) -> Ledger:
    """One ledger for all calls of a run in this process, so that its listings are made once."""
    return Ledger(output)


def newest_progress() -> Snapshot:
    """The progress of the run that began last in this process; zero counts if none is active."""
    with _CHANGING:
        opened = list(_SESSIONS.values())
    progress = opened[-1].progress if opened else Progress()
    return progress.snapshot()


def index_answers(
    ledger: Ledger,
    question: Question,
    *,
    include_failed: bool = False,
    others: Sequence[str] = (),
) -> KnownAnswers:
    """A new index of all committed answers to `question`; with failures if `include_failed`.

    Those in the outputs `others` count too. An output that cannot be read is logged and skipped.
    """
    files = list(ledger.answer_files(question.key))
    stored = ledger.stored_keys(question.key, files)
    for output in others:
        try:
            other = Ledger(output)
            theirs = list(other.answer_files(question.key))
            stored += other.stored_keys(question.key, theirs) if theirs else []
            files += theirs
        except (GlmbatchError, OSError) as error:
            logger.warning("%s: its answers are not reused: %s", output, error)
    return KnownAnswers(
        files,
        question.name,
        answers_schema(question.step, question.model.labels),
        include_failed=include_failed,
        stored=sorted(stored, key=len, reverse=True),
        find_spare=ledger.find_spare,
    )
