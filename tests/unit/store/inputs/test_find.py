"""Files are found by folder, glob and name; skipped ones are counted, bad names are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from glmbatch.errors import InputError
from glmbatch.store.inputs.find import (
    HIDDEN,
    LINKED_FOLDER,
    OTHER_ENDING,
    find_files,
    is_hidden,
)
from glmbatch.store.inputs.found import Found
from tests.stores import BUCKET, Store


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def counts(found: Found) -> dict[str, tuple[int, str]]:
    return {skipped.reason: (skipped.count, skipped.first) for skipped in found.skipped}


def test_a_folder_means_all_parquet_files_below_it(tmp_path: Path) -> None:
    touch(tmp_path, "day=2/a.parquet", "day=1/b.parquet", "top.parquet", "notes.txt")
    found = find_files(str(tmp_path))
    assert found.root == tmp_path
    assert found.names == ["day=1/b.parquet", "day=2/a.parquet", "top.parquet"]


def test_hidden_and_underscore_names_are_skipped_at_every_depth(tmp_path: Path) -> None:
    touch(
        tmp_path, "a.parquet", ".b.parquet", "_c.parquet", "_temporary/d.parquet", ".git/e.parquet"
    )
    assert find_files(str(tmp_path)).names == ["a.parquet"]
    assert find_files(str(tmp_path / "**" / "*.parquet")).names == ["a.parquet"]


def test_a_glob_matches_below_its_first_plain_folder(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "in/day=1/a.parquet",
        "in/day=2/a.parquet",
        "in/day=2/deep/b.parquet",
        "other/c.parquet",
    )
    found = find_files(str(tmp_path / "in" / "day=[2-9]*"))
    assert found.root == tmp_path / "in"
    assert found.names == ["day=2/a.parquet", "day=2/deep/b.parquet"]


def test_one_file_is_found_by_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet")
    found = find_files(str(tmp_path / "a.parquet"))
    assert (found.root, found.names) == (tmp_path, ["a.parquet"])


@pytest.mark.parametrize("pattern", ["missing", "missing/*.parquet", "empty", "empty/*.parquet"])
def test_a_missing_input_says_which_setting_to_change(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"Set data\.input\.$"):
        find_files(str(tmp_path / pattern))


def test_partitions_may_begin_with_an_underscore(tmp_path: Path) -> None:
    touch(tmp_path, "_year=1/a.parquet", "_year=1/_b.parquet", ".y=1/c.parquet", "_a=1.parquet")
    found = find_files(str(tmp_path))
    assert found.names == ["_a=1.parquet", "_year=1/a.parquet"]
    assert counts(found) == {HIDDEN: (2, ".y=1/")}
    assert find_files(str(tmp_path / "_year=1")).names == ["_year=1/a.parquet"]
    assert not is_hidden("_year=1/a.parquet")


def test_lines_are_found_only_where_they_are_read(tmp_path: Path) -> None:
    touch(tmp_path, "a.CSV", "b.jsonl.gz", "c.tsv.zst", "d.parquet", "e.csv.zip", "f.json")
    found = find_files(str(tmp_path), lines=True)
    assert found.names == ["a.CSV", "b.jsonl.gz", "c.tsv.zst", "d.parquet"]
    assert find_files(str(tmp_path)).names == ["d.parquet"]


def test_the_ending_may_be_in_any_case(tmp_path: Path) -> None:
    touch(tmp_path, "a.PARQUET", "b.Parquet", "c.parquet")
    assert find_files(str(tmp_path)).names == ["a.PARQUET", "b.Parquet", "c.parquet"]


SKIPPED = {
    OTHER_ENDING: ["d.parq", "e", "f.csv", "deep/g.parquet.crc"],
    HIDDEN: [".h.parquet", "_i.parquet", "_SUCCESS"],
}


def test_skipped_names_are_counted_by_reason(tmp_path: Path, store: Store) -> None:
    names = ["in/a.parquet", *(f"in/{name}" for some in SKIPPED.values() for name in some)]
    hidden = ["in/_tmp/k.parquet", "in/_tmp/l.parquet", "in/x/.m/n.parquet"]
    touch(tmp_path, *names, *hidden, "in/x/o.parquet")
    (tmp_path / "in" / "old").symlink_to(tmp_path)
    for name in (*names, *hidden, "in/x/o.parquet"):
        store.path(name).write_bytes(b"x")
    expected = {OTHER_ENDING: (4, "d.parq"), HIDDEN: (5, ".h.parquet")}
    assert counts(find_files(store.url("in"))) == expected
    found = find_files(str(tmp_path / "in"))
    assert counts(found) == {**expected, LINKED_FOLDER: (1, "old")}
    assert found.names == ["a.parquet", "x/o.parquet"]
    every = find_files(str(tmp_path / "in" / "**"))
    assert (every.names, every.skipped) == (found.names, found.skipped)


@pytest.mark.parametrize(
    ("name", "word"),
    [("d.parq", "another ending"), ("e", "another ending"), ("_f.parquet", "begins with . or _")],
)
def test_a_folder_without_readable_names_says_why(tmp_path: Path, name: str, word: str) -> None:
    touch(tmp_path, f"in/{name}")
    with pytest.raises(InputError, match=f"no file to read matches; not read: 1 .*{word}.*{name}"):
        find_files(str(tmp_path / "in"))


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "/".join("abcdefgh")
    touch(tmp_path, *(f"{deep[: 2 * depth + 1]}/x.parquet" for depth in range(8)))
    listed: list[str] = []
    scandir = os.scandir

    def counting(path: Path) -> object:
        listed.append(str(path))
        return scandir(path)

    monkeypatch.setattr("glmbatch.store.inputs.find.os.scandir", counting)
    assert len(find_files(str(tmp_path / "**")).names) == 8
    # pathlib's own glob lists each folder once more.
    assert max(map(listed.count, listed)) <= 2


def test_links_to_folders_are_followed_only_on_request(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.parquet", "in/day=1/b.parquet", "else/c.parquet", "else/deep/d.parquet")
    (tmp_path / "in" / "there").symlink_to(tmp_path / "else")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "day=1")
    (tmp_path / "else" / "deep" / "back").symlink_to(tmp_path / "else")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    own = ["a.parquet", "day=1/b.parquet"]
    assert find_files(str(tmp_path / "in")).names == own
    found = find_files(str(tmp_path / "in"), follow_links=True)
    assert found.names == [*own, "there/c.parquet", "there/deep/d.parquet"]
    assert counts(found) == {LINKED_FOLDER: (3, "again")}


BYTES = [b"caf\xe9.parquet", b"caf\xe9/a.parquet", b"\xff/\xfe.parquet"]


@pytest.mark.parametrize("name", BYTES)
def test_a_name_that_is_not_utf8_is_left_out(tmp_path: Path, name: bytes) -> None:
    touch(tmp_path, "a.parquet", os.fsdecode(name))
    for pattern in ("", "**/*.parquet"):
        found = find_files(str(tmp_path / pattern))
        assert found.names == ["a.parquet"]
        (reason,) = found.refused.values()
        escaped = name.decode("ascii", "backslashreplace")
        assert reason == f"{tmp_path}/{escaped}: its name is not UTF-8. Rename the file."


# A mark of each kind of table, and its name.
TABLES = [
    ("_delta_log/00000000000000000000.json", "a Delta table"),
    ("metadata/v1.metadata.json", "an Iceberg table"),
    ("metadata/00001-6f.gz.metadata.json", "an Iceberg table"),
    (".hoodie/hoodie.properties", "a Hudi table"),
    (".hoodie_partition_metadata", "a part of a Hudi table"),
    ("snapshot/snapshot-1", "a Paimon table"),
    ("_spark_metadata/0", "an output of a Spark stream"),
]
# Where such a table is, relative to the input.
INPUTS = ["", "/t", "/t/day=1", "/t/day=1/a.parquet", "/*", "/t/*.parquet", "/t/day=*/*.parquet"]
INPUTS += ["/**/*.parquet", "/t/day=1/deep", "/*/day=1/*", "/**"]


@pytest.mark.parametrize(("mark", "kind"), TABLES)
def test_tables_of_other_formats_are_refused_anywhere(
    tmp_path: Path, store: Store, mark: str, kind: str
) -> None:
    names = [f"in/t/{mark}", "in/t/a.parquet", "in/t/day=1/a.parquet", "in/t/day=1/deep/b.parquet"]
    touch(tmp_path, *names, "in/b.parquet")
    (tmp_path / "link").symlink_to(tmp_path / "in" / "t" / "day=1")
    for name in (*names, "in/b.parquet"):
        store.path(name).write_bytes(b"x")
    addresses = [str(tmp_path / "link")]
    for place in INPUTS:
        addresses += [f"{tmp_path}/in{place}", store.url(f"in{place}")]
    for address in addresses:
        with pytest.raises(InputError, match=f"in/t: is {kind} ") as refused:
            find_files(address)
        assert "\n" not in str(refused.value)
        assert "current rows to a separate folder" in str(refused.value)
    # Files beside the table are read.
    assert find_files(f"{tmp_path}/in/*.parquet").names == ["b.parquet"]
    assert find_files(store.url("in/b.parquet")).names == ["b.parquet"]


@pytest.mark.parametrize(
    "name", ["metadata/a.parquet", "metadata/notes.json", "snapshot/a.parquet"]
)
def test_the_name_alone_does_not_make_a_table(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "b.parquet", name)
    assert "b.parquet" in find_files(str(tmp_path)).names


def test_folders_above_an_input_are_listed_briefly(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmbatch.store.inputs.tables.MOST_KEYS", 3)
    for name in ("metadata/x/{}.json", "snapshot/snapshot-{}.jpg", "metadata_{}", "_delta_log-{}"):
        for number in range(20):
            store.path(f"a/{name.format(number)}").write_bytes(b"x")
    store.path("a/b/in/a.parquet").write_bytes(b"x")
    store.calm()
    assert find_files(store.url("a/b/in")).names == ["a.parquet"]
    # The input, and eight prefixes in each of the four folders above it.
    assert len(store.requests) <= 40
    # A page has twice as many keys as are read from it; the input is checked and listed.
    assert sum(request.listed for request in store.requests) <= 10


ODD = ["/a.parquet", "./b.parquet", "../c.parquet", "x//d.parquet", "x/./e.parquet", "f.parquet/"]


def put(store: Store, key: str, content: bytes) -> None:
    store.client.put_object(Bucket=BUCKET, Key=key, Body=content)


@pytest.mark.parametrize("key", ODD)
def test_keys_that_no_path_can_hold_are_left_out(store: Store, key: str) -> None:
    put(store, f"{store.folder}/in/{key}", b"x")
    store.path("in/z.parquet").write_bytes(b"x")
    found = find_files(store.url("in"))
    assert found.names == ["z.parquet"]
    ((name, reason),) = found.refused.items()
    assert name == key
    assert reason.startswith(f"{store.url('in')}/{key}: its key has ")


@pytest.mark.parametrize(
    "name", ["a\\b.parquet", "in\\c.parquet", "\\.parquet", "a b%20+#?.parquet"]
)
def test_odd_keys_that_paths_can_hold_are_read(store: Store, name: str) -> None:
    store.path(f"in/{name}").write_bytes(b"x")
    assert find_files(store.url("in")).names == [name]


ADDRESSES: list[Callable[[str], str]] = [
    lambda bucket: f"s3://{bucket}//in",
    lambda bucket: f"s3://{bucket}/x//in",
    lambda bucket: f"s3://{bucket}/./in",
    lambda bucket: f"s3://{bucket}/x/../in",
    lambda bucket: f"s3://{bucket}/in//",
    lambda bucket: f"s3:///{bucket}/in",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_of_other_objects_are_refused(address: Callable[[str], str]) -> None:
    with pytest.raises(
        InputError, match=r"has (an empty part|a part '\.\.?')|is not (an|written as an) address"
    ):
        find_files(address("bucket"))
