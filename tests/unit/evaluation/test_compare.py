"""Two jobs over the same rows: paired numbers, moved answers, and nothing asked twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.evaluation.compare import compare
from glmbatch.evaluation.differences import by_text, chance_of, moved, pair
from glmbatch.evaluation.evaluate import evaluate
from glmbatch.evaluation.results import Comparison, Cost
from tests.support import CLASSIFY, Settings

MOOD = {**CLASSIFY, "compare": "prior"}

REPLY = {"kind": "generate", "name": "reply", "prompt_template": "{mood}: {text}", "max_tokens": 4}
FACTS = {
    "kind": "extract",
    "name": "facts",
    "fields": {
        "tone": {"choices": ["warm", "cold"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5, "nullable": True},
    },
    "max_tokens": 30,
}


def test_the_exact_test_is_that_of_mcnemar() -> None:
    for better, worse in ((0, 0), (1, 0), (7, 3), (30, 12), (400, 351)):
        tosses = better + worse
        expected = binomtest(better, tosses).pvalue if tosses else 1.0
        p = min(1.0, 2 * chance_of(max(better, worse), tosses))
        assert p == pytest.approx(expected, rel=1e-9)


def test_rows_with_one_text_count_as_one() -> None:
    gains = np.array([1.0, 1.0, 1.0, -1.0, 1.0, -1.0])
    assert by_text(gains, np.array([0, 0, 0, 1, 2, 2])) == (1, 1)
    truth, a, b = ["x"] * 20, ["y"] * 20, ["x"] * 20
    assert pair("labels", truth, a, b, np.zeros(20, int)).p == 1.0
    assert pair("labels", truth, a, b, np.arange(20)).p < 1e-5


def test_numbers_differ_as_those_of_each_job_do() -> None:
    dice = np.random.default_rng(1)
    labels = np.array(["red", "green", "blue"])
    truth = labels[dice.integers(3, size=300)]
    a = np.where(dice.random(300) < 0.7, truth, labels[dice.integers(3, size=300)]).tolist()
    b = np.where(dice.random(300) < 0.9, truth, a).tolist()
    found = pair("labels", truth.tolist(), a, b, np.arange(300))
    expected = [f1_score(truth, answers, average="macro") for answers in (a, b)]
    numbers = found.numbers["macro_f1"]
    assert [numbers.a, numbers.b] == pytest.approx(expected)
    assert numbers.interval is not None and numbers.p is not None
    assert 0 < numbers.interval[0] < numbers.difference < numbers.interval[1]
    assert numbers.p < 0.01 and found.p < 0.01
    assert found.only_b - found.only_a == pytest.approx(300 * found.numbers["accuracy"].difference)
    # What both get wrong alike says nothing of the difference.
    same = pair("labels", truth.tolist(), a, a, np.arange(300)).numbers["macro_f1"]
    assert (same.interval, same.p) == ((0.0, 0.0), 1.0)


def test_every_kind_of_answer_has_its_numbers() -> None:
    group = np.arange(4)
    texts = pair("text", ["so it is"] * 4, ["so it was"] * 4, ["so it is"] * 4, group)
    assert texts.numbers["rouge_l"].b == 1 > texts.numbers["rouge_l"].a
    values = pair("value", [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 5.0], group)
    assert values.numbers["mean_absolute_error"].difference == -0.75
    items = pair("list", [["a", "b"]] * 4, [["a"]] * 4, [["b", "a"]] * 4, group)
    assert (items.only_b, items.numbers["f1"].b) == (4, 1.0)
    several = pair("several labels", [["a"]] * 4, [["a", "b"]] * 4, [["a"]] * 4, group)
    assert several.numbers["micro_precision"].difference == 0.5
    assert moved("text", ["a", None], ["a ", ""]).differ == 0
    shares = moved("labels", ["a", "a", "b"], ["a", "b", "b"])
    assert (shares.share, shares.labels["a"].moved, shares.moves) == (1 / 3, 0.5, {"a": {"b": 1}})


@pytest.fixture
def job(job_settings: Settings) -> dict[str, Any]:
    settings: dict[str, Any] = job_settings(steps=[MOOD, REPLY, FACTS], max_error_rate=0.5)
    return settings


@pytest.fixture
def file(rows: list[str | None], tmp_path: Path) -> str:
    path = tmp_path / "rows.parquet"
    texts = [*rows[:8], None]
    table = pa.table({"text": texts, "mood": ["bad"] * 9, "tone": ["warm"] * 9})
    pq.write_table(table, path)
    return str(path)


def changed(job: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The job with other settings of its first step."""
    return {**job, "steps": [{**job["steps"][0], **settings}, *job["steps"][1:]]}


def tokens(found: Comparison) -> list[tuple[int, int]]:
    return [(step.a.now, step.b.now) for step in found.steps]


@pytest.mark.slow
def test_only_a_changed_step_is_asked_and_once(
    job: dict[str, Any], file: str, tmp_path: Path
) -> None:
    other = changed(job, prompt_template="Is this good? {text}")
    first = compare(job, other, file, keep=tmp_path / "kept")
    mood, reply, facts = first.steps
    # The facts of both are the same, and so are replies with the same mood.
    assert (mood.a.now, mood.b.now, facts.a.now, facts.b.now) == (8, 8, 8, 0)
    differing = [row for row in first.differences if row.part == "mood"]
    assert reply.b.now == len(differing) == mood.parts["mood"].moved.differ > 0
    again = compare(job, other, file, keep=tmp_path / "kept")
    assert tokens(again) == [(0, 0)] * 3
    assert all(step.a.tokens_now == step.b.tokens_now == 0 for step in again.steps)
    assert again.steps[0].a.prompt_tokens == mood.a.prompt_tokens > 0
    assert again.differences == first.differences
    # Without a publication of that set of steps, its answers are found by their keys.
    alone = {**job, "steps": [job["steps"][0]]}
    assert tokens(
        compare(alone, {**other, "steps": other["steps"][:1]}, file, keep=tmp_path / "kept")
    ) == [(0, 0)]


@pytest.mark.slow
def test_the_cost_counts_whatever_asked_first(
    job: dict[str, Any], rows: list[str | None], tmp_path: Path
) -> None:
    alone = {**job, "steps": [MOOD]}
    other = changed(alone, prompt_template="Is this good? {text}")
    file, few = str(tmp_path / "rows.parquet"), str(tmp_path / "few.parquet")
    # A text twice, and one that no evaluation asks about.
    table = pa.table({"text": [*rows[:9], rows[0]], "mood": [*["bad"] * 8, None, "bad"]})
    tones = pa.array([*["warm"] * 8, None, "warm"])
    pq.write_table(table.append_column("tone", tones), file)
    pq.write_table(table.slice(0, 4), few)
    fresh = compare(alone, other, file, keep=tmp_path / "fresh").steps[0]
    assert (fresh.a.prompts, fresh.a.now, fresh.b.prompts) == (9, 9, 9)
    assert fresh.a.prompt_tokens == fresh.a.tokens_now

    def cost(b: dict[str, Any], rows: str) -> tuple[Cost, Cost]:
        step = compare(alone, b, rows, keep=tmp_path / "kept").steps[0]
        return step.a, step.b

    evaluate({**job, "steps": [MOOD, FACTS]}, file, keep=tmp_path / "kept")
    a, b = cost(other, file)
    assert (a.now, b.now, a.prompts, b.prompts) == (1, 9, 9, 9)
    assert (a.prompt_tokens, b.prompt_tokens) == (fresh.a.prompt_tokens, fresh.b.prompt_tokens)
    assert a.seconds > 0 and b.seconds > 0
    again = cost(other, file)
    assert [(job.now, job.prompts, job.prompt_tokens) for job in again] == [
        (0, 9, a.prompt_tokens),
        (0, 9, b.prompt_tokens),
    ]
    assert [job.seconds for job in again] == pytest.approx([a.seconds, b.seconds])
    # Some of the rows are a share of all, and what the other job asked is counted too.
    share, _ = cost(other, few)
    assert (share.now, share.prompts) == (0, 4)
    assert share.prompt_tokens == pytest.approx(a.prompt_tokens * 4 / 9, rel=0.1)
    both = cost({**job, "steps": [MOOD, FACTS]}, file)
    assert both[0] == both[1] and both[0].prompts == 9


@pytest.mark.slow
def test_rows_are_told_by_what_became_of_them(
    job: dict[str, Any], file: str, tmp_path: Path
) -> None:
    other = changed(job, prompt_template="Is this good? {text}", abstain_below=0.99)
    found = compare(job, other, file, keep=tmp_path / "kept")
    part = found.steps[0].parts["mood"]
    assert part.moved.rows + part.only_a == 8 and part.only_a > 0
    lost = [row for row in found.differences if row.part == "mood" and row.b is None]
    assert len(lost) == part.only_a and not any(row.right_b for row in lost)
    assert {row.truth for row in lost} == {"bad"}
    assert set(found.steps[2].parts) == {"tone", "stars"}
    assert found.steps[2].parts["tone"].paired is not None
    assert found.steps[2].parts["stars"].paired is None
    # A step that answers in another form, and one that only A has.
    other = changed(job, multiple=True, compare="sum")
    other["steps"] = [other["steps"][0], other["steps"][2]]
    found = compare(job, other, file, keep=tmp_path / "kept")
    assert found.only_in_a == ("reply",)
    assert found.steps[0].note is not None and not found.steps[0].parts
    # Steps that only one job has are not asked; this one would cost an answer for each row.
    longer = {**job, "steps": [*job["steps"], {**REPLY, "name": "more", "max_tokens": 3}]}
    assert compare(job, longer, file, keep=tmp_path / "kept").only_in_b == ("more",)
    found_now = evaluate(longer, file, truth={"more": "mood"}, keep=tmp_path / "kept")
    assert found_now.steps[-1].step == "more" and found_now.steps[-1].computed == 8
    other["steps"] = [{**CLASSIFY, "name": "other"}]
    with pytest.raises(InputError, match="no step of the same name"):
        compare(job, other, file, keep=tmp_path / "kept")


@pytest.mark.slow
def test_the_command_compares_a_job_with_its_changes(
    job: dict[str, Any], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**job, "steps": job["steps"][:1]}))
    where = ["--keep", str(tmp_path / "kept")]
    assert main(["compare", str(path), file, *where]) == 2
    assert "nothing to compare it with" in capsys.readouterr().err
    wide = "steps.0.prompt_template=Is this good? {text}"
    listed = tmp_path / "differences.parquet"
    command = ["compare", str(path), file, *where, "--set", wide, "--differences", str(listed)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("mood, compared with column mood\n")
    assert "McNemar p" in out and "8 of 9 answered by both" in out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"][0]["b"]["tokens_now"] == 0
    table = pq.read_table(listed).to_pylist()
    assert table == found["differences"] and len(table) > 0
    # Two files, without labels.
    second = tmp_path / "other.yaml"
    second.write_text(yaml.safe_dump({**changed(job, prompt_template="{text}")}))
    bare = tmp_path / "bare.parquet"
    pq.write_table(pq.read_table(file, columns=["text"]), bare)
    assert main(["compare", str(path), str(second), str(bare), *where]) == 0
    out = capsys.readouterr().out
    assert "McNemar" not in out and "moved" in out and "only B has: reply, facts" in out
