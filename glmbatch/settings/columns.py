"""The names of a step's answer columns: declared here, spelled nowhere else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Columns:
    """The output columns of the step named `step`. No column holds what its kind of step lacks."""

    step: str

    @property
    def answer(self) -> str:
        """The label or the text; null where the row failed."""
        return self.step

    @property
    def score(self) -> str:
        """Probability of the chosen label."""
        return f"{self.step}_score"

    @property
    def scores(self) -> str:
        """Struct with the probability of each label."""
        return f"{self.step}_scores"

    @property
    def margin(self) -> str:
        """How far the chosen label lies before the second one."""
        return f"{self.step}_margin"

    @property
    def finish_reason(self) -> str:
        """Why the text ends: stop or length."""
        return f"{self.step}_finish_reason"

    @property
    def prompt_tokens(self) -> str:
        """Tokens of the prompt."""
        return f"{self.step}_prompt_tokens"

    @property
    def completion_tokens(self) -> str:
        """Tokens of the written text."""
        return f"{self.step}_completion_tokens"

    @property
    def error(self) -> str:
        """Why the row failed, as a sentence; null where it has an answer."""
        return f"{self.step}_error"

    @property
    def error_type(self) -> str:
        """Why the row failed, as one word; null where it has an answer."""
        return f"{self.step}_error_type"

    @property
    def key(self) -> str:
        """The row key, 16 bytes; it identifies the answer across files and runs."""
        return f"{self.step}_key"

    @property
    def of_classify(self) -> list[str]:
        """All columns of a classify step, in the order of the output."""
        return [self.answer, self.score, self.scores, self.margin, *self._of_both]

    @property
    def of_generate(self) -> list[str]:
        """All columns of a generate step, in the order of the output."""
        counts = [self.prompt_tokens, self.completion_tokens]
        return [self.answer, self.finish_reason, *counts, *self._of_both]

    # Last, so that a reader of the first columns meets the answers.
    @property
    def _of_both(self) -> list[str]:
        return [self.error, self.error_type, self.key]
