"""CSV and JSON lines in: each line comes out as a row, or as a failed row with its number."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from glmbatch.errors import InputError
from glmbatch.ledger.verification import verify
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from tests.support import CLASSIFY, Settings, committed, read_quarantine, rows_of, run

pytestmark = pytest.mark.slow

# Few, so that the model is asked few prompts; all other fields differ.
TEXTS = [
    "plain",
    "with, a comma",
    'says "hi"',
    "two\nlines",
    "three\r\nlines\rin one",
    "很好 😀 é",
    "nul \0 inside",
    " blanks around ",
    "12345678901234567890",
    "NaN",
    "\u2028 and \x0b and \x85",
    '"',
    "\t",
    "=1+1",
]
BAD_CSV = [
    b"1,2",
    b"1,2,3,4",
    b'1,"closed"early,3',
    b"1,\xff\xfe,3",
    b'1,"in quotes \xc3",3',
    b"   ",
]
BAD_JSON = [
    b'{"id":1,"text":"cut',
    b'{"id":1,"text":"cut"',
    b'{"id":1,"id":2}',
    b'["a"]',
    b'"a"',
    b"17",
    b'{"text":"\xff"}',
    b'{"text":"\\ud83d"}',
    b'{"text":"a\tb"}',
    b"{'text':'a'}",
    b'{"text":"a",}',
    b'{"text":"a"} {"text":"b"}',
    b'{"":"a"}',
    b'{"deep":' + b"[" * 100_000,
    b"nul \0",
]
ODD_VALUES = [
    "7",
    "-0.0",
    "1e999",
    "NaN",
    "-Infinity",
    "123456789012345678901234567890",
    "true",
    '{"a": [1, {"b": null}]}',
    "[]",
    "[" * 200 + "]" * 200,
]


@pytest.fixture
def lines_job(job_settings: Settings, tmp_path: Path) -> Settings:
    """Make settings of a job over lines in `in/`, with a cache of its own."""
    (tmp_path / "in").mkdir()

    def settings(**overrides: Any) -> dict[str, Any]:
        own = {"runtime__cache": str(tmp_path / "cache"), "data__rows_per_fragment": 1000}
        return job_settings(steps=[dict(CLASSIFY)], max_error_rate=1.0, **{**own, **overrides})

    return settings


def csv_file(rng: random.Random, records: int, line_end: str) -> tuple[bytes, list[Any]]:
    """A CSV file, and for each record its values or, if it cannot be read, its first line."""
    content = b"id,text,note" + line_end.encode()
    expected: list[Any] = []
    for number in range(records - 1):
        if rng.random() < 0.1:
            record = rng.choice(BAD_CSV)
            expected.append(None)
        else:
            values = [str(number), rng.choice(TEXTS), rng.choice(["", "x" * number, "a\nb"])]
            written = io.StringIO()
            csv.writer(written).writerow(values)
            record = written.getvalue().removesuffix("\r\n").encode()
            expected.append(values)
        content += record + line_end.encode()
    expected.append(None)
    return content + b'9,"an open quote', expected


def json_file(rng: random.Random, records: int) -> tuple[bytes, list[Any]]:
    """A file of JSON lines, and for each line its text and its odd value; None for a bad line."""
    lines = []
    expected: list[Any] = []
    for number in range(records):
        if rng.random() < 0.1:
            lines.append(rng.choice(BAD_JSON))
            expected.append(None)
            continue
        text, odd = rng.choice(TEXTS), rng.choice(ODD_VALUES)
        key = f"key{number % 7}"
        line = f'{{"id": {number}, "{key}": {odd}, "text": {json.dumps(text)}}}'
        lines.append(line.encode())
        expected.append([str(number), text, key, odd])
    return b"\n".join(lines), expected


def test_rows_and_failed_rows_are_all_lines(lines_job: Settings, tmp_path: Path, out: Path) -> None:
    rng = random.Random(19)
    folder = tmp_path / "in"
    expected: dict[str, list[Any]] = {}
    for name, line_end in (("lf.csv", "\n"), ("crlf.csv", "\r\n"), ("cr.csv", "\r")):
        content, expected[name] = csv_file(rng, 2_500, line_end)
        (folder / name).write_bytes(content)
    content, expected["mark.csv.gz"] = csv_file(rng, 2_500, "\n")
    (folder / "mark.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + content))
    for name in ("a.jsonl", "b.ndjson"):
        content, expected[name] = json_file(rng, 4_000)
        (folder / name).write_bytes(content)
    content, expected["c.jsonl.zst"] = json_file(rng, 2_000)
    (folder / "c.jsonl.zst").write_bytes(pa.compress(content, "zstd", asbytes=True))

    summary = run(lines_job())
    assert summary.rows == sum(map(len, expected.values())) == 20_000
    bad = sum(values.count(None) for values in expected.values())
    listed = read_quarantine(out)
    blank = sum(row[1] == "\t" for rows in expected.values() for row in rows if row is not None)
    kinds = [line["error_type"] for line in listed]
    assert kinds.count("unreadable_line") == bad
    assert summary.faulty_rows == len(listed) == bad + blank
    by_source: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(out.glob("*.parquet")):
        if not file.name.startswith("_"):
            by_source.setdefault(file.name[: -len("-0000000000.parquet")], []).extend(rows_of(file))
    for name, values in expected.items():
        rows = by_source[name]
        assert len(rows) == len(values)
        numbers = [row["_line"] for row in rows]
        assert numbers == sorted(set(numbers))
        failed = {line["row"]: line["error"] for line in listed if line["source"] == name}
        for place, (row, value) in enumerate(zip(rows, values, strict=True)):
            if value is None:
                assert row["text"] is None
                assert row["_line_text"]
                assert failed[place].startswith(f"line {row['_line']}: ")
            elif name.partition(".")[2].startswith("csv"):
                assert [row["id"], row["text"], row["note"]] == value
            else:
                number, text, key, odd = value
                assert [row["id"], row["text"], row[key]] == [number, text, odd]
    assert verify(out).findings == ()


def test_encodings_delimiters_and_escapes_are_settings(
    lines_job: Settings, tmp_path: Path, out: Path
) -> None:
    lines = "id;text\n1;很好\n2;a\\;b\n".encode("gb18030")
    (tmp_path / "in" / "a.csv").write_bytes(lines)
    read = {"encoding": "gb18030", "delimiter": ";", "escape": "\\"}
    run(lines_job(data__lines=read))
    assert [row["text"] for row in rows_of(out)] == ["很好", "a;b"]
    assert verify(out).findings == ()
    answers = committed(out)
    # Read in another way, the same bytes are other rows.
    summary = run(lines_job(data__lines={**read, "escape": None}))
    assert (summary.rows, summary.faulty_rows) == (2, 1)
    assert summary.steps[0].computed == 0
    assert answers.isdisjoint(committed(out) - answers)


def test_unchanged_lines_are_not_read_again(lines_job: Settings, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "in" / "day=1" / "a.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "one"}\n{"text": "two"}\nbad\n')
    job = lines_job()
    run(job)
    stored = list((tmp_path / "cache" / "lines").iterdir())
    assert len(stored) == 1
    stored[0].unlink()
    path.touch()
    assert run(job).steps[0].computed == 0
    assert list((tmp_path / "cache" / "lines").iterdir()) == []
    # A changed line costs that line; its stored rows have a name of their own.
    path.write_text('{"text": "one"}\n{"text": "three"}\nbad\n')
    previewed = preview(JobConfig.model_validate(job)).steps[0]
    assert (previewed.to_run, previewed.reasons["unreadable_line"]) == (1, 1)
    assert run(job).steps[0].computed == 1
    assert [row["text"] for row in rows_of(out)] == ["one", "three", None]
    assert verify(out).findings == ()


def test_a_file_without_a_readable_line_keeps_its_rows(
    lines_job: Settings, tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    (folder / "bad.jsonl").write_bytes(b"oops\n\noh\n")
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "empty.csv").write_bytes(b"")
    (folder / "good.csv").write_bytes(b"text\nfine\n")
    summary = run(lines_job())
    assert (summary.rows, summary.faulty_rows, summary.unusable) == (3, 2, ())
    assert sorted(line for line in caplog.messages if "is empty" in line) == [
        f"{folder}/empty.csv: is empty, without a header: counts as 0 rows",
        f"{folder}/empty.jsonl: is empty: counts as 0 rows",
    ]
    assert [line["error"] for line in read_quarantine(out)] == [
        "line 1: is not JSON at character 1: Expecting value: oops",
        "line 3: is not JSON at character 1: Expecting value: oh",
    ]
    assert verify(out).findings == ()


FAULTS = {
    "names.csv": (b"text,_line\na,b\n", "has a column '_line', which glmbatch adds"),
    "header.csv": (b'"text,id\na,b\n', "its header cannot be read"),
    "twice.csv": (b"text,text\na,b\n", "no column 'text'; it has ['text_1', 'text_2'"),
    "cut.csv.gz": (gzip.compress(b"text\nfine\n" * 999)[:-9], "not readable as lines"),
    "other.jsonl": (b'{"body": "fine"}\n', "no column 'text'; it has ['body'"),
}


def test_a_file_that_cannot_be_read_is_left_out(
    lines_job: Settings, tmp_path: Path, out: Path
) -> None:
    for name, (content, _) in FAULTS.items():
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(InputError, match="none of 5 files can be used"):
        run(lines_job())
    (tmp_path / "in" / "good.csv").write_bytes(b"text\nfine\n")
    summary = run(lines_job())
    reasons = {fault.source: fault.reason for fault in summary.unusable}
    for name, (_, reason) in FAULTS.items():
        assert reason in reasons[name], reasons[name]
    assert [row["text"] for row in rows_of(out)] == ["fine"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id;body\n1;fine\n", "it has ['id;body']. Set data.lines.delimiter."),
        ("a.tsv", "id,body\n1,fine\n", "it has ['id,body']. Set data.lines.delimiter."),
        ("a.csv", "id,text\n1,fine\n", "it has ['id', 'text']. Set data.text_column."),
        ("a.jsonl", '{"id;body": "fine"}\n', "it has ['id;body']. Set data.text_column."),
    ],
)
def test_another_delimiter_is_advised(
    lines_job: Settings, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / "in" / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(f"no column 'body'; {message}")):
        preview(JobConfig.model_validate(lines_job(data__text_column="body")))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(
    lines_job: Settings, tmp_path: Path, out: Path, encoding: str
) -> None:
    (tmp_path / "in" / "a.tsv").write_bytes("id\ttext\n1\t很好\n".encode(encoding))
    run(lines_job())
    assert [(row["id"], row["text"]) for row in rows_of(out)] == [("1", "很好")]


@pytest.mark.parametrize(
    "lines",
    [{"encoding": "klingon"}, {"encoding": "hex"}, {"delimiter": '"'}, {"escape": "\n"}],
)
def test_settings_of_lines_are_checked(lines_job: Settings, lines: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"no encoding of text|must be two characters"):
        JobConfig.model_validate(lines_job(data__lines=lines))


def test_a_condition_leaves_out_no_unreadable_line(
    lines_job: Settings, tmp_path: Path, out: Path
) -> None:
    (tmp_path / "in" / "a.csv").write_text("text,lang\nein,de\nbad\none,en\n")
    (tmp_path / "in" / "b.jsonl").write_text("bad\n")
    summary = run(lines_job(data__where="lang = 'de'", data__columns=["text"]))
    assert (summary.rows, summary.faulty_rows) == (3, 2)
    rows = rows_of(out)
    assert [row["text"] for row in rows] == ["ein", None, None]
    assert not {"lang", "_line"} & rows[0].keys()
    errors = [line["error"] for line in read_quarantine(out)]
    assert errors[0] == "line 3: 1 field where the header has 2: bad"
    assert verify(out).findings == ()
