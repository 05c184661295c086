"""Every setting, declared once: the job file, the command line, the Prefect form and Python share these classes.

Reads no files, no environment. What changes answers stands in `ModelConfig` and the steps; what changes only speed
and its price stands in `RuntimeConfig`.
"""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
TEXT = "text"  # the placeholder of data.text_column, whatever that column is called
Share = Annotated[float, Field(ge=0, le=1)]
StepName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]


def has_credentials(address: str) -> bool:
    """Whether an address of an object store holds a name or key before its bucket."""
    return "@" in address.partition("://")[2].partition("/")[0]


def _without_credentials(address: str) -> str:
    if has_credentials(address):
        raise ValueError(
            "an address holds no credentials; the store's package finds them in the environment"
        )
    return address


# A setting is shown in forms, logs and records; the packages of object stores find credentials by their own ways.
Address = Annotated[str, Field(min_length=1), AfterValidator(_without_credentials)]


def _number_fields(schema: dict[str, Any]) -> None:
    # The Prefect form sorts the fields of a nested class by name unless each carries its position.
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


class Settings(BaseModel):
    """Frozen, refuses unknown keys, keeps the order of declaration in forms, quotes no value that it refuses."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", json_schema_extra=_number_fields, hide_input_in_errors=True
    )


class ModelConfig(Settings):
    """Which checkpoint answers, and in which numbers."""

    path: Address = Field(
        description="Directory of a ChatGLM2 checkpoint in its original layout, here or in an object store "
        "(s3://bucket/name), or a hub id such as THUDM/chatglm2-6b.",
    )
    revision: str | None = Field(
        None,
        description="Commit of the hub repository; required for a hub id, refused for a directory.",
    )
    adapter: Address | None = Field(
        None,
        description="Directory of a LoRA adapter as peft saves it, merged into the weights at load; empty: none.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Numbers to compute in; auto is bfloat16 on CUDA and float32 on CPU."
    )
    quantization: Literal["none", "int8"] = Field(
        "none",
        description="int8 computes the layers' products in 8 bits, on CPU only: twice as fast or more, other answers; "
        "compare them on rows of yours before.",
    )


class DataConfig(Settings):
    """Where the rows come from and where the answers go."""

    input: Address = Field(
        description="A Parquet file, a folder of them, or a glob such as `in/day=*/*.parquet`; s3://bucket/name is one "
        "in an object store.",
    )
    output: Address = Field(
        description="Folder for the answers, here or in an object store (s3://bucket/name); made when absent, mirrors "
        "the input's folders.",
    )
    format: Literal["parquet", "delta"] = Field(
        "parquet",
        description="parquet: a folder of files; delta: a Delta Lake table over them too, whose readers see each "
        "publication whole or not at all (needs glmbatch[delta]).",
    )
    text_column: str = Field(
        "text", min_length=1, description="Column that holds the text; a prompt calls it {text}."
    )
    id_column: str | None = Field(
        None,
        description="Column that names a row in error lists; empty: rows are named by their number in the file.",
    )
    rows_per_fragment: int = Field(
        10_000, ge=1, le=10_000_000, description="Rows in one unit of work, retry and commit."
    )
    missing_sources: Literal["keep", "drop"] = Field(
        "keep",
        description="What becomes of published rows whose file is there no more: keep, for a landing folder that is "
        "emptied; drop, for full snapshots that are split or written under other names.",
    )
    limit: int | None = Field(
        None, ge=1, description="Process only the first so many rows; empty: all."
    )


class Step(Settings):
    """What the two kinds of step share."""

    name: StepName = Field(
        description="Name of the step and of its answer column; later prompts call it {name}."
    )
    prompt_template: str = Field(
        "{text}",
        min_length=1,
        description="Prompt of a row; {column} is replaced by the row's value, {{ }} are braces.",
    )
    system_prompt: str | None = Field(
        None, description="Instruction set before the first round of the chat form; empty: none."
    )
    max_input_tokens: int | None = Field(
        None, ge=1, description="Longest prompt in tokens; empty: what the model's positions leave."
    )
    on_too_long: Literal["error", "truncate"] = Field(
        "error",
        description="A longer prompt is an error of its row, or its text is cut at the end until it fits.",
    )
    model: ModelConfig | None = Field(
        None, description="Checkpoint of this step alone; empty: the job's model."
    )

    @field_validator("model", mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("prompt_template")
    @classmethod
    def _placeholders(cls, template: str) -> str:
        placeholders(template)
        return template


class ClassifyStep(Step):
    """Choose one label for each row."""

    kind: Literal["classify"] = Field("classify", description="What kind of step this is.")
    labels: list[str] | None = Field(
        None,
        description="Labels to choose from; empty: the labels of the checkpoint's trained head.",
    )
    chat: bool | None = Field(
        None,
        description="Put the prompt in the chat form; empty: yes without a trained head, no with one.",
    )

    max_label_drift: float | None = Field(
        None,
        gt=0,
        description="Audit: how far the shares of labels may move from those published (population stability index; "
        "0.1 is a small shift, 0.25 a large one); beyond it nothing is published. Empty: no audit.",
    )

    @field_validator("labels")
    @classmethod
    def _distinct_labels(cls, labels: list[str] | None) -> list[str] | None:
        if labels is None:
            return None
        if len(labels) < 2:
            raise ValueError(f"a choice needs at least two labels; it has {labels}")
        if any(not label.strip() for label in labels):
            raise ValueError(f"a label is empty: {labels}")
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"labels repeat: {repeated}")
        return labels


class GenerateStep(Step):
    """Write a text for each row."""

    kind: Literal["generate"] = Field("generate", description="What kind of step this is.")
    chat: bool = Field(
        True, description="Put the prompt in the chat form the model was trained on."
    )
    max_tokens: int = Field(
        256,
        ge=1,
        le=32_768,
        validation_alias=AliasChoices("max_tokens", "max_new_tokens"),
        description="Most tokens to write for a row.",
    )
    temperature: float = Field(
        0.0, ge=0, le=10, description="0 takes the likeliest token; above 0 samples."
    )
    top_p: float = Field(
        0.8, gt=0, le=1, description="Sample among the likeliest tokens of this total probability."
    )
    top_k: int = Field(
        50, ge=0, description="Sample among so many likeliest tokens; 0: no such limit."
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of sampling; each row draws from (seed, row key)."
    )
    stop: list[str] = Field(
        default_factory=list, description="Texts that end an answer; they are not part of it."
    )
    max_truncated_rate: Share | None = Field(
        None,
        description="Audit: share of answers that max_tokens may cut off; beyond it nothing is published. Empty: none.",
    )
    max_empty_rate: Share | None = Field(
        None,
        description="Audit: share of answers that may be empty; beyond it nothing is published. Empty: no audit.",
    )
    max_length_drift: float | None = Field(
        None,
        gt=0,
        description="Audit: how far the mean length of answers in tokens may move from that of those published, as a "
        "share of it; beyond it nothing is published. Empty: no audit.",
    )

    @model_validator(mode="before")
    @classmethod
    def _hint_max_length(cls, values: object) -> object:
        if isinstance(values, dict) and "max_length" in values:
            raise ValueError(
                "max_length would count the prompt too; set max_tokens (and max_input_tokens) instead"
            )
        return values

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if any(not text for text in stop):
            raise ValueError("an empty stop text would end every answer at once")
        return stop


# Settings of steps that say what may be published, and change no answer.
AUDITS = frozenset({"max_label_drift", "max_truncated_rate", "max_empty_rate", "max_length_drift"})

AnyStep = Annotated[ClassifyStep | GenerateStep, Field(discriminator="kind")]


class RuntimeConfig(Settings):
    """What changes only speed, and what it is said to cost; changing it never starts work over."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto (CUDA when there is one), cpu, cuda or cuda:N.",
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Most tokens in one packed forward; empty: 2,048 on CPU, 16,384 on CUDA.",
    )
    max_slots: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Most rows generated at once; empty: 32 on CPU, from free memory on CUDA.",
    )
    max_loaded_models: int | None = Field(
        None,
        ge=1,
        description="Models loaded at once; empty: all of the job where they fit in memory, else one.",
    )
    fragments_in_flight: int = Field(
        2, ge=1, le=64, description="Fragments worked on at once by one engine."
    )
    cache: str = Field(
        "~/.cache/glmbatch",
        min_length=1,
        description="Folder for checkpoints that are fetched from an object store; with a cluster, one that all its "
        "machines share.",
    )
    cluster: Literal["ray"] | None = Field(
        None,
        description="ray: fragments are worked on by engine processes on a Ray cluster, each with a GPU of its own "
        "(needs glmbatch[ray]); empty: by this process.",
    )
    cluster_address: str | None = Field(
        None,
        min_length=1,
        description="Address of a Ray cluster that this machine belongs to, such as 10.0.0.1:6379; empty: one of this "
        "machine alone, for this run.",
    )
    cluster_workers: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Engine processes on the cluster; empty: one for each GPU or, without GPUs, for each machine.",
    )
    retries: int = Field(
        3, ge=0, le=20, description="Times a task is tried again after the machine failed."
    )
    retry_delay_seconds: float = Field(
        2.0, ge=0, le=3600, description="First wait before a retry; it doubles, with jitter."
    )
    price_per_hour: float | None = Field(
        None,
        ge=0,
        description="Price of an hour of the machine, in any currency, for the run's report; empty: no cost.",
    )

    @model_validator(mode="after")
    def _devices_are_given_by_the_cluster(self) -> RuntimeConfig:
        if self.cluster and ":" in self.device:
            raise ValueError(
                f"device {self.device}: a cluster gives each engine a GPU; set auto, cuda or cpu"
            )
        return self


class JobConfig(Settings):
    """One job: rows in, one answer column group for each step out."""

    data: DataConfig = Field(description="Where the rows come from and where the answers go.")
    model: ModelConfig = Field(
        description="The checkpoint that answers, unless a step names its own."
    )
    steps: list[AnyStep] = Field(min_length=1, description="Questions asked of each row, in order.")
    on_error: Literal["raise", "quarantine", "null"] = Field(
        "quarantine",
        description="A bad row or file: raise stops the run and publishes nothing; quarantine keeps the row with its "
        "reason, lists it and ends with exit code 3; null keeps the row with its reason and ends as done.",
    )
    max_error_rate: Share = Field(
        0.1,
        description="Share of rows that may fail, unreadable files' included; above it nothing is published.",
    )
    canary: Address | None = Field(
        None,
        description="Audit: Parquet file of rows with the answers that `glmbatch canary` froze beside them; a run "
        "that asks the model asks it about them too. Empty: no audit.",
    )
    max_canary_change: Share = Field(
        0.0,
        description="Share of canary rows whose answers may differ; beyond it nothing is published. In half precision "
        "a text counts as the same that begins as it did (a quarter of it); 0.1 leaves room for rounding.",
    )
    retry_failed: bool = Field(
        True,
        description="Ask again about rows on which the model failed in an earlier run; no: they keep their reason.",
    )
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, description="Speed only.")

    @field_validator("model", mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("on_error", mode="before")
    @classmethod
    def _yaml_null(cls, value: object) -> object:
        return "null" if value is None else value

    @model_validator(mode="after")
    def _names_are_distinct(self) -> JobConfig:
        seen: dict[str, str] = {}
        for step in self.steps:
            if step.name == TEXT:
                raise ValueError(
                    "a step cannot be named 'text': a prompt's {text} is the text column; rename it"
                )
            for column in answer_columns(step):
                folded = column.casefold()  # Spark and DuckDB do not tell Mood from mood
                if folded in seen:
                    raise ValueError(
                        f"steps {seen[folded]!r} and {step.name!r} both write a column {column!r}; rename one"
                    )
                seen[folded] = step.name
        return self

    def model_of(self, step: Step) -> ModelConfig:
        """The checkpoint that answers `step`."""
        return step.model or self.model

    def earlier_steps(self, step: Step) -> list[str]:
        """Names of the steps whose answers the prompt of `step` uses, in the order they run."""
        before = [earlier.name for earlier in self.steps[: self.steps.index(step)]]  # type: ignore[arg-type]
        return [name for name in before if name in placeholders(step.prompt_template)]

    def source_columns(self, step: Step) -> dict[str, str]:
        """The source column behind each placeholder of `step` that is not an earlier answer."""
        names = [
            name
            for name in placeholders(step.prompt_template)
            if name not in self.earlier_steps(step)
        ]
        return {name: self.data.text_column if name == TEXT else name for name in names}


def answer_columns(step: Step) -> list[str]:
    """Names of the output columns of `step`, in order."""
    name = step.name
    if isinstance(step, ClassifyStep):
        middle = [f"{name}_score", f"{name}_scores", f"{name}_margin"]
    else:
        middle = [f"{name}_finish_reason", f"{name}_prompt_tokens", f"{name}_completion_tokens"]
    return [name, *middle, f"{name}_error", f"{name}_error_type", f"{name}_key"]


def placeholders(template: str) -> list[str]:
    """Names that `template` takes from the row, in order, each once; ValueError when it is not a plain template."""
    names: list[str] = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if spec or conversion or not name or name.isdigit() or any(mark in name for mark in ".[]"):
            raise ValueError(
                f"placeholder {{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}} "
                "must be a plain column name; write {{ and }} for braces"
            )
        if name not in names:
            names.append(name)
    return names
