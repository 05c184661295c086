"""Read this first: a fine-tuning from labelled rows to a promoted checkpoint, in plain calls.

    OUTPUT/runs/<id>/checkpoint/   the new classifier, in the published layout       adapter/   with LoRA
    OUTPUT/runs/<id>/report.html   what a person reads; report.json and checkpoint/README.md say the same
    OUTPUT/runs/<id>/trainer/      where a killed training goes on from
    OUTPUT/current -> runs/<id>    the promoted run; a job's model is OUTPUT/current/checkpoint

A run's id comes from its settings, rows and base, so running it again goes on, or finds it done.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from glmbatch.errors import InputError
from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from glmbatch.run.fetching import PROMPT_FILE
from glmbatch.run.models import locate_model, prepare_model
from glmbatch.settings.job import (
    ClassifyStep,
    DataConfig,
    GenerateStep,
    JobConfig,
    ModelConfig,
    RuntimeConfig,
)
from glmbatch.settings.tuning import LabelledData, TuneConfig
from glmbatch.steps.prompt import Prompt, build_prompts
from glmbatch.store.files import committed, writable
from glmbatch.tuning.examples import (
    Example,
    LabelAudit,
    Labelled,
    Part,
    read_labelled,
    read_rows_of,
    text_keys,
)
from glmbatch.tuning.processes import local_rank, train_together
from glmbatch.tuning.scores import Scores, TextScores, score, score_texts

RUNS, CURRENT, REPORT, PAGE, CARD, BASE = (
    "runs",
    "current",
    "report.json",
    "report.html",
    "README.md",
    "base",
)
TRAINED = "trained.json"
LEARNED = "learned.npy"  # which texts were seen in training, so that no later run tests on them
CHECKPOINT = "checkpoint"
STEP = "predicted"
MISTAKES = 20


class Mistake(BaseModel, frozen=True, extra="forbid"):
    """A held-out row that was answered wrongly, and how sure the model was."""

    place: str
    text: str
    label: str
    predicted: str
    confidence: float


class Report(BaseModel, frozen=True, extra="forbid"):
    """What a run made, how good it is, and whether it was promoted; `reason` says why or why not.

    `baseline` is of classifiers alone. `current` are the scores of the checkpoint that was promoted before, the run
    `compared_with`, over the same rows.
    """

    run: str
    checkpoint: str
    labels: tuple[str, ...]
    settings: dict[str, Any]
    base: str
    audit: LabelAudit
    training: dict[str, Any]
    scores: Scores | TextScores
    mistakes: tuple[Mistake, ...]
    baseline_name: str
    baseline: Scores | None
    current: Scores | TextScores | None
    compared_with: str | None
    promoted: bool
    reason: str
    versions: dict[str, str]


def finetune(config: TuneConfig) -> Report:
    """Train, evaluate and promote; the report. InputError when the rows or the settings cannot be trained on."""
    run = begin(config)
    train_run(config, run)
    return promote(config, evaluate_run(config, run))


def check(config: TuneConfig) -> None:
    """Tell what is wrong at once, before a server is started: rows, labels and model are looked at. InputError."""
    for package in ("accelerate", "peft", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"{package} is not installed, which training needs. Run pip install 'glmbatch[train]'."
            )
    read_labelled(config.data)
    if config.model is not None and config.model.revision is None:
        locate_model(config.model, config.runtime)


def begin(config: TuneConfig) -> str:
    """The folder of this run, with its base in it or named by the settings; the same one for the same run."""
    labelled = read_labelled(config.data)
    base = (
        "scratch"
        if config.model is None
        else prepare_model(locate_model(config.model, config.runtime)).identity
    )
    stated = config.model_dump(mode="json", exclude={"output", "runtime", "min_gain"})
    facts = [stated, dict(labelled.audit.files), base]
    run = (
        Path(config.output)
        / RUNS
        / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    )
    with writable(run):
        run.mkdir(parents=True, exist_ok=True)
    if config.model is None and not (run / BASE / "config.json").exists():
        from glmbatch.tuning.scratch import make_base

        shutil.rmtree(run / BASE, ignore_errors=True)
        texts = [each.text for each in labelled.parts["train"]]
        texts += [each.label for each in labelled.parts["train"]] if config.writes else []
        make_base(run / BASE, texts, config.scratch, config.training.seed)
    return str(run)


def read_report(run: Path) -> Report | None:
    """The report of a run that came to its end."""
    path = run / REPORT
    try:
        return Report.model_validate_json(path.read_bytes()) if path.is_file() else None
    except ValidationError as error:
        raise InputError(
            f"{path}: is not a report of glmbatch: {error.errors()[0]['msg']}. Remove it."
        ) from error


def train_run(config: TuneConfig, folder: str) -> dict[str, Any]:
    """Train, or find trained; what training did."""
    run = Path(folder)
    done = run / TRAINED
    if not done.is_file():
        if config.training.processes > 1:
            train_together(config, run)
        else:
            train_here(config, run)
    shutil.rmtree(run / "trainer", ignore_errors=True)
    found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return found


def train_here(config: TuneConfig, run: Path) -> None:
    """Train in this process, alone or as one of several, of which the first writes the result."""
    from glmbatch.tuning.train import TrainingRow, train

    labelled, base = read_labelled(config.data), _base(config, run)
    tokenizer = load_tokenizer(base)
    number = {label: at for at, label in enumerate(labelled.labels)}
    rows: dict[Part, list[TrainingRow]] = {}
    for part in ("train", "valid"):
        examples = labelled.parts[part]
        prompts, answers = (
            _prompts(config, base, tokenizer, examples),
            _answers(config, tokenizer, examples),
        )
        rows[part] = [
            TrainingRow(
                np.array(prompt.ids, np.int32), number.get(each.label, 0), each.place, answer
            )
            for each, prompt, answer in zip(examples, prompts, answers, strict=True)
        ]
    if config.model is not None:  # an adapter too may lie in a store
        located = locate_model(config.model, config.runtime)
        found = config.model.model_copy(update={"path": located.path, "adapter": located.adapter})
        config = config.model_copy(update={"model": found})
    trained = train(config, base, labelled.labels, rows["train"], rows["valid"], run)
    if local_rank() > 0:
        return
    with committed(run / CHECKPOINT / PROMPT_FILE) as partial:
        stated = {"prompt_template": config.prompt_template, "system_prompt": config.system_prompt}
        partial.write_text(json.dumps(stated, ensure_ascii=False, indent=1), encoding="utf-8")
    np.save(
        run / LEARNED, np.unique(text_keys([*labelled.parts["train"], *labelled.parts["valid"]]))
    )
    with committed(run / TRAINED) as partial:
        partial.write_text(trained.model_dump_json(indent=1), encoding="utf-8")


def _base(config: TuneConfig, run: Path) -> Path:
    return (
        run / BASE
        if config.model is None
        else Path(locate_model(config.model, config.runtime).path)
    )


def _step(config: TuneConfig) -> ClassifyStep | GenerateStep:
    """The step as the job that uses the model asks it."""
    asked: dict[str, Any] = {
        "name": STEP,
        "prompt_template": config.prompt_template,
        "system_prompt": config.system_prompt,
        "max_input_tokens": config.training.max_input_tokens,
        "on_too_long": "truncate",
    }
    if config.writes:
        return GenerateStep(**asked, max_tokens=config.training.max_answer_tokens)
    return ClassifyStep(**asked)


def _answers(
    config: TuneConfig, tokenizer: Tokenizer, examples: Sequence[Example]
) -> list[np.ndarray]:
    """The ids to be written to each example, as the published model's own fine-tuning has them; none for labels."""
    if not config.writes:
        return [np.empty(0, np.int32)] * len(examples)
    most = config.training.max_answer_tokens
    encoded = tokenizer.encode_plain([each.label for each in examples])
    return [np.array([*ids, tokenizer.eos_id][:most], np.int32) for ids in encoded]


def _prompts(
    config: TuneConfig, base: Path, tokenizer: Tokenizer, examples: Sequence[Example]
) -> list[Prompt]:
    from glmbatch.glm.checkpoint.load import read_checkpoint

    room = read_checkpoint(base).architecture.max_positions
    built = build_prompts(
        _step(config),
        [{"text": each.text} for each in examples],
        tokenizer,
        chat=config.writes,
        max_input_tokens=min(
            room - (config.training.max_answer_tokens if config.writes else 0),
            config.training.max_input_tokens,
        ),
    )
    for each, prompt in zip(examples, built, strict=True):
        if not isinstance(prompt, Prompt):
            raise InputError(
                f"{each.place}: has no prompt: {prompt.reason}. Set training.max_input_tokens."
            )
    return [prompt for prompt in built if isinstance(prompt, Prompt)]


def evaluate_run(config: TuneConfig, folder: str) -> Report:
    """Score the run's checkpoint, the one promoted before and the baseline on the test rows, and write the report.

    A run that was promoted, or has been evaluated beside the same current checkpoint, is not evaluated again.
    """
    from glmbatch.tuning.baseline import score_baseline
    from glmbatch.tuning.report import versions

    run, current = Path(folder), _current(config)
    done = read_report(run)
    if done is not None and current == run.resolve():
        return done
    if done is not None and done.compared_with == (current and current.name):
        return _decided(config, done, run)
    labelled = _not_learned(read_labelled(config.data), current, config)
    trained, test = train_run(config, folder), labelled.parts["test"]
    scores, mistakes = evaluate(
        ModelConfig(path=str(run / CHECKPOINT)), config, test, labelled.labels, run / "test"
    )
    baseline_name, baseline = "none", None
    if not config.writes:
        baseline_name, baseline = score_baseline(labelled.parts, labelled.labels)
    report = Report(
        run=run.name,
        checkpoint=str(run / CHECKPOINT),
        labels=labelled.labels,
        settings=config.model_dump(mode="json"),
        base="random weights" if config.model is None else config.model.path,
        audit=labelled.audit,
        training=trained,
        scores=scores,
        mistakes=tuple(mistakes[:MISTAKES]),
        baseline_name=baseline_name,
        baseline=baseline,
        current=_score_current(config, labelled, run),
        compared_with=current and current.name,
        promoted=False,
        reason="",
        versions=versions(),
    )
    return _decided(config, report, run)


def evaluate(
    model: ModelConfig,
    config: TuneConfig,
    rows: Sequence[Example],
    labels: Sequence[str],
    folder: Path,
) -> tuple[Scores | TextScores, list[Mistake]]:
    """Scores of `model` on `rows`, and its mistakes, the surest first: by the very job that will use it."""
    from glmbatch.run.job import run_job

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": [each.text for each in rows]}), folder / "rows.parquet")
    job = JobConfig(
        data=DataConfig(input=str(folder / "rows.parquet"), output=str(folder / "answers")),
        model=model,
        steps=[_step(config)],
        max_error_rate=1.0,
        runtime=RuntimeConfig(
            device=config.runtime.device, max_batch_tokens=config.runtime.max_batch_tokens
        ),
    )
    run_job(job)
    files = sorted((folder / "answers").glob("*-*.parquet"))
    columns = [STEP] if config.writes else [STEP, f"{STEP}_score"]
    answered = pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
    predicted = [label or "" for label in answered.column(STEP).to_pylist()]
    confidence = (
        [value or 0.0 for value in answered.column(columns[-1]).to_pylist()]
        if not config.writes
        else []
    )
    mistakes = [
        Mistake(
            place=each.place,
            text=each.text[:500],
            label=each.label,
            predicted=guess,
            confidence=sure,
        )
        for each, guess, sure in zip(rows, predicted, confidence or [0.0] * len(rows), strict=True)
        if guess.strip() != each.label.strip()
    ]
    truth = [each.label for each in rows]
    scores = (
        score_texts(truth, predicted)
        if config.writes
        else score(truth, predicted, labels, confidence)
    )
    shutil.rmtree(folder)  # held-out texts
    return scores, sorted(mistakes, key=lambda mistake: -mistake.confidence)


def _current(config: TuneConfig) -> Path | None:
    current = Path(config.output) / CURRENT
    return current.resolve() if current.exists() else None


def _not_learned(labelled: Labelled, current: Path | None, config: TuneConfig) -> Labelled:
    """`labelled` less the test rows that the current checkpoint was trained on: of another seed, split or input."""
    if current is None or not (current / LEARNED).is_file():
        return labelled
    test = labelled.parts["test"]
    seen = np.isin(text_keys(test), np.load(current / LEARNED))
    left = [each for each, known in zip(test, seen, strict=True) if not known]
    if not left:
        raise InputError(
            f"{config.data.input}: {current} was trained on all test rows. Set data.seed as it had, or output."
        )
    if len(left) == len(test):
        return labelled
    warning = f"{len(test) - len(left)} test rows were left out: the current checkpoint was trained on their texts"
    audit = labelled.audit.model_copy(update={"warnings": (*labelled.audit.warnings, warning)})
    return Labelled({**labelled.parts, "test": left}, audit)


def _score_current(config: TuneConfig, labelled: Labelled, run: Path) -> Scores | TextScores | None:
    """Scores of what is promoted now, over this run's test rows; None where nothing is."""
    current = _current(config)
    if current is None:
        return None
    before = read_report(current)
    if before is None:
        raise InputError(
            f"{current}: has no {REPORT}, so nothing can be compared with it. Set output."
        )
    settings = TuneConfig.model_validate(before.settings).model_copy(
        update={"runtime": config.runtime}
    )
    if settings.writes != config.writes:
        raise InputError(
            f"{current}: is a model of another kind, so nothing can be compared with it. Set output."
        )
    labels = sorted({*labelled.labels, *before.labels})
    model = ModelConfig(path=str(current / CHECKPOINT))
    return evaluate(model, settings, labelled.parts["test"], labels, run / "current")[0]


def _decided(config: TuneConfig, report: Report, run: Path) -> Report:
    """The report with what becomes of its checkpoint, written."""
    from glmbatch.tuning.report import write_report

    promoted, reason = _decide(config, report)
    report = report.model_copy(update={"promoted": promoted, "reason": reason})
    write_report(report, run)
    return report


def _decide(config: TuneConfig, report: Report) -> tuple[bool, str]:
    new = getattr(report.scores, config.promoted_by)
    if report.current is None and isinstance(report.scores, TextScores):
        return new > 0, f"{config.promoted_by} {new:.4f}; nothing was promoted before"
    if report.current is None and isinstance(report.scores, Scores):
        counts = {label: one.rows for label, one in report.scores.labels.items()}
        always = max(counts, key=lambda label: counts[label])
        truth = [label for label, count in counts.items() for _ in range(count)]
        floor = getattr(score(truth, [always] * len(truth), list(counts)), config.promoted_by)
        said = f"{config.promoted_by} {new:.4f}, always {always!r} would have {floor:.4f}; nothing was promoted before"
        return new > floor, said
    lacking = (
        sorted(set(report.current.labels) - set(report.labels))
        if isinstance(report.current, Scores)
        else []
    )
    if lacking:
        return (
            False,
            f"it lacks the labels {lacking}, which the current checkpoint has. Set output to begin anew",
        )
    old = getattr(report.current, config.promoted_by)
    better = new > old and new - old >= config.min_gain
    said = f"{config.promoted_by} {new:.4f}, the current checkpoint has {old:.4f} on the same rows"
    return better, said if better else f"{said}; it must be better by {config.min_gain:g} at least"


def promote(config: TuneConfig, report: Report) -> Report:
    """Make OUTPUT/current the run of `report` if that is to be promoted; by one rename, so a reader finds either.

    What was promoted since the run was evaluated is compared with first.
    """
    output = Path(config.output)
    with _alone(output):
        current = _current(config)
        if (current and current.name) not in (report.compared_with, report.run):
            report = evaluate_run(config, str(output / RUNS / report.run))
        if report.promoted:
            link = output / f".{CURRENT}"
            with writable(output / CURRENT):
                link.unlink(missing_ok=True)
                link.symlink_to(Path(RUNS) / report.run)
                os.replace(link, output / CURRENT)
    return report


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """One promotion at a time; the system frees the lock of a process that dies."""
    with (output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def evaluate_rows(
    model: str,
    data: LabelledData,
    prompt_template: str | None = None,
    runtime: RuntimeConfig | None = None,
) -> Scores | TextScores:
    """Scores of the checkpoint in directory `model` on all rows of `data`: its head's labels, and those that it lacks.

    Without a `prompt_template` prompts are made as the run did that made it, if its report lies beside it.
    """
    runtime = runtime or RuntimeConfig()
    prepared = prepare_model(locate_model(ModelConfig(path=model), runtime))
    if not prepared.has_head:
        raise InputError(
            f"{model}: has no trained head. Give a checkpoint that `glmbatch train` made."
        )
    report = read_report(Path(model).resolve().parent)
    config = TuneConfig(data=data, output=".", model=ModelConfig(path=model))
    if report is not None:
        config = TuneConfig.model_validate(report.settings)
    changed = {} if prompt_template is None else {"prompt_template": prompt_template}
    config = TuneConfig.model_validate(
        config.model_dump() | changed | {"runtime": runtime.model_dump()}
    )
    rows = read_rows_of(data).examples
    labels = sorted({*prepared.labels, *(each.label for each in rows)})
    with tempfile.TemporaryDirectory() as folder:
        return evaluate(ModelConfig(path=model), config, rows, labels, Path(folder))[0]


def describe(report: Report) -> str:
    """The report as text for a person."""
    from glmbatch.tuning.report import compared

    lines = [
        f"{report.audit.rows} rows, {len(report.labels) or 'no'} labels: {report.audit.parts}",
        *(f"  look at: {warning}" for warning in report.audit.warnings),
        f"{report.training['steps']} steps from {report.base}, best at {report.training['best_step']}",
        *compared(report),
        *([f"look at: {report.baseline_name} scores higher"] if _loses(report) else []),
        f"{'promoted' if report.promoted else 'not promoted'}: {report.reason}",
        f"report: {Path(report.checkpoint).parent / PAGE}",
        f"checkpoint: {report.checkpoint}",
    ]
    return "\n".join(lines)


def _loses(report: Report) -> bool:
    ours, theirs = report.scores, report.baseline
    return isinstance(ours, Scores) and theirs is not None and theirs.accuracy > ours.accuracy
