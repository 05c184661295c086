"""Any step of a job, by its `kind`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import Field

from glmbatch.settings.columns import Columns
from glmbatch.settings.steps.classify import ClassifyStep
from glmbatch.settings.steps.extract import ExtractStep
from glmbatch.settings.steps.generate import GenerateStep

# `kind` chooses the class, so an error names only settings of that kind.
AnyStep = Annotated[ClassifyStep | GenerateStep | ExtractStep, Field(discriminator="kind")]


def calibrated_columns(step: AnyStep, parts: Collection[str] | None = None) -> list[str]:
    """The columns that a calibration of `parts` adds to the answers of `step`; None: of anything.

    Parts are the step itself, its labels if it may give several, or its fields.
    """
    columns = Columns(step.name)
    if not isinstance(step, ExtractStep):
        return [columns.calibrated] if parts is None or parts else []
    names = [field.name for field in step.fields if parts is None or field.name in parts]
    return [columns.field(name).calibrated for name in names]
