"""Names and contents of an input are only data: nothing is executed and no secret leaks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from glmbatch.cli.server import own_server
from glmbatch.errors import AuditError, InputError, UnusableFile
from glmbatch.ledger.verification import verify
from glmbatch.run.plan import plan_run
from glmbatch.settings.job import JobConfig
from glmbatch.store.parquet import open_parquet
from glmbatch.store.values import is_plain
from tests.support import CLASSIFY, ROOT, Settings, Write, run

pytestmark = pytest.mark.slow
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


def test_file_and_column_names_are_never_interpreted(
    write_source: Write,
    job_settings: Settings,
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = {}
    for name in NAMES:
        write_source(name, {"text": [f"in {name}"]} | {column: [column] for column in COLUMNS})
        expected[f"{name.removesuffix('.parquet')}-0000000000.parquet"] = f"in {name}"
    before = outside(out)
    assert run(job_settings(steps=[CLASSIFY])).rows == len(NAMES)
    written = {}
    for path in out.rglob("*-0000000000.parquet"):
        (row,) = pq.ParquetFile(path).read().to_pylist()
        assert [row[column] for column in COLUMNS] == COLUMNS
        written[path.relative_to(out).as_posix()] = row["text"]
    assert written == expected
    assert outside(out) - before == {out}
    assert verify(out).findings == ()


def outside(out: Path) -> set[Path]:
    """All paths in the output's parent folder except those inside the output."""
    return {path for path in out.parent.rglob("*") if out not in path.parents}


@pytest.fixture
def secret(write_source: Write, tmp_path: Path) -> Path:
    """A file outside the input. The input has one file of its own."""
    write_source("a.parquet", {"text": ["mine"]})
    path = tmp_path / "elsewhere" / "secret.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": ["not yours"]}), path)
    return path


def test_a_link_to_a_file_outside_the_input_is_a_fault(
    secret: Path, job_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "in" / "b.parquet").symlink_to(secret)
    settings = job_settings(steps=[CLASSIFY], max_error_rate=1.0)
    summary = run(settings)
    assert summary.rows == 1
    (fault,) = summary.unusable
    assert fault.source == "b.parquet"
    assert "leads out of the input" in fault.reason
    with pytest.raises(UnusableFile, match="leads out"):
        plan_run(JobConfig.model_validate({**settings, "on_error": "raise"}))


def test_a_link_to_an_outside_folder_is_not_followed(
    secret: Path, job_settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "in" / "b").symlink_to(secret.parent)
    summary = run(job_settings(steps=[CLASSIFY], on_error="raise"))
    assert (summary.rows, summary.unusable) == (1, ())


def test_a_link_named_in_the_settings_is_followed(
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


def test_no_secret_of_the_environment_leaks(
    write_source: Write,
    job_settings: Settings,
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_source("a.parquet", {"text": ["one", None]})
    secrets = {"HF_TOKEN": "hf_sEcReT0123456789", "AWS_SECRET_ACCESS_KEY": "aWsSeCrEt0123456789"}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    missing = {"path": "some/model", "revision": "0" * 40}
    texts = []
    with own_server() as client:
        for name, value in client.items():
            monkeypatch.setenv(name, value)
        for model, code in ((job_settings()["model"], 3), (missing, 1)):
            file = tmp_path / "job.yaml"
            settings = job_settings(model=model, max_error_rate=1.0, runtime__retries=0)
            file.write_text(yaml.safe_dump(settings))
            command = [sys.executable, "-m", "glmbatch.cli.main", "run", str(file)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=False)
            assert done.returncode == code, done.stderr
            texts += [done.stdout, done.stderr]
    for folder in (out, tmp_path / "home"):
        texts += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert len(texts) > 9
    for secret in secrets.values():
        assert not any(secret.encode() in text for text in texts)


@pytest.mark.skipif(
    not CONFORMANCE.is_dir(), reason="set PARQUET_TEST_DATA to a checkout of apache/parquet-testing"
)
@pytest.mark.parametrize("form", ["parquet", "delta"])
def test_each_public_file_gives_rows_or_a_one_line_error(
    job_settings: Settings, tmp_path: Path, form: str
) -> None:
    published = 0
    for number, path in enumerate(sorted(CONFORMANCE.rglob("*.parquet*"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(path, folder / "a.parquet")
        step = {
            **CLASSIFY,
            "name": "zz",
            "prompt_template": f"{{{first_plain_column(path)}}}",
            "on_too_long": "truncate",
        }
        settings = job_settings(
            steps=[step],
            data__input=str(folder / "a.parquet"),
            data__output=str(folder / "out"),
            data__format=form,
            data__limit=100,
            max_error_rate=1,
        )
        try:
            run(settings)
        except (InputError, AuditError) as error:
            assert "\n" not in str(error)
            continue
        assert verify(folder / "out").findings == ()
        published += 1
    assert published > 45


def first_plain_column(path: Path) -> str:
    """The first column that a prompt can name, or "none" if there is none to read."""
    with suppress(InputError), open_parquet(path) as file:
        for field in file.schema_arrow:
            if is_plain(field.type):
                return str(field.name)
    return "none"


def test_a_circular_link_costs_only_itself(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["mine"]})
    circle = tmp_path / "in" / "circle.parquet"
    circle.symlink_to(circle)
    summary = run(job_settings(steps=[CLASSIFY], max_error_rate=1.0))
    assert summary.rows == 1
    assert [fault.source for fault in summary.unusable] == ["circle.parquet"]


def test_the_input_may_be_a_linked_day(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["mine"]})
    (tmp_path / "days").mkdir()
    day = tmp_path / "days" / "day=1"
    day.symlink_to(tmp_path / "in")
    plan = plan_run(JobConfig.model_validate(job_settings(data__input=str(day)))).plan
    assert [fragment.source for fragment in plan.fragments] == ["day=1/a.parquet"]
