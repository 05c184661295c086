"""The command line as a user meets it: outputs, exit codes, one line for what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from glmbatch import cli
from tests.conftest import CAUSAL, CLASSIFIER, ROOT
from tests.glm.adapters import make_original_adapter
from tests.glm.checkpoints import read_json

Settings = Callable[..., dict[str, Any]]
Write = Callable[..., Path]


@pytest.fixture
def job_file(tmp_path: Path, job_settings: Settings) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_settings()))
    return str(path)


def glmbatch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "glmbatch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_plan_says_what_would_run_and_writes_nothing(
    job_file: str, write_source: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source("day=1/a.parquet", {"text": ["x"] * 20})
    assert cli.main(["plan", job_file]) == 0
    said = capsys.readouterr().out
    assert "20 rows in 3 fragments" in said
    assert [line.split()[2:] for line in said.splitlines() if line.startswith("day=1")] == [
        ["20", "20", "0", "new", "rows"]
    ] * 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_plan_says_why_rows_run_again(
    job_file: str, write_source: Write, job_settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    from glmbatch.config import JobConfig
    from glmbatch.pipeline import run_job

    write_source("a.parquet", {"text": ["x"] * 5})
    run_job(JobConfig.model_validate(job_settings()))
    write_source("b.parquet", {"text": ["y"] * 3})
    cli.main(["plan", job_file, "--set", "steps.0.prompt_template=Mood of {text}"])
    why = {tuple(line.split()[:2]): line.split(maxsplit=5)[5] for line in table(capsys.readouterr().out)}
    assert why == {
        ("a.parquet", "mood"): "changed settings or weights",
        ("a.parquet", "reply"): "changed earlier answers",
        ("b.parquet", "mood"): "new rows",
        ("b.parquet", "reply"): "new rows",
    }
    cli.main(["run", job_file, "--dry-run"])
    assert {line.split(maxsplit=5)[5] for line in table(capsys.readouterr().out)} == {"answered already", "new rows"}


def table(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(("a.parquet", "b.parquet"))]


@pytest.mark.parametrize("flag", ["--text-column", "--data.text-column"])
def test_what_is_wrong_is_one_line_and_exit_code_2(
    job_file: str, write_source: Write, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    source = write_source("a.parquet", {"text": ["x"]})
    assert cli.main(["run", job_file, flag, "body"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    expected = f"{source}: no column 'body'; it has ['text']. Set data.text_column."
    assert told.err.splitlines() == [f"glmbatch: {source.parent}: none of 1 files can be used; the first: {expected}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "no/such/job.yaml"],
        ["plan", str(ROOT)],
        ["doctor", "no/such/model"],
        ["run", "JOB", "--limit", "some"],
        ["run", "JOB", "--set", "nonsense"],
        ["run", "JOB", "--set", "x=["],
        ["run", "JOB", "--set", "steps.0.labels.first.second=1"],
        ["run", "JOB", "--input", "in/**x"],
        ["run", "JOB", "--input", "/no/such/input"],
        ["run", "JOB", "--model", "/no/such/model"],
        ["plan", "JOB", "--device", "cuda:99"],
    ],
)
def test_bad_usage_and_bad_input_exit_with_2_and_no_traceback(
    job_file: str, write_source: Write, arguments: list[str]
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    done = glmbatch(*(job_file if part == "JOB" else part for part in arguments))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


@pytest.mark.parametrize(("model", "said"), [(CAUSAL, "4"), (CLASSIFIER, "正面")])
def test_the_doctor_knows_a_sound_checkpoint(model: Path, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(model)]) == 0
    assert said in capsys.readouterr().out


def test_the_doctor_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in CAUSAL.iterdir():
        if source.name not in {"pytorch_model-00002-of-00003.bin", "tokenizer.model"}:
            (tmp_path / source.name).write_bytes(source.read_bytes())
    assert cli.main(["doctor", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "pytorch_model-00002-of-00003.bin" in said
    assert "tokenizer.model" in said


@pytest.mark.parametrize("command", ["run", "plan", "doctor"])
def test_a_bad_adapter_is_told_before_anything_is_loaded(
    job_file: str, write_source: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    model = str(CAUSAL) if command == "doctor" else job_file
    adapter = tmp_path / "adapter"
    assert cli.main([command, model, "--adapter", str(adapter)]) == 2
    assert f"{adapter}: no" in "".join(capsys.readouterr())
    make_original_adapter(adapter, read_json(CAUSAL / "config.json"), r=8)
    assert cli.main([command, model, "--adapter", str(adapter)]) == 2
    assert f"{adapter / 'adapter_model.safetensors'}: " in "".join(capsys.readouterr())
    make_original_adapter(adapter, read_json(CAUSAL / "config.json"))
    if command != "run":
        assert cli.main([command, model, "--adapter", str(adapter)]) == 0
        assert str(adapter) in capsys.readouterr().out


def test_help_names_every_command_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    said = capsys.readouterr().out
    for flag in ("--output", "--limit", "--model", "--device", "--on-error", "--dry-run", "--set"):
        assert flag in said
