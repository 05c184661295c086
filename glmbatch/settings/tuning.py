"""Every setting of a fine-tuning, once: the file, the command line and the Prefect form share these classes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from glmbatch.settings.job import Address, ModelConfig, RuntimeConfig, Settings, Share, placeholders

SplitShare = Annotated[float, Field(gt=0, le=0.5)]


class LabelledData(Settings):
    """Where the labelled rows come from, and how they are split."""

    input: Address = Field(
        description="A Parquet file, a folder of them, or a glob such as `in/day=*/*.parquet`; s3://bucket/name is one "
        "in an object store."
    )
    text_column: str = Field(
        "text", min_length=1, description="Column that holds the text; a prompt calls it {text}."
    )
    label_column: str = Field(
        "label", min_length=1, description="Column that holds the label: text or whole numbers."
    )
    response_column: str | None = Field(
        None,
        description="Column that holds an answer to be written; set, the model learns to write it, and label_column is "
        "not read.",
    )
    split_column: str | None = Field(
        None,
        description="Column that says train, valid or test; empty: rows are split by their text.",
    )
    valid_share: SplitShare = Field(
        0.1, description="Share of the texts to choose the best weights on."
    )
    test_share: SplitShare = Field(0.1, description="Share of the texts to score the result on.")
    conflicts: Literal["drop", "keep"] = Field(
        "drop",
        description="Texts that stand there with two labels: leave them out, or train on both.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the split.")


class ScratchConfig(Settings):
    """A small ChatGLM2 that begins with random weights and a tokenizer of the training texts."""

    hidden_size: int = Field(
        128, ge=16, le=4096, description="Size of a token's state; a multiple of 4 heads."
    )
    layers: int = Field(2, ge=1, le=64, description="Layers.")
    vocabulary: int = Field(
        8000, ge=300, le=65_000, description="Pieces of the tokenizer; fewer where texts are few."
    )
    max_positions: int = Field(
        1024, ge=64, le=32_768, description="Longest prompt that the model can hold."
    )

    @field_validator("hidden_size")
    @classmethod
    def _four_heads(cls, size: int) -> int:
        if size % 16:
            raise ValueError(
                f"must be a multiple of 16 (4 heads, rotated by pairs over half of each); it is {size}"
            )
        return size


class TrainingConfig(Settings):
    """How the weights are trained."""

    method: Literal["lora", "full", "head"] | None = Field(
        None, description="lora: an adapter, merged at the end; full: all weights; head: the head alone. "
        "Empty: full from scratch, lora otherwise.",
    )  # fmt: skip
    epochs: int = Field(4, ge=1, le=1000, description="Times that every row is seen.")
    batch_rows: int = Field(32, ge=1, le=65_536, description="Rows in one forward of one process.")
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes of this machine that train together, each with a card and batches of its own.",
    )
    gradient_accumulation: int = Field(
        1, ge=1, le=65_536, description="Forwards for one step of the optimizer."
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Highest rate; empty: 2e-3 from scratch, else 2e-4 (lora), 2e-5 (full), 1e-3 (head).",
    )
    warm_up_share: Share = Field(
        0.05, description="Share of the steps in which the rate rises; then it falls as a cosine."
    )
    weight_decay: float = Field(0.05, ge=0, le=1, description="Of matrices; vectors have none.")
    noise: Share | None = Field(
        None,
        description="Share of a prompt's tokens that are spelled by shorter ones, and half that share hidden, anew "
        "each time it is seen: few texts are not learned by heart. Empty: 0.2 for a classifier from scratch, else 0.",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: a label weighs the more the fewer rows have it."
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after so many evaluations without a better one; empty: never early.",
    )
    evaluations_per_epoch: int = Field(
        1, ge=1, le=100, description="Each also saves where training can go on from."
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Compute activations twice and keep few: less memory. Empty: with a model, not from scratch.",
    )
    max_input_tokens: int = Field(
        512, ge=8, description="Longer prompts lose the end of their text."
    )
    max_answer_tokens: int = Field(
        256, ge=1, description="Longer answers lose their end; for a response_column."
    )
    lora_rank: int = Field(16, ge=1, le=1024, description="Rank of the adapter's matrices.")
    lora_alpha: int = Field(32, ge=1, description="Scale of the adapter, over its rank.")
    lora_dropout: Share = Field(
        0.05, description="Share of an adapter's inputs left out in training."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of first weights, order and dropout.")


class TuneConfig(Settings):
    """One fine-tuning: labelled rows in, a checkpoint that `annotate` uses out, and the proof that it is better."""

    data: LabelledData = Field(
        description="Where the labelled rows come from, and how they are split."
    )
    output: str = Field(
        min_length=1,
        description="Folder of this machine for runs; OUTPUT/current is the promoted one.",
    )
    model: ModelConfig | None = Field(
        None, description="The checkpoint to begin from; empty: from scratch."
    )
    scratch: ScratchConfig = Field(
        default_factory=ScratchConfig, description="Used without a model."
    )
    prompt_template: str = Field(
        "{text}", min_length=1, description="Prompt of a row; {text} is replaced by its text."
    )
    system_prompt: str | None = Field(None, description="Instruction before the text; empty: none.")
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, description="How the weights are trained."
    )
    metric: Literal["accuracy", "macro_f1", "exact_match", "rouge_l"] | None = Field(
        None,
        description="What promotes, and chooses a classifier's weights; those of a writer are chosen by their loss. "
        "Empty: accuracy, or rouge_l with a response_column.",
    )
    min_gain: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How much better than the current checkpoint a new one must be to be promoted.",
    )
    stored: Literal["float32", "bfloat16", "float16"] = Field(
        "float16",
        description="Numbers that the checkpoint is saved in; the published one has float16.",
    )
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig, description="Speed only.")

    @field_validator("output")
    @classmethod
    def _on_this_machine(cls, output: str) -> str:
        if "://" in output:
            raise ValueError("a training is written on this machine; name a folder of it")
        return output

    @field_validator("model", mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> TuneConfig:
        if placeholders(self.prompt_template) != ["text"]:
            raise ValueError(
                f"prompt_template takes {{text}} and nothing else; it is {self.prompt_template!r}"
            )
        if self.model is None and self.training.method in ("lora", "head"):
            raise ValueError(
                f"training.method {self.training.method} needs a model to begin from; set model"
            )
        if self.metric is not None and self.writes != (self.metric in ("exact_match", "rouge_l")):
            raise ValueError(
                f"metric {self.metric} is not of a model that {'writes' if self.writes else 'classifies'}"
            )
        if self.writes and (
            self.training.method == "head" or self.training.class_weights != "none"
        ):
            raise ValueError(
                "a model that writes has no head and no class weights; set training.method to lora or full"
            )
        if self.model is not None and (
            self.model.dtype != "auto" or self.model.quantization != "none"
        ):
            raise ValueError(
                "model.dtype and model.quantization are of inference; training has numbers of its own"
            )
        if self.data.valid_share + self.data.test_share > 0.8:
            raise ValueError("valid_share and test_share leave too few rows to train on")
        return self

    @property
    def writes(self) -> bool:
        """Whether it learns to write answers, and not to classify."""
        return self.data.response_column is not None

    @property
    def promoted_by(self) -> str:
        return self.metric or ("rouge_l" if self.writes else "accuracy")

    @property
    def gradient_checkpointing(self) -> bool:
        chosen = self.training.gradient_checkpointing
        return self.model is not None if chosen is None else chosen

    @property
    def noise(self) -> float:
        if self.training.noise is not None:
            return self.training.noise
        return 0.2 if self.model is None and not self.writes else 0.0

    @property
    def method(self) -> Literal["lora", "full", "head"]:
        return self.training.method or ("full" if self.model is None else "lora")

    @property
    def learning_rate(self) -> float:
        if self.training.learning_rate is not None:
            return self.training.learning_rate
        return (
            2e-3 if self.model is None else {"lora": 2e-4, "full": 2e-5, "head": 1e-3}[self.method]
        )
