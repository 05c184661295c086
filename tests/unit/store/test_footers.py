"""Which metadata of a source's footer the output keeps beside our columns."""

from __future__ import annotations

import json

import pandas as pd
import pyarrow as pa
import pytest

from glmbatch.store.footers import kept_metadata
from glmbatch.store.types import written_field

FIELDS = [pa.field("id", pa.int64()), pa.field("text", pa.string())]
OURS = pa.field("mood", pa.string())
COLUMNS = [{"name": "id"}, {"name": "text"}]

DESCRIPTIONS = {
    "org.apache.spark.sql.parquet.row.metadata": {"type": "struct", "fields": COLUMNS},
    "parquet.avro.schema": {"type": "record", "name": "row", "fields": COLUMNS},
    "iceberg.schema": {"type": "struct", "schema-id": 0, "fields": COLUMNS},
    "parquet.proto.class": "com.example.Row",
    "parquet.proto.descriptor": 'name: "Row" field { name: "id" } field { name: "text" }',
    "writer.model.name": "protobuf",
    "thrift.class": "com.example.Row",
    "huggingface": {"info": {"features": {"id": {"dtype": "int64"}, "text": {"dtype": "string"}}}},
    "ours": {"columns": ["id", "text"]},
    "layout": "id,text",
    "ddl": "struct<id:bigint,text:string>",
    "text in json": {"ddl": "struct<id:bigint,text:string>"},
    "json in json": {"night": json.dumps({"fields": [{"name": "id"}]})},
    "binary": b"\x00\xff\x01",
}


def kept(metadata: dict[str, object]) -> dict[bytes, bytes]:
    texts = {}
    for key, value in metadata.items():
        text = json.dumps(value) if isinstance(value, dict) else value
        texts[key.encode()] = text if isinstance(text, bytes) else str(text).encode()
    return kept_metadata(pa.schema(FIELDS, texts), [*FIELDS, OURS], range(2))


@pytest.mark.parametrize("key", DESCRIPTIONS)
def test_a_description_of_the_columns_is_dropped(key: str) -> None:
    assert kept({key: DESCRIPTIONS[key]}) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("team", "数据"),
        ("licence", "CC BY 4.0 (see the page); of the owners"),
        ("source", '{"country": "cn", "night": 4}'),
        ("owner", '{"team": "a textile", "contact": "ide@y"}'),
        ("remark", "the text (of others); a textile"),
        ("geo", '{"primary_column": "shape", "columns": {"shape": {"encoding": "WKB"}}}'),
        ("org.apache.spark.version", "2.4.8"),
        ("org.apache.spark.legacyDateTime", ""),
    ],
)
def test_metadata_that_stays_true_is_kept(key: str, value: str) -> None:
    assert kept({key: value}) == {key.encode(): value.encode()}


def test_column_ids_are_dropped_at_every_depth() -> None:
    def numbered(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, kind, metadata={"PARQUET:field_id": "7", "note": "kept"})

    kind = pa.map_(pa.string(), numbered("value", pa.list_(numbered("part", pa.struct([])))))
    for field in (numbered("a", kind), numbered("b", pa.struct([numbered("c", pa.int8())]))):
        written = written_field(field)
        assert written.type == field.type
        assert written.metadata == {b"note": b"kept"}
        assert "field_id" not in pa.schema([written]).to_string(show_field_metadata=True)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"id": [1, 2], "text": ["a", "b"]}, index=pd.Index(["x", "y"], name="key")),
        pd.DataFrame({"id": [1, 2], "text": ["a", "b"]}, index=pd.RangeIndex(5, 9, 2)),
        pd.DataFrame({"id": pd.array([1, None], "Int64"), "text": pd.Categorical(["a", "b"])}),
        pd.DataFrame([[1, "a"], [2, "b"]], columns=[0, 1]),
        pd.DataFrame([[1, "a"]], columns=pd.MultiIndex.from_tuples([("a", "x"), ("b", "y")])),
        pd.DataFrame({"id": []}),
    ],
    ids=["named index", "counted index", "types", "numbers", "levels", "no rows"],
)
def test_pandas_reads_its_frame_with_our_columns(frame: pd.DataFrame) -> None:
    source = pa.Table.from_pandas(frame)
    table = source.append_column(OURS, pa.array(["good"] * len(frame), pa.string()))
    rows = range(len(frame))
    read = table.replace_schema_metadata(kept_metadata(source.schema, list(table.schema), rows))
    back = read.to_pandas()
    assert back.pop("mood").tolist() == ["good"] * len(frame)
    back.columns = frame.columns  # beside our names, numbers and tuples become text
    pd.testing.assert_frame_equal(back, frame)


def test_some_rows_get_their_part_of_a_range_index() -> None:
    source = pa.Table.from_pandas(pd.DataFrame({"text": list("abcd")}, index=pd.RangeIndex(4)))
    part = source.slice(2, 2)
    kept = kept_metadata(source.schema, list(source.schema), range(2, 4))
    assert part.replace_schema_metadata(kept).to_pandas().index.tolist() == [2, 3]


def test_invalid_pandas_metadata_is_dropped() -> None:
    assert kept({"pandas": "yes"}) == kept({"pandas": {"columns": [1]}}) == {}
