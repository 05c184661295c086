"""Every kind of damage to an output is found, with its file and row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.ledger.comparison import differences
from glmbatch.ledger.manifest import MANIFEST
from glmbatch.ledger.verification import verify
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from glmbatch.store.files import digest_file
from tests.support import Settings, Write

Rows = Callable[[pa.Table], pa.Table]


@pytest.fixture
def out(
    write_source: Write, job_settings: Settings, rows: list[str | None], tmp_path: Path
) -> Path:
    """An output over several files, with nested, null and NaN values, a row without text, and a
    file without rows.
    """
    values = [None if number % 4 == 0 else number / 3 for number in range(23)]
    odd = [float("nan") if number % 5 == 0 else float(number) for number in range(23)]
    nested = [{"a": [number, None], "b": odd[number]} for number in range(23)]
    columns = {
        "text": [None, *rows[1:]],
        "id": ["same"] * 23,
        "value": values,
        "odd": odd,
        "nested": nested,
    }
    write_source("day=1/a.parquet", columns)
    write_source("b.parquet", pa.table(columns).slice(3, 5))
    write_source("c.parquet", pa.table(columns).slice(0, 0))
    run_job(JobConfig.model_validate(job_settings()))
    return tmp_path / "out"


def findings(out: Path) -> list[str]:
    return [str(finding) for finding in verify(out).findings]


def rewrite(out: Path, name: str, change: Rows, *, in_manifest: bool = True) -> None:
    """Change the rows of a published file, and its digest in the manifest to hide that."""
    path = out / name
    table = pq.read_table(path, partitioning=None)
    changed = change(table)
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    if in_manifest:
        manifest = json.loads((out / MANIFEST).read_text())
        for file in manifest["files"]:
            if file["output_name"] == name:
                file["digest"] = digest_file(path)
        manifest.pop("digest")
        (out / MANIFEST).write_text(json.dumps(manifest))


def replaced(table: pa.Table, row: int, column: str, value: object) -> pa.Table:
    values = table.column(column).to_pylist()
    values[row] = value
    at = table.schema.get_field_index(column)
    return table.set_column(
        at, table.schema.field(at), pa.array(values, table.schema.field(at).type)
    )


def test_an_unchanged_output_is_sound(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert findings(out) == []
    assert main(["verify", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 5 files, 28 rows: sound\n"


def test_a_changed_byte_is_found(out: Path) -> None:
    path = out / "b-0000000000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert any(
        "b-0000000000.parquet: was changed after it was published" in each for each in findings(out)
    )


@pytest.mark.parametrize("column", ["id", "value", "odd", "nested"])
def test_a_changed_value_is_found_with_its_row(out: Path, column: str) -> None:
    name = "day=1/a-0000000008.parquet"
    other = {"id": "other", "value": 7.5, "odd": 7.5, "nested": {"a": [1, None], "b": 2.0}}[column]
    rewrite(out, name, lambda table: replaced(table, 3, column, other))
    (found,) = findings(out)
    assert found.startswith(f"wrong: {name}: row 3: column {column!r} differs from row 11 of ")


def test_rows_in_another_order_are_found(out: Path) -> None:
    name = "day=1/a-0000000000.parquet"
    rewrite(out, name, lambda table: table.take([1, 0, *range(2, 8)]))
    assert any(f"wrong: {name}: row 0: column 'text'" in each for each in findings(out))


def test_a_missing_row_is_found(out: Path) -> None:
    name = "day=1/a-0000000016.parquet"
    rewrite(out, name, lambda table: table.slice(0, 6))
    assert any(f"{name}: has 6 rows, _manifest.json says 7" in each for each in findings(out))


def test_a_missing_answer_is_found(out: Path) -> None:
    name = "day=1/a-0000000008.parquet"
    rewrite(out, name, lambda table: replaced(table, 2, "mood", None))
    assert (
        f"wrong: {name}: row 2: step 'mood' has neither an answer nor a reason, or both"
        in findings(out)
    )


def test_an_uncounted_failure_is_found(out: Path) -> None:
    name = "b-0000000000.parquet"
    rewrite(
        out,
        name,
        lambda table: replaced(replaced(table, 1, "mood", None), 1, "mood_error", "made up"),
    )
    found = findings(out)
    assert f"wrong: {name}: 1 of its rows failed, _manifest.json says 0" in found
    assert "wrong: _quarantine.parquet: lists 0 failures of b.parquet; its files have 1" in found


def test_files_that_are_not_published_are_found(out: Path) -> None:
    (out / "day=1" / "extra.parquet").write_bytes((out / "b-0000000000.parquet").read_bytes())
    (out / ".a.partial").write_bytes(b"half")
    (out / "_glmbatch" / "staged").mkdir(exist_ok=True)
    (out / "_glmbatch" / "staged" / "k.d.parquet").write_bytes(b"")
    assert findings(out) == [
        "wrong: .a.partial: is incomplete; the next run deletes it",
        "waiting: _glmbatch/staged/k.d.parquet: is of a run that was refused or killed; "
        "the next run uses or deletes it",
        "wrong: day=1/extra.parquet: is not in _manifest.json: of a run that was killed, "
        "or not of glmbatch",
    ]


def test_a_missing_file_is_found(out: Path) -> None:
    os.unlink(out / "day=1" / "a-0000000008.parquet")
    assert "wrong: day=1/a-0000000008.parquet: is gone" in findings(out)


def edited(out: Path, change: Callable[[dict[str, Any]], None]) -> list[str]:
    manifest = json.loads((out / MANIFEST).read_text())
    change(manifest)
    manifest.pop("digest")
    (out / MANIFEST).write_text(json.dumps(manifest))
    return findings(out)


def test_a_fragment_missing_from_the_manifest_is_found(out: Path) -> None:
    found = edited(out, lambda manifest: manifest["files"].pop(3))
    assert any("rows 8 to 15 of day=1/a.parquet are in no file" in each for each in found)


def test_a_missing_last_fragment_is_found(out: Path) -> None:
    found = edited(out, lambda manifest: manifest["files"].pop())
    assert any("rows 16 to 22 of day=1/a.parquet are in no file" in each for each in found)


def test_a_file_with_other_step_keys_is_found(out: Path) -> None:
    found = edited(out, lambda manifest: manifest["files"][1]["step_keys"].update(mood="other"))
    assert any(
        "was answered with other settings or weights than b-0000000000.parquet" in each
        for each in found
    )
    assert any("differ in the step keys" in each for each in found)


def test_missing_or_changed_sources_are_not_wrong(out: Path, write_source: Write) -> None:
    source = write_source("b.parquet", {"text": ["a new night"]})
    (source.parent / "day=1" / "a.parquet").unlink()
    verification = verify(out)
    assert verification.sound
    assert {finding.kind for finding in verification.findings} == {"unchecked"}
    assert len(verification.findings) == 4


def test_the_command_exits_with_1_when_anything_is_wrong(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.unlink(out / "b-0000000000.parquet")
    assert main(["verify", str(out), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert {
        "kind": "wrong",
        "file": "b-0000000000.parquet",
        "what": "is gone",
        "row": None,
    } in told["findings"]


def test_a_folder_without_a_manifest_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no _manifest"):
        verify(tmp_path)
    assert main(["verify", str(tmp_path)]) == 2


def test_a_column_of_another_type_is_a_finding_not_an_error(out: Path) -> None:
    def as_lists(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index("odd")
        return table.set_column(at, "odd", pa.array([[1]] * len(table)))

    rewrite(out, "b-0000000000.parquet", as_lists)
    assert any("column 'odd' differs from row" in finding for finding in findings(out))


FAR = pa.array([2**49, None, 5], pa.duration("s"))  # more days than Python's timedelta holds
NANS = pa.array([float("nan"), None, 0.5])


def beside_nan(kind: str) -> pa.Array:
    pairs = pa.StructArray.from_arrays([FAR, NANS], ["far", "nan"])
    offsets = pa.array([0, 1, 1, 3], pa.int32())
    lists = pa.ListArray.from_arrays(offsets, pairs)
    if kind == "view":
        firsts, sizes = pa.array([0, 1, 1], pa.int32()), pa.array([1, 0, 2], pa.int32())
        return pa.ListViewArray.from_arrays(firsts, sizes, pairs)
    if kind == "map":
        return pa.MapArray.from_arrays(offsets, pa.array(["a", "b", "c"]), pairs)
    return {"struct": pairs, "list": lists, "float16": NANS.cast(pa.float16()), "far": FAR}[kind]


@pytest.mark.parametrize("kind", ["struct", "list", "view", "map", "float16", "far"])
def test_values_that_python_cannot_hold_are_compared(kind: str) -> None:
    column = beside_nan(kind)

    def found(ours: pa.Array) -> list[tuple[str, int]]:
        ours, theirs = (pa.record_batch([array], ["x"]) for array in (ours, column))
        return list(differences(iter([ours]), iter([theirs]), [("x", 0, 0)], other_types=False))

    assert found(column) == []
    assert found(pa.concat_arrays([column.slice(0, 2), column.slice(0, 1)])) == [("x", 2)]
