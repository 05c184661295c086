"""A run replaces the current one only if it scores higher on the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmbatch.errors import InputError
from glmbatch.tuning.finetune import evaluate_run, finetune, promote
from glmbatch.tuning.promote import decide
from glmbatch.tuning.report import Report
from glmbatch.tuning.scores import score
from tests.support import Tune, Write
from tests.unit.tuning.rows import without_label
from tests.unit.tuning.runs import trained

GOOD = {"training__epochs": 6}
POOR = {"training__epochs": 1, "training__learning_rate": 1e-6}


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(tune: Tune, tmp_path: Path) -> None:
    report = finetune(tune(**GOOD))
    summary = tmp_path / "tuned" / "current" / "trained.json"
    before = summary.stat().st_mtime_ns
    assert finetune(tune(**GOOD)) == report
    assert summary.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_worse_run_is_not_promoted(tune: Tune, tmp_path: Path) -> None:
    good = finetune(tune(**GOOD))
    assert good.promoted
    poor = finetune(tune(**POOR))
    assert not poor.promoted
    assert poor.current is not None and poor.current.accuracy == good.scores.accuracy
    assert "must score higher" in poor.reason
    assert (tmp_path / "tuned" / "current").resolve().name == good.run


@pytest.mark.slow
def test_rows_that_current_learned_are_not_tested_on(tune: Tune) -> None:
    first = finetune(tune(**GOOD))
    again = finetune(tune(**POOR, data__seed=1))
    assert again.current is not None
    assert again.scores.rows == again.current.rows < first.scores.rows
    assert any("was trained on their texts" in warning for warning in again.audit.warnings)
    with pytest.raises(InputError, match="was trained on all test rows"):
        finetune(tune(**POOR, data__seed=1, data__test_share=0.01))


@pytest.mark.parametrize(("predicted", "promoted"), [("aaaa", False), ("aaab", True)])
def test_the_first_run_must_beat_the_constant_label(predicted: str, promoted: bool) -> None:
    scores = score(list("aabb"), list(predicted), ["a", "b"])
    report = Report.model_construct(scores=scores, current=None, labels=("a", "b"))
    decision, reason = decide(report, "accuracy")
    assert decision == promoted
    assert "always answering 'a' would score 0.5000; no checkpoint was promoted" in reason


@pytest.mark.slow
def test_a_run_that_lacks_a_label_is_not_promoted(tune: Tune, write_source: Write) -> None:
    assert finetune(tune(**GOOD)).promoted
    for day in range(2):
        write_source(f"day={day}/a.parquet", without_label("bad"))
    fewer = finetune(tune(**GOOD))
    assert not fewer.promoted
    assert "lacks the labels ['bad']" in fewer.reason


@pytest.mark.slow
def test_a_run_promoted_meanwhile_is_compared(tune: Tune, tmp_path: Path) -> None:
    weak = tune(training__epochs=2, training__learning_rate=5e-4)
    report = evaluate_run(weak, str(trained(weak)))
    best = finetune(tune(**GOOD))
    assert best.scores.accuracy > report.scores.accuracy
    late = promote(weak, report.model_copy(update={"promoted": True}))
    assert not late.promoted
    assert (tmp_path / "tuned" / "current").resolve().name == best.run


@pytest.mark.slow
def test_a_report_of_an_earlier_version_is_compared(tune: Tune, tmp_path: Path) -> None:
    good = finetune(tune(**GOOD))
    path = tmp_path / "tuned" / "current" / "report.json"
    dropped = {"stored": "float16", "scratch": {"layers": 2}, "min_gain": 0.0}
    earlier = good.model_copy(update={"settings": good.settings | dropped})
    path.write_text(earlier.model_dump_json())
    poor = finetune(tune(**POOR))
    assert poor.current is not None and poor.current.accuracy == good.scores.accuracy
