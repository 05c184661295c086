"""Which losses are refused, and how right an answer is: numbers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter
from scipy.stats import binomtest

from glmbatch.errors import AuditError
from glmbatch.evaluation.truth import Truth
from glmbatch.report.counts import Measured
from glmbatch.run.promotion.rule import check_measured, is_loss, judged, paired, passed
from glmbatch.run.promotion.scores import row_scores
from glmbatch.settings.job import AnyStep, EvaluateConfig

ROWS = 1000


def measured(**facts: Any) -> Measured:
    own = {"step": "mood", "rows": ROWS, "score": 0.9, "change": "changed weights", "kept": "k"}
    return Measured.model_validate({**own, **facts})


def config(**settings: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate({"rows": "rows.parquet", **settings})


def beside(before_R: np.ndarray, now_R: np.ndarray) -> dict[str, float]:
    return paired(before_R.astype(float), now_R.astype(float), np.arange(len(before_R)))


def test_the_chance_of_rights_and_wrongs_is_mcnemars() -> None:
    for worse, better in ((30, 12), (20, 20), (9, 15)):
        before_R, now_R = np.zeros(200), np.zeros(200)
        before_R[:worse] = 1
        now_R[worse : worse + better] = 1
        found = beside(before_R, now_R)
        exact = binomtest(worse, worse + better, alternative="greater").pvalue
        assert found["p"] == pytest.approx(exact, abs=0.02)
        assert (found["worse"], found["better"]) == (worse, better)
    assert beside(np.ones(9), np.ones(9))["p"] == 1


def test_rows_of_one_text_count_once() -> None:
    found = paired(np.ones(50), np.zeros(50), np.zeros(50, int))
    assert (found["gain"], found["worse"]) == (-1.0, 1)
    assert found["p"] == pytest.approx(0.5, abs=0.03)


def test_regressions_are_refused_and_harmless_changes_pass() -> None:
    """Drawn from 60 to 98 % right and 1 to 20 % of rows that change besides, with 1,000 rows."""
    dice = np.random.default_rng(7)
    stopped = wrongly = 0
    for _ in range(100):
        level, churn = dice.uniform(0.6, 0.98), dice.uniform(0.01, 0.2)
        before_R = dice.random(ROWS) < level
        again_R = np.where(dice.random(ROWS) < churn, dice.random(ROWS) < level, before_R)
        harmless = beside(before_R, again_R)
        wrongly += is_loss(harmless["gain"], harmless["p"])
        # A loss of 3 points or more as measured: rights are made wrong until there are enough.
        worse_R = again_R.copy()
        lost = int(before_R.sum() - worse_R.sum())
        rights = dice.permutation(np.flatnonzero(worse_R))
        worse_R[rights[: max(0, int(dice.integers(30, 80)) - lost)]] = False
        planted = beside(before_R, worse_R)
        assert planted["gain"] <= -0.03
        stopped += is_loss(planted["gain"], planted["p"])
    assert stopped == 100
    assert wrongly <= 5


def test_limits_of_the_user_decide_for_changed_steps() -> None:
    loss = {"before": 0.92, "gain": -0.02, "paired": ROWS, "worse": 40, "better": 20, "p": 0.006}
    assert judged(measured(**loss), config()).refused is not None
    assert judged(measured(**loss), config(least_gain=-1)).refused is None
    assert judged(measured(**loss, change=None), config()).refused is None
    gain = {**loss, "gain": 0.004, "p": 0.9}
    assert judged(measured(**gain), config()).refused is None
    assert "least_gain" in str(judged(measured(**gain), config(least_gain=0.01)).refused)
    assert "least_score asks for 0.95" in str(judged(measured(), config(least_score=0.95)).refused)
    low = config(least_score={"other": 0.95})
    assert judged(measured(), low).refused is None
    assert judged(measured(change=None), config(least_score=0.95)).refused is None
    refused = judged(measured(**loss), config())
    assert passed([measured()]) and not passed([measured(), refused])
    with pytest.raises(AuditError, match=r"-2\.0 points, 40 texts worse, 20 better, p 0\.006"):
        check_measured([measured(), refused])


def scores(settings: dict[str, Any], truth: dict[str, list[Any]], **columns: Any) -> list[float]:
    step: AnyStep = TypeAdapter(AnyStep).validate_python(settings)
    known = {name: [value is not None for value in values] for name, values in truth.items()}
    of = Truth({name: name for name in truth}, truth, known)
    return row_scores(step, of, pa.table(columns)).tolist()


def test_each_kind_of_answer_has_a_score() -> None:
    label = {"kind": "classify", "name": "mood", "labels": ["a", "b"]}
    kinds = [None, None, "too_long", None, "not_asked"]
    found = scores(
        label,
        {"mood": ["a", "a", "a", None, "a"]},
        mood=["a", "b", None, "a", None],
        mood_error_type=kinds,
    )
    assert found[:3] == [1, 0, 0] and np.isnan(found[3:]).all()
    several = {**label, "multiple": True}
    none = pa.array([None, None], pa.string())
    lists = scores(several, {"mood": [["a", "b"], []]}, mood=[["a"], []], mood_error_type=none)
    assert lists == pytest.approx([2 / 3, 1])
    text = {"kind": "generate", "name": "reply"}
    texts = scores(
        text, {"reply": ["so it is", "yes"]}, reply=[" so it is ", "no"], reply_error_type=none
    )
    assert texts[0] == 1 > texts[1]
    number = {"kind": "classify", "name": "mood", "number": True}
    near = scores(number, {"mood": ["1", "5"]}, mood=[1.0, 4.0], mood_error_type=none)
    assert near == pytest.approx([1, 0.75])
    # On the scale of all truths, also of those whose rows failed.
    failed = pa.array([None, "too_long"])
    near = scores(number, {"mood": ["2", "6"]}, mood=[1.0, None], mood_error_type=failed)
    assert near == pytest.approx([0.75, 0])
    facts = {
        "kind": "extract",
        "name": "facts",
        "fields": {"stars": {"type": "integer"}, "tags": {"type": "list", "items": "text"}},
    }
    fields = scores(
        facts,
        {"stars": [4, 2], "tags": [["x"], ["x", "y"]]},
        facts_stars=[4, 3],
        facts_tags=[["x"], ["x"]],
        facts_error_type=none,
    )
    assert fields == pytest.approx([1, 1 / 3])
