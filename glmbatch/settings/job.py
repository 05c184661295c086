"""The settings of a job, declared once for the job file, the command line, the form and Python.

Reads no files and no environment. `ModelConfig` and the steps have the settings that change
answers; those of `RuntimeConfig` change only speed.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field, field_validator, model_validator

from glmbatch.settings.addresses import has_credentials
from glmbatch.settings.columns import Columns
from glmbatch.settings.conditions import columns_of, parse_condition
from glmbatch.settings.data import DataConfig
from glmbatch.settings.gates import (
    CanaryConfig,
    CanarySetting,
    EvaluateConfig,
    EvaluateSetting,
)
from glmbatch.settings.kinds import Address, LocalAddress, Settings, Share
from glmbatch.settings.model import ModelConfig, ModelSetting
from glmbatch.settings.report import LineageConfig, ReportConfig
from glmbatch.settings.steps.any_step import AnyStep, calibrated_columns
from glmbatch.settings.steps.classify import ClassifyStep
from glmbatch.settings.steps.extract import ExtractStep
from glmbatch.settings.steps.generate import GenerateStep
from glmbatch.settings.steps.step import TEXT, Step, differ_in_names, placeholders

# Other modules import a job and its parts from here, whichever module declares them.
__all__ = [
    "TEXT",
    "Address",
    "AnyStep",
    "CanaryConfig",
    "ClassifyStep",
    "DataConfig",
    "EvaluateConfig",
    "ExtractStep",
    "GenerateStep",
    "JobConfig",
    "LineageConfig",
    "ModelConfig",
    "ReportConfig",
    "RuntimeConfig",
    "Settings",
    "Share",
    "Step",
    "differ_in_names",
    "has_credentials",
    "placeholders",
]

CACHE = "~/.cache/glmbatch"
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"


class RuntimeConfig(Settings):
    """Performance settings; changing them never invalidates answers."""

    device: str = Field(
        "auto",
        pattern=DEVICE,
        description="Device to run on: cpu, cuda, cuda:N, or auto for CUDA if available.",
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Maximum tokens in one forward pass. Lower it if memory runs out. "
        "Empty: 2,048 on CPU, 16,384 on CUDA.",
    )
    max_slots: int | None = Field(
        None,
        ge=1,
        le=4096,  # more rows than any card has room for
        description="Maximum rows to generate at the same time. Lower it to share a GPU. "
        "Empty: 32 on CPU, 1,024 on CUDA.",
    )
    engine_process: bool | None = Field(
        None,
        description="Whether the model runs in a process of its own, where the work on rows and "
        "files never holds it up, and which is replaced if it dies. Empty: yes on CUDA; no on CPU, "
        "where it starts sooner and needs less memory.",
    )
    fragments_in_flight: int = Field(
        2,
        ge=1,
        le=64,
        description="Bundles that one engine processes at the same time: large fragments, or small "
        "ones that share a task. Raise it if the device waits for files.",
    )
    cache: LocalAddress = Field(
        CACHE,
        description="Folder for checkpoints downloaded from an object store, and for the rows of "
        "CSV and JSON lines. On a cluster, all machines must share it.",
    )
    cluster: Literal["ray"] | None = Field(
        None,
        description="ray: spread fragments over a Ray cluster, one engine process per GPU (needs "
        "glmbatch[ray]). Empty: use one device, in this process.",
    )
    cluster_address: str | None = Field(
        None,
        min_length=1,
        description="Address of a running Ray cluster that includes this machine, such as "
        "10.0.0.1:6379. Empty: start one on this machine for the run.",
    )
    cluster_workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Engine processes on the cluster. Set it to run several per machine on CPUs. "
        "Empty: one per GPU or, without GPUs, one per machine.",
    )
    retries: int = Field(
        3,
        ge=0,
        le=20,
        description="Retries of a task after a machine failure; other errors are never retried.",
    )
    retry_delay_seconds: float = Field(
        2.0,
        ge=0,
        le=3600,
        description="Seconds before the first retry; each further wait is twice as long.",
    )

    @field_validator("cluster_address")
    @classmethod
    def _without_credentials(cls, address: str | None) -> str | None:
        if address is not None and has_credentials(address):
            raise ValueError("an address must not contain credentials; set RAY_AUTH_TOKEN instead")
        return address

    @model_validator(mode="after")
    def _devices_are_given_by_the_cluster(self) -> RuntimeConfig:
        if self.cluster and ":" in self.device:
            raise ValueError(
                f"device {self.device}: a cluster assigns the GPUs; set auto, cuda or cpu"
            )
        return self


class JobConfig(Settings):
    """One job: every row is answered by each step, which adds its columns to the output."""

    data: DataConfig = Field(description="Where rows are read from and where answers are written.")
    model: ModelSetting = Field(
        description="Checkpoint for all steps that do not set their own; its path alone is enough."
    )
    steps: list[AnyStep] = Field(
        min_length=1,
        description="Questions to ask about each row, in order; a prompt may use earlier answers.",
    )
    on_error: Literal["raise", "quarantine", "null"] = Field(
        "quarantine",
        description="What to do with a row or file that fails. quarantine: record the reason and "
        "exit with code 3. null: the same, but exit with code 0. raise: stop and publish nothing.",
    )
    max_error_rate: Share = Field(
        0.1,
        description="Maximum share of rows that may fail, including rows of unreadable files; "
        "above it, nothing is published. Set it a little above the rate of a normal run.",
    )
    canary: CanarySetting | None = Field(
        None,
        description="Rows with known-good answers to check the model against; the path of the file "
        "alone is enough. Empty: no such audit.",
    )
    evaluate: EvaluateSetting | None = Field(
        None,
        description="Labelled rows on which a changed prompt, model or setting is measured before "
        "anything else; the path of the rows alone is enough. Empty: changes are not measured.",
    )
    calibration: Address | None = Field(
        None,
        description="File of `glmbatch evaluate --calibrate`: adds a column {name}_calibrated, "
        "which says how often answers of such a confidence are right. Empty: no such column.",
    )
    report: ReportConfig = Field(
        default_factory=ReportConfig, description="What a run's report shows."
    )
    lineage: LineageConfig | None = Field(
        None,
        description="Where the OpenLineage events of each run go (needs glmbatch[lineage]). Empty: "
        "there are none.",
    )
    runtime: RuntimeConfig = Field(
        default_factory=RuntimeConfig,
        description="Performance settings; changing them never invalidates answers.",
    )

    @field_validator("on_error", mode="before")
    @classmethod
    def _yaml_null(cls, value: object) -> object:
        # YAML and the Prefect form read `on_error: null` as an absent value.
        return "null" if value is None else value

    @model_validator(mode="after")
    def _names_are_distinct(self) -> JobConfig:
        writers: dict[str, str] = {}
        for step in self.steps:
            if step.name == TEXT:
                raise ValueError(
                    "a step cannot be named 'text': {text} in a prompt is the text column; "
                    "rename the step"
                )
            for column in self.written_columns(step):
                folded = column.casefold()  # Spark and DuckDB ignore case in column names
                if folded in writers:
                    raise ValueError(
                        f"steps {writers[folded]!r} and {step.name!r} both write a column "
                        f"{column!r}; rename one"
                    )
                writers[folded] = step.name
        return self

    @model_validator(mode="after")
    def _only_earlier_answers_are_used(self) -> JobConfig:
        later: dict[str, str] = {}
        for place in reversed(range(len(self.steps))):
            step = self.steps[place]
            later.update(dict.fromkeys(step.answer_columns, step.name))
            uses = [(name, "when") for name in conditioned_columns(step)]
            uses += [(name, "prompt_template") for name in placeholders(step.prompt_template)]
            for name, setting in uses:
                if name in later:
                    raise ValueError(
                        f"steps[{place}].{setting} uses {name!r}, which step {later[name]!r} does "
                        "not answer before; use a column of the input or of an earlier step"
                    )
        return self

    @model_validator(mode="after")
    def _history_is_of_the_input(self) -> JobConfig:
        for place, step in enumerate(self.steps):
            for writer in self.steps:
                if step.history_column in writer.answer_columns:
                    raise ValueError(
                        f"steps[{place}].history_column is {step.history_column!r}, which step "
                        f"{writer.name!r} answers; use a column of the input"
                    )
        return self

    def from_today(self) -> JobConfig:
        """The job with the date of today, if it has none, so that it reads one day throughout."""
        dated = self.data.dated(None)
        return self.model_copy(update={"data": self.data.model_copy(update={"today": dated.today})})

    def dated(self, moment: datetime | None = None) -> JobConfig:
        """The job with the dates of a run that was to start at `moment`, or that starts now."""
        lineage = self.lineage
        if lineage is not None:  # a job has one name on all days
            name = lineage.job_name or self.data.output
            lineage = lineage.model_copy(update={"job_name": name})
        return self.model_copy(update={"data": self.data.dated(moment), "lineage": lineage})

    @property
    def files_besides(self) -> tuple[str, ...]:
        """The files of rows that a run reads besides its input, each once."""
        files = [self.canary.file if self.canary else None]
        files += [self.evaluate.rows if self.evaluate else None]
        files += [step.examples.file for step in self.steps if step.examples is not None]
        return tuple(dict.fromkeys(filter(None, files)))

    def written_columns(self, step: AnyStep) -> list[str]:
        """The answer columns of `step`, and those that a calibration may add."""
        calibrated = calibrated_columns(step) if self.calibration is not None else []
        return [*step.answer_columns, *calibrated]

    def model_of(self, step: Step) -> ModelConfig:
        """The checkpoint that answers `step`."""
        return step.model or self.model

    def steps_before(self, step: Step) -> list[AnyStep]:
        """The steps that are asked before `step`, in order."""
        names = [other.name for other in self.steps]
        return self.steps[: names.index(step.name)]

    def earlier_columns(self, step: Step) -> dict[str, str]:
        """The step that writes each placeholder of `step` that is a column of an earlier answer."""
        writers: dict[str, str] = {}
        for earlier in self.steps_before(step):
            columns = Columns(earlier.name)
            unusable = (*columns.reasons, columns.key)
            for name in earlier.answer_columns:
                if name not in unusable:
                    writers[name] = earlier.name
        names = placeholders(step.prompt_template)
        return {name: writers[name] for name in names if name in writers}

    def source_columns(self, step: Step) -> dict[str, str]:
        """The source column of each placeholder of `step` that is not an earlier answer."""
        earlier = self.earlier_columns(step)
        columns = {}
        for name in placeholders(step.prompt_template):
            if name not in earlier:
                columns[name] = self.data.text_column if name == TEXT else name
        return columns


def conditioned_columns(step: Step) -> list[str]:
    """Names of the columns that the condition of `step` uses; [] without a condition."""
    return [] if step.when is None else columns_of(parse_condition(step.when))
