"""Encodes labelled rows as token ids, with the prompts of the job that will use the model.

Targets may be mixed with the probabilities of TF-IDF, which also judges mixed texts (`taught`).

No tensors.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glmbatch.errors import InputError
from glmbatch.glm.files import RANDOM_WEIGHTS, read_json
from glmbatch.glm.tokenizer import Tokenizer
from glmbatch.run.checks.steps import trained_prompt
from glmbatch.run.models import locate_model, prepare_model
from glmbatch.settings.job import TEXT, ClassifyStep, GenerateStep, placeholders
from glmbatch.settings.steps.step import literal, renamed
from glmbatch.settings.tuning import SCORED_AS, TuneConfig
from glmbatch.steps.prompt import Prompt, RowFault, build_prompts
from glmbatch.tuning.baseline import Seen, judge, out_of_fold
from glmbatch.tuning.examples import TEXT_ALONE, Example
from glmbatch.tuning.scores import has_labels
from glmbatch.tuning.split import Labelled

MOST_NAMED = 50  # labels in a default prompt; more would take the room of the text
STEP = SCORED_AS
DISTILLED = 0.7  # the share of TF-IDF in what random weights learn
# Mixed texts for each row in each epoch. Each costs as much as a row, and more rows need fewer of
# them, so the maximum bounds the time.
MIXED = 10
MOST_MIXED = 60_000
# Epochs with mixed texts of their own, which bounds the memory; later epochs have them again.
FRESH_EPOCHS = 4
# Pieces of a mixed text. With two, nearly all pairs of words were in one row, and a new text has
# mostly pairs that no row has (benchmarks/results/2026-11-27_cpu_random-weights.md).
PIECES = 4


class TrainingRow(NamedTuple):
    """Token ids of a prompt and what to learn: the index of a label, or the ids of an answer.

    Where a row may have several labels, `label` is 1 or 0 for each.

    `soft` has a probability of each label to learn instead, if it is not empty. `place` is the
    row's file and number. An answer ends with the end token, and is empty for a
    classifier. `text_is_cut` and `answer_is_cut` say whether the limits cut off an end. Only the
    epoch of this number, from 0, has the row; None stands for all.
    """

    ids: Any  # a sequence of ints; a numpy array takes a tenth of a list's memory
    label: int | tuple[int, ...]
    place: str
    answer: Any = ()
    text_is_cut: bool = False
    answer_is_cut: bool = False
    soft: Any = ()
    epoch: int | None = None

    @property
    def length(self) -> int:
        """Number of tokens of prompt and answer together."""
        return len(self.ids) + len(self.answer)


def step_of(settings: Mapping[str, Any], *, several: bool = False) -> ClassifyStep | GenerateStep:
    """The step with the same prompts as a training with these settings.

    `several` says whether a row may have several labels.

    `settings` is a dumped `TuneConfig` or the `settings` of a report. A report may be of an earlier
    version with other settings, so only those needed here are read.
    """
    training = settings["training"]
    asked: dict[str, Any] = {
        "name": STEP,
        "prompt_template": settings["prompt_template"],
        "system_prompt": settings["system_prompt"],
        "chat": settings.get("chat"),
        "max_input_tokens": training["max_input_tokens"],
        "on_too_long": "truncate",
    }
    if settings["data"]["response_column"] is None:
        return ClassifyStep(**asked, multiple=several)
    return GenerateStep(**asked, max_tokens=training["max_answer_tokens"])


def template_of(config: TuneConfig) -> str:
    """The template of a training without a question: its own, or that of a head trained further.

    It names the text column {text}, so that a job may have another name for it.
    """
    template = config.prompt_template
    if template is None and not config.writes:
        base = prepare_model(locate_model(config.model, config.runtime))
        template = (trained_prompt(base) or {}).get("prompt_template")
    return renamed(template or TEXT_ALONE, {config.data.text_column: TEXT})


def with_prompt(config: TuneConfig, labels: Sequence[str], *, several: bool) -> TuneConfig:
    """`config` with the prompt that it leaves to us.

    A head that is trained further keeps its prompt; a new one gets a question that names `labels`,
    which the base understands, unless they are too many to name.
    """
    if config.prompt_template is not None:
        return config.model_copy(update={"prompt_template": template_of(config)})
    if config.writes or len(labels) > MOST_NAMED:
        return config.model_copy(update={"prompt_template": TEXT_ALONE})
    base = prepare_model(locate_model(config.model, config.runtime))
    asked = trained_prompt(base) or {"prompt_template": TEXT_ALONE}
    if not base.has_head:
        template = question_of(TEXT_ALONE, labels, several=several)
        asked = {"prompt_template": template, "chat": base.chats}
    elif config.system_prompt is not None:
        asked = {**asked, "system_prompt": config.system_prompt}
    if config.chat is not None:
        asked = {**asked, "chat": config.chat}
    return config.model_copy(update=dict(asked))


def question_of(template: str, labels: Sequence[str], *, several: bool) -> str:
    """`template`, followed by a question that names `labels` unless it names all of them.

    `several` says whether a row may have several labels.
    """
    named = template.casefold()
    if all(label.casefold() in named for label in labels):
        return template
    *others, last = map(literal, labels)
    if several:
        return f"{template}\n\nWhich of these apply: {', '.join([*others, last])}?"
    listed = f"{', '.join(others)} or {last}" if others else last
    return f"{template}\n\nIs this {listed}?"


def encode_rows(
    examples: Sequence[Example],
    labels: Sequence[str],
    step: ClassifyStep | GenerateStep,
    tokenizer: Tokenizer,
    max_positions: int,
) -> list[TrainingRow]:
    """Training rows of `examples`, in order.

    Prompt and answer together have at most `max_positions` tokens. InputError if a row's prompt
    cannot be built.
    """
    writes = isinstance(step, GenerateStep)
    answers = [np.empty(0, np.int32)] * len(examples)
    room = max_positions
    if isinstance(step, GenerateStep):
        answers = _answers(examples, tokenizer, step.max_tokens)
        room -= step.max_tokens  # the longest answer must fit after any prompt
    prompts = build_prompts(
        step,
        [example.values for example in examples],
        tokenizer,
        texts=[name for name in placeholders(step.prompt_template) if name == TEXT],
        chat=writes if step.chat is None else step.chat,
        max_input_tokens=min(room, step.max_input_tokens or room),
    )
    numbers = {label: number for number, label in enumerate(labels)}
    rows = []
    for example, prompt, answer in zip(examples, prompts, answers, strict=True):
        if isinstance(prompt, RowFault):
            raise InputError(
                f"{example.place}: its prompt cannot be built: {prompt.reason}. "
                "Raise training.max_input_tokens."
            )
        assert isinstance(prompt, Prompt)  # a training has no condition
        ids = np.array(prompt.ids, np.int32)
        # A complete answer ends with the end token, which no text contains.
        cut = len(answer) > 0 and int(answer[-1]) != tokenizer.eos_id
        label: int | tuple[int, ...] = numbers.get(example.label, 0)
        if example.several is not None:
            label = tuple(int(name in example.several) for name in labels)
        rows.append(TrainingRow(ids, label, example.place, answer, prompt.is_cut, cut))
    return rows


def _answers(
    examples: Sequence[Example], tokenizer: Tokenizer, max_tokens: int
) -> list[np.ndarray]:
    """The ids of each answer with the end token, cut to `max_tokens`.

    Answers are encoded without the tokenizer's prefix, as in the published fine-tuning of ChatGLM2.
    """
    encoded = tokenizer.encode_plain([example.label for example in examples])
    return [np.array([*ids, tokenizer.eos_id][:max_tokens], np.int32) for ids in encoded]


def taught(
    config: TuneConfig,
    labelled: Labelled,
    rows: Sequence[TrainingRow],
    encode: Callable[[Sequence[Example]], Sequence[TrainingRow]],
) -> list[TrainingRow]:
    """The training rows and mixed ones, with TF-IDF's probabilities as `training.distill` asks.

    A small model learns its rows by heart, labels and probabilities alike. TF-IDF can judge any
    number of other texts, which `encode` gives token ids. Only random weights get those.
    """
    share = distilled_share(config)
    if not share:
        return [*rows]
    labels, examples = labelled.labels, labelled.parts["train"]
    known = Seen(examples, [row.ids for row in rows])
    truth_RL = has_labels([example.names for example in examples], labels)
    taught_rows = _with_soft(rows, (1 - share) * truth_RL + share * out_of_fold(known, labels))
    count = mixed_rows(config, len(rows))
    if count:
        epochs = min(config.training.epochs, FRESH_EPOCHS)
        mixed = mixtures(examples, count * epochs, config.training.seed)
        more = encode(mixed)
        judged_RL = judge(known, Seen(mixed, [row.ids for row in more]), labels)
        for at, row in enumerate(_with_soft(more, judged_RL)):
            taught_rows.append(row._replace(epoch=at // count))
    return taught_rows


def by_epoch(rows: Sequence[TrainingRow]) -> list[list[int]]:
    """The places of the rows that each epoch has; epochs after the last one begin again."""
    places: list[list[int]] = []
    for epoch in range(1 + max(row.epoch or 0 for row in rows)):
        places.append([at for at, row in enumerate(rows) if row.epoch in (None, epoch)])
    return places


def _with_soft(rows: Sequence[TrainingRow], soft_RL: np.ndarray) -> list[TrainingRow]:
    pairs = zip(rows, soft_RL.astype(np.float32), strict=True)
    return [row._replace(soft=soft_L) for row, soft_L in pairs]


def distilled_share(config: TuneConfig) -> float:
    """The share of TF-IDF in what is learned; the base must be local."""
    if config.writes:
        return 0
    if config.training.distill is not None:
        return config.training.distill
    return DISTILLED if _is_random(config) else 0


def mixed_rows(config: TuneConfig, rows: int) -> int:
    """The number of texts to mix from so many rows for an epoch; the base must be local."""
    if not distilled_share(config) or not _is_random(config):
        return 0
    return min(MIXED * rows, MOST_MIXED)


def lacks_end(config: TuneConfig) -> bool:
    """Whether the head of random weights would read the last token of each text itself.

    The base must be local, and the prompt known (`with_prompt`).
    """
    *_, (_, last, _, _) = string.Formatter().parse(config.prompt_template or TEXT_ALONE)
    return last is not None and not config.chat and not config.writes and _is_random(config)


def _is_random(config: TuneConfig) -> bool:
    return bool(read_json(Path(config.model.path) / "config.json").get(RANDOM_WEIGHTS))


def mixtures(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """New texts, each of random pieces of several `rows`."""
    dice = random.Random(seed)
    mixed = []
    for number in range(count):
        parts = dice.choices(rows, k=PIECES)
        weights = [dice.expovariate(1) for _ in parts]
        values = {}
        for name in parts[0].values:
            pieces = []
            for part, weight in zip(parts, weights, strict=True):
                pieces.append(_piece(part.values[name] or "", weight / sum(weights), dice))
            value = (" " if " " in pieces[0] else "").join(pieces)
            # A text of white space alone makes no prompt.
            values[name] = value if value.strip() else parts[0].values[name] or ""
        place, text = f"mixed text {number}", "\n".join(values.values())
        columns = values if parts[0].columns else {}
        mixed.append(parts[0]._replace(place=place, text=text, columns=columns, asked=""))
    return mixed


def _piece(text: str, share: float, dice: random.Random) -> str:
    """A piece of `text`: a share of its words, or of its characters if it has few spaces."""
    space = " " if text.count(" ") > 3 else ""
    units = text.split(" ") if space else list(text)
    length = min(len(units), max(1, round(len(units) * share)))
    first = dice.randint(0, len(units) - length)
    return space.join(units[first : first + length])
