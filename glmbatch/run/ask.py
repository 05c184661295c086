"""Ask the model: prompts in, answers out, through the engine of the run's session.

    Choice, Writing, Extraction
                       a model's answer to one prompt (classify, generate and extract in steps/)
    Outcome            one of these, or a RowFault if the model failed
    Asked              the outcomes of many prompts, by row key
    Answer             an outcome as a row of a table (steps/answers.py)

Knows no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from glmbatch.errors import TransientError
from glmbatch.glm.engine.protocol import Engine
from glmbatch.run.models import tokenizer_of
from glmbatch.run.session import Session
from glmbatch.run.work import Question, now
from glmbatch.settings.job import ClassifyStep, ExtractStep
from glmbatch.steps.classify import Choice, ask_choices
from glmbatch.steps.extract import Extraction, ask_extractions
from glmbatch.steps.generate import Writing, ask_writings
from glmbatch.steps.prompt import Prompt, RowFault

Outcome = Choice | Writing | Extraction | RowFault


@dataclass(frozen=True, slots=True)
class Asked:
    """The model's outcomes by row key. `began` is in seconds since 1970, after loading."""

    began: float
    outcomes: dict[bytes, Outcome]

    @property
    def only_reason(self) -> str | None:
        """The reason for which the model failed on every prompt, with N for each number.

        None if any prompt was answered or the reasons differ.
        """
        reasons: set[str] = set()
        for outcome in self.outcomes.values():
            if not isinstance(outcome, RowFault):
                return None
            # Numbers such as a prompt's length differ from row to row.
            reasons.add(re.sub(r"(?<![\w:])\d+", "N", outcome.reason))
        return reasons.pop() if len(reasons) == 1 else None


def ask(
    question: Question, prompts: Mapping[bytes, Prompt], session: Session, *, counted: bool = True
) -> Asked:
    """Ask the model about every prompt, and return the outcomes by row key.

    `counted` outcomes advance the run's progress. A prompt on which the model failed has a RowFault
    as its outcome. TransientError when the machine failed, Interrupted when the run was stopped.
    """
    with session.engine(question) as engine:
        began = now()  # after loading, which must not count against the model's speed
        outcomes: dict[bytes, Outcome] = {}
        try:
            for key, outcome in _outcomes(question, prompts, engine):
                outcomes[key] = outcome
                session.progress.add(1 if counted else 0, computed=True)
                session.check_running()  # stopping the run does not close a shared engine
        except TransientError:
            session.check_running()  # perhaps it failed because the run was stopped
            session.discard(engine)
            raise
    return Asked(began, outcomes)


def _outcomes(
    question: Question, prompts: Mapping[bytes, Prompt], engine: Engine
) -> Iterator[tuple[bytes, Outcome]]:
    tokenizer = tokenizer_of(question.model)
    step = question.step
    if isinstance(step, ClassifyStep):
        return ask_choices(step, question.model.labels, prompts, engine, tokenizer)
    if isinstance(step, ExtractStep):
        return ask_extractions(step, prompts, engine, tokenizer)
    return ask_writings(step, prompts, engine, tokenizer, chat=question.chat)
