"""A run is promoted only if it surely beats what it must beat on the same rows."""

from __future__ import annotations

import html
import os
from pathlib import Path

import numpy as np
import pytest

from glmbatch.errors import InputError
from glmbatch.evaluation.paired import compare_answers
from glmbatch.tuning.finetune import evaluate_run, finetune, promote
from glmbatch.tuning.promote import decide, make_current, prune
from glmbatch.tuning.render import _warnings, card, describe
from glmbatch.tuning.report import REPORT, RUNS, Comparison, Report
from glmbatch.tuning.scores import score
from glmbatch.tuning.split import LabelAudit
from tests.support import Tune, Write
from tests.unit.tuning.rows import GOOD, without_label
from tests.unit.tuning.runs import trained

POOR = {"training__epochs": 1, "training__learning_rate": 1e-6}


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(good: Tune, tmp_path: Path) -> None:
    report = finetune(good(**GOOD))
    summary = tmp_path / "tuned" / "current" / "trained.json"
    before = summary.stat().st_mtime_ns
    assert finetune(good(**GOOD)) == report
    assert summary.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_worse_run_is_not_promoted(good: Tune, tmp_path: Path) -> None:
    best = finetune(good(**GOOD))
    assert best.promoted
    poor = finetune(good(**POOR))
    assert not poor.promoted
    assert poor.current is not None and poor.current.accuracy == best.scores.accuracy
    assert "and the current checkpoint, as it must be" in poor.reason
    assert (tmp_path / "tuned" / "current").resolve().name == best.run


@pytest.mark.slow
def test_rows_that_current_learned_are_not_tested_on(good: Tune) -> None:
    first = finetune(good(**GOOD))
    again = finetune(good(**POOR, data__seed=1))
    assert again.current is not None
    assert again.scores.rows == again.current.rows < first.scores.rows
    assert any("was trained on their texts" in warning for warning in again.audit.warnings)
    with pytest.raises(InputError, match="was trained on all test rows"):
        finetune(good(**POOR, data__seed=1, data__test_share=0.01))


TRUTH = list("ab") * 50


def report_of(answers: list[str], **rivals: list[str]) -> Report:
    """The report of a run that gave `answers` to 100 rows, beside those of its rivals."""
    compared = []
    for rival, theirs in ({"constant": ["a"] * 100} | rivals).items():
        test = compare_answers("accuracy", TRUTH, answers, theirs, np.arange(100))
        compared.append(Comparison(rival=rival, name=f"the {rival}", test=test))
    return Report.model_construct(
        scores=score(TRUTH, answers, ["a", "b"]),
        current=None,
        labels=("a", "b"),
        settings={},
        comparisons=tuple(compared),
    )


def wrong_in(count: int) -> list[str]:
    """The truth with the first `count` rows wrong."""
    return ["b" if label == "a" else "a" for label in TRUTH[:count]] + TRUTH[count:]


@pytest.mark.parametrize(("wrong", "promoted"), [(0, True), (30, True), (45, False)])
def test_a_run_must_surely_beat_the_constant_label(wrong: int, promoted: bool) -> None:
    decided = decide(report_of(wrong_in(wrong)), [], 100)
    assert decided.promoted == promoted
    assert f"{'' if promoted else 'not surely '}better than the constant" in decided.reason


@pytest.mark.parametrize("rival", ["base", "current", "baseline"])
def test_two_of_a_hundred_rows_promote_nothing(rival: str) -> None:
    report = report_of(wrong_in(0), **{rival: wrong_in(2)})
    assert not decide(report, [rival], 100).promoted
    assert decide(report, [], 100).promoted
    assert decide(report_of(wrong_in(0), **{rival: wrong_in(8)}), [rival], 100).promoted


def test_a_baseline_like_chance_need_not_be_beaten() -> None:
    report = report_of(wrong_in(20), baseline=["a"] * 100)
    decided = decide(report, ["baseline"], 100)
    assert decided.promoted and not decided.comparisons[1].needed


def test_too_few_test_rows_promote_nothing() -> None:
    decided = decide(report_of(wrong_in(0)), [], 101)
    assert not decided.promoted and "101 test rows are needed" in decided.reason


@pytest.mark.parametrize(("rows", "few"), [(1499, True), (1500, False)])
def test_a_better_baseline_is_advised(rows: int, few: bool) -> None:
    audit = LabelAudit.model_construct(parts={"train": rows}, warnings=())
    given = {"audit": audit, "baseline_model": "out/baseline", "training": {}}
    report = report_of(wrong_in(20), baseline=wrong_in(2)).model_copy(update=given)
    decided = decide(report, ["baseline"], 100)
    assert f"better choice with {rows:,} training rows: set model: out/baseline" in decided.reason
    (warning,) = _warnings(decided)
    assert "set model: out/baseline" in warning
    assert ("below 1,500 training rows" in warning) == few
    assert "set model" not in decide(report, [], 100).reason


@pytest.mark.slow
def test_a_run_no_better_than_its_base_is_not_promoted(good: Tune, tmp_path: Path) -> None:
    best = finetune(good(**GOOD))
    asked = {**POOR, "model": {"path": best.checkpoint}, "output": str(tmp_path / "second")}
    worse = finetune(good(**asked, must_beat=["base"]))
    assert worse.untrained is not None and worse.untrained.accuracy == best.scores.accuracy
    assert not worse.promoted and "the untrained base, as it must be" in worse.reason
    page = html.unescape((Path(worse.checkpoint).parent / "report.html").read_text())
    for text in (page, card(worse), describe(worse), worse.model_dump_json()):
        assert worse.reason in text
    for text in (page, card(worse), describe(worse)):
        assert "not beaten: the untrained base" in text
    # The decision is made again, without training or scoring anew.
    assert finetune(good(**asked)).promoted


def test_old_runs_are_deleted_but_not_the_current_one(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "old", "older", "current", "unfinished"]):
        run = tmp_path / RUNS / name
        run.mkdir(parents=True)
        if name != "unfinished":
            (run / REPORT).touch()
            os.utime(run / REPORT, (1000 - age, 1000 - age))
    make_current(tmp_path, "current")
    prune(tmp_path, 1)
    left = {run.name for run in (tmp_path / RUNS).iterdir()}
    assert left == {"new", "current", "unfinished"}
    assert (tmp_path / "current" / REPORT).exists()


@pytest.mark.slow
def test_a_run_that_lacks_a_label_is_not_promoted(good: Tune, write_source: Write) -> None:
    file = write_source("a.parquet", without_label("bad"))
    fewer = finetune(good(training__epochs=1, data__input=str(file)))
    assert not fewer.promoted
    assert "lacks the labels ['bad']" in fewer.reason


@pytest.mark.slow
def test_a_run_promoted_meanwhile_is_compared(good: Tune, tmp_path: Path) -> None:
    (tmp_path / "tuned" / "current").unlink()
    weak = good(training__epochs=2, training__learning_rate=5e-4)
    report = evaluate_run(weak, str(trained(weak)))
    best = finetune(good(**GOOD))
    assert best.promoted and best.scores.accuracy > report.scores.accuracy
    late = promote(weak, report.model_copy(update={"promoted": True}))
    assert not late.promoted
    assert (tmp_path / "tuned" / "current").resolve().name == best.run


@pytest.mark.slow
def test_a_report_of_an_earlier_version_is_compared(good: Tune, tmp_path: Path) -> None:
    best = finetune(good(**GOOD))
    path = tmp_path / "tuned" / "current" / "report.json"
    dropped = {"stored": "float16", "scratch": {"layers": 2}, "min_gain": 0.0}
    earlier = best.model_copy(update={"settings": best.settings | dropped})
    path.write_text(earlier.model_dump_json())
    poor = finetune(good(**POOR))
    assert poor.current is not None and poor.current.accuracy == best.scores.accuracy
