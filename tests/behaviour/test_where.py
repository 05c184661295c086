"""`data.where` and `data.columns`: what is read, what goes out, and what a moving filter costs."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from glmbatch.cli.plan import describe_plan
from glmbatch.errors import InputError
from glmbatch.ledger.input import cutting
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.repair import repair
from glmbatch.ledger.verification import verify
from glmbatch.report.summary import Summary
from glmbatch.report.text import describe
from glmbatch.run.preview import Preview, preview
from glmbatch.settings.job import JobConfig
from glmbatch.store.inputs.filters import kept_rows
from glmbatch.view.published import read_published
from glmbatch.view.rows import Rows
from tests import forked
from tests.stores import Store
from tests.support import CLASSIFY, Settings, Write, column_of, read_quarantine, rows_of, run

pytestmark = pytest.mark.slow
DAYS = (24, 25, 26)
ROWS = 30
Night = Callable[..., Summary]

# A run in a process of its own, to be killed.
RUN = "import sys; from glmbatch.run.job import run_job; "
RUN += "from glmbatch.settings.jobfile import load_job; run_job(load_job(sys.argv[1]))"


@pytest.fixture
def days(write_source: Write) -> None:
    for day in DAYS:
        columns = {
            "id": list(range(day * 100, day * 100 + ROWS)),
            "text": [None if row == 29 else f"day {day} row {row}" for row in range(ROWS)],
            "length": [None if row % 10 == 0 else row for row in range(ROWS)],
            "secret": [f"hush{row}" for row in range(ROWS)],
        }
        write_source(f"day=2026-11-{day}/a.parquet", columns, row_group_size=7)


@pytest.fixture
def night(days: None, job_settings: Settings) -> Night:
    def one(where: str | None, **overrides: Any) -> Summary:
        data = {"data__where": where, "data__id_column": "id", "max_error_rate": 0.5}
        return run(job_settings(steps=[CLASSIFY], **data, **overrides))

    return one


def left_out(told: Summary | Preview) -> tuple[int, int]:
    """The sources and the rows of other sources that the filter left out."""
    assert told.filtered is not None
    return told.filtered.sources, told.filtered.rows


def sound(output: Path) -> bool:
    found = verify(output)
    assert not found.findings, found
    return found.sound


def test_only_rows_that_meet_the_filter_come_out(night: Night, out: Path) -> None:
    first = night("day >= '2026-11-25' and length > 20")
    assert first.rows == 18
    assert left_out(first) == (1, 42)
    assert column_of(out, "id") == [*range(2521, 2530), *range(2621, 2630)]
    # Rows are named by their number in the source, wherever they come out.
    assert [line["row"] for line in read_quarantine(out)] == [29, 29]
    assert sound(out)
    assert "leaves out 1 file, and 42 rows of others" in describe(first)
    again = night("day >= '2026-11-25' and length > 20")
    assert (again.computed, again.unchanged_sources) == (0, 2)
    assert left_out(again) == (1, 42)


def test_a_row_that_comes_back_into_the_filter_is_free(night: Night, out: Path) -> None:
    night("length > 10")
    narrow = night("length > 20")
    assert (narrow.computed, narrow.rows) == (0, 27)
    wide = night("length > 10")
    assert (wide.computed, wide.rows) == (0, 54)
    assert night("length > 10 or length is null").computed == 9
    assert sound(out)


@pytest.mark.parametrize("missing_sources", ["keep", "drop"])
def test_a_window_that_moves_asks_only_what_is_new(
    night: Night, tmp_path: Path, out: Path, missing_sources: str
) -> None:
    computed = []
    for day in ("2026-11-25", "2026-11-26", "2026-11-27"):
        where = "day >= '{today-1}' and day <= '{today}' and length > 20"
        last = night(where, data__today=day, data__missing_sources=missing_sources)
        computed.append(last.computed)
        assert sound(out)
    assert computed == [16, 8, 0]
    assert last.unchanged_sources == 1
    manifest = Ledger(out).manifest()
    assert manifest is not None
    assert manifest.where == "day >= '2026-11-26' and day <= '2026-11-27' and length > 20"
    twin = "length > 20" if missing_sources == "keep" else "day = '2026-11-26' and length > 20"
    night(twin, data__output=str(tmp_path / "twin"))
    assert rows_of(out) == rows_of(tmp_path / "twin")


def test_a_file_is_treated_alike_left_out_by_folder_or_rows(night: Night, out: Path) -> None:
    night("length > 20")
    assert night("length > 20 and day = '2026-11-25'").rows == 9
    assert night("id >= 2500 and id < 2600 and length > 20").rows == 9
    assert len(rows_of(out)) == 27, "the other files have no row tonight, so they stay"
    night("id >= 2500 and id < 2600 and length > 20", data__missing_sources="drop")
    assert column_of(out, "id") == list(range(2521, 2530))
    assert sound(out)


def test_a_file_without_such_rows_is_not_read_again(night: Night, out: Path) -> None:
    assert night("id >= 2500 and id < 2600").rows == ROWS
    assert night("id >= 2500 and id < 2600").unchanged_sources == 3
    assert sound(out)


@pytest.mark.timeout(120)
def test_of_a_thousand_partitions_one_is_opened(
    job_settings: Settings, write_source: Write, tmp_path: Path, out: Path
) -> None:
    for day in range(1000):  # each would be listed as unreadable if it were opened
        place = tmp_path / "in" / f"day={day}" / "a.parquet"
        place.parent.mkdir(parents=True)
        place.write_bytes(b"PAR1 no Parquet file")
    write_source("day=700/a.parquet", {"text": ["one", "two"]})
    summary = run(job_settings(steps=[CLASSIFY], data__where="day = 700"))
    assert (summary.rows, summary.unusable) == (2, ())
    assert left_out(summary) == (999, 0)
    assert column_of(out, "text") == ["one", "two"]


@pytest.mark.timeout(300)
def test_in_a_store_only_that_partition_costs_bytes(store: Store, job_settings: Settings) -> None:
    wide = pa.table({"text": ["one", "two"], "image": [os.urandom(200_000)] * 2})
    for day in range(1000):
        store.path(f"in/day={day}/a.parquet").write_bytes(b"PAR1 no Parquet file")
    store.put("in/day=700/a.parquet", wide)
    places = {"data__input": store.url("in"), "data__output": store.url("out")}
    store.calm()
    settings = job_settings(
        steps=[CLASSIFY], **places, data__where="day = 700", data__columns=["text"]
    )
    assert run(settings).rows == 2
    touched = {request.key for request in store.requests if request.key.startswith("in/day=")}
    assert touched == {"in/day=700/a.parquet"}
    read = [request for request in store.requests if request.key in touched]
    assert len(read) < 20
    assert verify(store.url("out")).sound


def test_row_groups_that_cannot_have_a_row_are_not_read(
    job_settings: Settings, write_source: Write, out: Path
) -> None:
    place = write_source(
        "a.parquet",
        {"text": [f"row {row}" for row in range(40)], "n": list(range(40))},
        row_group_size=10,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    # Damage in every group but the third: each would fail if it were decoded.
    content = bytearray(place.read_bytes())
    metadata = pq.read_metadata(place)
    for group in (0, 1, 3):
        for at in range(2):
            column = metadata.row_group(group).column(at)
            end = column.data_page_offset + column.total_compressed_size
            content[end - 1] ^= 0xFF
    place.write_bytes(content)
    summary = run(job_settings(steps=[CLASSIFY], data__where="n >= 22 and n < 27"))
    assert (summary.rows, summary.unusable) == (5, ())
    assert column_of(out, "n") == [22, 23, 24, 25, 26]


def test_the_plan_says_what_the_filter_leaves_out(days: None, job_settings: Settings) -> None:
    where = "day = '2026-11-25' and length > 20"
    settings = job_settings(steps=[CLASSIFY], data__where=where)
    plan = preview(JobConfig.model_validate(settings))
    assert plan.rows == 9
    assert left_out(plan) == (2, 21)
    assert f"where {where}: leaves out 2 files, and 21 rows of others" in describe_plan(plan)


def test_a_filter_that_no_row_meets_is_named(days: None, job_settings: Settings) -> None:
    settings = job_settings(steps=[CLASSIFY], data__where="length > 1000")
    plan = preview(JobConfig.model_validate(settings))
    summaries = [run(settings), run(settings)]
    for told in (describe_plan(plan), *map(describe, summaries)):
        assert told.startswith("0 rows in ")
        assert "; no row meets it\n" in told
    assert [left_out(told) for told in summaries] == [left_out(plan)] * 2


def test_a_limit_counts_rows_that_are_kept(night: Night, out: Path) -> None:
    assert night("length > 20", data__limit=12).rows == 12
    assert column_of(out, "id") == [*range(2421, 2430), 2521, 2522, 2523]
    assert sound(out)


def test_failed_rows_are_listed_again_by_their_numbers(night: Night, out: Path) -> None:
    night("length > 20")
    before = [(line["source"], line["row"]) for line in read_quarantine(out)]
    (out / "_quarantine.parquet").unlink()
    repair(out)
    assert [(line["source"], line["row"]) for line in read_quarantine(out)] == before
    (out / "_manifest.json").unlink()
    repair(out)
    assert sound(out)
    assert night("length > 20").computed == 0


def test_the_viewer_shows_rows_by_their_numbers(night: Night, tmp_path: Path, out: Path) -> None:
    night("length > 20", data__columns=["length", "text"])
    night("length > 25 and id > 2500", data__output=str(tmp_path / "other"))
    viewed, other = read_published(str(out)), read_published(str(tmp_path / "other"))
    assert viewed.numbers(2) == list(range(21, 28)), "as many row groups as make eight rows"
    assert other.files[1].source == viewed.files[2].source
    with closing(Rows(viewed, "text", other)) as rows:
        assert rows.other_place(2, 5) == (1, 0)
        assert rows.other_place(2, 4) is None, "row 25 is in one output alone"


@pytest.mark.parametrize("missing_sources", ["keep", "drop"])
def test_a_delta_table_has_only_rows_that_are_kept(
    night: Night, out: Path, missing_sources: str
) -> None:
    deltalake = pytest.importorskip("deltalake")
    for where in ("day >= '2026-11-25' and length > 20", "day = '2026-11-26' and length > 25"):
        kinds = {"data__format": "delta", "data__missing_sources": missing_sources}
        night(where, **kinds, data__columns=["length"])
        assert sound(out)
    table = deltalake.DeltaTable(str(out)).to_pandas()
    last = list(range(2626, 2630))
    assert sorted(table["id"]) == (
        last if missing_sources == "drop" else [*range(2521, 2530), *last]
    )
    assert "text" not in table


def test_verify_tests_each_row_of_the_source_anew(
    night: Night, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_too_few(*arguments: Any) -> Iterator[np.ndarray]:
        for rows in kept_rows(*arguments):
            yield rows[1:]

    monkeypatch.setattr(cutting, "kept_rows", one_too_few)
    night("length > 20 and day = '2026-11-25'")
    found = [str(finding) for finding in verify(out).findings]
    assert any("has 7 rows, but 9 meet" in line for line in found), found


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("lenth > 3", "no column 'lenth'; it has ['id', 'text', 'length', 'secret', 'day']"),
        ("length = 'x'", "column 'length' holds int64, which cannot be compared as == 'x'"),
        ("day > 3", "day=2026-11-24: column 'day' is '2026-11-24' here, which is compared with"),
        ("day = true", "'2026-11-24' here, which is compared with true or false. Set data.where."),
        ("text = true", "column 'text' holds string, which cannot be compared as == True"),
        (
            "day = '2027-01-01'",
            "3 files, and no folder's name meets data.where: day = '2027-01-01'",
        ),
    ],
)
def test_what_a_filter_cannot_test_is_one_line(night: Night, where: str, line: str) -> None:
    with pytest.raises(InputError) as caught:
        night(where)
    assert line in str(caught.value)
    assert str(caught.value).endswith("Set data.where.")
    assert "\n" not in str(caught.value)


@pytest.mark.timeout(300)
def test_a_killed_run_with_a_filter_ends_as_its_twin(
    days: None, job_settings: Settings, tmp_path: Path, out: Path
) -> None:
    where = "(length > 5 or length is null) and day >= '2026-11-25'"
    settings = {"steps": [CLASSIFY], "max_error_rate": 0.5, "data__rows_per_fragment": 3}
    settings |= {"data__where": where, "data__columns": ["id", "text"]}
    twin = tmp_path / "twin"
    run(job_settings(**settings, data__output=str(twin)))
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(job_settings(**settings)))
    moments = random.Random(7)
    ends = []
    for _ in range(3):
        process = forked.start({}, "-c", RUN, str(job))
        while not (out / "_glmbatch" / "lock").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.5))
        process.kill()
        ends.append(process.wait())
    assert -signal.SIGKILL in ends
    run(job_settings(**settings))
    assert rows_of(out) == rows_of(twin)
    assert sound(out)


def test_a_column_left_out_appears_nowhere(night: Night, out: Path) -> None:
    summary = night("secret <> 'hush3'", data__columns=["length"])
    assert summary.rows == 87
    names = pq.read_schema(next(out.glob("day=*/*.parquet"))).names
    assert names[:3] == ["id", "length", "mood"]
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"hush2" not in content, path
            assert b"day 25 row" not in content, path
    for path in out.rglob("*.parquet"):
        text = str(pq.read_table(path).to_pylist())
        assert "hush2" not in text
        assert "day 25 row" not in text
    assert "day 25 row" not in describe(summary)
    assert [line["id"] for line in read_quarantine(out)] == ["2429", "2529", "2629"]
    assert sound(out)


def test_a_step_may_have_the_name_of_a_column_left_out(
    night: Night, write_source: Write, out: Path
) -> None:
    for day in DAYS:
        path = write_source(f"day=2026-11-{day}/b.parquet", {"id": [day], "text": ["fine"]})
        table = pq.read_table(path, partitioning=None).append_column("Mood_score", pa.array(["x"]))
        pq.write_table(table.append_column("mood", pa.array([f"own {day}"])), path)
    with pytest.raises(InputError, match=r"already has a column 'Mood_score'.*Rename the step"):
        night(None, data__input=str(path), data__columns=["Mood_score"])
    night(None, data__columns=["text"])
    moods = column_of(out, "mood")
    assert len(moods) == 93 and not {f"own {day}" for day in DAYS} & {*moods}
    assert sound(out)


def test_other_columns_cost_no_answer(night: Night, out: Path) -> None:
    night(None)
    few = night(None, data__columns=["length"])
    assert (few.computed, few.unchanged_sources) == (0, 0)
    assert night(None, data__columns=["length"]).unchanged_sources == 3
    assert night(None).computed == 0
    assert "secret" in pq.read_schema(next(out.glob("day=*/*.parquet"))).names
    assert sound(out)


def test_a_misspelt_column_is_named(night: Night) -> None:
    with pytest.raises(InputError, match=r"no column 'lenth'.*Set data\.columns\."):
        night(None, data__columns=["lenth"])


def test_dates_name_the_input_and_the_output(
    days: None, job_settings: Settings, tmp_path: Path
) -> None:
    folders = {
        "data__input": str(tmp_path / "in" / "day={yesterday}"),
        "data__output": str(tmp_path / "out-{today:%Y%m%d}"),
        "data__today": date(2026, 11, 26),
    }
    run(job_settings(steps=[CLASSIFY], max_error_rate=0.5, **folders))
    assert column_of(tmp_path / "out-20261126", "id") == list(range(2500, 2500 + ROWS))
    report = next((tmp_path / "out-20261126" / "_glmbatch" / "reports").glob("*.json"))
    assert "day=2026-11-25" in report.read_text()
    assert "yesterday" not in report.read_text()
