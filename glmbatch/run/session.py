"""What a run holds while it is on: its output's lock, its engines, its known answers, its progress.

A session begins and ends with one `with`; nothing else of a run outlives a call. The tasks of a
run, which Prefect puts on threads of their own, find it by the run's id. Loaded engines alone stay
behind in the process, so that the next run over the same weights need not load them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from glmbatch.errors import InputError, Interrupted, TransientError, UnusableFile
from glmbatch.glm.engine.loading import load_engine
from glmbatch.glm.engine.pool import EnginePool
from glmbatch.glm.engine.protocol import Engine
from glmbatch.ledger.fragments import Fragment
from glmbatch.ledger.known import KnownAnswers
from glmbatch.ledger.ledger import Ledger
from glmbatch.report.progress import Progress, Snapshot
from glmbatch.run.models import describe_model, stamp_checkpoint
from glmbatch.run.work import Question, Run, RunContext
from glmbatch.steps.answers import answers_schema

logger = logging.getLogger(__name__)

# The engines loaded in this process, whichever run uses them.
_ENGINES = EnginePool()
# The sessions that are open in this process, by run id.
_SESSIONS: dict[str, Session] = {}
_CHANGING = threading.Lock()


class Session:
    """What the tasks of one run share in one process. Safe to use from several threads."""

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.ledger = Ledger(run.output)
        self.progress = Progress()
        self._stopped = False
        # By step name and step key: two steps that ask the same have columns of different names.
        self._known: dict[tuple[str, str], KnownAnswers] = {}
        # Fragments without an answer, and their rows, by step key and reason.
        self._hopeless: dict[tuple[str, str], tuple[int, int]] = {}
        # Why each fragment whose rows were walked through cannot be used, by its name.
        self._walked: dict[str, str | None] = {}
        self._walking: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def known_answers(self, question: Question) -> KnownAnswers:
        """The index of all committed answers to `question`; the run's fragments add to it."""
        key = (question.name, question.key)
        with self._lock:  # made once, however many fragments begin together
            if key not in self._known:
                self._known[key] = index_answers(self.ledger, question)
            return self._known[key]

    def count_hopeless(self, question: Question, reason: str, rows: int) -> tuple[int, int]:
        """Count a fragment in which the model failed on all `rows` for one reason.

        Returns how many such fragments and rows there were so far.
        """
        with self._lock:
            fragments, before = self._hopeless.get((question.key, reason), (0, 0))
            counted = (fragments + 1, before + rows)
            self._hopeless[question.key, reason] = counted
            return counted

    def walk_once(self, fragment: Fragment, walk: Callable[[Fragment], None]) -> None:
        """`walk` through the rows of `fragment`, once for all steps of the run.

        What was found holds for them all: UnusableFile is raised again. A machine's fault is not.
        """
        with self._lock:
            walking = self._walking.setdefault(fragment.name, threading.Lock())
        with walking:  # another step of the fragment may be at it
            if fragment.name not in self._walked:
                try:
                    walk(fragment)
                    self._walked[fragment.name] = None
                except UnusableFile as error:
                    self._walked[fragment.name] = str(error)
        reason = self._walked[fragment.name]
        if reason is not None:
            raise UnusableFile(reason)

    @contextmanager
    def engine(self, question: Question) -> Iterator[Engine]:
        """The engine that answers `question`, loaded when it is not there yet.

        InputError when the checkpoint was changed since it was digested, Interrupted when the run
        was told to stop.
        """
        model, runtime = question.model, self.run.runtime

        def load() -> Engine:
            logger.info("loading %s (%s)", describe_model(model.config), model.config.dtype)
            start = time.monotonic()
            engine = load_engine(model.config, runtime, question.models_at_once)
            seconds = time.monotonic() - start
            logger.info("%s: loaded in %.1f s", describe_model(model.config), seconds)
            # Only now, since the files may change between their digests and their loading.
            if stamp_checkpoint(model.config) != model.stamp:
                engine.close()
                raise InputError(
                    f"{describe_model(model.config)}: was changed since this run took its digests. "
                    "Run again."
                )
            return engine

        # What makes two engines different; another run with the same finds this one loaded.
        key = (model.identity, runtime.device, runtime.max_batch_tokens, runtime.max_slots)
        with _ENGINES.lease(key, load, question.models_at_once, self) as engine:
            yield engine

    def discard(self, engine: Engine) -> None:
        """Close an engine that failed, so that a retry loads it again."""
        _ENGINES.discard(engine)

    def check_running(self) -> None:
        """Interrupted once the run was told to stop."""
        if self._stopped:
            raise Interrupted("the run was told to stop")

    def stop(self) -> None:
        """End the inference of this run, and let none begin; returns at once. Other runs go on."""
        self._stopped = True
        # On a thread of its own: closing waits for the forward that the engine is in.
        threading.Thread(
            target=_ENGINES.close_unshared, args=(self,), name="stop-engines", daemon=True
        ).start()


@contextmanager
def session(run: Run) -> Iterator[Session]:
    """Hold the output of `run`, and keep what its tasks share, until the block ends.

    A block that fails, or is interrupted, ends the inference under way in this process, which
    nobody needs any more. InputError when the output cannot be written or another run holds it.
    """
    opened = Session(run.context)
    _lock(opened)  # first: without it nothing else may begin
    opened.ledger.keep_private({fragment.path for fragment in run.plan.fragments})
    with _CHANGING:
        _SESSIONS[run.context.id] = opened
    opened.progress.start("annotate", run.plan.rows * len(run.inputs))
    try:
        yield opened
    except BaseException:  # an interrupt and a cancellation too
        opened.stop()
        raise
    finally:
        with _CHANGING:
            del _SESSIONS[run.context.id]
        opened.ledger.close(run.context.id)


def _lock(opened: Session) -> None:
    """Lock the output; tried again here, since a session begins outside of any task."""
    run = opened.run
    delay = run.runtime.retry_delay_seconds
    for _ in range(run.runtime.retries):
        try:
            opened.ledger.open(run.id)
            return
        except TransientError as error:
            logger.warning("%s; trying again in %.1f s", error, delay)
            time.sleep(delay)
            delay *= 2
    # The last try, whose error is the caller's to see.
    opened.ledger.open(run.id)


def join(run: RunContext) -> None:
    """Open the session of `run` without its lock, as an engine process of a cluster does."""
    with _CHANGING:
        _SESSIONS[run.id] = Session(run)


def session_of(run: RunContext) -> Session:
    """The open session of `run`; Interrupted when the run has ended."""
    opened = _SESSIONS.get(run.id)
    if opened is None:  # as for a task that outlives its flow
        raise Interrupted(f"{run.output}: the run {run.id} has ended")
    return opened


def ledger_of(run: RunContext) -> Ledger:
    """The ledger of the open session of `run`; Interrupted when the run has ended.

    The light processes that submit to a cluster's engines write output files, and have no session:
    there it is one of their own.
    """
    # Without a cluster a missing session means that the run has ended, and its lock with it.
    if run.runtime.cluster is not None and run.id not in _SESSIONS:
        return Ledger(run.output)
    return session_of(run).ledger


def newest_progress() -> Snapshot:
    """How far the run is that began last in this process; empty counts when none is on."""
    with _CHANGING:
        opened = list(_SESSIONS.values())
    progress = opened[-1].progress if opened else Progress()
    return progress.snapshot()


def index_answers(
    ledger: Ledger, question: Question, *, include_failed: bool = False
) -> KnownAnswers:
    """An index of all committed answers to `question`, failures only if `include_failed`."""
    return KnownAnswers(
        list(ledger.answer_files(question.key)),
        question.name,
        answers_schema(question.step, question.model.labels),
        include_failed=include_failed,
    )
