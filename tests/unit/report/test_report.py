"""The report agrees with the summary, loads nothing, and escapes the texts of the data."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from glmbatch.errors import AuditError
from glmbatch.ledger.verification import verify
from glmbatch.report import report
from glmbatch.report.counts import population_stability
from glmbatch.report.facts import Report
from glmbatch.report.markdown import markdown
from glmbatch.report.page.run import page as drawn
from glmbatch.report.report import past_runs, read_report
from glmbatch.report.summary import Summary, short
from glmbatch.report.text import describe
from tests.support import CLASSIFIER, CLASSIFY, GENERATE, Settings, Write, run

pytestmark = pytest.mark.slow

HEAD = {"kind": "classify", "name": "mood", "model": str(CLASSIFIER)}


class Page(HTMLParser):
    """What a browser sees: the elements, the rows of tables, and the other texts."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.open = ""
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.open = tag
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open in {"td", "th"}:
            self.rows[-1][-1] += data


def facts_of(summary: Summary) -> Report:
    facts = read_report(summary.output, summary.run)
    assert facts is not None
    return facts


def verdict_of(summary: Summary) -> tuple[str, ...]:
    verdict = facts_of(summary).verdict
    assert verdict is not None
    return verdict.lines


def page_of(summary: Summary) -> Page:
    assert summary.report is not None
    return Page(summary.report)


def test_the_page_agrees_with_the_summary(
    rows: list[str | None], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": [rows[0], *rows, None, " "]})
    summary = run(job_settings(max_error_rate=0.5, report__price_per_hour=7200.0))
    page = page_of(summary)
    facts = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert facts["run"] == summary.run
    assert facts["size"] == "26 rows in 4 fragments"
    assert (facts["failed rows"], facts["answers"]) == ("2", "52")
    assert facts["computed, reused, repeated"] == "46, 0, 2"
    tokens = [
        sum(getattr(step, name) for step in summary.steps)
        for name in ("prompt_tokens", "completion_tokens")
    ]
    assert facts["tokens"] == f"{tokens[0]:,} read, {tokens[1]:,} generated"
    assert facts["device"].startswith("cpu, ")
    assert float(facts["cost"].split()[0]) == pytest.approx(2 * summary.seconds, rel=1e-3)
    for step in summary.steps:
        for reason, count in step.faults.items():
            assert [step.name, reason, str(count)] in page.rows
    assert set(summary.steps[0].labels) == {"good", "bad", "so so"}, "those nobody chose as well"
    for label, count in summary.steps[0].labels.items():
        assert [label, str(count), f"{count / 24:.1%}"] in page.rows
    assert describe(summary).endswith(f"Read about the run: {summary.report}")
    assert verify(tmp_path / "out").findings == ()


def test_plots_count_the_published_columns(
    rows: list[str | None], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": rows})
    summary = run(job_settings(steps=[HEAD, GENERATE]))
    facts = read_report(str(tmp_path / "out"), summary.run)
    assert facts is not None
    mood, reply = facts.measures
    published = pd.read_parquet(tmp_path / "out")
    counts, _ = np.histogram(published["mood_score"], bins=20, range=(0, 1))
    assert mood.histograms["score"].counts == tuple(counts)
    lengths = reply.histograms["completion_tokens"]
    expected = np.bincount((published["reply_completion_tokens"] // lengths.width).astype(int))
    assert lengths.counts == tuple(expected)
    prompts = reply.histograms["prompt_tokens"]
    assert prompts.counts == tuple(
        np.bincount((published["reply_prompt_tokens"] // prompts.width).astype(int))
    )
    assert sum(mood.histograms["prompt_tokens"].counts) == len(rows)
    for measures in (mood, reply):
        apart = measures.rates[1][0] - measures.rates[0][0]
        assert sum(rate for _, rate in measures.rates) * apart == pytest.approx(
            len(rows), rel=0.01
        ), "all rows, spread over time"
        assert {slow.fragment for slow in measures.slowest} == {
            f"a.parquet@{first}" for first in (0, 8, 16)
        }
    answers = {(row.text, row.mood, row.mood_score) for row in published.itertuples()}
    for sample in mood.samples:
        assert (sample.text, sample.label, sample.score) in answers
    assert {sample.label for sample in mood.samples} == set(published["mood"])
    plots = re.findall(r"<svg.*?</svg>", page_of(summary).source)
    assert len(plots) == 6  # shares, lengths and confidence; lengths twice; throughput
    for plot in map(ET.fromstring, plots):
        assert plot.attrib["role"] == "img" and plot.attrib["aria-label"]
        assert len(list(plot.iter("text"))) >= 4, "numbers at the axes stay text"
        assert not {"script", "style", "desc"} & {node.tag for node in plot.iter()}
    again = drawn(facts)
    assert again == drawn(facts), "the same facts give the same page"
    assert re.findall(r"<svg.*?</svg>", again) == plots


def test_labels_are_compared_with_the_previous_run(
    rows: list[str | None], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": rows})
    first = run(job_settings(steps=[HEAD]))
    then = first.steps[0].labels
    chosen = [label for label, count in then.items() if count]
    assert len(chosen) > 1
    rarest = pd.read_parquet(tmp_path / "out").set_index("mood")["text"][[chosen[-1]]]
    write_source("a.parquet", {"text": [*rarest, *rows[:5]]})
    with pytest.raises(AuditError, match="label drift"):
        run(job_settings(steps=[{**HEAD, "audits": {"max_label_drift": 1e-9}}]))
    second = run(job_settings(steps=[HEAD]))
    now = second.steps[0].labels
    page = page_of(second)
    for label in now | then:
        new = now.get(label, 0)
        old = then.get(label, 0)
        line = [
            label,
            str(new),
            f"{new / sum(now.values()):.1%}",
            str(old),
            f"{old / sum(then.values()):.1%}",
        ]
        assert line in page.rows
    moved = population_stability(then, now)
    assert moved > 0.01
    assert any(
        text.startswith(f"Label shift since the previous run, {first.run}: {moved:.4f} ")
        for text in page.texts
    )
    third = page_of(run(job_settings(steps=[HEAD])))
    assert ["device", "none (no model was used)"] in third.rows
    assert any(
        text.startswith(f"Label shift since the previous run, {second.run}: 0.0000 ")
        for text in third.texts
    )


def test_the_page_compares_with_the_kept_runs(
    rows: list[str | None], write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": rows})
    first = run(job_settings(steps=[HEAD]))
    assert "no earlier run was published" in verdict_of(first)[1].lower()
    shutil.rmtree(out / "_glmbatch" / "answers")
    for file in out.glob("*.parquet"):
        file.unlink()  # only the kept reports may be read
    write_source("a.parquet", {"text": [*rows[:6], *[None] * 6, " "]})
    settings = job_settings(steps=[HEAD], max_error_rate=0.9, data__rows_per_fragment=40)
    with pytest.raises(AuditError):
        run({**settings, "max_error_rate": 0.1})
    last = run(settings)
    assert [past.published for past in past_runs(str(out), last.run)] == [True, False]
    shown = page_of(last)
    lines = verdict_of(last)
    assert lines[0].startswith("Published: 13 rows, 7 rows failed (53.8%)")
    assert "Compared with 1 earlier run: mood: " in lines[1]
    assert "53.8% of the rows failed, usually 0.0%" in lines[1]
    assert "6 rows that failed in mood with null_value" in lines[2]
    assert [line for line in lines if line in shown.texts] == list(lines)
    assert "The last 3 runs" in shown.texts
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", shown.source)
    assert titles[:4] == ["mood: label shares", "failed rows", "throughput", "confidence"]
    assert [row[1] for row in shown.rows if row[-1:] in ([first.run], [last.run])][:2] == [
        "published",
        "published",
    ]
    assert "usually" in markdown(facts_of(last))


def test_the_oddest_rows_are_those_with_extreme_values(
    rows: list[str | None], write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": rows})
    summary = run(job_settings(steps=[HEAD, GENERATE]))
    mood, reply = facts_of(summary).measures
    published = pd.read_parquet(out).reset_index(drop=True)
    least = published.sort_values("mood_score", kind="stable").head(5)
    assert [odd.row for odd in mood.oddest] == list(least.index)
    assert [(odd.text, odd.answer) for odd in mood.oddest] == [
        *zip(least.text, least.mood, strict=True)
    ]
    most = published.sort_values("reply_completion_tokens", ascending=False, kind="stable").head(5)
    assert [odd.row for odd in reply.oddest] == list(most.index)
    assert [odd.value for odd in reply.oddest] == list(most.reply_completion_tokens)


def test_fragments_unlike_the_others_are_named(
    rows: list[str | None], write_source: Write, job_settings: Settings
) -> None:
    for name in ("a", "b", "c"):
        failing = 20 if name == "b" else 0
        write_source(f"{name}.parquet", {"text": [*(rows * 2)[: 40 - failing], *[None] * failing]})
    summary = run(job_settings(steps=[HEAD], max_error_rate=0.5, data__rows_per_fragment=40))
    (odd,) = facts_of(summary).measures[0].odd_fragments
    assert (odd.fragment, odd.what, odd.rows, odd.share) == ("b.parquet@0", "failed", 40, 0.5)
    assert odd.usual == pytest.approx(20 / 120)
    assert any("b.parquet@0, 50% failed in mood" in text for text in verdict_of(summary))


def test_a_refused_run_has_a_report(
    rows: list[str | None], write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": [*rows, None]})
    with pytest.raises(
        AuditError, match=r"nothing published.*Read about the run: .*\.html\."
    ) as caught:
        run(job_settings(max_error_rate=0.01))
    page = Page(str(caught.value).split("Read about the run: ")[1].removesuffix("."))
    assert any(
        text.startswith("Refused: ") and "1 of 24 rows failed" in text for text in page.texts
    )
    assert ["mood", "null_value", "1"] in page.rows
    assert not (tmp_path / "out" / "_manifest.json").exists()


HOSTILE = (
    "<img src=x onerror=alert(1)>\"'|[a](http://evil) `b` & </td></table><script>alert(2)</script>"
)


def test_texts_of_the_data_never_act_as_markup(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    name = "day=<b>1/<i>|a.parquet"
    write_source(name, {"text": [f"{HOSTILE} {number}" for number in range(9)] + [None]})
    step = {**CLASSIFY, "labels": [HOSTILE, f"{HOSTILE}!"]}
    settings = job_settings(steps=[step], max_error_rate=0.6)
    (tmp_path / "in" / "<script>.parquet").write_bytes(b"broken")
    summary = run(settings)
    page = page_of(summary)
    plain = {"html", "meta", "title", "style", "h1", "h2", "p", "table", "tr", "td", "th"}
    plain |= {"div", "figure", "figcaption", "details", "summary"}
    assert set(page.tags) <= plain | {
        "ul",
        "li",
        "span",
        "svg",
        "g",
        "path",
        "text",
        "rect",
        "circle",
    }
    for name, _ in page.attributes:
        assert not name.startswith("on") and name not in {"src", "href"}
    cells = {cell for row in page.rows for cell in row}
    assert f"{HOSTILE} 0" in cells and cells & {HOSTILE, f"{HOSTILE}!"}, (
        "text and label are there, as text"
    )
    assert any("<script>.parquet" in text for text in page.texts)
    assert any("default-src 'none'" in str(value) for _, value in page.attributes)
    facts = read_report(str(tmp_path / "out"), summary.run)
    assert facts is not None
    line = next(line for line in markdown(facts).splitlines() if "onerror" in line)
    assert not re.search(r"(?<!\\)[<>`\[\]()&\"']", line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 3, "two cells"


def test_a_failed_report_does_not_fail_the_run(
    write_source: Write, job_settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_source("a.parquet", {"text": ["one", "two"]})
    (tmp_path / "out" / "_glmbatch").mkdir(parents=True)
    (tmp_path / "out" / "_glmbatch" / "reports").write_text("in the way")
    summary = run(job_settings())
    assert (summary.rows, summary.report) == (2, None)
    assert "the report of the run could not be written" in caplog.text
    assert verify(tmp_path / "out").sound


def test_the_last_reports_and_the_published_one_are_kept(
    write_source: Write, job_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "KEPT", 2)
    write_source("a.parquet", {"text": ["one", "two"]})
    published = run(job_settings(steps=[CLASSIFY]))
    write_source("a.parquet", {"text": ["one", None]})
    for _ in range(3):
        with pytest.raises(AuditError):
            run(job_settings(steps=[CLASSIFY], max_error_rate=0.1))
    files = sorted((tmp_path / "out" / "_glmbatch" / "reports").iterdir())
    assert Counter(path.suffix for path in files) == {".html": 3, ".json": 3}
    assert published.run in {path.stem for path in files}


def test_structs_and_lists_are_shown_as_json() -> None:
    value = {"day": date(2024, 2, 29), "tags": ["好", None]}
    assert short(value) == '{"day": "2024-02-29", "tags": ["好", null]}'
    assert short(["a b"]) == '["a b"]' and short(date(2024, 2, 29)) == "2024-02-29"
