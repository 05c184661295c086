"""The names of a step's answer columns. No other module spells them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# In the column of error types, for a row that is null without an error: the step's condition did
# not hold, or the model was not sure enough.
NOT_ASKED = "not_asked"
ABSTAINED = "abstained"
NO_ERRORS = (NOT_ASKED, ABSTAINED)


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the output columns of the step named `step`.

    `of_classify`, `of_generate` and `of_extract` list those that each kind of step writes.
    """

    step: str

    @property
    def answer(self) -> str:
        """The label or labels, the text or the fields.

        Null if the step failed, was not asked, or abstained.
        """
        return self.step

    @property
    def score(self) -> str:
        """Probability of the best label; with `multiple`, of the least certain verdict."""
        return f"{self.step}_score"

    @property
    def scores(self) -> str:
        """Struct with the probability of each label; except with `multiple`, they add up to 1."""
        return f"{self.step}_scores"

    @property
    def margin(self) -> str:
        """Probability of the best label minus that of the next.

        With `multiple`, the least distance of a label's probability from its threshold.
        """
        return f"{self.step}_margin"

    @property
    def finish_reason(self) -> str:
        """Why generation ended: `stop` or `length`."""
        return f"{self.step}_finish_reason"

    @property
    def prompt_tokens(self) -> str:
        """Number of tokens in the prompt."""
        return f"{self.step}_prompt_tokens"

    @property
    def completion_tokens(self) -> str:
        """Number of tokens generated."""
        return f"{self.step}_completion_tokens"

    @property
    def log_prob(self) -> str:
        """Log-probability of the generated tokens, summed; only where a step asks for it."""
        return f"{self.step}_log_prob"

    def field(self, name: str) -> Columns:
        """The columns of an extracted field.

        Its value is their `answer`. A choice has its probability as `score`; the others have
        log-probabilities of their tokens where the step asks for confidence.
        """
        return Columns(f"{self.step}_{name}")

    @property
    def abstained(self) -> str:
        """Names of the extracted fields that are null because the model was not sure of them."""
        return f"{self.step}_abstained"

    @property
    def mean_log_prob(self) -> str:
        """Mean log-probability of a generated token; only where a step asks for confidence."""
        return f"{self.step}_mean_log_prob"

    @property
    def least_log_prob(self) -> str:
        """Log-probability of the least likely generated token; as `mean_log_prob`."""
        return f"{self.step}_least_log_prob"

    @property
    def calibrated(self) -> str:
        """How often answers of such a confidence are right; only with the job's `calibration`.

        With `multiple`, a struct of how often each label applies.
        """
        return f"{self.step}_calibrated"

    @property
    def error(self) -> str:
        """Why the row failed, as a sentence; null if it did not."""
        return f"{self.step}_error"

    @property
    def error_type(self) -> str:
        """Why the row has no answer, as a short code; null if it has one."""
        return f"{self.step}_error_type"

    @property
    def reasons(self) -> tuple[str, str]:
        """The columns that say why a row has no answer; known even where the answer is not."""
        return self.error, self.error_type

    @property
    def key(self) -> str:
        """The row key, 16 bytes that identify the answer across files and runs."""
        return f"{self.step}_key"

    @property
    def of_classify(self) -> list[str]:
        """All columns of a classify step, in output order."""
        return [self.answer, self.score, self.scores, self.margin, *self._of_both]

    @property
    def agreement(self) -> str:
        """Share of the drawn texts that are the answer; only where a step draws several."""
        return f"{self.step}_agreement"

    @property
    def answers(self) -> str:
        """List of all drawn texts, in the order of their draws; as `agreement`."""
        return f"{self.step}_answers"

    @property
    def of_number(self) -> list[str]:
        """All columns of a classify step whose answer is a number, in output order."""
        return [self.answer, *self._of_both]

    def of_generate(self, log_probs: bool, confidence: bool, votes: bool = False) -> list[str]:
        """All columns of a generate step, in output order."""
        numbers = [self.prompt_tokens, self.completion_tokens]
        if confidence:
            numbers += self.of_confidence
        elif log_probs:
            numbers.append(self.log_prob)
        if votes:
            numbers += [self.agreement, self.answers]
        return [self.answer, self.finish_reason, *numbers, *self._of_both]

    def of_extract(
        self, fields: Sequence[str], chosen: Sequence[str], sure: Sequence[str], *, abstains: bool
    ) -> list[str]:
        """All columns of an extract step with `fields` in columns, in output order.

        `chosen` are the fields that are a choice, and `sure` those with log-probabilities.
        """
        names = [self.answer, self.finish_reason]
        names += [self.field(name).answer for name in fields]
        names += [self.field(name).score for name in chosen]
        names += [self.prompt_tokens, self.completion_tokens]
        for name in sure:
            names += self.field(name).of_confidence
        return [*names, *([self.abstained] if abstains else []), *self._of_both]

    @property
    def of_confidence(self) -> list[str]:
        """Log-probabilities of the tokens: their sum, their mean and the least."""
        return [self.log_prob, self.mean_log_prob, self.least_log_prob]

    # Last, so that the answers come first when someone looks at the file.
    @property
    def _of_both(self) -> list[str]:
        return [self.error, self.error_type, self.key]
