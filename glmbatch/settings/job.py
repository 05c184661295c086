"""One job: every setting, declared once for the job file, the command line, forms and Python.

Reads no files and no environment. `ModelConfig` and the steps hold what changes answers;
`RuntimeConfig` holds what changes only speed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from glmbatch.settings.addresses import has_credentials
from glmbatch.settings.kinds import Address, LocalAddress, Settings, Share
from glmbatch.settings.model import ModelConfig, ModelSetting
from glmbatch.settings.steps import (
    TEXT,
    AnyStep,
    ClassifyStep,
    GenerateStep,
    Step,
    answer_columns,
    placeholders,
)

# The job and its parts are found here, whichever file declares them.
__all__ = [
    "TEXT",
    "Address",
    "AnyStep",
    "CanaryConfig",
    "ClassifyStep",
    "DataConfig",
    "GenerateStep",
    "JobConfig",
    "ModelConfig",
    "ReportConfig",
    "RuntimeConfig",
    "Settings",
    "Share",
    "Step",
    "answer_columns",
    "has_credentials",
    "placeholders",
]


class DataConfig(Settings):
    """Where the rows come from and where the answers go."""

    input: Address = Field(
        description="A Parquet file, a folder of them, or a glob such as `in/day=*/*.parquet`; "
        "s3://bucket/name is one in an object store.",
    )
    output: Address = Field(
        description="Folder for the answers, here or in an object store (s3://bucket/name); "
        "made when absent, mirrors the input's folders.",
    )
    format: Literal["parquet", "delta"] = Field(
        "parquet",
        description="parquet: a folder of files. delta: a Delta Lake table over them too; choose "
        "it where readers must never see two publications mixed (needs glmbatch[delta]).",
    )
    text_column: str = Field(
        "text", min_length=1, description="Column that holds the text; a prompt calls it {text}."
    )
    id_column: str | None = Field(
        None,
        description="Column that names a row in error lists; empty: rows are named by their number "
        "in the file.",
    )
    rows_per_fragment: int = Field(
        10_000,  # minutes of work on a GPU, and some MB of answers
        ge=1,
        le=10_000_000,
        description="Rows in one unit of work, retry and commit. Fewer lose less to a crash; more "
        "make fewer, larger files.",
    )
    missing_sources: Literal["keep", "drop"] = Field(
        "keep",
        description="What becomes of published rows whose file is gone. keep: for a landing folder "
        "that is emptied; drop: for full snapshots that are split or written under other names.",
    )
    follow_links: bool = Field(
        False,
        description="Read files and folders of the input that are links out of it, as in a Hugging "
        "Face cache. Who may write there can have any file of this machine read.",
    )
    limit: int | None = Field(
        None, ge=1, description="Process only the first so many rows, for a trial; empty: all."
    )


class RuntimeConfig(Settings):
    """Performance settings; changing them never invalidates answers."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (CUDA when there is one), cpu, cuda or cuda:N.",
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Most tokens in one packed forward; empty: 2,048 on CPU, 16,384 on CUDA. Lower "
        "it where memory runs out.",
    )
    max_slots: int | None = Field(
        None,
        ge=1,
        le=4096,  # more rows than any card has room for
        description="Most rows generated at once; empty: 32 on CPU, from free memory on CUDA. "
        "Lower it to share a GPU.",
    )
    fragments_in_flight: int = Field(
        2,
        ge=1,
        le=64,
        description="Fragments worked on at once by one engine. Raise it where fragments are so "
        "small that the device waits for files.",
    )
    cache: LocalAddress = Field(
        "~/.cache/glmbatch",
        description="Folder for checkpoints fetched from an object store; with a cluster, one that "
        "all its machines share.",
    )
    cluster: Literal["ray"] | None = Field(
        None,
        description="ray: engine processes on a Ray cluster work on the fragments, each with a GPU "
        "of its own (needs glmbatch[ray]); empty: this process does, with one device.",
    )
    cluster_address: str | None = Field(
        None,
        min_length=1,
        description="Address of a Ray cluster that this machine belongs to, such as 10.0.0.1:6379; "
        "empty: one of this machine alone, for this run.",
    )
    cluster_workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Engine processes on the cluster; empty: one for each GPU or, without GPUs, "
        "for each machine. Set it where CPUs should be shared by several.",
    )
    retries: int = Field(
        3, ge=0, le=20, description="Times a task is tried again after the machine failed."
    )
    retry_delay_seconds: float = Field(
        2.0, ge=0, le=3600, description="First wait before a retry; it doubles, with jitter."
    )

    @field_validator("cluster_address")
    @classmethod
    def _without_credentials(cls, address: str | None) -> str | None:
        if address is not None and has_credentials(address):
            raise ValueError("an address holds no credentials; set RAY_AUTH_TOKEN instead")
        return address

    @model_validator(mode="after")
    def _devices_are_given_by_the_cluster(self) -> RuntimeConfig:
        if self.cluster and ":" in self.device:
            raise ValueError(
                f"device {self.device}: a cluster gives each engine a GPU; set auto, cuda or cpu"
            )
        return self


class CanaryConfig(Settings):
    """Rows with known-good answers, which a run must reproduce before it publishes."""

    file: Address = Field(
        description="Parquet file of rows and answers, as `glmbatch canary` freezes them. A run "
        "that asks the model asks it about these rows too.",
    )
    max_change: Share = Field(
        0.0,
        description="Share of canary rows whose answers may differ; beyond it nothing is "
        "published. 0 suits float32. In half precision a text counts as the same when its first "
        "quarter is, and 0.1 leaves room for rounding.",
    )


def _file_alone(value: object) -> object:
    return {"file": value} if isinstance(value, str) else value


class ReportConfig(Settings):
    """What the page of a run shows; it changes no answer."""

    price_per_hour: float | None = Field(
        None,
        ge=0,
        description="Price of an hour of the machine, in any currency; the report then shows what "
        "the run cost. Empty: no cost.",
    )


class JobConfig(Settings):
    """One job: rows in, one group of answer columns for each step out."""

    data: DataConfig = Field(description="Where the rows come from and where the answers go.")
    model: ModelSetting = Field(
        description="The checkpoint that answers, unless a step names its own."
    )
    steps: list[AnyStep] = Field(min_length=1, description="Questions asked of each row, in order.")
    on_error: Literal["raise", "quarantine", "null"] = Field(
        "quarantine",
        description="What a bad row or file does. quarantine: it keeps its reason, is listed, and "
        "the run ends with exit code 3; null: the same, ending as done; raise: the run stops and "
        "publishes nothing.",
    )
    max_error_rate: Share = Field(
        0.1,
        description="Share of rows that may fail, unreadable files' included; above it nothing is "
        "published. Set it a little above what a usual night has.",
    )
    canary: Annotated[CanaryConfig, BeforeValidator(_file_alone)] | None = Field(
        None,
        description="Audit against rows with known-good answers; a text alone is its file. "
        "Empty: no audit.",
    )
    report: ReportConfig = Field(
        default_factory=ReportConfig, description="What the page of a run shows."
    )
    runtime: RuntimeConfig = Field(
        default_factory=RuntimeConfig,
        description="Performance only; changing it never invalidates answers.",
    )

    @field_validator("on_error", mode="before")
    @classmethod
    def _yaml_null(cls, value: object) -> object:
        # YAML reads `on_error: null` as no value, and so does the Prefect form.
        return "null" if value is None else value

    @model_validator(mode="after")
    def _names_are_distinct(self) -> JobConfig:
        writers: dict[str, str] = {}
        for step in self.steps:
            if step.name == TEXT:
                raise ValueError(
                    "a step cannot be named 'text': a prompt's {text} is the text column; rename it"
                )
            for column in answer_columns(step):
                folded = column.casefold()  # Spark and DuckDB do not tell Mood from mood
                if folded in writers:
                    raise ValueError(
                        f"steps {writers[folded]!r} and {step.name!r} both write a column "
                        f"{column!r}; rename one"
                    )
                writers[folded] = step.name
        return self

    def model_of(self, step: Step) -> ModelConfig:
        """The checkpoint that answers `step`."""
        return step.model or self.model

    def earlier_steps(self, step: Step) -> list[str]:
        """Names of the steps whose answers the prompt of `step` uses, in the order they run."""
        wanted = placeholders(step.prompt_template)
        # A later step's name, or its own, is a source column: its answers do not exist yet.
        names = []
        for earlier in self.steps:
            if earlier is step or earlier.name == step.name:
                break
            if earlier.name in wanted:
                names.append(earlier.name)
        return names

    def source_columns(self, step: Step) -> dict[str, str]:
        """The source column behind each placeholder of `step` that is not an earlier answer."""
        earlier = self.earlier_steps(step)
        columns = {}
        for name in placeholders(step.prompt_template):
            if name not in earlier:
                columns[name] = self.data.text_column if name == TEXT else name
        return columns
