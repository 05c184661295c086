"""What is read of a Delta table's log, and the tables that are refused by name."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from glmbatch.errors import InputError, StoreRefused, TransientError
from glmbatch.store.inputs.filters import left_out, row_filter
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.objects.access import storage_options
from glmbatch.store.tables.delta import find_delta
from tests.stores import Store

LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
FEATURES = {"minReaderVersion": 3, "minWriterVersion": 7}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    write_deltalake(folder, pa.table({"text": ["a", "b"], "n": [1, 2]}))
    write_deltalake(folder, pa.table({"text": ["c"], "n": [3]}), mode="append")
    return folder


def entries(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The entries of one kind in the log, in order."""
    found = []
    for path in sorted((folder / "_delta_log").glob("0*.json")):
        for line in path.read_text().splitlines():
            found += [entry for name, entry in json.loads(line).items() if name == kind]
    return found


def commit(folder: Path, *actions: dict[str, Any]) -> None:
    """Write a commit by hand, for what deltalake does not write."""
    number = len(list((folder / "_delta_log").glob("0*.json")))
    text = "".join(json.dumps(action) + "\n" for action in actions)
    (folder / "_delta_log" / f"{number:020}.json").write_text(text)


def needs(folder: Path, *features: str) -> None:
    """Say in the log that a reader needs these features."""
    lists = {"readerFeatures": list(features), "writerFeatures": list(features)}
    commit(folder, {"protocol": {**FEATURES, **lists}})


def z85(content: bytes) -> str:
    """Four bytes as five letters, as in the text of a deletion vector."""
    text = ""
    for (number,) in struct.iter_unpack(">I", content):
        text += "".join(LETTERS[number // 85**place % 85] for place in (4, 3, 2, 1, 0))
    return text


def with_deleted_row(folder: Path) -> None:
    """Delete the first row of the first file by a deletion vector, as Databricks does."""
    # Magic number, bitmaps, key; then a roaring bitmap without runs: cookie, containers, key,
    # values less one, offset, and the value 0.
    bitmap = struct.pack("<IQIIIHHIH", 1681511377, 1, 0, 12346, 1, 0, 0, 16, 0)
    vector = {
        "storageType": "i",
        "pathOrInlineDv": z85(bitmap + bytes(-len(bitmap) % 4)),
        "sizeInBytes": len(bitmap),
        "cardinality": 1,
    }
    add = entries(folder, "add")[0]
    needs(folder, "deletionVectors")
    remove = {"path": add["path"], "dataChange": True, "deletionTimestamp": 1}
    commit(folder, {"remove": remove}, {"add": {**add, "deletionVector": vector}})


def mapped(folder: Path) -> None:
    """Give the table column mapping by name."""
    metadata = entries(folder, "metaData")[0]
    schema = json.loads(metadata["schemaString"])
    for number, field in enumerate(schema["fields"], 1):
        names = {"id": number, "physicalName": f"col-{number}"}
        field["metadata"] = {f"delta.columnMapping.{name}": value for name, value in names.items()}
    mode = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "2"}
    commit(
        folder,
        {"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}},
        {"metaData": {**metadata, "configuration": mode, "schemaString": json.dumps(schema)}},
    )


def cloned(folder: Path) -> None:
    """Let the table have a file of another one."""
    add = {**entries(folder, "add")[0], "path": f"file://{folder}/other.parquet"}
    commit(folder, {"add": add})


def prefixed(folder: Path) -> None:
    """Give a partitioned table a file whose folder is a random prefix."""
    add = {**entries(folder, "add")[0], "path": "a7/x.parquet", "partitionValues": {"day": "9"}}
    commit(folder, {"add": add})


def emptied(folder: Path) -> None:
    DeltaTable(folder).delete()


def newer(folder: Path) -> None:
    commit(folder, {"protocol": {"minReaderVersion": 9, "minWriterVersion": 9}})


def test_names_the_live_files_and_their_stamps(table: Path) -> None:
    found = find_delta(table, None)
    adds = {unquote(add["path"]): add for add in entries(table, "add")}
    assert found.names == sorted(adds)
    for name, stamp in found.stamps.items():
        assert stamp == (adds[name]["size"], adds[name]["modificationTime"])
    assert (found.kind, str(found.version)) == ("table", "version 1 of the Delta table")
    assert found.columns is not None
    assert found.columns.names == ["text", "n"]
    assert len(find_delta(table, 0).names) == 1


def test_values_of_partitions_are_those_of_folders(tmp_path: Path) -> None:
    days = ["2026-11", "a b", "x/y=ü%", None, "__", "__HIVE"]
    columns = {"text": list("abcdef"), "day": days}
    write_deltalake(tmp_path / "in", pa.table(columns), partition_by=["day"])
    found = find_delta(tmp_path / "in", None)
    assert {folder_columns(name)["day"] for name in found.names} == set(days)
    for name in found.names:
        assert (tmp_path / "in" / name).is_file()
    assert found.columns is not None
    assert found.columns.names == ["text"]


@pytest.mark.parametrize(
    "values",
    [[1, 2], [date(2026, 11, 27), None], [True, False], [1.5, -2.0], [b"x", b"y"]],
    ids=["whole", "date", "boolean", "float", "bytes"],
)
def test_partitions_may_have_types(tmp_path: Path, values: list[Any]) -> None:
    rows = pa.table({"text": ["a", "b"], "part": values})
    write_deltalake(tmp_path / "in", rows, partition_by=["part"])
    assert len(find_delta(tmp_path / "in", None).names) == 2


def test_reads_checkpoints_without_older_commits(table: Path) -> None:
    DeltaTable(table).create_checkpoint()
    for path in (table / "_delta_log").glob("0*.json"):
        path.unlink()
    assert len(find_delta(table, None).names) == 2
    with pytest.raises(InputError, match=r"Set data.version to a later one, up to 1\."):
        find_delta(table, 0)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (mapped, r"column mapping \(delta.columnMapping.mode: name\)"),
        (with_deleted_row, r"has deletion vectors, .* REORG TABLE \.\.\. APPLY \(PURGE\)"),
        (cloned, r"lies outside of its folder, as in a shallow clone"),
        (emptied, r"version 2 of the Delta table has no files"),
        (newer, r"cannot be used: .*Unsupported"),
        (lambda folder: needs(folder, "fancy"), r"Feature 'fancy' is not supported"),
        (lambda folder: needs(folder, "variantType"), r"needs variantType of its readers"),
        (lambda folder: needs(folder, "catalogManaged"), r"cannot be used: .*catalog"),
    ],
    ids=["mapping", "vectors", "clone", "empty", "protocol", "unknown", "variant", "catalog"],
)
def test_refuses_by_name(table: Path, harm: Callable[[Path], None], reason: str) -> None:
    harm(table)
    with pytest.raises(InputError, match=reason) as refused:
        find_delta(table, None)
    assert "\n" not in str(refused.value)


def test_refuses_folders_that_say_another_value(tmp_path: Path) -> None:
    rows = pa.table({"text": ["a"], "day": ["1"]})
    write_deltalake(tmp_path / "in", rows, partition_by=["day"])
    prefixed(tmp_path / "in")
    with pytest.raises(InputError, match=r"x.parquet belongs to day=9, but its folders do not"):
        find_delta(tmp_path / "in", None)


def test_features_without_use_are_served(table: Path) -> None:
    needs(table, "deletionVectors", "columnMapping", "timestampNtz")
    assert len(find_delta(table, None).names) == 2
    needs(table, "typeWidening", "v2Checkpoint", "vacuumProtocolCheck")
    assert len(find_delta(table, None).names) == 2


def test_reads_a_table_in_a_store(store: Store) -> None:
    options = {"allow_http": "true", "conditional_put": "etag"}
    write_deltalake(store.url("in"), pa.table({"text": ["a"]}), storage_options=options)
    store.requests.clear()
    found = find_delta(store.path("in"), None)
    assert len(found.names) == 1
    assert not [request for request in store.requests if request.key.endswith(".parquet")]


def test_without_deltalake_one_line_says_what_to_install(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(InputError, match=r"not installed. Run pip install 'glmbatch\[delta\]'\.$"):
        find_delta(table, None)


def test_a_store_that_is_away_is_tried_again_later(store: Store) -> None:
    write_deltalake(
        store.url("in"),
        pa.table({"text": ["a"]}),
        storage_options=storage_options(store.path("in")),
    )
    for harm, kind in ((500, TransientError), ("reset", TransientError), (403, StoreRefused)):
        store.harm = lambda request, harm=harm: harm
        with pytest.raises(kind, match=r"the store (refuses it|cannot be reached)"):
            find_delta(store.path("in"), None)
    # Only the log is refused, so the store itself is there.
    store.harm = lambda request: 403 if request.key.endswith("0.json") else None
    with pytest.raises((TransientError, StoreRefused)) as refused:
        find_delta(store.path("in"), None)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("n > 5", {"c", "none"}),
        ("n = 4", {"b", "none"}),
        ("n in (1, 9)", {"a", "none"}),
        ("n <> 4", {"a", "b", "c", "none"}),
        ("not (n >= 3)", {"a", "none"}),
        ("n is null", {"c", "none"}),
        ("n > 5 and name < 'b'", {"none"}),
        ("n > 5 or name < 'b'", {"a", "c", "none"}),
        ("day = '2026-11-02'", {"b"}),
        ("day >= '2026-11-02' and n = 1", set()),
        ("score > 1.5", set()),
        ("not (score > 1.5)", {"a", "b", "c", "none"}),
        ("seen > '2026-11-01'", {"a", "b", "c", "none"}),
        ("n > 'x'", {"a", "b", "c", "none"}),
        ("text > 'zzz'", set()),
    ],
)
def test_the_logs_bounds_leave_files_out(tmp_path: Path, where: str, kept: set[str]) -> None:
    folder = tmp_path / "in"
    for number, name in enumerate("abc"):
        begin = 3 * number + 1
        columns = {
            "n": [begin, begin + 1] if name != "c" else [begin, None],
            "name": [name, name],
            "body": ["x", "y"],
            "day": [date(2026, 11, number + 1)] * 2,
            "score": [1.0, float("nan")],
            "seen": [datetime(2026, 11, 1)] * 2,
        }
        write_deltalake(folder, pa.table(columns), mode="append")
    files = {name: "abc"[number] for number, name in enumerate(paths(folder))}
    add = {**entries(folder, "add")[0], "path": "none.parquet"}
    commit(folder, {"add": {**add, "stats": None}})
    files["none.parquet"] = "none"
    found = find_delta(folder, None)
    gone = left_out(found, row_filter(where, "body", {}))
    expected = kept | {"none"}
    assert {files[name] for name in found.names if name not in gone} == expected


def paths(folder: Path) -> list[str]:
    return [unquote(add["path"]) for add in entries(folder, "add")]
