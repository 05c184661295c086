"""The flow over an output of an earlier version, with stored results of classes since moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.flows.commands import run
from tests.support import CAUSAL, EARLIER, copy_earlier

pytestmark = [pytest.mark.prefect, pytest.mark.slow]


def test_the_flow_reuses_an_earlier_output(prefect_server: dict[str, str], tmp_path: Path) -> None:
    earlier = copy_earlier(tmp_path)
    settings = yaml.safe_load((EARLIER / "job.yaml").read_text())
    settings["data"] |= {"input": str(earlier / "in"), "output": str(earlier / "parquet")}
    settings["model"] = str(CAUSAL)
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(settings))
    done = run(prefect_server, "-m", "glmbatch.cli.main", "run", str(job))
    assert done.returncode == 3, done.stderr  # two rows have no text
    assert "no inference was executed and no model was loaded" in done.stdout
