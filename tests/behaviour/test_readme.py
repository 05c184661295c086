"""Every README command runs, and the output it shows is what the command prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from glmbatch.settings.job import JobConfig
from tests.support import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all commands: later commands may read what earlier ones wrote."""
    return tmp_path_factory.mktemp("readme")


def commands() -> list[str]:
    lines = "\n".join(blocks("sh")).splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def run(command: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
    }
    return subprocess.run(
        command.replace("/tmp/answers", str(tmp_path / "answers")),
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
        timeout=500,
    )


def test_the_readme_begins_with_two_commands() -> None:
    assert commands()[:2] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in commands() if not line.startswith("make")])
def test_every_readme_command_runs(command: str, folder: Path) -> None:
    done = run(command, folder)
    assert done.returncode in {0, 3}, done.stderr
    assert done.stdout


def without_numbers(text: str) -> list[str]:
    """The lines without numbers and run ids, which differ between runs and processors."""
    text = re.sub(r"[0-9a-f]{32}", "N", text)
    return re.sub(r"(?<![\w-])[0-9][0-9,.]*(?![\w-])", "N", text).strip().splitlines()


@pytest.mark.slow
@pytest.mark.prefect
def test_the_demo_prints_what_the_readme_shows(tmp_path: Path) -> None:
    job = "glmbatch run sample_data/reviews.yaml"
    assert f"$(RUN)/{job}" in (ROOT / "Makefile").read_text()
    done = run(f"{job} --output {tmp_path / 'answers'}", tmp_path)
    assert done.returncode == 3, done.stderr
    printed = done.stdout.replace(str(tmp_path / "answers"), "sample_data/out")
    shown = blocks("text")[0]
    assert without_numbers(printed) == without_numbers(shown)
    assert printed.split(" fragments")[0] == shown.split(" fragments")[0]


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    code = blocks("python")[0].replace("/tmp/answers", str(tmp_path / "answers"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.strip() == "200", done.stderr


def test_the_job_shown_is_a_job() -> None:
    JobConfig.model_validate(yaml.safe_load(blocks("yaml")[0]))
