"""Killed at any step, run again, the output is that of an undisturbed run; nothing that is whole is done twice."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmbatch.errors import InputError
from glmbatch.ledger.fragments import FileFault, Fragment, Plan
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import MANIFEST, Manifest, merged_manifest
from glmbatch.ledger.receipts import AnswersReceipt, OutputReceipt
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.conftest import ROOT

Settings = Callable[..., dict[str, Any]]
Write = Callable[..., Path]

# Runs each job in a process of its own that dies, as by kill -9, before or after its n-th change of a name on disk.
DYING_RUNS = """
import json, os, sys
from glmbatch.settings.job import JobConfig
from glmbatch.run.job import run_job
# Once, before the processes part: all that a run would import.
from glmbatch.glm.checkpoint import load
from glmbatch.glm import tokenizer
from glmbatch.glm.engine import worker
from glmbatch.glm.model import slot_kernel
from transformers import GlmForCausalLM, GlmForSequenceClassification

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
    done = subprocess.run(
        command, input=json.dumps(runs), capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout


def published(folder: Path) -> pa.Table:
    return ds.dataset(folder, partitioning=None).to_table()


@pytest.mark.slow
def test_killed_at_any_step_and_run_again_the_output_is_the_same(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    earlier = job_settings(data__output=str(tmp_path / "killed-0"))
    write_source("day=1/a.parquet", {"text": [f"earlier row {n}" for n in range(17)]})
    run_job(JobConfig.model_validate({**earlier, "steps": earlier["steps"][:1]}))
    for number in range(1, 45):
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
    assert 12 < steps < 45
    folders = [tmp_path / f"killed-{deadly}" for deadly in range(1, steps + 1)]
    runs = [
        (
            job_settings(max_error_rate=0.5, data__output=str(folder)),
            deadly,
            "after" if deadly % 2 else "before",
        )
        for deadly, folder in enumerate(folders, 1)
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


def keys_of(path: Path) -> set[bytes]:
    table = ds.dataset(path).to_table()
    name = next(name for name in table.schema.names if name.endswith("_key"))
    return set(table.column(name).to_pylist()) - {None}


def receipt(run: str = "r", **fields: Any) -> AnswersReceipt:
    return AnswersReceipt(
        key="k" * 32, run=run, fragment="a@0", step="mood", step_key="s", rows=2, **fields
    )


def test_answers_are_found_again_only_when_they_are_whole(tmp_path: Path) -> None:
    ledger, table = Ledger(tmp_path), pa.table({"mood": ["a", None]})
    assert ledger.find_answers(receipt().key, "r", retry_failed=True) is None
    ledger.keep_answers(receipt(), table)
    assert ledger.find_answers(receipt().key, "r", retry_failed=True) == receipt()
    assert ledger.read_answers(receipt().key)[1].equals(table)
    (path,) = (tmp_path / "_glmbatch/answers").iterdir()
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert ledger.find_answers(receipt().key, "r", retry_failed=True) is None
        assert not path.exists()


def test_rows_on_which_the_model_failed_are_tried_again_by_the_next_run(tmp_path: Path) -> None:
    ledger, table = Ledger(tmp_path), pa.table({"mood": ["a", None]})
    ledger.keep_answers(receipt("first", faults={"model_failed": 1}), table)
    assert ledger.find_answers(receipt().key, "first", retry_failed=True) is not None
    assert ledger.find_answers(receipt().key, "second", retry_failed=True) is None
    ledger.keep_answers(receipt("second"), table)
    assert ledger.find_answers(receipt().key, "third", retry_failed=True) == receipt("second")


def test_a_manifest_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"rows": 1}')
    with pytest.raises(
        InputError, match=r"_manifest\.json: is not a manifest of glmbatch.*Set data\.output\."
    ):
        Ledger(tmp_path).manifest()


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
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


def output(source: str, first_row: int, rows: int, digest: str = "d") -> OutputReceipt:
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
    return OutputReceipt(
        key="k", run="r", fragment=fragment, output_name=fragment.output_name, answers=()
    )


def merged(
    before: Manifest | None, *outputs: OutputReceipt, root: Path = Path("/none"), **fields: Any
) -> Manifest:
    unusable = [FileFault(source=source, reason="x") for source in fields.pop("damaged", ())]
    plan = Plan(root=str(root), fragments=(), unusable=(), **fields)
    return merged_manifest("run", plan, before, outputs, unusable)


def names(manifest: Manifest) -> list[str]:
    return [f"{file.source}@{file.first_row}+{file.rows}" for file in manifest.files]


BEFORE = merged(None, output("a", 0, 5), output("a", 5, 5), output("b", 0, 3, "e"))


def test_new_files_replace_those_of_their_source_and_leave_others() -> None:
    after = merged(BEFORE, output("a", 0, 9))
    assert names(after) == ["a@0+9", "b@0+3"]
    assert after.replaced == ("a-0000000005.parquet",)
    assert "a-0000000005.parquet" in merged(after, output("b", 0, 3)).replaced


def test_a_damaged_source_keeps_the_rows_that_nothing_new_covers() -> None:
    assert names(merged(BEFORE, output("a", 0, 5), damaged="ab")) == ["a@0+5", "a@5+5", "b@0+3"]
    assert names(merged(BEFORE, output("a", 4, 3), damaged="ab")) == ["a@4+3", "b@0+3"]


def test_rows_of_another_version_of_a_file_never_stay_beside_new_ones() -> None:
    assert names(merged(BEFORE, output("a", 0, 5, "changed"), damaged="a")) == ["a@0+5", "b@0+3"]


def test_a_renamed_file_is_not_there_twice(tmp_path: Path) -> None:
    assert names(merged(BEFORE, output("c", 0, 3, "e"))) == ["a@0+5", "a@5+5", "c@0+3"]
    (tmp_path / "b").touch()  # still there: a copy, not a new name
    assert names(merged(BEFORE, output("c", 0, 3, "e"), root=tmp_path)) == [
        "a@0+5",
        "a@5+5",
        "b@0+3",
        "c@0+3",
    ]


def test_a_limited_run_is_replaced_whole() -> None:
    limited = merged(None, output("a", 0, 2), limit=2)
    assert names(merged(limited, output("b", 0, 3))) == ["b@0+3"]


SOURCES = st.sampled_from("abc")
# For each source of a night: which version of the file, its fragments' rows, and which of them cannot be read.
NIGHTS = st.lists(
    st.dictionaries(
        SOURCES,
        st.tuples(
            st.sampled_from("12"),
            st.lists(st.integers(1, 4), min_size=1, max_size=4),
            st.sets(st.integers(0, 3)),
        ),
        min_size=1,
    ),
    max_size=6,
)


@given(nights=NIGHTS)
def test_after_any_nights_no_row_is_there_twice_and_none_of_a_whole_file_is_missing(
    nights: list[dict[str, tuple[str, list[int], set[int]]]],
) -> None:
    manifest, on_disk = None, set[str]()
    for night in nights:
        outputs, damaged = [], set()
        for source, (version, sizes, unreadable) in night.items():
            starts = [sum(sizes[:at]) for at in range(len(sizes))]
            sound = [at for at in range(len(sizes)) if at not in unreadable]
            outputs += [output(source, starts[at], sizes[at], source + version) for at in sound]
            damaged |= {source} if len(sound) < len(sizes) else set()
        manifest = merged(manifest, *outputs, damaged=damaged)
        on_disk = (on_disk | {each.output_name for each in outputs}) - set(manifest.replaced)
        assert {file.output_name for file in manifest.files} == on_disk
        for source in {file.source for file in manifest.files}:
            files = [file for file in manifest.files if file.source == source]
            rows = [
                row for file in files for row in range(file.first_row, file.first_row + file.rows)
            ]
            assert len(rows) == len(set(rows))
            assert len({file.source_digest for file in files}) == 1, (
                "two versions of a file never mix"
            )
            if source in night and source not in damaged:
                assert sorted(rows) == list(range(sum(night[source][1])))


def keep_many(folder: str, process: int) -> None:
    ledger, table = Ledger(folder), pa.table({"mood": ["good"] * 5})
    for number in range(60):
        (ledger.root / f"{number}-{process}").touch()
        while not (ledger.root / f"{number}-{1 - process}").exists():
            pass
        ledger.keep_answers(
            receipt(seconds=float(process)).model_copy(update={"key": f"key-{number}"}), table
        )


def test_processes_that_commit_the_same_answers_at_once_leave_one_whole_file(
    tmp_path: Path,
) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        list(processes.map(keep_many, [str(tmp_path)] * 2, range(2)))
    for number in range(60):
        assert Ledger(tmp_path).find_answers(f"key-{number}", "r", retry_failed=True), number
        assert len(list(tmp_path.glob(f"_glmbatch/answers/key-{number}.*"))) == 1
