"""Which published files stay after a run: each of the four cases, and any sequence of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmbatch.errors import InputError
from glmbatch.ledger.fragments import FileFault, Fragment, Plan
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import MANIFEST, Manifest, next_manifest
from glmbatch.ledger.receipts import AnswersReceipt, OutputReceipt
from glmbatch.ledger.staying import staying
from tests.support import CLASSIFY, Settings, Write, rows_of, run


def output(
    source: str, first_row: int, rows: int, digest: str = "d", key: str = "s"
) -> OutputReceipt:
    fragment = Fragment(
        source=source,
        path="",
        digest=digest,
        stamp=(0, 0),
        first_row=first_row,
        rows=rows,
        row_groups=(),
        skip_rows=0,
    )
    answers = AnswersReceipt(
        key="k", run="r", fragment=fragment.name, step="mood", step_key=key, rows=rows
    )
    return OutputReceipt(
        key="k", run="r", fragment=fragment, output_name=fragment.output_name, answers=(answers,)
    )


def merged(
    before: Manifest | None,
    *outputs: OutputReceipt,
    root: Path = Path("/none"),
    planned: Sequence[OutputReceipt] = (),
    damaged: Iterable[str] = (),
    drop_missing: bool = False,
    limit: int | None = None,
) -> Manifest:
    """The manifest after a run that wrote `outputs` but could not write `planned`."""
    unusable = [FileFault(source=source, reason="x") for source in damaged]
    fragments = tuple(output.fragment for output in [*outputs, *planned])
    plan = Plan(root=str(root), fragments=fragments, unusable=(), limit=limit)
    stay = staying(
        before,
        plan,
        written=[output.fragment for output in outputs],
        damaged={*damaged},
        drop_missing=drop_missing,
    ).files
    return next_manifest(
        "run", plan, before, written=outputs, stay=stay, unusable=unusable, steps={}
    )


def names(manifest: Manifest) -> list[str]:
    return [f"{file.source}@{file.first_row}+{file.rows}" for file in manifest.files]


BEFORE = merged(None, output("a", 0, 5), output("a", 5, 5), output("b", 0, 3, "e"))


def test_new_files_replace_only_those_of_their_source() -> None:
    after = merged(BEFORE, output("a", 0, 9))
    assert names(after) == ["a@0+9", "b@0+3"]
    assert after.replaced == ("a-0000000005.parquet",)
    assert "a-0000000005.parquet" in merged(after, output("b", 0, 3)).replaced


def test_a_damaged_source_keeps_rows_without_a_new_file() -> None:
    assert names(merged(BEFORE, output("a", 0, 5), damaged="ab")) == ["a@0+5", "a@5+5", "b@0+3"]
    assert names(merged(BEFORE, output("a", 4, 3), damaged="ab")) == ["a@4+3", "b@0+3"]


def test_rows_of_an_older_version_never_stay_beside_new_ones() -> None:
    assert names(merged(BEFORE, output("a", 0, 5, "changed"), damaged="a")) == ["a@0+5", "b@0+3"]


def test_a_renamed_file_is_published_once(tmp_path: Path) -> None:
    assert names(merged(BEFORE, output("c", 0, 3, "e"))) == ["a@0+5", "a@5+5", "c@0+3"]
    (tmp_path / "b").touch()  # still there: a copy, not a new name
    after = merged(BEFORE, output("c", 0, 3, "e"), root=tmp_path)
    assert names(after) == ["a@0+5", "a@5+5", "b@0+3", "c@0+3"]


def test_rows_of_a_deleted_original_stay_beside_its_copy() -> None:
    before = merged(None, output("a", 0, 3), output("copy", 0, 3))
    assert names(merged(before, output("copy", 0, 3))) == ["a@0+3", "copy@0+3"]
    # With other fragments, it is still the same old copy.
    halves = [output("copy", 0, 2), output("copy", 2, 1)]
    assert names(merged(before, *halves)) == ["a@0+3", "copy@0+2", "copy@2+1"]


def test_one_new_file_replaces_one_of_two_deleted_originals() -> None:
    before = merged(None, output("a", 0, 3), output("b", 0, 3))
    assert names(merged(before, output("c", 0, 3))) == ["b@0+3", "c@0+3"]
    two = merged(before, output("c", 0, 3), output("d", 0, 3))
    assert names(two) == ["c@0+3", "d@0+3"]


def test_files_that_swap_names_are_replaced() -> None:
    before = merged(None, output("a", 0, 3, "d"), output("b", 0, 5, "e"))
    assert names(merged(before, output("a", 0, 5, "e"), output("b", 0, 3, "d"))) == [
        "a@0+5",
        "b@0+3",
    ]


def test_a_file_published_before_is_not_a_new_name() -> None:
    before = merged(None, output("a", 0, 3, "d"), output("b", 0, 5, "e"))
    assert names(merged(before, output("b", 0, 3, "d"))) == ["a@0+3", "b@0+3"]


@pytest.mark.parametrize(
    ("old", "new", "renamed"),
    [
        ("day=1/p", "day=2/p", False),  # a resend, or a file of one constant row
        ("day=1/p", "p", False),
        ("p", "day=1/p", False),
        ("day=1/hour=2/p", "day=1/hour=3/p", False),
        ("day=1/hour=2/p", "hour=2/day=1/q", True),
        ("day=1/p", "day=1/q", True),
        ("x/p", "y/p", True),
    ],
)
def test_a_move_to_another_partition_is_no_rename(old: str, new: str, renamed: bool) -> None:
    before = merged(None, output(old, 0, 3), output("other", 0, 4, "e"))
    after = merged(before, output(new, 0, 3), output("other", 0, 4, "e"))
    assert {file.source for file in after.files} == {"other", new, *([] if renamed else [old])}


def test_rows_unreadable_under_a_new_name_stay_under_the_old() -> None:
    before = merged(None, output("a", 0, 5), output("a", 5, 5))
    half = merged(before, output("c", 0, 5), planned=[output("c", 5, 5)], damaged="c")
    assert names(half) == ["a@5+5", "c@0+5"]
    assert names(merged(half, output("c", 0, 5), output("c", 5, 5))) == ["c@0+5", "c@5+5"]


def test_rows_stay_when_nothing_of_the_new_name_is_readable() -> None:
    before = merged(None, output("a", 0, 5))
    none = merged(before, output("b", 0, 3, "e"), planned=[output("c", 0, 5)], damaged="c")
    assert names(none) == ["a@0+5", "b@0+3"]


def test_missing_rows_are_removed_if_the_job_says_so() -> None:
    assert names(merged(BEFORE, output("c", 0, 4, "x"))) == ["a@0+5", "a@5+5", "b@0+3", "c@0+4"]
    assert names(merged(BEFORE, output("c", 0, 4, "x"), drop_missing=True)) == ["c@0+4"]


def test_a_source_without_new_files_keeps_its_rows() -> None:
    planned = [output("b", 0, 3, "e")]
    same = merged(BEFORE, output("a", 0, 10), planned=planned, damaged="b")
    assert names(same) == ["a@0+10", "b@0+3"]


def test_a_limited_run_is_replaced_completely() -> None:
    limited = merged(None, output("a", 0, 2), limit=2)
    assert names(merged(limited, output("b", 0, 3))) == ["b@0+3"]


ROWS = {
    "1": 5,
    "2": 8,
}  # of each version of a file; sources with the same version have the same bytes
# For each source of a run: its version, the rows of a fragment, and the fragments that cannot be
# read.
Night = dict[str, tuple[str, int, set[int]]]
NIGHTS: st.SearchStrategy[list[Night]] = st.lists(
    st.dictionaries(
        st.sampled_from("abc"),
        st.tuples(st.sampled_from("12"), st.integers(1, 4), st.sets(st.integers(0, 7))),
        min_size=1,
    ),
    max_size=6,
)


def outputs_of(night: Night) -> tuple[list[OutputReceipt], list[OutputReceipt]]:
    """The fragments that can be read, and the others."""
    written, unreadable = [], []
    for source, (version, rows, damaged) in night.items():
        for number, first_row in enumerate(range(0, ROWS[version], rows)):
            fragment = output(source, first_row, min(rows, ROWS[version] - first_row), version)
            (unreadable if number in damaged else written).append(fragment)
    return written, unreadable


def rows_by_source(manifest: Manifest | None) -> Counter[tuple[str, str]]:
    """The number of published rows of each source and version."""
    rows: Counter[tuple[str, str]] = Counter()
    for file in manifest.files if manifest else ():
        rows[file.source, file.source_digest] += file.rows
    return rows


def assert_rows_stand_once(manifest: Manifest) -> None:
    """Check that no row is published twice and that two versions of a source never mix."""
    rows: set[tuple[str, int]] = set()
    versions: dict[str, str] = {}
    for file in manifest.files:
        assert versions.setdefault(file.source, file.source_digest) == file.source_digest
        of_file = {(file.source, row) for row in range(file.first_row, file.first_row + file.rows)}
        assert not rows & of_file
        rows |= of_file


@given(nights=NIGHTS)
def test_after_any_runs_each_row_is_published_once(nights: list[Night]) -> None:
    manifest = None
    on_disk: set[str] = set()
    for night in nights:
        written, unreadable = outputs_of(night)
        damaged = {receipt.fragment.source for receipt in unreadable}
        manifest = merged(manifest, *written, planned=unreadable, damaged=damaged)
        on_disk = on_disk | {receipt.output_name for receipt in written}
        on_disk -= set(manifest.replaced)
        assert {file.output_name for file in manifest.files} == on_disk
        assert_rows_stand_once(manifest)
        for source in night.keys() - damaged:
            version = night[source][0]
            assert rows_by_source(manifest)[source, version] == ROWS[version]


@given(nights=NIGHTS)
def test_rows_of_a_missing_file_move_only_to_a_new_name(nights: list[Night]) -> None:
    manifest = None
    for night in nights:
        written, unreadable = outputs_of(night)
        damaged = {receipt.fragment.source for receipt in unreadable}
        before = rows_by_source(manifest)
        manifest = merged(manifest, *written, planned=unreadable, damaged=damaged)
        change = rows_by_source(manifest)
        change.subtract(before)
        for version in ROWS if not damaged else ():
            missing = [change[source, version] for source in "abc" if source not in night]
            gained = [change[source, version] for source in night]
            assert -sum(missing) <= sum(rows for rows in gained if rows > 0)


def test_a_foreign_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"rows": 1}')
    with pytest.raises(
        InputError,
        match=r"json: is damaged, or not of glmbatch.*Run glmbatch repair .*data\.output\.",
    ):
        Ledger(tmp_path).manifest()


@pytest.mark.parametrize("kept", [True, False])
def test_a_file_renamed_with_a_new_prompt_is_asked_again(
    kept: bool, write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    source = write_source("a.parquet", {"text": ["one", "two"]})
    write_source("b.parquet", {"text": ["three"]})
    run(job_settings(steps=[CLASSIFY]))
    source.rename(source.with_name("c.parquet"))
    asked = {**CLASSIFY, "prompt_template": "How does this sound? {text}"}
    missing = "keep" if kept else "drop"
    summary = run(job_settings(steps=[asked], data__missing_sources=missing))
    assert (summary.computed, summary.kept_sources) == (3, 0)
    assert sorted(row["text"] for row in rows_of(tmp_path / "out")) == ["one", "three", "two"]
    manifest = Ledger(tmp_path / "out").manifest()
    assert manifest is not None
    assert {file.source for file in manifest.files} == {"b.parquet", "c.parquet"}


def test_a_deleted_copy_of_other_settings_is_refused(
    write_source: Write, job_settings: Settings
) -> None:
    source = write_source("a.parquet", {"text": ["one", "two"]})
    write_source("copy.parquet", {"text": ["one", "two"]})
    run(job_settings(steps=[CLASSIFY]))
    source.unlink()
    asked = {**CLASSIFY, "prompt_template": "How does this sound? {text}"}
    with pytest.raises(
        InputError,
        match=r"1 gone \(a\.parquet\)\. Restore the files .*, or set .*missing_sources to drop",
    ):
        run(job_settings(steps=[asked]))
