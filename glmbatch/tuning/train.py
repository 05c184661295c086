"""One training, from labelled rows to a saved checkpoint. A killed training resumes when run again.

The result is bit for bit that of an uninterrupted training (float32, one device).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.adapter_save import finish_adapter
from glmbatch.glm.checkpoint.load import load_model
from glmbatch.glm.checkpoint.save import StoredDtype, save_checkpoint
from glmbatch.glm.files import PROMPT_FILE
from glmbatch.glm.oom import is_out_of_memory
from glmbatch.glm.tokenizer import TOKENIZER_FILE, load_tokenizer
from glmbatch.run.models import locate_model
from glmbatch.settings.job import GenerateStep
from glmbatch.settings.tuning import TuneConfig
from glmbatch.store.files import committed
from glmbatch.tuning.encode import (
    TrainingRow,
    distilled_share,
    encode_rows,
    lacks_end,
    mixed_rows,
    step_of,
    taught,
    template_of,
    with_prompt,
)
from glmbatch.tuning.examples import Example, text_keys
from glmbatch.tuning.model import (
    build_model,
    check_memory,
    local_rank,
    read_base,
    training_device,
)
from glmbatch.tuning.processes import writable_run
from glmbatch.tuning.report import (
    ADAPTER,
    CHECKPOINT,
    LEARNED,
    TRAINED,
    TRAINER,
    Trained,
    TrainingPlan,
    learned_lists,
)
from glmbatch.tuning.scores import fit_temperature
from glmbatch.tuning.split import Labelled, read_labelled, with_metric
from glmbatch.tuning.trainer import RowDataset, RowTrainer, is_stale, make_trainer

logger = logging.getLogger(__name__)

# As in the published checkpoint: half the size of float32, and a GPU computes in 16 bits anyway.
STORED: StoredDtype = "float16"
# The head reads the last token, and random weights do not know yet what else it stands for.
NO_END = (
    "the prompt ends with the text, so the head reads from another token in each row. Random "
    'weights learn better from the same one: set prompt_template to "{text}\\n"'
)


def train_here(config: TuneConfig, run: Path) -> None:
    """Train in this process, alone or as one of several, and write the result into `run`.

    Of several processes, only the first writes. `trained.json` is written last and marks the
    training as done.
    """
    # The base or the adapter may be in an object store; from here on, both are local.
    config = config.model_copy(update={"model": locate_model(config.model, config.runtime)})
    labelled = read_labelled(config.data, template_of(config))
    config = with_metric(config, labelled)
    config = with_prompt(config, labelled.labels, several=labelled.several)
    rows, valid = encode_parts(config, labelled)
    cut = _count_cut([*rows, *valid])
    rows = taught(config, labelled, rows, lambda mixed: _encoded(config, labelled, mixed))
    with writable_run(run):
        trained = train(config, labelled.labels, rows, valid, run).model_copy(update=cut)
    if local_rank() > 0:
        return
    asked = config.model_dump(include={"prompt_template", "system_prompt"})
    asked |= {"chat": True} if config.chat else {}
    asked |= {"writes": True} if config.writes else {}  # no head, whose prompt a job would take
    for folder in (run / CHECKPOINT, run / ADAPTER):
        if folder.is_dir():
            with committed(folder / PROMPT_FILE, "output") as partial:
                partial.write_text(json.dumps(asked, ensure_ascii=False, indent=1), "utf-8")
    learned = [*labelled.parts["train"], *labelled.parts["valid"]]
    # Validation rows count as learned: they chose the weights. So do those that the base learned.
    keys = [text_keys(learned), *map(np.load, learned_lists(config.model))]
    with committed(run / LEARNED, "output") as partial, partial.open("wb") as file:
        np.save(file, np.unique(np.concatenate(keys)))
    with committed(run / TRAINED, "output") as partial:
        partial.write_text(trained.model_dump_json(indent=1), encoding="utf-8")


def plan_training(config: TuneConfig, labelled: Labelled) -> TrainingPlan:
    """What a training on these rows would do. InputError if its memory would not suffice."""
    config = config.model_copy(update={"model": locate_model(config.model, config.runtime)})
    config = with_metric(config, labelled)
    config = with_prompt(config, labelled.labels, several=labelled.several)
    rows, valid = encode_parts(config, labelled)
    check_memory(config, rows, training_device(config.runtime.device, config.training.processes))
    lengths = sorted(row.length for row in rows)
    mixed = mixed_rows(config, len(rows))
    training = config.training
    step_rows = training.batch_rows * training.gradient_accumulation * training.processes
    cut = _count_cut([*rows, *valid])
    used = {"learning_rate": config.learning_rate, "distill": distilled_share(config)}
    used_training = training.model_copy(update=used)
    return TrainingPlan(
        audit=labelled.audit,
        settings=config.model_copy(update={"training": used_training}).model_dump(mode="json"),
        tokens=(lengths[0], lengths[len(lengths) // 2], lengths[-1]),
        cut=(cut["cut_texts"], cut["cut_answers"]),
        steps=math.ceil((len(rows) + mixed) / step_rows) * training.epochs,
        mixed=mixed,
        advice=NO_END if lacks_end(config) else "",
    )


def encode_parts(
    config: TuneConfig, labelled: Labelled
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """The training rows and the validation rows as token ids; the base must be local.

    InputError if a model that generates is trained over CodeGeeX2, which has no chat format.
    """
    tokenizer = load_tokenizer(config.model.path)
    step = step_of(config.model_dump())
    base = read_base(config.model)
    if base.family == "CodeGeeX2" and isinstance(step, GenerateStep):
        # A job over that base uses bare prompts, but a merged checkpoint names no family.
        raise InputError(
            f"{config.model.path}: CodeGeeX2 has no chat format, which training of answers uses. "
            "Set model to a ChatGLM2 checkpoint."
        )
    positions = base.architecture.max_positions
    rows, valid = (
        encode_rows(labelled.parts[part], labelled.labels, step, tokenizer, positions)
        for part in ("train", "valid")
    )
    return rows, valid


def _encoded(
    config: TuneConfig, labelled: Labelled, examples: Sequence[Example]
) -> list[TrainingRow]:
    return encode_parts(config, labelled._replace(parts={"train": [*examples], "valid": []}))[0]


def _count_cut(rows: Sequence[TrainingRow]) -> dict[str, int]:
    """The fields of `Trained` that count cut rows; also logged, before hours of training."""
    texts = sum(row.text_is_cut for row in rows)
    answers = sum(row.answer_is_cut for row in rows)
    if texts or answers:
        logger.warning(
            "of %d rows, %d texts and %d answers are cut off. See training.max_input_tokens.",
            len(rows),
            texts,
            answers,
        )
    return {"learned": len(rows), "cut_texts": texts, "cut_answers": answers}


def train(
    config: TuneConfig,
    labels: Sequence[str],
    rows: Sequence[TrainingRow],
    valid: Sequence[TrainingRow],
    run: Path,
) -> Trained:
    """Train on `rows`, keep the weights that are best on `valid`, and save them in `run`.

    `run`/checkpoint has the published layout. With LoRA, `run`/adapter has the adapter that was
    merged into it. InputError if memory is too small or the loss is not finite; saved checkpoints
    stay, and the next call resumes from the last one.
    """
    device = training_device(config.runtime.device, config.training.processes)
    check_memory(config, rows, device)
    # For a new head, the adapter and dropout.
    torch.manual_seed(config.training.seed)
    several = isinstance(rows[0].label, tuple)
    model = build_model(config, labels, device, several=several)
    trainer = make_trainer(config, model, rows, valid, run / TRAINER)
    _resume(trainer, config, run / TRAINER)
    temperature = 1.0
    if not config.writes:
        temperature = _temperature(trainer, valid)
    if trainer.is_world_process_zero():
        save_result(config, model, temperature, run)
    summary = _summary(trainer.state, model, temperature)
    return summary.model_copy(update={"used": _used(trainer, config)})


def _resume(trainer: RowTrainer, config: TuneConfig, folder: Path) -> None:
    """Train to the end, from the last complete checkpoint in `folder` or from the start."""
    # One process deletes incomplete checkpoints before the others look.
    with trainer.args.main_process_first():
        last = _last_whole(folder)
    if last is not None:
        state = TrainerState.load_from_json(str(last / "trainer_state.json"))
        if is_stale(state, config):  # it stopped early, but was killed before the result was saved
            trainer.state = state
            trainer._load_best_model()
            return
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"{trainer.args.device}: out of memory while training. Lower training.batch_rows, "
            "or set training.gradient_checkpointing to true."
        ) from error


def _last_whole(folder: Path) -> Path | None:
    """The last complete checkpoint, or None. Deletes incomplete ones."""
    while folder.is_dir():
        name: str | None = get_last_checkpoint(str(folder))  # type: ignore[no-untyped-call]
        if name is None:
            return None
        last = Path(name)
        try:  # the Trainer writes its state last, so a readable state means a complete checkpoint
            state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(last)
            continue
        if state.get("best_global_step"):
            # The state names the best checkpoint by path, but the folder may have moved since.
            state["best_model_checkpoint"] = str(folder / f"checkpoint-{state['best_global_step']}")
            with committed(last / "trainer_state.json", "output") as partial:
                partial.write_text(json.dumps(state, indent=2), encoding="utf-8")
        logger.info("resuming from %s", last)
        return last
    return None


def _temperature(trainer: RowTrainer, valid: Sequence[TrainingRow]) -> float:
    logits_RL = trainer.predict(RowDataset(valid)).predictions
    return fit_temperature(np.asarray(logits_RL), np.array([row.label for row in valid]))


def save_result(config: TuneConfig, model: Any, temperature: float, run: Path) -> None:
    """Write the trained `model` to `run`/checkpoint and, with LoRA, its adapter to `run`/adapter.

    A classifier's logits are divided by `temperature` first. Replaces files of a killed run.
    """
    for folder in (run / ADAPTER, run / CHECKPOINT):
        shutil.rmtree(folder, ignore_errors=True)
    lora = config.training.method == "lora"
    if not config.writes:
        head = model.score.modules_to_save["default"] if lora else model.score
        _divide(head, temperature)
    if lora:
        model = _merged(config, model, run / ADAPTER)
    save_checkpoint(
        model.to("cpu"),
        run / CHECKPOINT,
        tokenizer_model=Path(config.model.path) / TOKENIZER_FILE,
        dtype=STORED,
        safetensors=True,
    )


@torch.no_grad()
def _divide(head: Any, temperature: float) -> None:
    """Fold the temperature into the head, because a separate setting could be forgotten."""
    head.weight.div_(temperature)
    head.bias.div_(temperature)


def _merged(config: TuneConfig, model: Any, folder: Path) -> Any:
    """Save the adapter of `model` in `folder`; returns the base with the adapter merged in."""
    model.save_pretrained(folder)  # for peft, and for jobs that set both base and adapter
    if not config.writes:  # peft saves the head, but not its labels
        head = {"id2label": model.config.id2label}
        if model.config.problem_type is not None:
            head["problem_type"] = model.config.problem_type
        labels = json.dumps(head, ensure_ascii=False, indent=2)
        (folder / "config.json").write_text(labels, encoding="utf-8")
    # If the base has an adapter, it becomes part of the new one, so that one adapter is enough.
    finish_adapter(folder, read_base(config.model))
    # Merged by the code that a job with base and adapter uses, so the weights are the same bits.
    return load_model(config.model.path, STORED, adapter=folder)


def _used(trainer: RowTrainer, config: TuneConfig) -> dict[str, int | float | str]:
    """The values that the training used without being told."""
    args, training = trainer.args, config.training
    step_rows = training.batch_rows * training.gradient_accumulation * training.processes
    return {
        "rows_per_step": step_rows,
        "learning_rate": args.learning_rate,
        "schedule": f"{args.warmup_steps:g} warm-up steps, then a cosine to 0",
        "optimizer": f"AdamW, beta2 {args.adam_beta2:g}, weight decay {args.weight_decay:g}",
        "largest_gradient_norm": args.max_grad_norm,
        "computed_in": "bfloat16" if args.bf16 else "float32",
        "stored_as": STORED,
        "device": str(args.device),
        "distill": distilled_share(config),
    }


def _summary(state: TrainerState, model: Any, temperature: float) -> Trained:
    trained = total = 0
    for weight in model.parameters():
        total += weight.numel()
        trained += weight.numel() if weight.requires_grad else 0
    history = []
    for line in state.log_history:
        numbers = {key: value for key, value in line.items() if isinstance(value, (int, float))}
        history.append({key: float(value) for key, value in numbers.items()})
    return Trained(
        steps=state.global_step,
        best_step=state.best_global_step or state.global_step,
        trained_parameters=trained,
        parameters=total,
        temperature=temperature,
        history=tuple(history),
    )
