"""transformers' Trainer over token ids, with our row order, padding and loss. Knows no texts.

Shapes: B rows of a batch, T tokens of its longest row, L labels, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from glmbatch.errors import InputError
from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.encode import TrainingRow, by_epoch, distilled_share
from glmbatch.tuning.model import IGNORED, pad
from glmbatch.tuning.report import PROGRESS
from glmbatch.tuning.scores import score, score_arrays

logger = logging.getLogger(__name__)

# Share of the steps with a rising rate, because the first gradients of a new head are its largest.
WARM_UP_SHARE = 0.05
# Only for matrices, because the Trainer exempts vectors. Between the usual 0.01 and 0.1.
WEIGHT_DECAY = 0.05
# Second moments average over 50 steps. AdamW's 0.999 means 1,000, more than small data has.
BETA2 = 0.98
# Number of batches to sort by length together: little padding, and the order is still random.
BATCHES_SORTED = 50
LOGS_PER_EPOCH = 10
PROGRESS_SECONDS = 0.2  # as often as a bar is drawn


class RowDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Training rows as `pad` takes them; `at` is the row's number, for error messages."""

    def __init__(self, rows: Sequence[TrainingRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Any]:
        row = self.rows[at]
        return {
            "ids": [*row.ids, *row.answer],
            "label": row.label,
            "answer": len(row.answer),
            "soft": row.soft,
            "at": at,
        }


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """The places of an epoch once each, with neighbours of similar length.

    `places` has those of each epoch; after the last, they begin again. The order depends only on
    (seed, epoch): transformers' sampler uses a global generator, so resuming would change batches.
    """

    def __init__(
        self, lengths: Sequence[int], places: Sequence[Sequence[int]], batch: int, seed: int
    ) -> None:
        self._lengths = lengths
        self._places = places
        self._batch = batch
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._places[0])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. The Trainer calls it when an epoch begins or resumes."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        dice = random.Random(f"{self._seed} {self._epoch}")
        places = self._places[self._epoch % len(self._places)]
        order = dice.sample(places, len(places))
        window = BATCHES_SORTED * self._batch
        batches = []
        for first in range(0, len(order), window):
            alike = sorted(order[first : first + window], key=self._lengths.__getitem__)
            batches += [alike[at : at + self._batch] for at in range(0, len(alike), self._batch)]
        last = batches.pop()  # a short batch anywhere else would shift the others
        dice.shuffle(batches)
        for batch in [*batches, last]:
            yield from batch


class RowTrainer(Trainer):
    """transformers' Trainer with our row order. It stops at the first loss that is not finite."""

    def __init__(self, rows: Sequence[TrainingRow], **options: Any) -> None:
        super().__init__(train_dataset=RowDataset(rows), data_collator=pad, **options)
        self._rows = rows

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        # Sorted by whole steps, so that the batches of a step are of similar length on all devices.
        step_rows = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        lengths = [row.length for row in self._rows]
        return LengthGroupedSampler(lengths, by_epoch(self._rows), step_rows, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean cross entropy over rows, over labels of rows, or over the tokens of answers.

        InputError if it is not finite.
        """
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        labels = inputs["labels"]
        loss_B = _row_losses(outputs.logits, labels, inputs.pop("soft", None))
        # Checked before the backward pass, because one such gradient would ruin all weights.
        self._check_finite(loss_B.detach(), inputs.pop("at"), model.training)
        if num_items_in_batch is None:
            loss = loss_B.sum() / (labels != IGNORED).sum()
        else:
            # The count covers all processes, but gradients are averaged over them.
            loss = loss_B.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _check_finite(self, loss_B: torch.Tensor, at_B: torch.Tensor, training: bool) -> None:
        finite_B = torch.isfinite(loss_B)
        if finite_B.all():
            return
        row = int(at_B[~finite_B][0])
        place = self._rows[row].place if training else f"validation row {row}"
        raise InputError(
            f"step {self.state.global_step + 1}: the loss is {float(loss_B.sum())}, "
            f"first at {place}. Lower training.learning_rate; the last checkpoint is kept."
        )


def _row_losses(
    logits: torch.Tensor, labels: torch.Tensor, soft_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of each row (B).

    From logits BL and labels B, or BL where each is judged by itself, or logits BTV and labels BT.
    The probabilities `soft_BL` are learned instead of labels.
    """
    logits = logits.float()  # in bfloat16, a sum over a vocabulary loses the third digit
    if labels.is_floating_point():
        loss_BL = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, labels if soft_BL is None else soft_BL, reduction="none"
        )
        return loss_BL.sum(dim=1)
    if labels.dim() == 1:
        targets = labels if soft_BL is None else soft_BL
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    loss_BT = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
    )
    return loss_BT.sum(dim=1)


def make_trainer(
    config: TuneConfig,
    model: Any,
    rows: Sequence[TrainingRow],
    valid: Sequence[TrainingRow],
    folder: Path,
) -> RowTrainer:
    """A Trainer that saves to `folder` after each epoch and loads the best weights at the end."""
    arguments = _arguments(config, len(by_epoch(rows)[0]), folder, model.device.type)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    trainer = RowTrainer(
        rows,
        model=model,
        args=arguments,
        eval_dataset=RowDataset(valid),
        compute_metrics=None if config.writes else _measure,
        callbacks=[_ProgressLog(folder / PROGRESS), _EarlyStop(config)],
    )
    # If several GPUs are visible, the Trainer's DataParallel would change batches, steps and loss.
    arguments._n_gpu = 1
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(config: TuneConfig, rows: int, folder: Path, device: str) -> TrainingArguments:
    training = config.training
    step_rows = training.batch_rows * training.gradient_accumulation * training.processes
    epoch_steps = math.ceil(rows / step_rows)
    return TrainingArguments(
        # The schedule is a linear warm-up, then a cosine that ends at 0 with the last step.
        output_dir=str(folder),
        per_device_train_batch_size=training.batch_rows,
        per_device_eval_batch_size=training.batch_rows,
        gradient_accumulation_steps=training.gradient_accumulation,
        num_train_epochs=training.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(WARM_UP_SHARE * epoch_steps * training.epochs)),
        weight_decay=WEIGHT_DECAY,
        adam_beta2=BETA2,
        max_grad_norm=1.0,  # so that a bad batch moves the weights no further than a good one
        bf16=device == "cuda" and torch.cuda.is_bf16_supported(),
        use_cpu=device == "cpu",
        seed=training.seed,
        dataloader_pin_memory=False,  # token ids are small, and pinning warns on CPU
        remove_unused_columns=False,  # otherwise the Trainer drops `at`, which models do not take
        label_names=["labels"],
        **_checkpointing(training.gradient_checkpointing),
        **_evaluations(config, epoch_steps),
        **_logs(epoch_steps),
    )


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Gradient checkpointing under its name in the installed release; transformers 6 renames it."""
    names = TrainingArguments.__dataclass_fields__
    current = "activation_checkpointing"
    return {current if current in names else "gradient_checkpointing": True} if wanted else {}


def _evaluations(config: TuneConfig, epoch_steps: int) -> dict[str, Any]:
    """Evaluate and save once per epoch; keep the last checkpoint and the best one."""
    return {
        "eval_strategy": "steps",
        "eval_steps": epoch_steps,
        "save_strategy": "steps",
        "save_steps": epoch_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss" if _kept_by_loss(config) else config.promoted_by,
        "greater_is_better": not _kept_by_loss(config),
        # The logits of all tokens of all validation rows do not fit in memory.
        "prediction_loss_only": config.writes,
    }


def _kept_by_loss(config: TuneConfig) -> bool:
    """Whether the lowest loss on the validation rows decides which epoch is kept.

    What learns from TF-IDF gets better to the end, and the loss shows it with fewer rows than the
    accuracy: on 518 rows the first epoch had as many right answers as the third.
    """
    return config.writes or distilled_share(config) > 0


def _logs(epoch_steps: int) -> dict[str, Any]:
    return {
        "logging_steps": max(1, epoch_steps // LOGS_PER_EPOCH),
        "logging_nan_inf_filter": False,  # it would hide the losses that _check_finite looks for
        "report_to": [],
        "disable_tqdm": True,
    }


def _measure(prediction: Any) -> dict[str, float]:
    """Scores of a classifier on the validation rows."""
    if prediction.label_ids.ndim > 1:
        selections = score_arrays(prediction.label_ids > 0, prediction.predictions > 0)
        return {"micro_f1": selections.micro_f1, "macro_f1": selections.macro_f1}
    names = [str(number) for number in range(prediction.predictions.shape[-1])]
    guesses = [names[number] for number in prediction.predictions.argmax(-1)]
    truth = [names[number] for number in prediction.label_ids]
    scores = score(truth, guesses, names)
    return {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1}


class _ProgressLog(TrainerCallback):
    """Logs the numbers that the Trainer would print, and keeps the count of steps in `file`.

    A file, because the steps may be taken in other processes than the one that shows them.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._first = 0
        self._began = self._written = 0.0
        self._loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._first, self._began = state.global_step, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        if not state.is_world_process_zero or now - self._written < PROGRESS_SECONDS:
            return
        self._written = now
        counts = {
            "total": state.max_steps,
            "done": state.global_step,
            "computed": state.global_step - self._first,
            "seconds": now - self._began,
            "note": self._loss,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(counts), encoding="utf-8")
        partial.replace(self._file)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        values = []
        for key, value in (logs or {}).items():
            if isinstance(value, float):
                values.append(f"{key} {value:.4g}")
        if "loss" in (logs or {}):
            self._loss = f"loss={logs['loss']:.4g}"
        logger.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(values))


class _EarlyStop(TrainerCallback):
    """Stops the training when evaluations no longer improve.

    transformers' callback counts in memory, so a resumed run would start counting from 0.
    """

    def __init__(self, config: TuneConfig) -> None:
        self._config = config

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or is_stale(state, self._config)


def is_stale(state: TrainerState, config: TuneConfig) -> bool:
    """Whether the last `training.patience` evaluations did not improve on the best before them."""
    patience = config.training.patience
    if patience is None:
        return False
    by_loss = _kept_by_loss(config)
    key = "eval_loss" if by_loss else f"eval_{config.promoted_by}"
    sign = -1 if by_loss else 1  # the lowest loss is best
    measured = [sign * line[key] for line in state.log_history if key in line]
    if not measured:
        return False
    since_best = len(measured) - 1 - measured.index(max(measured))
    return since_best >= patience
