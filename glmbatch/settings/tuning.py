"""The settings of a training, declared once for its file, the command line and the Prefect form."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from glmbatch.settings.job import Address, RuntimeConfig, Settings, Share, placeholders
from glmbatch.settings.kinds import LocalAddress
from glmbatch.settings.model import ModelSetting

Rival = Literal["base", "current", "baseline"]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
# All matrices of a layer: adapting only attention learns less (QLoRA, Dettmers et al., 2023).
LORA_TARGETS: list[LoraTarget] = list(get_args(LoraTarget))
SplitShare = Annotated[float, Field(gt=0, le=0.5)]
SCORED_AS = "predicted"  # the step that asks a checkpoint to score it, and its answer column
# Training all weights needs the smallest steps. A head starts from random weights, so it takes the
# largest.
LEARNING_RATES = {"lora": 2e-4, "full": 2e-5, "head": 1e-3}
# valid_share and test_share may each be 0.5, but a fifth of the texts must remain for training.
LARGEST_HELD_OUT_SHARE = 0.8


def _in_order(targets: list[LoraTarget]) -> list[LoraTarget]:
    """Each target once, in the order of a layer, so that another order is no other training."""
    return [target for target in LORA_TARGETS if target in targets]


class LabelledData(Settings):
    """Where labelled rows are read from and how they are split."""

    input: Address = Field(
        description="Parquet file, folder of Parquet files, or glob such as `in/day=*/*.parquet`. "
        "A local path or an address such as s3://bucket/name."
    )
    text_column: str = Field(
        "text", min_length=1, description="Column with the text; the prompt refers to it as {text}."
    )
    label_column: str = Field(
        "label",
        min_length=1,
        description="Column with the label: text, whole numbers (also as 1.0) or booleans. With a "
        "list of them, a row may have several labels, or none.",
    )
    response_column: str | None = Field(
        None,
        description="Column with the answers that the model learns to generate; label_column is "
        "then ignored. Empty: the model learns to classify.",
    )
    split_column: str | None = Field(
        None,
        description="Column that assigns each row to train, valid or test. Set it if you have a "
        "split already. Empty: rows are split by a hash of their text.",
    )
    valid_share: SplitShare = Field(
        0.1,
        description="Share of the texts for validation, which selects the best epoch. 0.1 suits a "
        "few thousand rows or more.",
    )
    test_share: SplitShare = Field(
        0.1,
        description="Share of the texts for the test, which scores the result and decides the "
        "promotion. Raise it if you have few rows.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Seed of the split; keep it to compare runs on the same rows.",
    )


def _check_columns(template: str, data: LabelledData) -> None:
    """ValueError if a prompt by `template` shows no column, or one that it must not show."""
    names = placeholders(template)
    if not names:
        raise ValueError(
            f"prompt_template has no column, such as {{text}}, so all prompts are {template!r}"
        )
    learned = data.response_column or data.label_column
    for name in names:
        if name == learned != data.text_column:
            raise ValueError(
                f"prompt_template has {{{name}}}, the column that the model learns to answer with; "
                "remove it"
            )
        if name.casefold().startswith(SCORED_AS):
            raise ValueError(
                f"prompt_template has {{{name}}}, but names that begin with {SCORED_AS!r} are of "
                "the answers when a checkpoint is scored; rename the column"
            )


class TrainingConfig(Settings):
    """How the weights are trained."""

    method: Literal["lora", "full", "head"] = Field(
        "lora",
        description="lora: train an adapter and merge it into the weights; the usual choice. "
        "full: train all weights, which needs the most memory. head: train only the "
        "classification head, which is fastest.",
    )
    epochs: int = Field(
        4, ge=1, le=1000, description="Passes over the training rows; each ends with a checkpoint."
    )
    batch_rows: int = Field(
        32,
        ge=1,
        le=65_536,
        description="Rows per forward pass of one process. If memory runs out, halve it and double "
        "gradient_accumulation.",
    )
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that train together on this machine; set it to the number of GPUs.",
    )
    gradient_accumulation: int = Field(
        1,
        ge=1,
        le=65_536,
        description="Forward passes per optimizer step. The effective batch is batch_rows times "
        "this times processes.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Peak learning rate. Lower it if the loss rises or jumps. "
        "Empty: 2e-4 for lora, 2e-5 for full, 1e-3 for head.",
    )
    distill: Share | None = Field(
        None,
        description="Share of TF-IDF's probabilities in what a classifier learns beside the labels "
        "(distillation). Each row is judged by a TF-IDF that has not learned it. Empty: 0.7 over "
        "the random weights of make_base.py, otherwise 0. With a share, an epoch over such "
        "weights also has ten mixed texts for each row, 60,000 at most, which TF-IDF alone judges. "
        "Each of the first four epochs has others.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many epochs without improvement. Empty: train all epochs.",
    )
    gradient_checkpointing: bool = Field(
        True,
        description="Recompute activations in the backward pass instead of storing them: far less "
        "memory, about a third more time. Turn it off if memory allows.",
    )
    max_input_tokens: int = Field(
        512,
        ge=8,
        description="Maximum tokens in a prompt; a longer one loses the end of its text. Use the "
        "same value in the job that uses the model.",
    )
    max_answer_tokens: int = Field(
        256,
        ge=1,
        description="Maximum tokens in an answer of response_column; a longer one loses its end.",
    )
    lora_rank: int = Field(
        16,
        ge=1,
        le=1024,
        description="Rank of the adapter's matrices. A higher rank can learn more, and takes more "
        "memory.",
    )
    lora_alpha: int = Field(
        32, ge=1, description="Scale of the adapter, divided by its rank. Twice the rank is usual."
    )
    lora_dropout: Share = Field(
        0.05,
        description="Share of the adapter's inputs dropped in training. Raise it if the model "
        "overfits.",
    )
    lora_targets: Annotated[list[LoraTarget], AfterValidator(_in_order)] = Field(
        LORA_TARGETS,
        min_length=1,
        description="Matrices of each layer that get an adapter, by their names in peft and "
        "transformers. ChatGLM2's query_key_value is q_proj, k_proj and v_proj; its dense is "
        "o_proj, dense_h_to_4h is gate_up_proj, and dense_4h_to_h is down_proj. Fewer take less "
        "memory and learn less.",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed for new weights, the order of rows and dropout."
    )


class TuneConfig(Settings):
    """One training: from labelled rows to a checkpoint, promoted if it is better."""

    data: LabelledData = Field(
        description="Where labelled rows are read from and how they are split."
    )
    output: LocalAddress = Field(
        description="Local folder for the runs; OUTPUT/current is the promoted one.",
    )
    model: ModelSetting = Field(description="Checkpoint to start from; its path alone is enough.")
    prompt_template: str | None = Field(
        None,
        min_length=1,
        description="Prompt of a row: {text} inserts its text, and {column} its value of another "
        "column. Empty: the text, and for labels "
        "also the question which of them fits, in the chat format. A job over the result takes "
        "this prompt if its step sets none.",
    )
    system_prompt: str | None = Field(
        None, description="Instruction placed before the prompt. Empty: none."
    )
    chat: bool | None = Field(
        None,
        description="Whether labels are learned from prompts in the chat format. Empty: with the "
        "question of an empty prompt_template only.",
    )
    training: TrainingConfig = Field(
        default_factory=TrainingConfig, description="How the weights are trained."
    )
    metric: Literal["accuracy", "micro_f1", "macro_f1", "exact_match", "rouge_l"] | None = Field(
        None,
        description="Score that decides the promotion and, for a classifier, which epoch is kept; "
        "a generator keeps the epoch with the lowest loss. Choose macro_f1 if labels are "
        "unbalanced. Empty: accuracy; micro_f1 where rows may have several labels, or "
        "rouge_l with a response_column.",
    )
    must_beat: list[Rival] = Field(
        ["base", "current", "baseline"],
        description="What the result must score higher than to be promoted, on the same test rows "
        "and by more than chance explains. base: the model before the training, asked with the "
        "labels named; one whose head has other labels cannot be asked, and need not be beaten. "
        "current: the checkpoint promoted before. baseline: TF-IDF, where that is better than the "
        "same answer to every row. All of them are scored anyway.",
    )
    least_test_rows: int = Field(
        100,
        ge=1,
        description="Least number of test rows; with fewer, nothing is promoted.",
    )
    keep_runs: int | None = Field(
        None,
        ge=1,
        description="Runs to keep beside the current one; a promotion or a refusal deletes the "
        "older ones. Empty: all.",
    )
    runtime: RuntimeConfig = Field(
        default_factory=RuntimeConfig,
        description="Performance settings, such as the device.",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> TuneConfig:
        template = self.prompt_template
        if template is not None:
            _check_columns(template, self.data)
        if self.metric is not None and self.writes != (self.metric in ("exact_match", "rouge_l")):
            task = "generates" if self.writes else "classifies"
            raise ValueError(f"metric {self.metric} cannot score a model that {task}")
        if self.writes and self.training.method == "head":
            raise ValueError(
                "a model that generates has no head; set training.method to lora or full"
            )
        if self.writes and self.chat is not None:
            raise ValueError("a model that generates always gets chats; remove chat")
        if self.model.dtype != "auto" or self.model.quantization != "none":
            raise ValueError(
                "model.dtype and model.quantization are for inference; remove them: training "
                "chooses its own"
            )
        if self.data.valid_share + self.data.test_share > LARGEST_HELD_OUT_SHARE:
            raise ValueError(
                "valid_share and test_share leave too few rows to train on; lower their sum to "
                f"{LARGEST_HELD_OUT_SHARE:g}"
            )
        return self

    @property
    def writes(self) -> bool:
        """Whether the model learns to generate answers; otherwise it learns to classify."""
        return self.data.response_column is not None

    @property
    def promoted_by(self) -> str:
        """Name of the score that decides the promotion: a field of `Scores` or `TextScores`."""
        return self.metric or ("rouge_l" if self.writes else "accuracy")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the setting, or the method's default."""
        return self.training.learning_rate or LEARNING_RATES[self.training.method]
