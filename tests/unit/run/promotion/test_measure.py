"""Changed steps are measured on labelled rows before a run asks anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from glmbatch import annotate_table
from glmbatch.cli.main import main
from glmbatch.cli.plan import describe_plan
from glmbatch.errors import AuditError, InputError
from glmbatch.report.facts import Report
from glmbatch.report.report import read_report
from glmbatch.report.summary import Summary
from glmbatch.report.text import describe
from glmbatch.run.preview import preview
from glmbatch.run.promotion.measure import Costs, _ask
from glmbatch.run.work import Work
from glmbatch.settings.job import JobConfig
from tests.support import CAUSAL, CLASSIFY, GENERATE, Settings, Write, column_of, run

OTHER = {**CLASSIFY, "labels": ["x", "the", "a", "bad"]}  # never the right one, "bad"


@pytest.fixture(scope="module")
def labelled() -> pa.Table:
    """46 rows, and the labels that the model gives them."""
    texts = [
        f"第{number}条 review number {number}: {'很好 ' * (number % 5)}" for number in range(46)
    ]
    free = {"model": str(CAUSAL), "steps": [CLASSIFY], "runtime": {"device": "cpu"}}
    answers: pa.Table = annotate_table(pa.table({"text": texts}), free)
    return answers.select(["text", "mood"])


@pytest.fixture
def job(
    job_settings: Settings, write_source: Write, labelled: pa.Table, tmp_path: Path
) -> dict[str, Any]:
    """A published job, and labelled rows on which every published label is right."""
    write_source("a.parquet", {"text": labelled["text"][:9]})
    pq.write_table(labelled, tmp_path / "labelled.parquet")
    settings: dict[str, Any] = job_settings(
        steps=[CLASSIFY], evaluate={"rows": str(tmp_path / "labelled.parquet")}
    )
    first = run(settings)
    assert [(one.score, one.change) for one in first.measured] == [(1.0, "not published before")]
    return settings


def with_step(job: dict[str, Any], *steps: dict[str, Any], **evaluate: Any) -> dict[str, Any]:
    return {**job, "steps": list(steps), "evaluate": {**job["evaluate"], **evaluate}}


def newest_report(out: Path) -> Report:
    pages = sorted(out.glob("_glmbatch/reports/*.json"), key=lambda path: path.stat().st_mtime_ns)
    report = read_report(str(out), pages[-1].stem)
    assert report is not None and report.verdict is not None
    return report


def asked(summary: Summary) -> list[tuple[int, int]]:
    return [(each.prompts, each.tokens) for each in summary.measured]


def test_an_unchanged_night_measures_nothing(job: dict[str, Any], write_source: Write) -> None:
    write_source("b.parquet", {"text": ["new"]})
    again = run(job)
    assert asked(again) == [(0, 0)]
    assert [each.change for each in again.measured] == [None]
    assert "unchanged" in describe(again)


def test_a_worse_prompt_publishes_nothing(
    job: dict[str, Any], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = column_of(out, "mood")
    changed = with_step(job, OTHER)
    plan = describe_plan(preview(JobConfig.model_validate(changed)))
    assert "measured first: 46 rows of" in plan and "mood (changed labels)" in plan
    with pytest.raises(
        AuditError, match=r"nothing published: mood scores 0\.0000 on 46"
    ) as refused:
        run(changed)
    assert "--set evaluate.least_gain=-1" in str(refused.value)
    report = newest_report(out)
    assert report.summary.measured[0].refused and report.summary.measured[0].tokens > 0
    assert sum(step.answers for step in report.summary.steps) == 0, "rows of the night were asked"
    assert report.verdict is not None and "mood scores" in report.verdict.lines[0]
    page = Path(str(report.summary.report)).read_text()
    assert "what is published scores 1.0000" in page
    assert column_of(out, "mood") == before

    with pytest.raises(AuditError):
        run(changed)
    assert asked(newest_report(out).summary) == [(0, 0)], "the second night asked again"
    assert "would be refused: mood scores" in describe_plan(
        preview(JobConfig.model_validate(changed))
    )
    # Still beside what is published, and not beside what was refused.
    accepted = run(with_step(job, OTHER, least_gain=-1))
    assert (accepted.measured[0].before, accepted.refused) == (1.0, None)
    assert asked(accepted) == [(0, 0)]
    verdict = newest_report(out).verdict
    assert verdict is not None and "1 changed step measured and passed" in verdict.lines[0]
    back = run(job)
    assert back.measured[0].gain == pytest.approx(1 - float(accepted.measured[0].score))


def test_a_later_step_is_measured_with_the_earlier(job: dict[str, Any], tmp_path: Path) -> None:
    reply = {**GENERATE, "max_tokens": 3}
    table = pq.read_table(tmp_path / "labelled.parquet")
    table = table.append_column("reply", pa.array(["x"] * len(table)))
    pq.write_table(table, tmp_path / "labelled.parquet")
    first = run(with_step(job, CLASSIFY, reply))
    assert [each.step for each in first.measured] == ["mood", "reply"]
    found = run(with_step(job, OTHER, reply, least_gain=-1))
    changes = [each.change for each in found.measured]
    assert changes == ["changed labels", "changed step mood"]


def test_only_changed_rows_are_left_out_of_the_pairs(job: dict[str, Any], tmp_path: Path) -> None:
    table = pq.read_table(tmp_path / "labelled.parquet").slice(6)
    more = pa.table({"text": ["another", "one more"], "mood": ["bad", "good"]})
    pq.write_table(pa.concat_tables([table, more]), tmp_path / "labelled.parquet")
    found = run(with_step(job, OTHER, least_gain=-1))
    assert (found.measured[0].rows, found.measured[0].paired) == (42, 40)


def test_rows_with_other_values_are_measured_again(job: dict[str, Any], tmp_path: Path) -> None:
    """Also values beside the text and the truth, which a prompt reads."""
    table = pq.read_table(tmp_path / "labelled.parquet")
    for source in (tmp_path / "labelled.parquet", Path(job["data"]["input"]) / "a.parquet"):
        rows = pq.read_table(source)
        pq.write_table(rows.append_column("shop", pa.array(["one"] * len(rows))), source)
    step = {**CLASSIFY, "prompt_template": "{shop}: {text}"}
    first = run(with_step(job, step, least_gain=-1))
    assert first.measured[0].prompts > 0
    assert asked(run(with_step(job, step))) == [(0, 0)]
    others = table.append_column("shop", pa.array(["another"] * len(table)))
    pq.write_table(others, tmp_path / "labelled.parquet")
    again = run(with_step(job, step))
    assert again.measured[0].prompts > 0, "the score of other prompts was taken"
    assert (again.measured[0].change, again.refused) == (None, None)


def test_lines_among_labelled_rows_are_refused(job: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "labelled"
    folder.mkdir()
    (tmp_path / "labelled.parquet").rename(folder / "a.parquet")
    (folder / "b.csv").write_text("text,mood\nfine,good\n")
    with pytest.raises(InputError, match=r"b\.csv: labelled rows must be Parquet"):
        run(with_step(job, OTHER, rows=str(folder)))
    assert run(with_step(job, CLASSIFY, rows=f"{folder}/*.parquet")).refused is None


def test_rows_that_change_while_asked_are_not_kept(
    job: dict[str, Any], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "labelled.parquet"
    kept = {*out.glob("_glmbatch/measured/*.json")}

    def replaced(work: Work) -> Costs:
        costs = _ask(work)
        pq.write_table(pq.read_table(rows).slice(1, 1).take([0] * 46), rows)
        return costs

    monkeypatch.setattr("glmbatch.run.promotion.measure._ask", replaced)
    with pytest.raises(InputError, match=r"labelled\.parquet: was changed while it was read"):
        run(with_step(job, OTHER))
    assert {*out.glob("_glmbatch/measured/*.json")} == kept


def test_a_step_that_is_asked_no_row_is_not_proven(job: dict[str, Any]) -> None:
    never = {**CLASSIFY, "when": "text = 'no such text'"}
    with pytest.raises(AuditError, match=r"mood was asked about no labelled row .*asks for 0.5"):
        run(with_step(job, never, least_score=0.5))


def test_only_the_least_score_decides_a_first_night(
    job: dict[str, Any], out: Path, tmp_path: Path
) -> None:
    other = {**job, "data": {**job["data"], "output": str(tmp_path / "second")}}
    with pytest.raises(AuditError, match=r"evaluate\.least_score asks for 0\.99"):
        run(with_step(other, OTHER, least_score={"mood": 0.99}))
    assert run(with_step(other, OTHER)).measured[0].before is None


def test_a_damaged_measurement_is_measured_again(job: dict[str, Any], out: Path) -> None:
    for path in out.glob("_glmbatch/measured/*.json"):
        path.write_text(path.read_text().replace("1.0", "0.0", 1))
    assert run(job).measured[0].score == 1.0


def test_trials_and_tables_are_not_measured(job: dict[str, Any], tmp_path: Path) -> None:
    trial = {**job["data"], "output": str(tmp_path / "trial"), "limit": 3}
    assert run({**job, "data": trial}).measured == ()
    free = {name: job[name] for name in ("model", "steps", "evaluate")}
    answers = annotate_table(pa.table({"text": ["some"]}), free)
    assert answers.column("mood")[0].as_py() in CLASSIFY["labels"]


def test_what_cannot_be_measured_is_refused_at_once(job: dict[str, Any], tmp_path: Path) -> None:
    bare = tmp_path / "bare.parquet"
    pq.write_table(pa.table({"text": ["a"]}), bare)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"rows": str(bare)}, r"bare.parquet: no column has the truth of a step"),
        ({"rows": str(tmp_path / "none.parquet")}, r"none.parquet"),
        ({"truth": {"tone": "mood"}}, r"evaluate.truth tone: the job has no such step"),
        ({"truth": {"mood": "tone"}}, r"evaluate.truth mood=tone: the rows have no column 'tone'"),
        ({"truth": {"mood": "text"}}, r"evaluate.truth mood=text: .* none of them is a label"),
        ({"least_score": {"tone": 0.5}}, r"evaluate.least_score: the job has no step 'tone'"),
    )
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            run(with_step(job, CLASSIFY, **settings))


def test_the_command_line_says_why(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(with_step(job, OTHER)))
    assert main(["plan", str(path)]) == 0
    assert "measured first:" in capsys.readouterr().out
