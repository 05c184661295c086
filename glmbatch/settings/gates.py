"""What a run must pass before it publishes, beside the audits of its steps. Reads no files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from glmbatch.settings.kinds import Address, Settings, Share, StepName, text_alone


class CanaryConfig(Settings):
    """Rows with known-good answers, which a run must reproduce before it publishes."""

    file: Address = Field(
        description="Parquet file of rows and answers, written by `glmbatch canary`. A run that "
        "uses the model answers these rows too.",
    )
    max_change: Share = Field(
        0.0,
        description="Maximum share of canary rows whose answers may change; above it, nothing is "
        "published. Use 0 in float32 and 0.1 in half precision, where rounding changes some "
        "answers. In half precision, only the first quarter of a text must stay the same.",
    )


class EvaluateConfig(Settings):
    """Labelled rows on which a changed step is measured before it may replace what is published."""

    rows: Address = Field(
        description="Parquet file, folder or glob with the columns that the prompts use and the "
        "truth of at least one step, as for `glmbatch evaluate`.",
    )
    truth: dict[str, str] = Field(
        default_factory=dict,
        description="Column with the truth of each step, or of a field as `step.field`. A step "
        "without an entry takes the column of its own name.",
    )
    least_score: Share | dict[StepName, Share] | None = Field(
        None,
        description="Least score of a changed step, from 0 to 1, or one for each step by its name. "
        "Empty: no such limit.",
    )
    least_gain: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None,
        description="Least gain of a changed step over what is published, on the same rows: 0.01 "
        "asks for one point more, -1 accepts any loss. Empty: a loss is refused if chance hardly "
        "explains it.",
    )


CanarySetting = Annotated[CanaryConfig, text_alone("canary")]
EvaluateSetting = Annotated[EvaluateConfig, text_alone("evaluate")]
