"""The examples run unchanged."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_the_in_memory_example_answers_a_dataframe() -> None:
    command = [sys.executable, "sample_data/examples/in_memory.py"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "About your Shanhai Rice Cooker" in done.stdout
    assert "negative    14" in done.stdout
