"""Steps about one text are asked together, and answer as the steps asked one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import InputError
from glmbatch.glm.engine.protocol import ClassifyRequest, ClassifyResult, GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.run import answer, job
from glmbatch.run.canary import freeze
from glmbatch.run.session import session_of
from tests.support import (
    CLASSIFIER,
    CLASSIFY,
    GENERATE,
    SAMPLE_MODEL,
    Settings,
    Write,
    rows_of,
    run,
)

TEXTS = [
    f"The {thing} came late and was {state}."
    for thing in ("box", "lamp", "chair")
    for state in ("broken", "fine", "too small", "as good as new")
]
STEPS: list[dict[str, Any]] = [
    {"kind": "classify", "name": "mood", "labels": ["good", "bad", "so so"]},
    {
        "kind": "classify",
        "name": "late",
        "labels": ["yes", "no"],
        "prompt_template": "{text}\nWas it late?",
    },
    {
        "kind": "classify",
        "name": "thing",
        "labels": ["box", "lamp"],
        "prompt_template": "{text}\nWhich thing is it?",
    },
    {
        "kind": "classify",
        "name": "first",
        "labels": ["a", "b"],
        "prompt_template": "Which letter? {text}",
    },
    {
        "kind": "classify",
        "name": "odd",
        "labels": ["x", "y"],
        "prompt_template": "{text} ({number})",
    },
]


@pytest.fixture
def source(write_source: Write) -> Path:
    numbers = [str(place % 3) for place in range(len(TEXTS))]
    numbers[2] = None  # type: ignore[call-overload]
    return write_source("a.parquet", {"text": TEXTS, "number": numbers})


@pytest.fixture
def job_settings(job_settings: Settings) -> Settings:
    """Settings of a job with one fragment and a trained model."""

    def with_changes(**changes: Any) -> dict[str, Any]:
        defaults = {"data__rows_per_fragment": 100, "model__path": str(SAMPLE_MODEL)}
        return job_settings(**defaults | changes)

    return with_changes


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of questions in each request to the engine."""
    sizes: list[int] = []
    plain = TorchEngine.classify

    def classify(engine: TorchEngine, requests: Any) -> Any:
        def counted() -> Iterator[ClassifyRequest]:
            for request in requests:
                sizes.append(1 + len(request.beside))
                yield request

        return plain(engine, counted())

    monkeypatch.setattr(TorchEngine, "classify", classify)
    return sizes


def test_a_question_under_two_names_is_asked_once(
    job_settings: Settings, source: Path, asked: list[int]
) -> None:
    steps = [STEPS[1], {**STEPS[1], "name": "again"}, STEPS[2]]
    summary = run(job_settings(steps=steps))
    assert [step.computed for step in summary.steps] == [len(TEXTS), 0, len(TEXTS)]
    assert asked == [2] * len(TEXTS)


def one_by_one(
    settings: Settings, folder: Path, steps: list[dict[str, Any]], **changes: Any
) -> list[dict[str, Any]]:
    """The rows of a run for each step alone, joined."""
    joined: list[dict[str, Any]] = [{} for _ in TEXTS]
    for step in steps:
        output = folder / step["name"]
        run(settings(steps=[step], data__output=str(output), **changes))
        for row, answers in zip(joined, rows_of(output), strict=True):
            row.update(answers)
    return joined


def assert_same(
    rows: list[dict[str, Any]], others: list[dict[str, Any]], tolerance: float = 2e-5
) -> None:
    """The same values in all columns, and scores within what float32 rounds off in any order."""
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if isinstance(value, float | dict):
                assert value == pytest.approx(other[name], abs=tolerance, rel=0)
            else:
                assert value == other[name], name


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("head", [False, True])
def test_steps_together_answer_as_one_by_one(
    job_settings: Settings, out: Path, tmp_path: Path, asked: list[int], head: bool
) -> None:
    changes = {"model__path": str(CLASSIFIER)} if head else {}
    steps = [{**step, "labels": None} for step in STEPS] if head else STEPS
    summary = run(job_settings(steps=steps, **changes))
    assert asked == [5, 5, 4, *[5] * 9]  # a row lacks its number
    alone = one_by_one(job_settings, tmp_path / "alone", steps, **changes)
    assert_same(rows_of(out), alone)
    assert [step.computed for step in summary.steps] == [12, 12, 12, 12, 11]
    assert all(step.rows_per_second for step in summary.steps)


WRITERS: list[dict[str, Any]] = [
    {**GENERATE, "prompt_template": "{text} {text} {text}\nReply.", "confidence": True},
    {
        **GENERATE,
        "name": "wish",
        "prompt_template": "{text} {text} {text}\nWhat is the wish?",
        "max_tokens": 9,
        "stop": ["."],
    },
    {
        **GENERATE,
        "name": "topic",
        "prompt_template": "{text} {text} {text} ({number})",
        "temperature": 1.0,
        "n": 3,
    },
    {**GENERATE, "name": "other", "prompt_template": "Reply: {text}", "chat": False},
]


@pytest.mark.usefixtures("source")
def test_texts_generated_together_are_as_one_by_one(
    job_settings: Settings, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = TorchEngine.generate

    def generate(engine: TorchEngine, requests: Any) -> Any:
        def counted() -> Iterator[GenerateRequest]:
            for request in requests:
                asked.append(1 + len(request.beside))
                yield request

        return plain(engine, counted())

    monkeypatch.setattr(TorchEngine, "generate", generate)
    summary = run(job_settings(steps=WRITERS, runtime__max_slots=5))
    assert asked == [6, 6, 3, *[6] * 9]  # a row lacks its number
    alone = one_by_one(job_settings, tmp_path / "alone", WRITERS)
    assert_same(rows_of(out), alone, 1e-5)
    assert [step.computed for step in summary.steps] == [12, 12, 11, 12]


@pytest.mark.usefixtures("source")
def test_known_answers_are_not_asked_beside_new_ones(
    job_settings: Settings, out: Path, tmp_path: Path, asked: list[int]
) -> None:
    run(job_settings(steps=STEPS[1:3]))
    assert asked == [2] * len(TEXTS)
    asked.clear()
    run(job_settings(steps=STEPS))
    assert asked == [3, 3, 2, *[3] * 9]
    assert_same(rows_of(out), one_by_one(job_settings, tmp_path / "alone", STEPS))


@pytest.mark.usefixtures("source")
def test_a_step_that_uses_an_answer_waits_for_it(
    job_settings: Settings, asked: list[int], out: Path
) -> None:
    later = {
        "kind": "classify",
        "name": "later",
        "labels": ["x", "y"],
        "prompt_template": "{text}\n{mood}?",
    }
    last = {
        "kind": "classify",
        "name": "last",
        "labels": ["x", "y"],
        "prompt_template": "{text}\n{reply}?",
    }
    generate = {**GENERATE, "prompt_template": "{text}"}
    run(job_settings(steps=[CLASSIFY, later, STEPS[1], generate, last]))
    assert asked == [2] * 12 + [1] * 24
    assert all(row["later"] and row["last"] and row["late"] for row in rows_of(out))


@pytest.mark.usefixtures("source")
def test_a_question_that_fails_fails_alone(
    job_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TorchEngine.classify

    def classify(engine: TorchEngine, requests: Any) -> Any:
        for result in plain(engine, requests):
            failed = ClassifyResult(result.index, (), "not finite")
            yield failed if result.index == 1 else result

    with monkeypatch.context() as failing:
        failing.setattr(TorchEngine, "classify", classify)
        run(job_settings(steps=STEPS[:3], max_error_rate=1))
    first, *rows = rows_of(out)
    assert (first["late"], first["late_error"]) == (None, "not finite")
    assert first["mood"]
    assert first["thing"]
    assert not any(row["late_error"] for row in rows)


@pytest.mark.usefixtures("source")
def test_a_run_killed_between_commits_asks_the_rest(
    job_settings: Settings, out: Path, tmp_path: Path, asked: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as killed:
        commit = answer._commit

        def kill(reading: Any, *arguments: Any) -> Any:
            if reading.assignment.question.name == "thing":
                raise KeyboardInterrupt
            return commit(reading, *arguments)

        killed.setattr(answer, "_commit", kill)
        with pytest.raises(KeyboardInterrupt):
            run(job_settings(steps=STEPS))
    asked.clear()
    run(job_settings(steps=STEPS))
    assert asked == [3, 3, 2, *[3] * 9]
    assert_same(rows_of(out), one_by_one(job_settings, tmp_path / "alone", STEPS))


@pytest.mark.usefixtures("source")
def test_a_bad_row_of_a_question_stops_a_strict_run(
    job_settings: Settings, asked: list[int]
) -> None:
    with pytest.raises(InputError, match="row 2, step 'odd': number is null"):
        run(job_settings(steps=STEPS, on_error="raise"))
    assert not asked


@pytest.mark.usefixtures("source")
def test_progress_counts_each_row_of_each_step_once(
    job_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    publish = job.publish  # type: ignore[attr-defined]

    def look(*arguments: Any) -> Any:
        seen.append(session_of(arguments[1].context).progress.snapshot())
        return publish(*arguments)

    monkeypatch.setattr(job, "publish", look)
    run(job_settings(steps=STEPS))
    (snapshot,) = seen
    assert (snapshot.done, snapshot.total) == (60, 60)


TOPICS: dict[str, Any] = {
    "kind": "classify",
    "name": "topics",
    "labels": ["late", "broken", "too small"],
    "prompt_template": "{text}\nWhat is said?",
    "multiple": True,
    "threshold": {"broken": 1e-9},  # nothing taught the sample such verdicts
}


@pytest.mark.usefixtures("source")
def test_several_labels_are_judged_as_each_alone(
    job_settings: Settings, out: Path, tmp_path: Path, asked: list[int]
) -> None:
    alone: list[dict[str, Any]] = []
    for place, label in enumerate(TOPICS["labels"]):
        verdicts = [f"{label}: yes", f"{label}: no"]
        step = {**STEPS[0], "name": f"alone{place}", "labels": verdicts}
        alone.append({**step, "prompt_template": TOPICS["prompt_template"]})
    later = {**GENERATE, "prompt_template": "{topics}: {text}"}
    summary = run(job_settings(steps=[TOPICS, *alone, later]))
    assert asked == [4] * len(TEXTS)
    rows = rows_of(out)
    for row in rows:
        for place, label in enumerate(TOPICS["labels"]):
            single = row[f"alone{place}_scores"][f"{label}: yes"]
            assert row["topics_scores"][label] == pytest.approx(single, abs=0, rel=1e-4)
            chosen = row["topics_scores"][label] >= (1e-9 if label == "broken" else 0.5)
            assert (label in row["topics"]) == chosen
        assert row["reply"] is not None
    counted = {label: sum(label in row["topics"] for row in rows) for label in TOPICS["labels"]}
    assert summary.steps[0].labels == counted
    assert sum(counted.values()) > 0


def test_a_canary_sees_that_several_labels_stay(
    job_settings: Settings, write_source: Write, out: Path, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": TEXTS[:6]})
    run(job_settings(steps=[TOPICS]))
    frozen = tmp_path / "canary.parquet"
    assert freeze(out, frozen, 6) == 6
    write_source("b.parquet", {"text": TEXTS[6:]})
    summary = run(job_settings(steps=[TOPICS], canary={"file": str(frozen)}))
    assert summary.rows == 12


def test_a_canary_shows_later_prompts_what_a_run_does(
    job_settings: Settings, write_source: Write, out: Path, tmp_path: Path
) -> None:
    fields = {"tone": {"choices": ["good", "bad"]}, "day": "date"}
    facts = {"kind": "extract", "name": "facts", "layout": "struct", "fields": fields}
    later = {**GENERATE, "prompt_template": "{topics}, {facts}: {text}"}
    settings = job_settings(steps=[TOPICS, {**facts, "max_tokens": 40}, later])
    write_source("a.parquet", {"text": TEXTS[:3]})
    run(settings)
    settings["canary"] = str(tmp_path / "canary.parquet")
    assert freeze(out, settings["canary"], 3) == 3
    settings["data"]["output"] = str(tmp_path / "again")
    audits = run(settings).audits
    assert [(audit.step, audit.measured) for audit in audits] == [
        ("topics", 0),
        ("facts", 0),
        ("reply", 0),
    ]


@pytest.mark.usefixtures("source")
def test_means_are_an_answer_of_their_own(job_settings: Settings, out: Path) -> None:
    labels = ["good", "not what was ordered"]
    by_sum = {**STEPS[0], "labels": labels}
    by_mean = {**by_sum, "name": "mean", "compare": "mean"}
    summary = run(job_settings(steps=[by_sum, by_mean]))
    assert [step.computed for step in summary.steps] == [12, 12]
    for row in rows_of(out):
        long = labels[1]
        assert row["mean_scores"][long] > row["mood_scores"][long]


def test_priors_are_asked_once_and_divided_out(
    job_settings: Settings, write_source: Write, out: Path, asked: list[int]
) -> None:
    write_source("a.parquet", {"text": [*TEXTS, "N/A"], "number": ["N/A"] * 13})
    template = "{text}\nIs it good or bad? ({number})"
    by_sum = {**STEPS[0], "labels": ["good", "not what was ordered"], "prompt_template": template}
    by_prior = {**by_sum, "name": "prior", "compare": "prior"}
    run(job_settings(steps=[by_sum, by_prior], data__rows_per_fragment=5))
    assert sorted(asked) == [1, *[2] * 13]
    *rows, empty = rows_of(out)
    assert empty["prior_scores"]["good"] == pytest.approx(0.5, abs=1e-6)
    for row in rows:
        ratios = {}
        for label, share in row["mood_scores"].items():
            ratios[label] = share / empty["mood_scores"][label]
        total = sum(ratios.values())
        expected = {label: ratio / total for label, ratio in ratios.items()}
        assert row["prior_scores"] == pytest.approx(expected, abs=1e-6)


def test_a_prior_without_a_prompt_is_no_fault_of_the_rows(
    job_settings: Settings, write_source: Write, out: Path
) -> None:
    write_source("a.parquet", {"text": ["a"]})  # N/A has more tokens
    short = {"prompt_template": "{text}", "chat": False, "max_input_tokens": 3}
    step = {**STEPS[0], **short, "compare": "prior"}
    with pytest.raises(InputError, match=r"without a row's values.*5 tokens, 3 are allowed"):
        run(job_settings(steps=[step], max_error_rate=1.0))
    assert not list(out.glob("*.parquet"))


@pytest.mark.usefixtures("source")
def test_descriptions_of_labels_enter_the_prompt(
    job_settings: Settings,
) -> None:
    described = {"good": "praise, {really}", "bad": None}
    step = {**STEPS[0], "labels": described, "prompt_template": "{labels}\n\n{text}"}
    last = {**step, "name": "last", "prompt_template": "{text}"}
    run(job_settings(steps=[step, last]))
    spelled = {**STEPS[0], "labels": ["good", "bad"]}
    lines = "good: praise, {{really}}\nbad"
    plain = [
        {**spelled, "prompt_template": f"{lines}\n\n{{text}}"},
        {**spelled, "name": "last", "prompt_template": f"{{text}}\n\n{lines}"},
    ]
    summary = run(job_settings(steps=plain))
    assert [answers.computed for answers in summary.steps] == [0, 0]
