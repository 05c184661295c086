"""Stored task results are used only if they are intact. Otherwise the task runs again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from glmbatch.ledger.ledger import RESULTS, Ledger
from glmbatch.ledger.verification import verify
from tests.flows.commands import run
from tests.support import CLASSIFY, Settings, Write, proved, touch_published
from tests.support import rows_of as rows_in

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


def test_damaged_task_results_are_rebuilt(
    prefect_server: dict[str, str],
    job_settings: Settings,
    write_source: Write,
    tmp_path: Path,
    out: Path,
) -> None:
    write_source("a.parquet", {"text": ["one", "two", "three"]})
    write_source("b.parquet", {"text": ["four", "five", "six"]})
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(job_settings(steps=[CLASSIFY])))
    command = ("-m", "glmbatch.cli.main", "run", str(job))
    assert run(prefect_server, *command).returncode == 0
    rows, manifest = rows_in(out), Ledger(out).manifest()
    assert manifest is not None
    results = sorted(path for path in (out / RESULTS).rglob("*") if path.is_file())
    assert len(results) == 5, "a checkpoint, two fragments' answers, two output files"
    # Like a flipped bit in a JSON value: Prefect can still read the result.
    for path in results:
        content = path.read_text()
        changed = content.replace('identity\\": \\"', 'identity\\": \\"0')
        changed = changed.replace('run\\": \\"', 'run\\": \\"0')
        assert changed != content
        path.write_text(changed)
    touch_published(out)
    again = run(prefect_server, *command)
    assert again.returncode == 0, again.stderr
    assert "no inference was executed" in again.stdout
    after = Ledger(out).manifest()
    assert after is not None
    assert (proved(after), after.steps) == (proved(manifest), manifest.steps)
    assert rows_in(out) == rows
    assert verify(out).findings == ()
    damage_at_random(results)
    results[0].unlink()
    results[0].mkdir()
    touch_published(out)
    last = run(prefect_server, *command)
    assert last.returncode == 0, last.stderr
    assert rows_in(out) == rows


def damage_at_random(results: list[Path]) -> None:
    chance = random.Random(0)
    for path in results:
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)


def test_swapped_task_results_are_refused(
    prefect_server: dict[str, str],
    job_settings: Settings,
    write_source: Write,
    tmp_path: Path,
    out: Path,
) -> None:
    write_source("a.parquet", {"text": ["one"]})
    write_source("b.parquet", {"text": ["two"]})
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(job_settings(steps=[CLASSIFY])))
    command = ("-m", "glmbatch.cli.main", "run", str(job))
    assert run(prefect_server, *command).returncode == 0
    first, second = sorted((out / RESULTS).glob("answers-*"))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    for path in (out / RESULTS).glob("output-*"):
        path.unlink()
    touch_published(out)
    again = run(prefect_server, *command)
    assert again.returncode == 2
    assert "a stored result is not the one that its name says" in again.stderr
    # Prefect may add a line about slow events.
    lines = [line for line in again.stderr.splitlines() if "EventsWorker" not in line]
    assert len(lines) == 1
