"""Scores a checkpoint on held-out rows, through the job that will use it. Promotes nothing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from glmbatch.errors import InputError, some_of
from glmbatch.evaluation.bootstrap import groups_of
from glmbatch.evaluation.paired import Answer, compare_answers
from glmbatch.run.job import run_job
from glmbatch.run.models import locate_model, prepare_model
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import (
    TEXT,
    ClassifyStep,
    DataConfig,
    GenerateStep,
    JobConfig,
    ModelConfig,
    RuntimeConfig,
    placeholders,
)
from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.baseline import Baseline, keep_baseline, score_baseline
from glmbatch.tuning.encode import STEP, question_of, step_of, template_of, with_prompt
from glmbatch.tuning.examples import Example
from glmbatch.tuning.promote import template_of_current, without_learned
from glmbatch.tuning.report import (
    BASELINE,
    CHECKPOINT,
    REPORT,
    TRAINED,
    AnyScores,
    Comparison,
    Mistake,
    Report,
    installed_versions,
    read_report,
)
from glmbatch.tuning.scores import (
    SelectionScores,
    TextScores,
    same_for_all,
    score,
    score_selections,
    score_texts,
)
from glmbatch.tuning.split import Labelled, read_labelled, with_metric

MISTAKES_KEPT = 20  # few enough to read
EXAMPLES_KEPT = 2  # of each label that was taken for another, for as many as MOST_CONFUSED pairs
MOST_CONFUSED = 50
MISTAKE_CHARACTERS = 500


AskedStep = ClassifyStep | GenerateStep


class HeldOut(NamedTuple):
    """The rows to score on, and all labels of these rows and of the checkpoint."""

    rows: Sequence[Example]
    labels: Sequence[str]


class Answered(NamedTuple):
    """What a model answered to the held-out rows, and its mistakes, most confident first."""

    scores: AnyScores
    answers: Sequence[Answer]
    mistakes: Sequence[Mistake]


RIVALS = {"base": "the untrained base", "current": "the current checkpoint"}
Rival = Literal["constant", "base", "current", "baseline"]


def score_run(config: TuneConfig, run: Path, current: Path | None) -> Report:
    """The report of a run: its scores, and those of its rivals on the same rows.

    The decision on the promotion is still missing.
    """
    template = template_of(config)
    labelled = _read(config, template, current)
    config = with_metric(config, labelled)
    config = with_prompt(config, labelled.labels, several=labelled.several)
    # All answer the same rows, each with the prompts of its own training.
    held_out = HeldOut(labelled.parts["test"], labelled.labels)
    step = step_of(config.model_dump(), several=labelled.several)
    own = ModelConfig(path=str(run / CHECKPOINT))
    ours = evaluate(own, step, held_out, config.runtime, run / "test")
    training = json.loads((run / TRAINED).read_text(encoding="utf-8"))
    baseline = None if config.writes else _score_baseline(labelled, template, training)
    answered = None
    if current is not None:
        answered = _score_current(current, (config, step), held_out, run / "current")
    untrained, note = _score_base(config, step, held_out, run / "base")
    rivals: dict[Rival, Answered | Baseline | None] = {"base": untrained, "current": answered}
    rivals["baseline"] = baseline
    return Report(
        run=run.name,
        checkpoint=str(run / CHECKPOINT),
        labels=labelled.labels,
        settings=config.model_dump(mode="json"),
        base=config.model.path,
        audit=labelled.audit,
        training=training,
        scores=ours.scores,
        mistakes=tuple(_shown(ours.mistakes, by_pair=isinstance(step, ClassifyStep))),
        baseline_name="none" if baseline is None else baseline.name,
        baseline=None if baseline is None else baseline.scores,
        baseline_model=keep_baseline(baseline, placeholders(template), run / BASELINE),
        current=None if answered is None else answered.scores,
        compared_with=None if current is None else current.name,
        untrained=None if untrained is None else untrained.scores,
        untrained_note=note,
        comparisons=tuple(_compared(config.promoted_by, held_out, ours, rivals)),
        promoted=False,
        reason="",
        versions=installed_versions(),
    )


def _read(config: TuneConfig, template: str, current: Path | None) -> Labelled:
    """The rows, with what the current checkpoint's prompt shows, and without those it learned."""
    theirs = template_of_current(config.output) or template
    labelled = read_labelled(config.data, template, placeholders(theirs))
    return without_learned(labelled, current, theirs, config.data.input)


def _score_baseline(labelled: Labelled, template: str, training: Mapping[str, Any]) -> Baseline:
    """The baseline, with what it reads behind its name unless that is the text of the prompt."""
    baseline = score_baseline(labelled.parts, labelled.labels)
    columns = placeholders(template)
    notes = []
    if columns != [TEXT]:
        notes.append(f"{' and '.join(columns)}{', joined' if len(columns) > 1 else ''}")
    if training.get("cut_texts"):
        notes.append("the full texts")
    note = f" (on {', '.join(notes)})" if notes else ""
    return baseline._replace(name=f"{baseline.name}{note}")


def _score_current(
    current: Path, asked: tuple[TuneConfig, AskedStep], held_out: HeldOut, folder: Path
) -> Answered:
    """The currently promoted checkpoint on the rows. InputError if it cannot be compared.

    `asked` are the settings of the new one, and its step.
    """
    config, new_step = asked
    report = read_report(current)
    if report is None:
        raise InputError(
            f"{current}: has no {REPORT}, so nothing can be compared with it. Set another output."
        )
    step = step_of(report.settings, several=isinstance(report.scores, SelectionScores))
    if _kind(step) != _kind(new_step):
        raise InputError(
            f"{current}: is a model of another kind, so nothing can be compared with it. "
            "Set another output."
        )
    # It may have labels that these rows lack, and lack some that they have.
    labels = sorted({*held_out.labels, *report.labels})
    everything = HeldOut(held_out.rows, labels)
    checkpoint = ModelConfig(path=str(current / CHECKPOINT))
    return evaluate(checkpoint, step, everything, config.runtime, folder)


def _score_base(
    config: TuneConfig, new_step: AskedStep, held_out: HeldOut, folder: Path
) -> tuple[Answered | None, str]:
    """The model before the training on the rows; or None, and why it cannot answer them.

    Its prompt is that of the training, with the labels named.
    """
    base = prepare_model(locate_model(config.model, config.runtime))
    step = new_step
    if isinstance(new_step, ClassifyStep):
        labels: list[str] | None = list(held_out.labels)
        template = new_step.prompt_template
        if base.has_head:
            if sorted(base.labels) != sorted(held_out.labels):
                return None, "its head has other labels"
            labels = None
        else:
            template = question_of(template, held_out.labels, several=new_step.multiple)
        asked = new_step.model_dump() | {"labels": labels, "prompt_template": template}
        if not base.has_head:
            asked["chat"] = None  # as the base is asked best
        # The question behind the text must not cost the text its end.
        asked["max_input_tokens"] = None
        try:
            step = ClassifyStep.model_validate(asked)
        except ValidationError as error:
            return None, error.errors()[0]["msg"].removeprefix("Value error, ")
    try:
        return evaluate(config.model, step, held_out, config.runtime, folder), ""
    except InputError as error:  # such as a head that was trained with another prompt
        if not base.has_head:
            raise
        return None, str(error)


def _compared(
    metric: str,
    held_out: HeldOut,
    ours: Answered,
    rivals: Mapping[Rival, Answered | Baseline | None],
) -> Iterator[Comparison]:
    """The run beside the same answer for all and beside each of `rivals`, by what decides."""
    compared: list[tuple[Rival, str, Sequence[Answer]]] = []
    if not isinstance(ours.scores, TextScores):
        constant = same_for_all(ours.scores, metric)
        shown = repr(constant) if isinstance(constant, str) else some_of(constant)
        always = f"always answering {shown}"
        compared.append(("constant", always, [constant] * len(held_out.rows)))
    for rival, answered in rivals.items():
        if answered is not None:
            name = answered.name if isinstance(answered, Baseline) else RIVALS[rival]
            compared.append((rival, name, answered.answers))
    truth: list[Answer] = []
    for row in held_out.rows:
        truth.append(row.label if row.several is None else row.several)
    group_R = groups_of([row.same for row in held_out.rows])
    for rival, name, theirs in compared:
        test = compare_answers(metric, truth, ours.answers, theirs, group_R)
        yield Comparison(rival=rival, name=name, test=test)


def evaluate(
    model: ModelConfig,
    step: AskedStep,
    held_out: HeldOut,
    runtime: RuntimeConfig,
    folder: Path,
) -> Answered:
    """The answers of `model` to the held-out rows, and their scores.

    The job's files are in `folder`, which is deleted at the end.
    """
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed evaluation
    folder.mkdir(parents=True)
    columns = {}
    for name in placeholders(step.prompt_template):
        columns[name] = [row.values.get(name) for row in held_out.rows]
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    job = JobConfig(
        data=DataConfig(input=str(folder / "rows.parquet"), output=str(folder / "answers")),
        model=model,
        steps=[step],
        max_error_rate=1.0,  # a row without an answer counts as wrong
        runtime=RuntimeConfig(device=runtime.device, max_batch_tokens=runtime.max_batch_tokens),
    )
    run_job(job)
    table = _read_answers(folder / "answers", step)
    shutil.rmtree(folder)  # because it has held-out texts
    if isinstance(step, ClassifyStep) and step.multiple:
        return _score_selections(held_out, table)
    answers = [answer or "" for answer in table.column(STEP).to_pylist()]
    confidence = [0.0] * len(answers)
    if isinstance(step, ClassifyStep):
        confidence = [value or 0.0 for value in table.column(Columns(STEP).score).to_pylist()]
    mistakes = _mistakes(held_out.rows, answers, confidence)
    truth = [row.label for row in held_out.rows]
    if isinstance(step, GenerateStep):
        return Answered(score_texts(truth, answers), answers, mistakes)
    scores = score(truth, answers, held_out.labels, confidence)
    return Answered(scores, answers, mistakes)


def _read_answers(folder: Path, step: AskedStep) -> pa.Table:
    """The answers of `step` in row order, with their probabilities."""
    columns = Columns(STEP)
    names = [columns.answer]
    if isinstance(step, ClassifyStep):
        names += [columns.score, columns.scores]
    tables = [pq.read_table(file, columns=names) for file in sorted(folder.glob("*-*.parquet"))]
    return pa.concat_tables(tables)


def _score_selections(held_out: HeldOut, table: pa.Table) -> Answered:
    """Answers with several labels; a row without one has none."""
    columns = Columns(STEP)
    selected = [labels or [] for labels in table.column(columns.answer).to_pylist()]
    probabilities = [scores or {} for scores in table.column(columns.scores).to_pylist()]
    truth = [row.names for row in held_out.rows]
    confidence = [value or 0.0 for value in table.column(columns.score).to_pylist()]
    answers = [", ".join(sorted(labels)) for labels in selected]
    mistakes = _mistakes(held_out.rows, answers, confidence)
    scores = score_selections(truth, selected, held_out.labels, probabilities)
    return Answered(scores, selected, mistakes)


def _kind(step: AskedStep) -> tuple[type, bool]:
    return type(step), isinstance(step, ClassifyStep) and step.multiple


def _mistakes(
    rows: Sequence[Example], answers: Sequence[str], confidence: Sequence[float]
) -> list[Mistake]:
    mistakes = []
    for row, answer, probability in zip(rows, answers, confidence, strict=True):
        if answer.strip() == row.label.strip():
            continue
        mistakes.append(
            Mistake(
                place=row.place,
                text=row.text[:MISTAKE_CHARACTERS],
                label=row.label,
                predicted=answer,
                confidence=probability,
            )
        )
    return sorted(mistakes, key=lambda mistake: -mistake.confidence)


def _shown(mistakes: Sequence[Mistake], *, by_pair: bool) -> list[Mistake]:
    """The most confident of `mistakes`, and `by_pair` also those of each confusion; same order."""
    pairs: Counter[tuple[str, str]] = Counter()
    kept = []
    for number, mistake in enumerate(mistakes):
        pair = (mistake.label, mistake.predicted)
        known = pair in pairs or len(pairs) < MOST_CONFUSED
        if number < MISTAKES_KEPT or (by_pair and known and pairs[pair] < EXAMPLES_KEPT):
            kept.append(mistake)
            pairs[pair] += 1
    return kept
