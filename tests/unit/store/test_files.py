"""Finding files by folder, glob and name; committing by one rename."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glmbatch.errors import InputError, TransientError
from glmbatch.store.files import committed, digest_file, find_files


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_folder_stands_for_all_parquet_files_below_it(tmp_path: Path) -> None:
    touch(tmp_path, "day=2/a.parquet", "day=1/b.parquet", "top.parquet", "notes.txt")
    assert find_files(str(tmp_path)) == (
        tmp_path,
        ["day=1/b.parquet", "day=2/a.parquet", "top.parquet"],
    )


def test_hidden_and_underscore_names_are_skipped_at_every_depth(tmp_path: Path) -> None:
    touch(
        tmp_path, "a.parquet", ".b.parquet", "_c.parquet", "_temporary/d.parquet", ".git/e.parquet"
    )
    assert find_files(str(tmp_path))[1] == ["a.parquet"]
    assert find_files(str(tmp_path / "**" / "*.parquet"))[1] == ["a.parquet"]


def test_a_glob_matches_below_its_first_plain_folder(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "in/day=1/a.parquet",
        "in/day=2/a.parquet",
        "in/day=2/deep/b.parquet",
        "other/c.parquet",
    )
    root, names = find_files(str(tmp_path / "in" / "day=[2-9]*"))
    assert (root, names) == (tmp_path / "in", ["day=2/a.parquet", "day=2/deep/b.parquet"])


def test_one_file_is_found_by_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet")
    assert find_files(str(tmp_path / "a.parquet")) == (tmp_path, ["a.parquet"])


@pytest.mark.parametrize("pattern", ["missing", "missing/*.parquet", "empty", "empty/*.parquet"])
def test_nothing_found_says_which_setting_to_change(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"Set data\.input\.$"):
        find_files(str(tmp_path / pattern))


def test_a_committed_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with pytest.raises(KeyError), committed(path) as partial:
        partial.write_bytes(b"half")
        raise KeyError
    assert not list(path.parent.iterdir())
    with committed(path) as partial:
        partial.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_output_that_is_a_file_is_the_callers_to_mend(tmp_path: Path) -> None:
    touch(tmp_path, "out")
    with pytest.raises(InputError, match=r"Set data\.output\."), committed(tmp_path / "out" / "x"):
        pass


def test_a_full_disk_is_the_machines_fault(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    from glmbatch.store.files import writable

    with (
        pytest.raises(TransientError, match="No space left"),
        writable(full),
        full.open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_a_digest_is_of_the_bytes(tmp_path: Path) -> None:
    touch(tmp_path, "a", "b")
    assert digest_file(tmp_path / "a") == digest_file(tmp_path / "b")
    os.truncate(tmp_path / "b", 0)
    assert digest_file(tmp_path / "a") != digest_file(tmp_path / "b")
