"""Every setting of a fine-tuning, for the settings file, the command line and the Prefect form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from glmbatch.settings.job import Address, RuntimeConfig, Settings, Share, placeholders
from glmbatch.settings.kinds import LocalAddress
from glmbatch.settings.model import ModelSetting

SplitShare = Annotated[float, Field(gt=0, le=0.5)]
# All weights need the smallest steps. A head alone starts from noise and bears the largest.
LEARNING_RATES = {"lora": 2e-4, "full": 2e-5, "head": 1e-3}
# valid_share and test_share may be 0.5 each, but a fifth of the texts must be left to train on.
LARGEST_HELD_OUT_SHARE = 0.8


class LabelledData(Settings):
    """Where the labelled rows come from, and how they are split."""

    input: Address = Field(
        description="A Parquet file, a folder of them, or a glob such as `in/day=*/*.parquet`; "
        "s3://bucket/name is one in an object store."
    )
    text_column: str = Field(
        "text", min_length=1, description="Column that holds the text; a prompt calls it {text}."
    )
    label_column: str = Field(
        "label",
        min_length=1,
        description="Column that holds the label: text, whole numbers (1.0 too) or truth values.",
    )
    response_column: str | None = Field(
        None,
        description="Column with the answers to learn to write; set, the model learns to generate "
        "and label_column is not read. Empty: it learns to classify.",
    )
    split_column: str | None = Field(
        None,
        description="Column that says train, valid or test; empty: rows are split by a hash of "
        "their text.",
    )
    valid_share: SplitShare = Field(
        0.1, description="Share of the texts that choose the best weights."
    )
    test_share: SplitShare = Field(0.1, description="Share of the texts that score the result.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the split.")


class TrainingConfig(Settings):
    """How the weights are trained."""

    method: Literal["lora", "full", "head"] = Field(
        "lora",
        description="lora: an adapter, merged into the weights at the end; full: all weights; "
        "head: the classification head alone.",
    )
    epochs: int = Field(
        4, ge=1, le=1000, description="Passes over the training rows; each ends with a checkpoint."
    )
    batch_rows: int = Field(
        32, ge=1, le=65_536, description="Rows in one forward pass of one process."
    )
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that train together on this machine, each with a GPU of its own.",
    )
    gradient_accumulation: int = Field(
        1, ge=1, le=65_536, description="Forward passes for each step of the optimizer."
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Highest rate; empty: 2e-4 for lora, 2e-5 for full, 1e-3 for head.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many epochs without a better one; empty: never early.",
    )
    gradient_checkpointing: bool = Field(
        True,
        description="Compute activations twice instead of keeping them: far less memory, about a "
        "third more time.",
    )
    max_input_tokens: int = Field(
        512, ge=8, description="Longer prompts lose the end of their text."
    )
    max_answer_tokens: int = Field(
        256, ge=1, description="Longer answers lose their end; for a response_column."
    )
    lora_rank: int = Field(16, ge=1, le=1024, description="Rank of the adapter's matrices.")
    lora_alpha: int = Field(32, ge=1, description="Scale of the adapter, divided by its rank.")
    lora_dropout: Share = Field(
        0.05, description="Share of an adapter's inputs dropped while training."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of new weights, row order and dropout.")


class TuneConfig(Settings):
    """One fine-tuning: from labelled rows to a checkpoint for `annotate` that is proved better."""

    data: LabelledData = Field(
        description="Where the labelled rows come from, and how they are split."
    )
    output: LocalAddress = Field(
        description="Folder on this machine for the runs; OUTPUT/current is the promoted one.",
    )
    model: ModelSetting = Field(description="The checkpoint to start from.")
    prompt_template: str = Field(
        "{text}", min_length=1, description="Prompt of a row; {text} is replaced by its text."
    )
    system_prompt: str | None = Field(None, description="Instruction before the text; empty: none.")
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, description="How the weights are trained."
    )
    metric: Literal["accuracy", "macro_f1", "exact_match", "rouge_l"] | None = Field(
        None,
        description="Score that decides the promotion, and which epoch's weights a classifier "
        "keeps (a generator keeps those of the lowest loss). Empty: accuracy, or rouge_l with a "
        "response_column.",
    )
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, description="Speed only.")

    @model_validator(mode="after")
    def _fits_together(self) -> TuneConfig:
        if placeholders(self.prompt_template) != ["text"]:
            raise ValueError(
                f"prompt_template takes {{text}} and nothing else; it is {self.prompt_template!r}"
            )
        if self.metric is not None and self.writes != (self.metric in ("exact_match", "rouge_l")):
            task = "generates" if self.writes else "classifies"
            raise ValueError(f"metric {self.metric} cannot score a model that {task}")
        if self.writes and self.training.method == "head":
            raise ValueError(
                "a model that generates has no head; set training.method to lora or full"
            )
        if self.model.dtype != "auto" or self.model.quantization != "none":
            raise ValueError(
                "model.dtype and model.quantization are for inference; training chooses its own"
            )
        if self.data.valid_share + self.data.test_share > LARGEST_HELD_OUT_SHARE:
            raise ValueError("valid_share and test_share leave too few rows to train on")
        return self

    @property
    def writes(self) -> bool:
        """Whether the model learns to generate answers rather than to classify."""
        return self.data.response_column is not None

    @property
    def promoted_by(self) -> str:
        """The score that decides the promotion: a field of `Scores` or of `TextScores`."""
        return self.metric or ("rouge_l" if self.writes else "accuracy")

    @property
    def learning_rate(self) -> float:
        """The highest learning rate: the setting, or the default of the method."""
        return self.training.learning_rate or LEARNING_RATES[self.training.method]
