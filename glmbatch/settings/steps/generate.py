"""Generate steps, and how written answers are bounded, sampled and judged."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator

from glmbatch.settings.columns import Columns
from glmbatch.settings.kinds import Settings, Share
from glmbatch.settings.steps.step import AbstainedRate, Step

MaxTokens = Annotated[
    int,
    Field(
        ge=1,
        le=32_768,
        # The name in transformers, which users type by habit.
        validation_alias=AliasChoices("max_tokens", "max_new_tokens"),
    ),
]
Temperature = Annotated[float, Field(ge=0, le=10)]
TopP = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Sample from the likeliest tokens whose probabilities add up to this. "
        "1: no limit.",
    ),
]
TopK = Annotated[int, Field(ge=0, description="Sample from the K likeliest tokens. 0: no limit.")]
AbstainBelow = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[
    int,
    Field(
        ge=0,
        lt=2**63,
        description="Seed for sampling; each row has its own random numbers, from the seed and its "
        "row key.",
    ),
]


class GenerateAudits(Settings):
    """Limits on written answers; a run that exceeds one publishes nothing."""

    max_truncated_rate: Share | None = Field(
        None,
        description="Maximum share of answers cut off at max_tokens. Start with 0.05. "
        "Empty: no audit.",
    )
    max_empty_rate: Share | None = Field(
        None, description="Maximum share of empty answers. Start with 0.01. Empty: no audit."
    )
    max_abstained_rate: AbstainedRate = None
    max_length_drift: float | None = Field(
        None,
        gt=0,
        description="Maximum relative change of the mean answer length in tokens since the last "
        "publication: 0.5 allows 50 to 150 percent of it. Empty: no audit.",
    )


class GenerateStep(Step):
    """Generate a text for each row."""

    kind: Literal["generate"] = Field(
        "generate", description="Makes this a step that generates a text for each row."
    )
    max_tokens: MaxTokens = Field(
        256,
        description="Maximum tokens to generate for a row; a longer answer is cut off and counted "
        "as truncated. A high limit costs nothing until answers reach it: memory is allocated as "
        "they grow.",
    )
    temperature: Temperature = Field(
        0.0,
        description="0: always take the likeliest token, best for facts and fixed formats. "
        "Above 0: sample; higher values vary more.",
    )
    top_p: TopP = 0.8
    top_k: TopK = 50
    seed: Seed = 0
    n: int = Field(
        1,
        ge=1,
        le=64,
        description="Number of texts to draw for a row. Above 1, the answer is the text that is "
        "drawn most often, and the columns {name}_agreement, its share, and {name}_answers, all "
        "texts, are added. Needs a temperature above 0.",
    )
    stop: list[str] = Field(
        default_factory=list,
        description="Strings that end an answer; the answer does not include them.",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=10,
        description="Makes tokens less likely that the prompt or the answer already has, as in "
        "transformers. 1: off. Above 1.2 or so, answers drift from the subject.",
    )
    no_repeat_ngram_size: int = Field(
        0,
        ge=0,
        le=1024,
        description="No run of so many tokens occurs twice in a prompt and its answer, as in "
        "transformers. It ends loops, and forbids quoting longer runs of the prompt. 0: off.",
    )
    min_tokens: int = Field(
        0,
        ge=0,
        le=32_768,
        validation_alias=AliasChoices("min_tokens", "min_new_tokens"),
        description="The model cannot end an answer before so many tokens; a stop text can.",
    )
    log_probs: bool = Field(
        False,
        description="Whether to add the column {name}_log_prob: how likely the model, without "
        "temperature, penalties and limits, finds the answer; the natural logarithm, summed over "
        "its tokens.",
    )
    confidence: bool = Field(
        False,
        description="Whether to add the columns {name}_log_prob, {name}_mean_log_prob and "
        "{name}_least_log_prob: the sum over the tokens of an answer, their mean, and the least "
        "likely token, as for log_probs.",
    )
    abstain_below: AbstainBelow | None = Field(
        None,
        description="Least mean probability of a token, which is exp({name}_mean_log_prob); below "
        "it, the row gets no text and the reason `abstained`, which is no failure. Adds the "
        "columns of confidence. Empty: every row gets one.",
    )
    audits: GenerateAudits = Field(
        default_factory=GenerateAudits,
        description="Limits on the texts; a run that exceeds one publishes nothing.",
    )

    @property
    def tells_confidence(self) -> bool:
        """Whether the step has the columns of confidence."""
        return self.confidence or self.abstain_below is not None

    @property
    def answer_columns(self) -> list[str]:
        """Names of the columns that the step adds to the output, in order."""
        return Columns(self.name).of_generate(self.log_probs, self.tells_confidence, self.n > 1)

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if not all(stop):
            raise ValueError("an empty stop string would end every answer at once; remove it")
        return stop

    @model_validator(mode="after")
    def _draws_differ(self) -> Self:
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n is {self.n}, and at temperature 0 all draws are the same text; set temperature "
                "above 0 or remove n"
            )
        return self

    @model_validator(mode="after")
    def _reachable_minimum(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}; raise "
                "max_tokens or lower min_tokens"
            )
        return self
