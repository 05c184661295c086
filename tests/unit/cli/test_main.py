"""The command line as a user sees it: output, exit codes, and one line per error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from glmbatch.cli import main as cli
from glmbatch.report.counts import RATED_ROWS
from tests.support import CAUSAL, CLASSIFIER, ROOT, Settings, Write, run
from tests.unit.glm.adapters import make_original_adapter
from tests.unit.glm.checkpoints import read_json


@pytest.fixture
def job_file(tmp_path: Path, job_settings: Settings) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_settings()))
    return str(path)


def glmbatch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "glmbatch.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_plan_shows_what_would_run_and_writes_nothing(
    job_file: str, write_source: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source("day=1/a.parquet", {"text": ["x"] * 20})
    assert cli.main(["plan", job_file]) == 0
    said = capsys.readouterr().out
    assert "20 rows in 3 fragments" in said
    assert [line.split()[1:5] for line in said.splitlines() if line.startswith("day=1")] == [
        ["mood", "20", "1", "2"],
        ["reply", "20", "20", "0"],
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_plan_says_why_rows_run_again(
    job_file: str, write_source: Write, job_settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source("a.parquet", {"text": [f"text {number}" for number in range(RATED_ROWS)]})
    run(job_settings())
    write_source("b.parquet", {"text": ["text 3", "new", "new", None]})
    cli.main(["run", job_file, "--dry-run"])
    said = capsys.readouterr().out
    assert table(said, "1 unchanged file") == [
        "unchanged file mood 50 0 50 0 0 0",
        "unchanged file reply 50 0 50 0 0 0",
    ]
    tokens = table(said, "b.parquet")[0].split()[6]
    assert table(said, "b.parquet") == [
        f"mood 4 1 1 1 1 {tokens} new text 1, null_value 1",
        "reply 4 2 1 0 1 0 new text 2, earlier_step_failed 1",
    ]
    assert "s of inference, at the rate of the last run of at least 50 rows" in said
    run(job_settings(max_error_rate=0.5))
    assert not any(line["to_run"] for line in capsys_plan(job_file, capsys)["steps"])
    cli.main(
        [
            "plan",
            job_file,
            "--set",
            "steps.0.prompt_template=Mood of {text}",
            "--set",
            "steps.1.max_tokens=7",
        ]
    )
    said = capsys.readouterr().out
    assert {line.split(maxsplit=7)[7] for line in table(said, "a.parquet")} == {
        "changed prompt_template 50",
        "changed max_tokens 50",
    }


def test_plan_counts_the_tokens_of_the_next_run(
    job_file: str, write_source: Write, job_settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source("a.parquet", {"text": [f"text {number % 15}" for number in range(20)]})
    for name in ("same.parquet", "twin.parquet"):  # fragments with the same rows share answers
        write_source(name, {"text": ["x"] * 20})
    before = capsys_plan(job_file, capsys)
    summary = run(job_settings())
    mood = summary.steps[0]
    own = [line for line in before["steps"] if line["step"] == "mood"]
    sums = {name: sum(line[name] for line in own) for name in own[0] if name not in TEXTS}
    assert sums["prompt_tokens"] == mood.prompt_tokens
    assert sums["to_run"] == mood.computed == 16
    assert (sums["reused"], sums["repeated"]) == (mood.reused, mood.repeated)
    assert mood.repeated > 15
    assert (before["steps"][1]["waiting"], before["seconds"]) == (20, None)
    after = capsys_plan(job_file, capsys)
    assert [(step["to_run"], step["reused"]) for step in after["steps"]] == [(0, 60), (0, 60)]
    # Another row with a known text repeats an answer of its fragment, as one with a new text does.
    write_source("b.parquet", {"text": ["text 3", "text 3", "new", "new", "text 4"]})
    plan = capsys_plan(job_file, capsys)
    assert plan["seconds"] is None  # the run of so few rows gives no rate
    line = plan["steps"][0]
    step = run(job_settings()).steps[0]
    assert (line["to_run"], line["reused"], line["repeated"]) == (1, 2, 2)
    assert (step.computed, step.reused - 60, step.repeated) == (1, 2, 2)


TEXTS = ("source", "step", "reasons")


def capsys_plan(job_file: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["plan", job_file, "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def table(said: str, source: str) -> list[str]:
    return [" ".join(line.split()[1:]) for line in said.splitlines() if line.startswith(source)]


def test_evaluating_a_missing_checkpoint_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "trained" / "current" / "checkpoint"
    assert cli.main(["evaluate", str(missing), "rows.parquet"]) == 2
    said = capsys.readouterr().err
    assert f"{missing}: there is no job file or checkpoint. Check the path" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("flag", [["--text-column", "body"], ["--set", "data.text_column=body"]])
def test_an_input_error_is_one_line_and_exit_code_2(
    job_file: str, write_source: Write, capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    source = write_source("a.parquet", {"text": ["x"]})
    assert cli.main(["run", job_file, *flag]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    expected = f"{source}: no column 'body'; it has ['text']. Set data.text_column."
    assert told.err.splitlines() == [
        f"glmbatch: {source.parent}: none of 1 files can be used; the first: {expected}"
    ]


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
def test_bad_usage_exits_with_2_and_no_traceback(
    job_file: str, write_source: Write, arguments: list[str]
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    done = glmbatch(*(job_file if part == "JOB" else part for part in arguments))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


@pytest.mark.parametrize(("model", "said"), [(CAUSAL, "4"), (CLASSIFIER, "正面")])
def test_doctor_accepts_a_valid_checkpoint(
    model: Path, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", str(model)]) == 0
    assert said in capsys.readouterr().out


def test_doctor_lists_the_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in CAUSAL.iterdir():
        if source.name not in {"pytorch_model-00002-of-00003.bin", "tokenizer.model"}:
            (tmp_path / source.name).write_bytes(source.read_bytes())
    assert cli.main(["doctor", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "pytorch_model-00002-of-00003.bin" in said
    assert "tokenizer.model" in said


@pytest.mark.parametrize("command", ["run", "plan", "doctor"])
def test_a_bad_adapter_is_refused_before_loading(
    job_file: str,
    write_source: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    adapter = tmp_path / "adapter"
    arguments = [command, job_file, "--set", f"model.adapter={adapter}"]
    if command == "doctor":
        arguments = ["doctor", str(CAUSAL), "--adapter", str(adapter)]
    assert cli.main(arguments) == 2
    assert f"{adapter}: no" in "".join(capsys.readouterr())
    make_original_adapter(adapter, read_json(CAUSAL / "config.json"), r=8)
    assert cli.main(arguments) == 2
    assert f"{adapter / 'adapter_model.safetensors'}: " in "".join(capsys.readouterr())
    make_original_adapter(adapter, read_json(CAUSAL / "config.json"))
    if command != "run":
        assert cli.main(arguments) == 0
        assert str(adapter) in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "plan"])
def test_the_help_of_a_job_fits_one_screen(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    lines = help_of(command, capsys).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 100


def test_the_help_shows_types_choices_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(help_of("run", capsys).split())
    for shown in (
        "--input PATH",
        "--output PATH",
        "--limit ROWS",
        "--on-error {raise,quarantine,null}",
        "Default: quarantine.",
        "Default: text.",
        "--set NAME=VALUE",
        "--dry-run",
    ):
        assert shown in words


def test_a_flag_has_one_name(job_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for other in ("--data.limit", "--lim", "--max-error-rate"):
        with pytest.raises(SystemExit) as caught:
            cli.main(["plan", job_file, other, "1"])
        assert caught.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return capsys.readouterr().out
