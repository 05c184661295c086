"""After a kill at any step, the next run gives the output of an undisturbed run.

No finished work is done twice.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from glmbatch.errors import InputError, TransientError
from glmbatch.ledger.filelist import LISTS
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.receipts import AnswersReceipt, BundleReceipt
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests import forked
from tests.support import ROOT, Settings, Write, some

# Runs each job in its own process, which dies, as by kill -9, before or after its n-th change of a
# name on disk.
DYING_RUNS = """
import json, os, sys
from glmbatch.ledger import manifest
from glmbatch.settings.job import JobConfig
from glmbatch.run.job import run_job
manifest.INLINE_FILES = 0

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

for settings, deadly, moment in json.loads(sys.argv[1]):
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
    done = forked.run({}, "-c", DYING_RUNS, json.dumps(runs))
    assert done.returncode == 0, done.stderr
    return done.stdout


def published(folder: Path) -> pa.Table:
    return ds.dataset(folder, partitioning=None).to_table()


@pytest.mark.slow
def test_killed_anywhere_the_next_run_gives_the_same_output(
    write_source: Write, job_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmbatch.ledger.manifest.INLINE_FILES", 0)  # a list beside the manifest
    earlier = job_settings(data__output=str(tmp_path / "killed-0"))
    write_source("day=1/a.parquet", {"text": [f"earlier row {n}" for n in range(17)]})
    run_job(JobConfig.model_validate({**earlier, "steps": earlier["steps"][:1]}))
    for number in range(1, 60):
        shutil.copytree(tmp_path / "killed-0", tmp_path / f"killed-{number}")
    write_source("day=1/a.parquet", {"text": [f"row {n}" for n in range(12)]})
    write_source("day=2/b.parquet", {"text": ["one", None, "three"]})
    undisturbed = job_settings(max_error_rate=0.5, data__output=str(tmp_path / "undisturbed"))
    run_job(JobConfig.model_validate(undisturbed))
    expected = published(tmp_path / "undisturbed")
    steps = int(
        dying_runs(
            (job_settings(max_error_rate=0.5, data__output=str(tmp_path / "killed-0")), 0, "before")
        )
    )
    assert 12 < steps < 60
    moments = some(range(1, steps + 1), 8)
    folders = [tmp_path / f"killed-{deadly}" for deadly in moments]
    runs = [
        (
            job_settings(max_error_rate=0.5, data__output=str(folder)),
            deadly,
            "after" if deadly % 2 else "before",
        )
        for deadly, folder in zip(moments, folders, strict=True)
    ]
    assert dying_runs(*runs) == ""
    for (settings, _, _), folder in zip(runs, folders, strict=True):
        committed = {
            path.name.split(".")[0]: len(keys_of(path))
            for path in folder.glob("_glmbatch/answers/*.parquet")
        }
        summary = run_job(JobConfig.model_validate(settings))
        manifest = Ledger(folder).manifest()
        assert manifest is not None
        published_keys = {key for file in manifest.files for key in file.answers_keys}
        assert summary.computed + sum(committed.get(key, 0) for key in published_keys) == 28
        assert {file.output_name for file in manifest.files} == {
            path.relative_to(folder).as_posix() for path in folder.glob("day=*/*.parquet")
        }
        assert published(folder).equals(expected)
        assert not list(folder.rglob(".*"))
        assert len(list((folder / LISTS).iterdir())) == 1


def keys_of(path: Path) -> set[bytes]:
    table = ds.dataset(path).to_table()
    name = next(name for name in table.schema.names if name.endswith("_key"))
    return set(table.column(name).to_pylist()) - {None}


def receipt(run: str = "r", key: str = "k" * 32, **fields: Any) -> BundleReceipt:
    """The receipt of a bundle of one fragment."""
    own = {"key": key, "run": run, "step": "mood", "step_key": "s"}
    return BundleReceipt(**own, parts=(AnswersReceipt(**own, fragment="a@0", rows=2, **fields),))


def test_only_undamaged_answers_are_found_again(tmp_path: Path) -> None:
    ledger, table = Ledger(tmp_path), pa.table({"mood": ["a", None]})
    assert ledger.find_answers(receipt().key, "r") is None
    ledger.keep_answers(receipt(), table)
    assert ledger.find_answers(receipt().key, "r") == receipt()
    assert ledger.read_answers(receipt().key)[1].equals(table)
    (path,) = (tmp_path / "_glmbatch/answers").iterdir()
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert ledger.find_answers(receipt().key, "r") is None
        assert not path.exists()


def test_a_committed_file_is_opened_once_but_always_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    open_file = pq.ParquetFile.__init__

    def counted(self: pq.ParquetFile, source: Any, **options: Any) -> None:
        opened.append(source)
        open_file(self, source, **options)

    monkeypatch.setattr(pq.ParquetFile, "__init__", counted)
    writer, table = Ledger(tmp_path), pa.table({"mood": ["a", None]})
    path = writer.keep_answers(receipt(), table).path
    assert writer.read_answers(receipt().key)[1].equals(table)
    assert not opened
    reader = Ledger(tmp_path)
    for _ in range(2):
        assert reader.read_answers(receipt().key)[1].equals(table)
        assert reader.answers_receipt(receipt().key) == receipt()
    assert len(opened) == 1
    damaged = bytearray(Path(path).read_bytes())
    damaged[7] ^= 4
    Path(path).write_bytes(damaged)
    for ledger in (writer, reader):
        with pytest.raises(TransientError, match="are missing"):
            ledger.read_answers(receipt().key)


def test_the_next_run_asks_again_about_failed_rows(tmp_path: Path) -> None:
    ledger, table = Ledger(tmp_path), pa.table({"mood": ["a", None]})
    ledger.keep_answers(receipt("first", faults={"model_failed": 1}), table)
    assert ledger.find_answers(receipt().key, "first") is not None
    assert ledger.find_answers(receipt().key, "second") is None
    ledger.keep_answers(receipt("second"), table)
    assert ledger.find_answers(receipt().key, "third") == receipt("second")


def test_a_live_process_holds_the_lock_a_dead_one_does_not(tmp_path: Path) -> None:
    hold = (
        "from glmbatch.ledger.ledger import Ledger; "
        f"Ledger({str(tmp_path)!r}).open(); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"process {other.pid} of .* is writing to it"):
            Ledger(tmp_path).open()
        other.kill()
    Ledger(tmp_path).open()
    Ledger(tmp_path).close()


def keep_many(folder: str, process: int) -> None:
    ledger, table = Ledger(folder), pa.table({"mood": ["good"] * 5})
    for number in range(60):
        (ledger.root / f"{number}-{process}").touch()
        while not (ledger.root / f"{number}-{1 - process}").exists():
            pass
        ledger.keep_answers(receipt(key=f"key-{number}", seconds=float(process)), table)


@pytest.mark.slow
def test_processes_that_commit_the_same_key_leave_one_file(
    tmp_path: Path,
) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        list(processes.map(keep_many, [str(tmp_path)] * 2, range(2)))
    for number in range(60):
        assert Ledger(tmp_path).find_answers(f"key-{number}", "r"), number
        assert len(list(tmp_path.glob(f"_glmbatch/answers/key-{number}.*"))) == 1
