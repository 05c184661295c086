"""Random tables of all types that Parquet can store, with nesting, nulls and odd names."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import random
from collections.abc import Callable
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa

ROWS = 4
DEPTH = 3
LETTERS = ["a", "B", "z", "0", "_", " ", ".", "-", "'", '"', "数", "é", "🎉", "{", "$", "`", "/"]
WORDS = ["", "plain", "很好", "x" * 40, "a\nb", "\u200b", "0", "null", "🎉"]
EPOCH = dt.datetime(1970, 1, 1)

Make = Callable[[random.Random], Any]


def _integers(bits: int, signed: bool) -> Make:
    low = -(2 ** (bits - 1)) if signed else 0
    high = 2 ** (bits - 1 if signed else bits) - 1
    return lambda rng: rng.choice([low, high, 0, rng.randint(low, high)])


def _number(rng: random.Random) -> float:
    return rng.choice([0.0, -0.0, 1.5, float("nan"), float("inf"), float(np.float16(rng.random()))])


def _decimal(digits: int, scale: int) -> Make:
    limit = 10**digits - 1
    return lambda rng: decimal.Decimal(rng.randint(-limit, limit)).scaleb(
        -scale, decimal.Context(prec=90)
    )


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def _bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 3, 20]))


def _uuid(rng: random.Random) -> bytes:
    return UUID(int=rng.getrandbits(128)).bytes


FAR = _integers(50, signed=True)
LEAVES: list[tuple[pa.DataType, Make]] = [
    (pa.null(), lambda rng: None),
    (pa.bool_(), lambda rng: rng.random() < 0.5),
    *((getattr(pa, f"int{bits}")(), _integers(bits, True)) for bits in (8, 16, 32, 64)),
    *((getattr(pa, f"uint{bits}")(), _integers(bits, False)) for bits in (8, 16, 32, 64)),
    (pa.float16(), lambda rng: np.float16(_number(rng))),
    (pa.float32(), _number),
    (pa.float64(), _number),
    (pa.string(), _word),
    (pa.large_string(), _word),
    (pa.string_view(), _word),
    (pa.binary(), _bytes),
    (pa.large_binary(), _bytes),
    (pa.binary_view(), _bytes),
    (pa.binary(5), lambda rng: rng.randbytes(5)),
    (pa.date32(), _integers(20, True)),
    (pa.date64(), lambda rng: rng.randint(-(10**5), 10**5) * 86_400_000),
    (pa.time32("s"), lambda rng: rng.randrange(86_400)),
    (pa.time32("ms"), lambda rng: rng.randrange(86_400_000)),
    (pa.time64("us"), lambda rng: rng.randrange(86_400 * 10**6)),
    (pa.time64("ns"), lambda rng: rng.randrange(86_400 * 10**9)),
    (pa.timestamp("s"), _integers(35, True)),
    (pa.timestamp("ms", "UTC"), _integers(45, True)),
    (pa.timestamp("us"), FAR),
    (pa.timestamp("us", "Asia/Shanghai"), FAR),
    (pa.timestamp("ns"), _integers(62, True)),
    (pa.timestamp("ns", "+05:30"), _integers(62, True)),
    (pa.duration("s"), FAR),
    (pa.duration("ns"), FAR),
    (pa.decimal32(7, 2), _decimal(7, 2)),
    (pa.decimal64(16, 5), _decimal(16, 5)),
    (pa.decimal128(38, 10), _decimal(38, 10)),
    (pa.decimal256(60, 3), _decimal(60, 3)),
    (pa.uuid(), _uuid),
    (pa.json_(pa.string()), lambda rng: json.dumps({"a": rng.random()})),
    (pa.bool8(), lambda rng: rng.randrange(2)),
    (pa.opaque(pa.binary(), "thing", "maker"), _bytes),
]


def _leaf(rng: random.Random, rows: int) -> pa.Array:
    kind, make = rng.choice(LEAVES)
    values = [None if rng.random() < 0.25 else make(rng) for _ in range(rows)]
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    array = pa.array(values, kind)
    if pa.types.is_string(kind) and rng.random() < 0.5:
        return array.dictionary_encode()
    return array


def _array(rng: random.Random, rows: int, depth: int) -> pa.Array:
    """A column of `rows` values, nested at most `depth` levels deep."""
    form = rng.choice(["leaf"] * 3 + ["struct", "list", "large", "view", "fixed", "map"])
    if form == "leaf" or depth == 0:
        return _leaf(rng, rows)
    mask = pa.array([rng.random() < 0.25 for _ in range(rows)], pa.bool_())
    if form == "struct":
        names = [f"f{number}" for number in range(rng.randint(1, 3))]
        parts = [_array(rng, rows, depth - 1) for _ in names]
        return pa.StructArray.from_arrays(parts, names, mask=mask)
    if form == "fixed":
        parts = _array(rng, 2 * rows, depth - 1)
        return pa.FixedSizeListArray.from_arrays(parts, 2, mask=mask)
    lengths = [0 if is_null else rng.randrange(3) for is_null in mask.to_pylist()]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    parts = _array(rng, sum(lengths), depth - 1)
    if form == "map":
        keys = pa.array([f"key {number}" for number in range(sum(lengths))], pa.string())
        kind = pa.map_(pa.string(), parts.type)
        return pa.MapArray.from_arrays(offsets, keys, parts, type=kind, mask=mask)
    if form == "view":
        firsts, sizes = offsets.slice(0, rows), pa.array(lengths, pa.int32())
        firsts = pa.array(firsts.to_numpy())  # a mask is not supported on a slice
        return pa.ListViewArray.from_arrays(firsts, sizes, parts, mask=mask)
    lists = pa.ListArray.from_arrays(offsets, parts, mask=mask)
    return lists.cast(pa.large_list(lists.type.value_field)) if form == "large" else lists


def _metadata(rng: random.Random, names: list[str]) -> dict[str, str]:
    columns = [{"name": name, "type": "string"} for name in names]
    choices = {
        "team": "数据",
        "note": json.dumps({"night": rng.random()}),
        # Spark would trust its own schema key over the source's. test_readers.py tests that key.
        "parquet.avro.schema": json.dumps({"type": "record", "name": "r", "fields": columns}),
        "huggingface": json.dumps({"info": {"features": {name: {} for name in names}}}),
    }
    return {key: choices[key] for key in rng.sample(sorted(choices), rng.randrange(3))}


def random_table(rng: random.Random) -> pa.Table:
    """A table with a column `text` and up to five others of any type and name."""
    names = ["text"]
    columns: list[pa.Array] = [pa.array([f"text {rng.random()}" for _ in range(ROWS)])]
    for number in range(rng.randint(1, 5)):
        names.append(f"{''.join(rng.choices(LETTERS, k=rng.randint(1, 6)))}{number}")
        columns.append(_array(rng, ROWS, DEPTH))
    fields = []
    for name, column in zip(names, columns, strict=True):
        notes = {"note": "kept"} if rng.random() < 0.2 else None
        fields.append(pa.field(name, column.type, metadata=notes))
    return pa.table(columns, schema=pa.schema(fields, _metadata(rng, names)))
