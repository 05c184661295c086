"""Any step of a job, by its `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from glmbatch.settings.steps.classify import ClassifyStep
from glmbatch.settings.steps.extract import ExtractStep
from glmbatch.settings.steps.generate import GenerateStep

# `kind` chooses the class, so an error names only settings of that kind.
AnyStep = Annotated[ClassifyStep | GenerateStep | ExtractStep, Field(discriminator="kind")]
