"""What is not fit is not published: shares of labels that moved, answers cut off or empty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmbatch.errors import AuditError
from glmbatch.report.counts import population_stability
from glmbatch.report.summary import Summary
from glmbatch.report.text import describe
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.conftest import CLASSIFIER

Settings = Callable[..., dict[str, Any]]
Write = Callable[..., Path]
COUNTS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 1000), min_size=1)


def run(settings: dict[str, Any]) -> Summary:
    return run_job(JobConfig.model_validate(settings))


def published(tmp_path: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for path in (tmp_path / "out").rglob("*.parquet")
        if "_glmbatch" not in path.parts
    }


def test_labels_whose_shares_moved_are_not_published(
    write_source: Write, job_settings: Settings, tmp_path: Path, rows: list[str | None]
) -> None:
    settings = job_settings()
    head = {
        "kind": "classify",
        "name": "mood",
        "model": str(CLASSIFIER),
        "audits": {"max_label_drift": 0.2},
    }
    settings["steps"] = [head]
    write_source("a.parquet", {"text": rows})
    first = run(settings)
    assert first.audits == (), "there is nothing to compare a first night with"
    (again,) = run(settings).audits
    assert again.measured == 0
    counts = first.steps[0].labels
    rarest = min(counts, key=lambda label: counts[label])
    texts = [row["text"] for row in table(tmp_path) if row["mood"] == rarest]
    before = published(tmp_path)
    write_source("a.parquet", {"text": texts * 30})
    with pytest.raises(
        AuditError, match=r"nothing published: mood: label drift \d+\.\d+, at most 0\.2 allowed"
    ):
        run(settings)
    assert published(tmp_path) == before
    settings["steps"][0]["audits"]["max_label_drift"] = 100.0
    passed = run(settings)
    assert passed.computed == 0, "a limit is no part of what makes an answer"
    assert f"audit {passed.audits[0]}" in describe(passed)


def table(tmp_path: Path) -> list[dict[str, Any]]:
    import pyarrow.dataset as ds

    found: list[dict[str, Any]] = (
        ds.dataset(tmp_path / "out", partitioning=None).to_table().to_pylist()
    )
    return found


def test_answers_that_are_cut_off_are_not_published(
    write_source: Write, job_settings: Settings, tmp_path: Path, rows: list[str | None]
) -> None:
    write_source("a.parquet", {"text": rows})
    settings = job_settings()
    settings["steps"][1] |= {"max_tokens": 1, "audits": {"max_truncated_rate": 0.5}}
    with pytest.raises(
        AuditError, match=r"reply: share of truncated answers 1, at most 0\.5 allowed"
    ):
        run(settings)
    assert published(tmp_path) == {}
    settings["steps"][1]["audits"]["max_truncated_rate"] = 1.0
    assert run(settings).computed == 0


def test_empty_answers_are_counted(
    write_source: Write, job_settings: Settings, rows: list[str | None]
) -> None:
    write_source("a.parquet", {"text": rows})
    settings = job_settings()
    first = run(settings)
    assert first.audits == ()
    begin = str(first.samples[0]["reply"])[:1]
    settings["steps"][1] |= {"stop": [begin], "audits": {"max_empty_rate": 1.0}}
    (audit,) = run(settings).audits
    assert (audit.step, audit.what) == ("reply", "share of empty answers")
    settings["steps"][1]["audits"]["max_empty_rate"] = 0.0
    assert audit.measured > 0
    with pytest.raises(
        AuditError, match=r"share of empty answers 0\.\d+|share of empty answers 1\.000"
    ):
        run(settings)


def test_answers_that_became_much_longer_are_not_published(
    write_source: Write, job_settings: Settings, tmp_path: Path, rows: list[str | None]
) -> None:
    write_source("a.parquet", {"text": rows})
    settings = job_settings()
    settings["steps"][1] |= {"max_tokens": 3, "audits": {"max_length_drift": 0.5}}
    assert run(settings).audits == (), "there is nothing to compare a first night with"
    (again,) = run(settings).audits
    assert (again.what, again.measured) == ("drift of the mean length", 0)
    before = published(tmp_path)
    settings["steps"][1]["max_tokens"] = 24
    with pytest.raises(
        AuditError, match=r"reply: drift of the mean length \d+\.\d+, at most 0\.5 allowed"
    ):
        run(settings)
    assert published(tmp_path) == before
    settings["steps"][1]["audits"]["max_length_drift"] = 100.0
    assert run(settings).computed == 0


def test_the_index_of_a_known_shift() -> None:
    """Shares 0.8 and 0.2 that become 0.6 and 0.4: 0.2 ln(4/3) + 0.2 ln 2."""
    index = population_stability({"a": 80_000, "b": 20_000}, {"a": 60_000, "b": 40_000})
    assert index == pytest.approx(0.2 * 0.28768207 + 0.2 * 0.69314718, rel=1e-4)


@given(before=COUNTS, now=COUNTS)
def test_the_index_is_0_for_equal_shares_and_the_same_both_ways(
    before: dict[str, int], now: dict[str, int]
) -> None:
    assert population_stability(before, before) == 0
    assert population_stability(before, now) == pytest.approx(population_stability(now, before))
    assert population_stability(before, now) >= 0
