"""Every command of the documents runs, and what the README shows is what is printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from glmbatch.settings.job import JobConfig
from tests import forked
from tests.postgresql import postgresql_server
from tests.stores import Store
from tests.support import ROOT

DATABASE = "postgresql://db.example.com/shop"
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md")))]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    lines = "\n".join(blocks(page, "sh")).splitlines()
    shown = [line.split(" #")[0].strip() for line in lines if line.strip()]
    return [line for line in shown if not line.startswith("make")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each page: a later command may look at what an earlier one wrote."""
    return {page: tmp_path_factory.mktemp("page") for page in PAGES}


def run_forked(
    command: str, folder: Path, server: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """As `run`, but `glmbatch` begins with its imports done, which take most of its time."""
    words = shlex.split(command)
    place = words.index("glmbatch")
    variables = dict(word.split("=", 1) for word in words[:place])
    environment = {**server, **variables, "PREFECT_HOME": str(folder / "prefect")}
    return forked.run(environment, "-m", "glmbatch.cli.main", *words[place + 1 :])


def run(
    command: str, folder: Path, server: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `command` from the checkout's root, with Prefect's home in `folder`.

    A run under no `server` starts its own.
    """
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        **(server or {}),
        "PREFECT_HOME": str(folder / "prefect"),
    }
    return subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
        timeout=500,
    )


def test_the_two_commands_come_first_and_ci_runs_the_second() -> None:
    lines = "\n".join(blocks("README.md", "sh")).splitlines()
    assert [line.split(" #")[0].strip() for line in lines[:2]] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()


def test_each_source_and_sink_has_a_command() -> None:
    section = (ROOT / "README.md").read_text().partition("## Sources and sinks\n")[2]
    links = re.findall(r"\]\(([^)]+)\)", section.partition("\n## ")[0])
    assert len(links) > 6
    for link in links:
        page = link.partition("#")[0] or "README.md"
        assert any("glmbatch run " in line for line in commands(page)), link


@pytest.fixture(scope="module")
def buckets(s3: Store) -> None:
    """The buckets of the commands, with the sample in one of them, in a store that they reach."""
    for name in ("landing", "answers"):
        s3.client.create_bucket(Bucket=name)
    sample = ROOT / "sample_data"
    for path in sample.glob("reviews/**/*.parquet"):
        key = path.relative_to(sample).as_posix()
        s3.client.put_object(Bucket="landing", Key=key, Body=path.read_bytes())


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of a server with the table of the commands."""
    from adbc_driver_postgresql import dbapi

    texts = [f"The noise of number {number} is so-so." for number in range(60)]
    reviews = pa.table({"id": range(60), "text": texts, "product": ["Blender"] * 60})
    with postgresql_server() as setting:
        host = setting.partition("?host=")[2]
        address = f"postgresql:///postgres?host={host}&user=prefect"
        with dbapi.connect(address) as connection, connection.cursor() as cursor:
            cursor.adbc_ingest("reviews", reviews, mode="create")
            connection.commit()
        yield address


@pytest.fixture(scope="module")
def few_labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every sixth of the sample's labelled rows; a training over all takes a minute and a half."""
    labelled = pq.read_table(ROOT / "sample_data" / "labelled" / "train.parquet")
    few = tmp_path_factory.mktemp("labelled") / "few.parquet"
    pq.write_table(labelled.take(pa.array(range(0, labelled.num_rows, 6))), few)
    return few


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "command"), [(page, command) for page in PAGES for command in commands(page)]
)
def test_each_command_runs(
    page: str,
    command: str,
    folders: dict[str, Path],
    prefect_server: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    if "s3://" in command:
        request.getfixturevalue("buckets")
    # The address last: a temporary folder of the machine may be part of it.
    command = command.replace("/tmp/", f"{folders[page]}/")
    if DATABASE in command:
        address = request.getfixturevalue("database")
        command = command.replace(DATABASE, shlex.quote(address))
    if "glmbatch train" in command:
        command += f" --set data.input={request.getfixturevalue('few_labelled')}"
    # One server for all, which saves seconds a run; the demo below starts its own.
    is_new = page in {"README.md", "docs/training.md"} or " glmbatch " not in f" {command}"
    done = (run if is_new else run_forked)(command, folders[page], prefect_server)
    assert done.returncode in {0, 3}, done.stderr
    assert done.stdout


def without_numbers(text: str) -> list[str]:
    """The lines without what differs from run to run or between processors.

    Times and names of runs do, and a few labels.
    """
    text = re.sub(r"[0-9a-f]{32}", "N", text)
    text = re.sub(r"(?<![\w-])[0-9][0-9,.]*(?![\w-])", "N", text)
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.slow
@pytest.mark.prefect
def test_the_demo_prints_what_the_readme_shows(tmp_path: Path) -> None:
    job = "glmbatch run sample_data/reviews.yaml"
    assert f"$(RUN)/{job}" in (ROOT / "Makefile").read_text()
    done = run(f"{job} --output {tmp_path / 'answers'}", tmp_path)
    assert done.returncode == 3, done.stderr
    printed = done.stdout.replace(str(tmp_path / "answers"), "sample_data/out")
    shown = blocks("README.md", "text")[0]
    # The README leaves lines out, but shows the others in their order.
    rest = iter(without_numbers(printed))
    for line in without_numbers(shown):
        assert line in rest, line
    assert printed.split(" fragments")[0] == shown.split(" fragments")[0]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_examples_run(page: str, tmp_path: Path) -> None:
    environment = {"PREFECT_HOME": str(tmp_path / "prefect")}
    for code in blocks(page, "python"):
        done = forked.run(environment, "-c", code.replace("/tmp/", f"{tmp_path}/"))
        assert done.returncode == 0, done.stderr


def test_the_jobs_shown_are_jobs() -> None:
    shown = [yaml.safe_load(block) for page in PAGES for block in blocks(page, "yaml")]
    jobs = [job for job in shown if {"data", "model", "steps"} <= set(job)]
    assert jobs
    for job in jobs:
        JobConfig.model_validate(job)
