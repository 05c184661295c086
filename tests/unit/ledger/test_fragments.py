"""Files are checked against the job and cut into fragments; bad ones are left out or refused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmbatch.errors import InputError, UnusableFile
from glmbatch.ledger.fragments import FileFault, Plan, none_usable, read_fragment
from glmbatch.ledger.input.ranges import cut
from glmbatch.run.plan import plan_run
from glmbatch.settings.job import JobConfig
from glmbatch.store.files import too_long
from tests.stores import Store
from tests.support import CLASSIFY, Settings, Write, run


def planned(settings: dict[str, Any]) -> Plan:
    return plan_run(JobConfig.model_validate(settings)).plan


@given(group_rows=st.lists(st.integers(0, 50), max_size=12), size=st.integers(1, 40))
def test_each_row_is_in_one_fragment_of_limited_size(group_rows: list[int], size: int) -> None:
    starts = [sum(group_rows[:index]) for index in range(len(group_rows))]
    expected = 0
    for first_row, rows, groups, skip in cut(group_rows, size):
        assert first_row == expected
        assert rows <= size
        assert not groups or starts[groups[0]] + skip == first_row
        assert sum(group_rows[group] for group in groups) - skip >= rows
        expected += rows
    assert expected == sum(group_rows)


def test_only_row_groups_that_are_too_large_are_cut() -> None:
    assert list(cut([3, 3, 10, 2], 6)) == [
        (0, 6, (0, 1), 0),
        (6, 6, (2,), 0),
        (12, 4, (2,), 6),
        (16, 2, (3,), 0),
    ]


def test_a_file_without_rows_is_one_empty_fragment(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("empty.parquet", {"text": pa.array([], pa.string())})
    plan = planned(job_settings())
    assert [(each.name, each.rows) for each in plan.fragments] == [("empty.parquet@0", 0)]


def test_fragments_read_back_the_rows_of_the_file(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": [f"t{number}" for number in range(30)]}, row_group_size=13)
    plan = planned(job_settings())
    read = [
        value
        for each in plan.fragments
        for batch in read_fragment(each)
        for value in batch["text"].to_pylist()
    ]
    assert read == [f"t{number}" for number in range(30)]
    assert [each.output_name for each in plan.fragments][:2] == [
        "a-0000000000.parquet",
        "a-0000000008.parquet",
    ]


def test_the_limit_takes_the_first_rows(write_source: Write, job_settings: Settings) -> None:
    write_source("a.parquet", {"text": ["x"] * 10})
    write_source("b.parquet", {"text": ["x"] * 10})
    assert [each.rows for each in planned(job_settings(data__limit=11)).fragments] == [8, 2, 1]


def test_a_new_file_renames_no_fragment(write_source: Write, job_settings: Settings) -> None:
    write_source("b.parquet", {"text": ["x"] * 10})
    before = planned(job_settings()).fragments
    write_source("a.parquet", {"text": ["y"] * 10})
    assert set(before) < set(planned(job_settings()).fragments)


def test_a_file_changed_while_it_is_read_is_refused(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": ["x"] * 10})
    fragment = planned(job_settings()).fragments[0]
    write_source("a.parquet", {"text": ["y"] * 10})
    with pytest.raises(UnusableFile, match="was changed while the run read it"):
        list(read_fragment(fragment))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"body": ["x"]},
            r"a\.parquet: no column 'text'; it has \['body'\]\. Set data\.text_column\.",
        ),
        (
            {"text": [1]},
            r"a\.parquet: column 'text' holds int64, not text\. Set data\.text_column\.",
        ),
        (
            {"text": [["x"]]},
            r"a\.parquet: column 'text' holds list<.*>, not text\. Set data\.text_column\.",
        ),
    ],
)
def test_a_column_that_no_file_has_stops_the_run(
    write_source: Write, job_settings: Settings, columns: dict[str, Any], message: str
) -> None:
    write_source("a.parquet", columns)
    with pytest.raises(InputError, match=message):
        planned(job_settings())


def test_the_most_frequent_reason_is_said() -> None:
    def fault(name: str, reason: str) -> FileFault:
        return FileFault(source=name, reason=f"in/{name}: {reason}")

    odd = fault("a", "not readable as Parquet: it is empty.")
    usual = [fault(f"b{n}", f"no column 'text'; it has ['x', '{n}']. Set it.") for n in range(3)]
    assert str(none_usable("in", [odd, *usual])) == (
        "in: none of 4 files can be used; 3 of them like: in/b0: no column 'text'; it has "
        "['x', '0']. Set it."
    )
    assert "3 files can be used; the first: in/b0" in str(none_usable("in", usual))
    assert "2 files can be used; the first: in/a" in str(none_usable("in", [odd, usual[0]]))


def test_a_prompt_that_names_an_unknown_column_says_which_step(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    settings = job_settings()
    settings["steps"][1]["prompt_template"] = "{text} {colour}"
    with pytest.raises(InputError, match=r"no column 'colour'") as refused:
        planned(settings)
    assert str(refused.value).endswith(
        "Set steps[1].prompt_template, with {{ and }} for literal braces."
    )


@pytest.mark.parametrize("name", ["mood", "MOOD", "reply_error", "mood_scores"])
def test_a_colliding_column_is_refused_before_any_work(
    write_source: Write, job_settings: Settings, name: str
) -> None:
    write_source("a.parquet", {"text": ["x"], name: ["y"]})
    with pytest.raises(InputError, match=f"already has a column '{name}'.*Rename the step"):
        planned(job_settings())


def test_a_name_like_a_partition_folder_is_refused(
    write_source: Write, job_settings: Settings
) -> None:
    write_source("mood=1/a.parquet", {"text": ["x"]})
    with pytest.raises(InputError, match="already has a column 'mood'"):
        planned(job_settings())


@pytest.mark.parametrize("on_error", ["quarantine", "null"])
def test_a_damaged_file_loses_only_itself(
    write_source: Write, job_settings: Settings, on_error: str
) -> None:
    write_source("good.parquet", {"text": ["x"]})
    damaged = write_source("bad.parquet", {"text": ["x"]})
    damaged.write_bytes(damaged.read_bytes()[:-9])
    plan = planned(job_settings(on_error=on_error))
    assert [each.source for each in plan.fragments] == ["good.parquet"]
    assert [fault.source for fault in plan.unusable] == ["bad.parquet"]
    with pytest.raises(UnusableFile, match=r"bad\.parquet"):
        planned(job_settings(on_error="raise"))


def test_an_output_inside_the_input_is_refused(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    with pytest.raises(InputError, match="lies inside the input"):
        planned(job_settings(data__output=str(tmp_path / "in" / "out")))
    with pytest.raises(InputError, match="holds the input file"):
        planned(job_settings(data__output=str(tmp_path)))
    file = str(tmp_path / "in" / "a.parquet")
    assert (
        planned(job_settings(data__input=file, data__output=str(tmp_path / "in" / "out"))).rows == 1
    )


def test_file_names_include_partition_folders(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("year=1/day=2/a.parquet", {"text": ["x"]})
    for pattern in (
        "in",
        "in/year=1",
        "in/year=1/day=2",
        "in/year=1/day=2/a.parquet",
        "in/*/*/*.parquet",
    ):
        plan = planned(job_settings(data__input=str(tmp_path / pattern)))
        assert [each.source for each in plan.fragments] == ["year=1/day=2/a.parquet"]


def test_two_files_with_the_same_output_are_refused(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    write_source("a", {"text": ["y"]})
    with pytest.raises(
        InputError, match=r"a and a\.parquet would both be written to a-0000000000\.parquet"
    ):
        planned(job_settings(data__input=str(tmp_path / "in" / "*")))


def test_an_output_that_is_a_file_is_refused(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    (tmp_path / "out").write_text("")
    with pytest.raises(
        InputError, match=r"is a file where a folder is expected\. Set data\.output\."
    ):
        planned(job_settings())


CHINESE = "中" * 79
TOO_LONG = [f"{CHINESE}.parquet", f"{'x' * 245}.parquet", f"{'é' * 119}abc.parquet"]


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_name_too_long_for_an_output_is_reported_at_once(
    write_source: Write, job_settings: Settings, name: str
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    write_source(name, {"text": ["x"]})
    (fault,) = planned(job_settings()).unusable
    assert re.search(
        r"name of its output would have 2\d\d bytes, 255 .*Rename the file", fault.reason
    )
    assert fault.rows == 1


def test_a_name_that_just_fits_is_read(write_source: Write, job_settings: Settings) -> None:
    write_source(f"{'x' * 236}.parquet", {"text": ["x"]})
    assert not planned(job_settings()).unusable
    with pytest.raises(InputError, match="would have 288 bytes"):  # the name includes a digest
        planned(job_settings(data__format="delta"))


def test_paths_and_keys_have_a_longest_length(tmp_path: Path) -> None:
    room = os.pathconf(tmp_path, "PC_PATH_MAX") - 1 - len(f"{tmp_path}/")
    longest = ("d/" * (room // 2 - 1)).ljust(room, "d")
    assert too_long(tmp_path, longest) is None
    assert "with its folders" in (too_long(tmp_path, f"{longest}d") or "")
    assert "1024 are allowed" in (too_long("s3://bucket/out", f"{'d' * 1021}") or "")
    assert too_long("s3://bucket/out", f"{'d' * 1020}") is None


def test_a_root_keeps_the_name_that_its_user_gave_it(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    for version in ("v1", "v2"):
        write_source(f"{version}/a.parquet", {"text": ["x"]})
    link = tmp_path / "in" / "current"
    settings = job_settings(data__input=str(link), steps=[CLASSIFY])
    link.symlink_to("v1")
    assert run(settings).computed == 1
    link.unlink()
    link.symlink_to("v2")
    assert planned(settings).root == str(link)
    summary = run(settings)
    assert (summary.computed, summary.kept_sources) == (0, 0)
    # The link's target counts as the same root, as in manifests of earlier versions.
    assert run(job_settings(data__input=str(link.resolve()), steps=[CLASSIFY])).computed == 0
    assert run(settings).computed == 0
    # After a link, `..` is another folder.
    (tmp_path / "link").symlink_to(tmp_path / "in" / "v1")
    above = planned(job_settings(data__input=f"{tmp_path}/link/../v2", data__output="o"))
    assert above.root == str(tmp_path / "in" / "v2")


REACHED = [
    ("in/*", "in/out"),
    ("in/*", "in/day=1/out"),
    ("in/day=*", "in/day=1/out"),
    ("in/*/*.parquet", "in"),
    ("in/**", "in/out"),
    ("in/**/*.parquet", "in/x/y"),
    ("in", "in/out"),
    ("in/day=1", "."),
    ("in/day=1/a.parquet", "in/day=1"),
    ("in/[do]*", "in/out"),
]
BESIDE = [
    ("in/*/*.parquet", "in/out"),
    ("in/day=*", "in/out"),
    ("in/day=?/*", "in/out"),
    ("in/*/a.parquet", "out"),
]


@pytest.mark.parametrize("in_store", [False, True])
def test_an_output_that_the_input_would_match_is_refused(
    write_source: Write, job_settings: Settings, tmp_path: Path, store: Store, in_store: bool
) -> None:
    table = pa.table({"text": ["x"]})
    write_source("day=1/a.parquet", table)
    store.put("in/day=1/a.parquet", table)

    def settings(places: tuple[str, str]) -> dict[str, Any]:
        pattern, output = places
        if in_store:
            pattern, output = store.url(pattern), store.url(output).removesuffix("/.")
        else:
            pattern, output = f"{tmp_path}/{pattern}", f"{tmp_path}/{output}"
        return job_settings(data__input=pattern, data__output=output)

    for places in REACHED:
        with pytest.raises(InputError, match=r"lies inside the input|holds the input file"):
            planned(settings(places))
    for places in BESIDE:
        assert planned(settings(places)).rows == 1


def test_links_out_of_the_input_are_read_if_trusted(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    blob = write_source("blobs/5f3a", {"text": ["x"]})
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    (snapshot / "a.parquet").symlink_to(blob)
    settings = job_settings(data__input=str(snapshot))
    with pytest.raises(InputError, match=r"leads out of the input.*data\.follow_links if"):
        planned(settings)
    settings["data"]["follow_links"] = True
    assert planned(settings).rows == 1


@pytest.mark.parametrize("name", ["a\nb.parquet", "a\x1b[31m.parquet", "a\u202eb.parquet"])
def test_odd_characters_in_a_name_break_no_line(
    write_source: Write, job_settings: Settings, name: str
) -> None:
    write_source(name, {"body": ["x"]})
    write_source(f"x{name}", {"text": ["x"]})
    (fault,) = planned(job_settings()).unusable
    assert fault.source == name
    assert fault.reason.isprintable()
    assert name.encode("unicode_escape").decode() in fault.reason
