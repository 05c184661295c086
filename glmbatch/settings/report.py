"""Settings of a run's report and of its lineage. They change no answers.

Reads no files and no environment.
"""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from glmbatch.settings.addresses import has_credentials
from glmbatch.settings.kinds import LocalAddress, Settings


class ReportConfig(Settings):
    """What a run's report shows; these settings change no answers."""

    price_per_hour: float | None = Field(
        None,
        ge=0,
        description="Price of the machine per hour, in any currency, for the cost in the report. "
        "Empty: no cost is shown.",
    )
    price_per_1000_writes: float | None = Field(
        None,
        ge=0,
        description="Price of 1,000 requests to an object store that write or list (S3: PUT, COPY, "
        "POST, LIST; Google: class A). Empty: the report counts them without their price.",
    )
    price_per_1000_reads: float | None = Field(
        None,
        ge=0,
        description="Price of 1,000 requests to an object store that read (S3: GET, HEAD; Google: "
        "class B). Empty: the report counts them without their price.",
    )


class LineageConfig(Settings):
    """Where the OpenLineage events of each run go; they change no answers and fail no run."""

    url: str | None = Field(
        None,
        description="Address of an OpenLineage server, such as http://localhost:5000. Its API key "
        "is read from OPENLINEAGE_API_KEY. Empty: the events go to `file`.",
    )
    file: LocalAddress | None = Field(
        None, description="File to which the events are added as JSON lines. Empty: they go to url."
    )
    namespace: str = Field(
        "glmbatch", min_length=1, description="Namespace of the job in the catalogue."
    )
    job_name: str | None = Field(
        None,
        min_length=1,
        description="Name of the job in the catalogue. Empty: data.output as the job writes it, "
        "with {today} in place of the date.",
    )

    @field_validator("url")
    @classmethod
    def _without_credentials(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://\S+", url):
            raise ValueError("must be an address such as http://localhost:5000")
        if url is not None and has_credentials(url):
            raise ValueError("an address must not contain credentials; set OPENLINEAGE_API_KEY")
        return url

    @model_validator(mode="after")
    def _url_or_file(self) -> LineageConfig:
        if (self.url is None) == (self.file is None):
            raise ValueError("lineage needs either url or file")
        return self
