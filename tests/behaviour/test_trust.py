"""Whatever an input is called or holds, it stays data: nothing runs, nothing outside it is read, no secret leaks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from glmbatch.errors import AuditError, InputError, UnusableFile
from glmbatch.ledger.verification import verify
from glmbatch.run.job import run_job
from glmbatch.run.plan import plan_run
from glmbatch.settings.job import JobConfig
from glmbatch.store.parquet import is_plain, open_parquet
from tests.conftest import CLASSIFY, ROOT

pytestmark = pytest.mark.slow
Settings = Callable[..., dict[str, Any]]
Write = Callable[..., Path]
CONFORMANCE = Path(os.environ.get("PARQUET_TEST_DATA", "not set"))

NAMES = [
    "a b.parquet",
    'it\'s "so".parquet',
    "new\nline.parquet",
    "$(touch ran).parquet",
    "`touch ran`;touch ran.parquet",
    "%2e%2e%2fup.parquet",
    "{text}.parquet",
    "day=1=2/x.parquet",
    "день 天/很好.parquet",
    "*?[a].parquet",
    "-rf.parquet",
    "~root.parquet",
    "x" * 200 + ".parquet",
    "a.parquet.parquet",
    "back\\slash\\..\\up.parquet",
    "rtl\u202egnp.parquet",
]
COLUMNS = [
    "a b",
    "{text}",
    "x.y",
    "__class__",
    "new\nline",
    "'; drop table rows; --",
    "",
    "很好",
    "mood ",
    "\u202e",
]


def test_names_of_files_and_columns_are_names_and_nothing_else(
    write_source: Write, job_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        write_source(name, {"text": [f"in {name}"], **{column: [column] for column in COLUMNS}})
    before = {path for path in tmp_path.rglob("*") if (tmp_path / "out") not in path.parents}
    settings = job_settings(steps=[CLASSIFY])
    assert run_job(JobConfig.model_validate(settings)).rows == len(NAMES)
    found = {}
    for path in (tmp_path / "out").rglob("*-0000000000.parquet"):
        table = pq.ParquetFile(path).read().to_pylist()
        assert [table[0][column] for column in COLUMNS] == COLUMNS
        found[path.relative_to(tmp_path / "out").as_posix()] = table[0]["text"]
    assert found == {
        name.removesuffix(".parquet") + "-0000000000.parquet": f"in {name}" for name in NAMES
    }
    outside = {path for path in tmp_path.rglob("*") if (tmp_path / "out") not in path.parents}
    assert outside - before == {tmp_path / "out"}
    assert verify(tmp_path / "out").findings == ()


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_out_of_the_input_is_not_followed(
    write_source: Write, job_settings: Settings, tmp_path: Path, link: str
) -> None:
    write_source("a.parquet", {"text": ["mine"]})
    secret = tmp_path / "elsewhere" / "secret.parquet"
    secret.parent.mkdir()
    pq.write_table(pa.table({"text": ["not yours"]}), secret)
    target = secret if link == "file" else secret.parent
    (tmp_path / "in" / ("b.parquet" if link == "file" else "b")).symlink_to(target)
    settings = job_settings(steps=[CLASSIFY], max_error_rate=1.0)
    summary = run_job(JobConfig.model_validate(settings))
    assert summary.rows == 1
    assert [fault.source for fault in summary.unusable] == (["b.parquet"] if link == "file" else [])
    assert all("leads out of the input" in fault.reason for fault in summary.unusable)
    with (
        pytest.raises(UnusableFile, match="leads out")
        if link == "file"
        else pytest.MonkeyPatch.context()
    ):
        plan_run(JobConfig.model_validate({**settings, "on_error": "raise"}))


def test_a_link_that_the_user_names_is_read(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["one", "two"]})
    (tmp_path / "folder").symlink_to(tmp_path / "in")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "file.parquet").symlink_to(tmp_path / "in" / "a.parquet")
    (tmp_path / "in" / "b.parquet").symlink_to(tmp_path / "in" / "a.parquet")
    for named, rows in (("folder", 4), ("links/file.parquet", 2)):
        job = JobConfig.model_validate(job_settings(data__input=str(tmp_path / named)))
        assert plan_run(job).plan.rows == rows


def test_no_secret_of_the_environment_is_told(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["one", None]})
    secrets = {"HF_TOKEN": "hf_sEcReT0123456789", "AWS_SECRET_ACCESS_KEY": "aWsSeCrEt0123456789"}
    environment = {
        **os.environ,
        **secrets,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "PREFECT_HOME": str(tmp_path / "home"),
    }
    told = []
    for number, model in enumerate(
        (job_settings()["model"], {"path": "some/model", "revision": "0" * 40})
    ):
        file = tmp_path / f"{number}.yaml"
        settings = job_settings(model=model, max_error_rate=1.0, runtime__retries=0)
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "glmbatch.cli.main", "run", str(file)]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, timeout=300, check=False
        )
        assert done.returncode == (3, 1)[number], done.stderr
        told.append(done.stdout + done.stderr)
    kept = [
        path
        for path in (*(tmp_path / "out").rglob("*"), *(tmp_path / "home").rglob("*"))
        if path.is_file()
    ]
    told += [path.read_bytes() for path in kept]
    assert len(kept) > 5
    assert not any(secret.encode() in each for secret in secrets.values() for each in told)


@pytest.mark.skipif(
    not CONFORMANCE.is_dir(), reason="PARQUET_TEST_DATA names no checkout of apache/parquet-testing"
)
@pytest.mark.parametrize("form", ["parquet", "delta"])
def test_a_job_over_each_public_file_gives_rows_or_one_clear_line(
    job_settings: Settings, tmp_path: Path, form: str
) -> None:
    published = 0
    for number, path in enumerate(sorted(CONFORMANCE.rglob("*.parquet*"))):
        here = tmp_path / str(number)
        here.mkdir()
        shutil.copy(path, here / "a.parquet")
        settings = job_settings(
            data__input=str(here),
            data__output=str(here / "out"),
            data__format=form,
            max_error_rate=1,
        )
        try:
            with open_parquet(path) as file:
                column = next(
                    (field.name for field in file.schema_arrow if is_plain(field.type)), "none"
                )
        except InputError:
            column = "none"
        step = {
            **CLASSIFY,
            "name": "zz",
            "prompt_template": f"{{{column}}}",
            "on_too_long": "truncate",
        }
        settings["data"] |= {"input": str(here / "a.parquet"), "limit": 100}
        try:
            run_job(JobConfig.model_validate({**settings, "steps": [step]}))
        except (InputError, AuditError) as error:
            assert "\n" not in str(error)
            continue
        assert verify(here / "out").findings == ()
        published += 1
    assert published > 45


def test_links_in_a_circle_cost_themselves_and_a_linked_day_may_be_named(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["mine"]})
    circle = tmp_path / "in" / "circle.parquet"
    circle.symlink_to(circle)
    summary = run_job(JobConfig.model_validate(job_settings(steps=[CLASSIFY], max_error_rate=1.0)))
    assert (summary.rows, [fault.source for fault in summary.unusable]) == (1, ["circle.parquet"])
    (tmp_path / "days").mkdir()
    (tmp_path / "days" / "day=1").symlink_to(tmp_path / "in")
    plan = plan_run(
        JobConfig.model_validate(job_settings(data__input=str(tmp_path / "days" / "day=1")))
    ).plan
    assert [fragment.source for fragment in plan.fragments] == ["day=1/a.parquet"]
