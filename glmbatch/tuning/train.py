"""Training through transformers' Trainer: from token ids, and labels or answers, to a saved checkpoint.

Killed at any moment and called again, it goes on from the last checkpoint that is whole, to the same weights (float32,
one device). Knows no texts and no Parquet.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from transformers import (
    GlmForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.load import (
    ClassifierHead,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from glmbatch.glm.device import free_memory_bytes, resolve_device
from glmbatch.glm.engine.oom import is_out_of_memory
from glmbatch.glm.tokenizer import TOKENIZER_FILE, load_tokenizer
from glmbatch.settings.tuning import TuneConfig
from glmbatch.store.files import committed
from glmbatch.tuning.muon import Muon
from glmbatch.tuning.noise import Splits, disturbed, piece_splits
from glmbatch.tuning.processes import local_rank
from glmbatch.tuning.scores import fit_temperature, score

logger = logging.getLogger(__name__)

TRAINER, ADAPTER, CHECKPOINT = "trainer", "adapter", "checkpoint"
PAD_ID = 0
IGNORED = -100  # a label that counts nothing, as in torch and transformers
# What peft adapts: every matrix of a layer.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
BETA2 = 0.98
# Weights, gradients and two moments in float32.
BYTES_TRAINED = 16
# Numbers that a layer keeps of each token for the way back, in units of the hidden size; measured, rounded up.
KEPT_NUMBERS = 40


class TrainingRow(NamedTuple):
    """Token ids of a prompt, the number of its label or the answer, and where the row stands."""

    ids: Any  # a sequence of whole numbers; as a numpy array it takes a tenth of a list's memory
    label: int
    place: str
    answer: Any = ()  # ids to be written after them, the end token included

    @property
    def length(self) -> int:
        return len(self.ids) + len(self.answer)


class Trained(BaseModel, frozen=True, extra="forbid"):
    """What training did. `history` holds its losses and scores by step; `temperature` is folded into the head."""

    steps: int
    best_step: int
    trained_parameters: int
    parameters: int
    temperature: float
    history: tuple[dict[str, float], ...]


def train(  # noqa: PLR0913, PLR0917 - what to train, on what, and where
    config: TuneConfig,
    base: Path,
    labels: Sequence[str],
    rows: Sequence[TrainingRow],
    valid: Sequence[TrainingRow],
    run: Path,
) -> Trained:
    """Train on `rows`, keep the weights that are best on `valid`, and save them in `run`.

    `run`/checkpoint is in the published layout; with LoRA `run`/adapter holds the adapter that was merged into it.
    InputError when there is too little memory, or when the loss is not finite; then what was saved before stays.
    """
    device = _device(config)
    _check_memory(config, base, rows, device)
    torch.manual_seed(config.training.seed)
    model = _with_method(_classifier(config, base, labels, device), config)
    trainer = _trainer(config, model, base, labels, rows, valid, run / TRAINER, device)
    with trainer.args.main_process_first():
        last = _last_whole(run / TRAINER)
    state = None if last is None else TrainerState.load_from_json(str(last / "trainer_state.json"))
    try:
        if state is not None and _stale(state, config):  # killed after it had stopped early
            trainer.state = state
            trainer._load_best_model()
        else:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"{device}: no room to train. Set training.batch_rows lower, or training.gradient_checkpointing to true."
        ) from error
    temperature = 1.0
    if not config.writes:
        logits = trainer.predict(_Rows(valid)).predictions
        temperature = fit_temperature(np.asarray(logits), np.array([row.label for row in valid]))
    if trainer.is_world_process_zero():
        _save(config, model, base, temperature, run)
    return Trained(
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step or trainer.state.global_step,
        trained_parameters=sum(
            weight.numel() for weight in model.parameters() if weight.requires_grad
        ),
        parameters=sum(weight.numel() for weight in model.parameters()),
        temperature=temperature,
        history=tuple(
            {key: float(value) for key, value in line.items() if isinstance(value, (int, float))}
            for line in trainer.state.log_history
        ),
    )


def _device(config: TuneConfig) -> str:
    """Where this process trains: of several, each has a card of its own."""
    device = resolve_device(config.runtime.device)
    if device not in ("cpu", "cuda:0"):
        raise InputError(
            f"{device}: training takes the first cards that it sees. Set CUDA_VISIBLE_DEVICES."
        )
    if device == "cpu":
        return device
    if config.training.processes > torch.cuda.device_count():
        raise InputError(
            f"{torch.cuda.device_count()} CUDA devices are seen. Set training.processes to at most that."
        )
    return f"cuda:{local_rank()}"


def _classifier(config: TuneConfig, base: Path, labels: Sequence[str], device: str) -> Any:
    """The base with a head for `labels`, its own where it is for them, else a new one; for a writer the base itself."""
    settings = config.model
    half = device.startswith("cuda") and config.method != "full"  # frozen weights need no more
    loaded = load_model(
        base,
        "bfloat16" if half else "float32",
        device,
        settings.adapter if settings else None,
    )
    if loaded.prefix_kv is not None:
        raise InputError(
            f"{base}: has a trained prefix, which training does not go on from. Set model."
        )
    stated = loaded.config
    if config.writes:
        if hasattr(loaded, "score"):
            raise InputError(
                f"{base}: has a classification head and cannot learn to write. Set model."
            )
        loaded.config.use_cache = False
        return loaded.requires_grad_(True)
    keeps_head = hasattr(loaded, "score") and tuple(stated.id2label.values()) == tuple(labels)
    stated.id2label, stated.label2id = (
        dict(enumerate(labels)),
        {label: at for at, label in enumerate(labels)},
    )
    stated.pad_token_id, stated.use_cache = PAD_ID, False
    with torch.device("meta"):
        model: Any = GlmForSequenceClassification(stated)  # type: ignore[no-untyped-call]
    model.model = loaded.model
    model.score = (
        loaded.score if keeps_head else ClassifierHead(stated.hidden_size, len(labels)).to(device)
    )
    if not keeps_head:
        torch.nn.init.normal_(model.score.weight, 0.0, 0.02)
        torch.nn.init.zeros_(model.score.bias)
    return model.requires_grad_(True)


def _with_method(model: Any, config: TuneConfig) -> Any:
    """`model` with what the method trains, and nothing else, trainable."""
    training = config.training
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    if config.method == "full":
        return model
    if config.method == "head":
        model.model.requires_grad_(False)
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    adapter = LoraConfig(
        task_type=TaskType.CAUSAL_LM if config.writes else TaskType.SEQ_CLS,
        r=training.lora_rank,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=TARGETS,
        modules_to_save=None if config.writes else ["score"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name of before
        return get_peft_model(model, adapter)


def _check_memory(config: TuneConfig, base: Path, rows: Sequence[TrainingRow], device: str) -> None:
    """InputError when the estimate does not fit what is free, before anything is loaded; it names what would."""
    settings = config.model
    found = read_checkpoint(base, settings.adapter if settings else None)
    stated, number = found.architecture, 2 if device.startswith("cuda") else 4
    weights = found.parameters * (BYTES_TRAINED if config.method == "full" else number)
    if config.method == "lora":
        shapes = stated.layers * (8 * stated.hidden_size + 3 * stated.ffn_size)
        weights += BYTES_TRAINED * config.training.lora_rank * shapes
    kept = stated.layers * KEPT_NUMBERS
    if (
        config.gradient_checkpointing
    ):  # the input of each layer, and all of the one that is computed again
        kept = stated.layers + KEPT_NUMBERS
    longest = max(row.length for row in rows)
    row = number * longest * stated.hidden_size * kept + (
        8 * longest * stated.vocab_size if config.writes else 0
    )
    free = free_memory_bytes(device) // (config.training.processes if device == "cpu" else 1)
    needed = weights + config.training.batch_rows * row
    if needed <= free:
        return
    fit = (free - weights) // row
    mend = (
        f"training.batch_rows to {fit}"
        if fit > 0
        else "training.method to lora or head, or another device"
    )
    if fit > 0 and not config.gradient_checkpointing:
        mend += ", or training.gradient_checkpointing to true"
    raise InputError(
        f"{device}: training needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free. Set {mend}."
    )


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
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
            "at": at,
        }


class _NoisyRows(_Rows):
    """Rows by number and epoch, which with the seed decide the noise."""

    def __init__(
        self, rows: Sequence[TrainingRow], splits: Splits, share: float, seed: int
    ) -> None:
        super().__init__(rows)
        self._splits, self._share, self._seed = splits, share, seed

    def __getitem__(self, drawn: Any) -> dict[str, Any]:
        at, epoch = drawn
        row = self.rows[at]
        if self._share:
            dice = random.Random(f"{self._seed} {epoch} {at}")
            row = row._replace(ids=disturbed(row.ids, self._splits, self._share, dice))
        return _Rows([row])[0] | {"at": at}


class _AlikeInLength(torch.utils.data.Sampler[tuple[int, int]]):
    """Every row once, with its epoch, in an order that (seed, epoch) alone decides; neighbours are alike in length.

    transformers' own draws from the global generator, so that a resumed epoch would see other batches.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed, self._epoch = lengths, batch, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        dice = random.Random(f"{self._seed} {self._epoch}")
        order = dice.sample(range(len(self._lengths)), len(self._lengths))
        groups = []
        for first in range(0, len(order), 50 * self._batch):
            alike = sorted(
                order[first : first + 50 * self._batch], key=lambda row: self._lengths[row]
            )
            groups += [alike[at : at + self._batch] for at in range(0, len(alike), self._batch)]
        last = groups.pop()  # a short batch anywhere else would shift the others
        dice.shuffle(groups)
        return ((row, self._epoch) for group in [*groups, last] for row in group)


def _pad(batch: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """On the right, where no causal position sees it. GLM reads the last id that is not PAD_ID, which no text has."""
    longest = max(len(row["ids"]) for row in batch)
    ids_BT = torch.full((len(batch), longest), PAD_ID)
    mask_BT = torch.zeros((len(batch), longest), dtype=torch.long)
    for at, row in enumerate(batch):
        ids_BT[at, : len(row["ids"])] = torch.tensor(row["ids"])
        mask_BT[at, : len(row["ids"])] = 1
    labels = torch.tensor([row["label"] for row in batch])
    if batch[0]["answer"]:  # of each token the next one, in the answer alone
        labels = torch.full((len(batch), longest), IGNORED)
        for at, row in enumerate(batch):
            end = len(row["ids"])
            labels[at, end - row["answer"] - 1 : end - 1] = ids_BT[at, end - row["answer"] : end]
    return {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "labels": labels,
        "at": torch.tensor([row["at"] for row in batch]),
    }


class _Trainer(Trainer):
    """transformers' Trainer with our order of rows, weighed labels, and an end at the first loss that is no number."""

    def __init__(self, *, rows: _NoisyRows, weights_L: torch.Tensor | None, **options: Any) -> None:
        super().__init__(train_dataset=rows, data_collator=_pad, **options)
        self._rows, self._weights_L = rows.rows, weights_L

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        batch = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        return _AlikeInLength([row.length for row in self._rows], batch, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        at, labels = inputs.pop("at"), inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        weights_L = None if self._weights_L is None else self._weights_L.to(outputs.logits.device)
        # The classes, or the tokens, go to the second place, where torch looks for them.
        logits = (
            outputs.logits.float() if labels.dim() == 1 else outputs.logits.float().transpose(1, 2)
        )
        losses = torch.nn.functional.cross_entropy(
            logits, labels, weights_L, reduction="none", ignore_index=IGNORED
        )
        loss_B = losses if labels.dim() == 1 else losses.sum(dim=1)
        if not torch.isfinite(loss_B).all():
            loss_B, row = loss_B.detach(), int(at[~torch.isfinite(loss_B)][0])
            where = self._rows[row].place if model.training else f"validation row {row}"
            raise InputError(
                f"step {self.state.global_step + 1}: the loss is {float(loss_B.sum())}, first at {where}. "
                "Set training.learning_rate lower; the last checkpoint is kept."
            )
        counted = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        # Of several processes the gradients are averaged, and the count is that of all.
        loss = (
            loss_B.sum()
            / counted
            * (1 if num_items_in_batch is None else self.accelerator.num_processes)
        )
        return (loss, outputs) if return_outputs else loss


def _trainer(  # noqa: PLR0913, PLR0917 - everything that training needs
    config: TuneConfig,
    model: Any,
    base: Path,
    labels: Sequence[str],
    rows: Sequence[TrainingRow],
    valid: Sequence[TrainingRow],
    folder: Path,
    device: str,
) -> _Trainer:
    training = config.training
    per_step = training.batch_rows * training.gradient_accumulation * training.processes
    per_epoch = math.ceil(len(rows) / per_step)
    every = max(1, per_epoch // training.evaluations_per_epoch)
    names = TrainingArguments.__dataclass_fields__  # renamed on the way to transformers 6
    checkpointing = (
        "activation_checkpointing"
        if "activation_checkpointing" in names
        else "gradient_checkpointing"
    )
    more: dict[str, Any] = {checkpointing: True} if config.gradient_checkpointing else {}
    half = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=training.batch_rows,
        per_device_eval_batch_size=training.batch_rows,
        gradient_accumulation_steps=training.gradient_accumulation,
        num_train_epochs=training.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(training.warm_up_share * per_epoch * training.epochs)),
        weight_decay=training.weight_decay,
        adam_beta2=BETA2,
        max_grad_norm=1.0,
        bf16=half,
        use_cpu=device == "cpu",
        **more,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss" if config.writes else config.promoted_by,
        greater_is_better=not config.writes,
        prediction_loss_only=config.writes,  # logits of all tokens of all rows fit nowhere
        logging_steps=max(1, every // 10),
        logging_nan_inf_filter=False,
        seed=training.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    def measure(found: Any) -> dict[str, float]:
        guessed, truth = found.predictions.argmax(-1), found.label_ids
        names = [str(at) for at in range(len(labels))]
        found_scores = score([names[at] for at in truth], [names[at] for at in guessed], names)
        return {"accuracy": found_scores.accuracy, "macro_f1": found_scores.macro_f1}

    counts = Counter(row.label for row in rows)
    weights = torch.tensor([len(rows) / (len(labels) * counts[at]) for at in range(len(labels))])
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    splits = piece_splits(load_tokenizer(base)) if config.noise else {}
    muon = (
        Muon(model, config.learning_rate, training.weight_decay, BETA2)
        if config.model is None
        else None
    )
    trainer = _Trainer(
        rows=_NoisyRows(rows, splits, config.noise, training.seed),
        optimizers=(muon, None),
        weights_L=weights if training.class_weights == "balanced" else None,
        model=model,
        args=arguments,
        eval_dataset=_Rows(valid),
        compute_metrics=None if config.writes else measure,
        callbacks=[_Told(), _StopEarly(config)],
    )
    arguments._n_gpu = 1  # with more, its DataParallel would change batches, steps and the loss
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Told(TrainerCallback):
    """Says on the log what the Trainer would print."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        said = ", ".join(
            f"{key} {value:.4g}" for key, value in (logs or {}).items() if isinstance(value, float)
        )
        logger.info("step %d of %d: %s", state.global_step, state.max_steps, said)


class _StopEarly(TrainerCallback):
    """As transformers' own, but told by what was measured: its counter would begin anew in a run that goes on."""

    def __init__(self, config: TuneConfig) -> None:
        self._config = config

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or _stale(state, self._config)


def _stale(state: TrainerState, config: TuneConfig) -> bool:
    """Whether the last `patience` evaluations were no better than those before."""
    key = "eval_loss" if config.writes else f"eval_{config.promoted_by}"
    measured = [
        -line[key] if config.writes else line[key] for line in state.log_history if key in line
    ]
    patience = config.training.patience
    return (
        patience is not None
        and bool(measured)
        and len(measured) - 1 - measured.index(max(measured)) >= patience
    )


def _last_whole(folder: Path) -> Path | None:
    """The last checkpoint whose saving came to its end; the Trainer writes its state last. Others are deleted.

    It names the best one by a path, which is set right here: the folder may have another name by now.
    """
    while folder.is_dir():
        found: str | None = get_last_checkpoint(str(folder))  # type: ignore[no-untyped-call]
        if found is None:
            return None
        last = Path(found)
        try:
            state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(last)
            continue
        if state.get("best_global_step"):
            state["best_model_checkpoint"] = str(folder / f"checkpoint-{state['best_global_step']}")
            with committed(last / "trainer_state.json") as partial:
                partial.write_text(json.dumps(state, indent=2), encoding="utf-8")
        logger.info("going on from %s", last)
        return last
    return None


def _save(config: TuneConfig, model: Any, base: Path, temperature: float, run: Path) -> None:
    """Write the adapter and the checkpoint; what a killed run left half-written is written anew."""
    for folder in (run / ADAPTER, run / CHECKPOINT):
        shutil.rmtree(folder, ignore_errors=True)
    if not config.writes:
        scores = model.score.modules_to_save["default"] if config.method == "lora" else model.score
        with (
            torch.no_grad()
        ):  # logits over a temperature, without a setting that a reader could forget
            scores.weight.div_(temperature)
            scores.bias.div_(temperature)
    if config.method == "lora":
        model.save_pretrained(run / ADAPTER)
        if not config.writes:
            stated = json.dumps({"id2label": model.config.id2label}, ensure_ascii=False, indent=2)
            (run / ADAPTER / "config.json").write_text(stated, encoding="utf-8")
        if (
            config.model is not None and config.model.adapter is not None
        ):  # part of the base that is in memory
            model = model.merge_and_unload()
        else:
            model = load_model(base, config.stored, adapter=run / ADAPTER)
    model = model.to("cpu")
    save_checkpoint(
        model,
        run / CHECKPOINT,
        tokenizer_model=base / TOKENIZER_FILE,
        dtype=config.stored,
        safetensors=True,
    )
