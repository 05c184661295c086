"""Killed at any step, run again, the output is that of an undisturbed run; nothing that is whole is done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from glmbatch.config import JobConfig
from glmbatch.data.fragments import FileFault, Fragment
from glmbatch.data.ledger import MANIFEST, AnswersReceipt, Ledger, Manifest, OutputReceipt, merged_manifest
from glmbatch.errors import InputError
from glmbatch.pipeline import run_job
from tests.conftest import ROOT

Settings = Callable[..., dict[str, Any]]
Write = Callable[..., Path]

# Runs each job in a process of its own that dies, as by kill -9, before or after its n-th change of a name on disk.
DYING_RUNS = """
import json, os, sys
from glmbatch.config import JobConfig
from glmbatch.glm import torch_engine  # once, before the processes part
from glmbatch.pipeline import run_job

def dying(call, deadly, after, seen):
    def counted(*arguments, **options):
        seen.append(call)
        if len(seen) == deadly and not after:
            os._exit(9)
        try:
            return call(*arguments, **options)
        finally:
            if len(seen) == deadly:
                os._exit(9)
    return counted

for settings, deadly, moment in json.loads(sys.stdin.read()):
    process = os.fork()
    if not process:
        seen = []
        os.replace = dying(os.replace, deadly, moment == "after", seen)
        os.unlink = dying(os.unlink, deadly, moment == "after", seen)
        run_job(JobConfig.model_validate(settings))
        print(len(seen), flush=True)
        os._exit(0)
    os.waitpid(process, 0)
"""


def dying_runs(*runs: tuple[dict[str, Any], int, str]) -> str:
    command = [sys.executable, "-c", DYING_RUNS]
    done = subprocess.run(command, input=json.dumps(runs), capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout


def published(folder: Path) -> pa.Table:
    return ds.dataset(folder, partitioning=None).to_table()


@pytest.mark.slow
def test_killed_at_any_step_and_run_again_the_output_is_the_same(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("day=1/a.parquet", {"text": [f"row {n}" for n in range(12)]})
    write_source("day=2/b.parquet", {"text": ["one", None, "three"]})
    undisturbed = job_settings(max_error_rate=0.5, data__output=str(tmp_path / "undisturbed"))
    run_job(JobConfig.model_validate(undisturbed))
    expected = published(tmp_path / "undisturbed")
    steps = int(dying_runs((job_settings(max_error_rate=0.5), 0, "before")))
    assert steps > 12
    folders = [tmp_path / f"killed-{deadly}" for deadly in range(1, steps + 1)]
    runs = [
        (job_settings(max_error_rate=0.5, data__output=str(folder)), deadly, "after" if deadly % 2 else "before")
        for deadly, folder in enumerate(folders, 1)
    ]
    assert dying_runs(*runs) == ""
    for (settings, _, _), folder in zip(runs, folders, strict=True):
        committed = list(folder.glob("_glmbatch/answers/*.parquet"))
        summary = run_job(JobConfig.model_validate(settings))
        assert summary.computed + sum(len(keys_of(path)) for path in committed) == 28
        assert published(folder).equals(expected)
        assert not list(folder.rglob(".*"))


def keys_of(path: Path) -> set[bytes]:
    table = ds.dataset(path).to_table()
    name = next(name for name in table.schema.names if name.endswith("_key"))
    return set(table.column(name).to_pylist()) - {None}


def receipt(key: str = "k" * 32) -> AnswersReceipt:
    return AnswersReceipt(key=key, run="r", fragment="a@0", step="mood", step_key="s", rows=2)


def test_answers_are_found_again_only_when_they_are_whole(tmp_path: Path) -> None:
    ledger, table = Ledger(tmp_path), pa.table({"mood": ["a", None]})
    assert ledger.find_answers(receipt().key) is None
    ledger.keep_answers(receipt(), table)
    found = ledger.find_answers(receipt().key)
    assert found is not None
    assert found[0] == receipt()
    assert ledger.read_answers(receipt().key).equals(table)
    whole = found[1].read_bytes()
    for at in range(0, len(whole), 7):
        found[1].write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert ledger.find_answers(receipt().key) is None
        assert not found[1].exists()


def test_a_manifest_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"rows": 1}')
    with pytest.raises(InputError, match=r"_manifest\.json: is not a manifest of glmbatch.*Set data\.output\."):
        Ledger(tmp_path).manifest()


def output(source: str, first_row: int, rows: int) -> OutputReceipt:
    fragment = Fragment(
        source=source, path="", digest="d", stamp=(0, 0), first_row=first_row, rows=rows, row_groups=(), skip_rows=0
    )
    return OutputReceipt(key="k", run="r", fragment=fragment, output_name=fragment.output_name, answers=())


def names(manifest: Manifest) -> list[str]:
    return [f"{file.source}@{file.first_row}+{file.rows}" for file in manifest.files]


def test_new_files_replace_those_of_their_source_and_leave_others() -> None:
    before = merged_manifest("1", None, [output("a", 0, 5), output("a", 5, 5), output("b", 0, 3)], [], None)
    after = merged_manifest("2", before, [output("a", 0, 9)], [], None)
    assert names(after) == ["a@0+9", "b@0+3"]


def test_a_damaged_source_keeps_the_rows_that_nothing_new_covers() -> None:
    before = merged_manifest("1", None, [output("a", 0, 5), output("a", 5, 5), output("b", 0, 3)], [], None)
    damaged = [FileFault(source="a", first_row=5, reason="x"), FileFault(source="b", reason="y")]
    assert names(merged_manifest("2", before, [output("a", 0, 5)], damaged, None)) == ["a@0+5", "a@5+5", "b@0+3"]
    assert names(merged_manifest("2", before, [output("a", 4, 3)], damaged, None)) == ["a@4+3", "b@0+3"]
