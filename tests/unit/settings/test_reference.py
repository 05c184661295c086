"""docs/settings.md agrees with the settings classes."""

from __future__ import annotations

import pytest

from glmbatch.cli.main import main
from glmbatch.settings.job import JobConfig
from tests.support import ROOT


def test_the_page_matches_the_command_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    printed = capsys.readouterr().out
    assert (ROOT / "docs/settings.md").read_text() == printed, (
        "run: glmbatch settings > docs/settings.md"
    )
    for group in JobConfig.model_fields:
        assert f"| `{group}` |" in printed
