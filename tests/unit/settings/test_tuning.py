"""Training settings that contradict each other or no longer exist are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from glmbatch.cli.main import main
from tests.support import Tune


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prompt_template": "How is it?"}, "has no column"),
        ({"metric": "rouge_l"}, "cannot score a model that classifies"),
        (
            {"data__response_column": "label", "metric": "accuracy"},
            "cannot score a model that generates",
        ),
        ({"data__response_column": "label", "training__method": "head"}, "has no head"),
        ({"data__valid_share": 0.5, "data__test_share": 0.5}, "too few rows"),
        ({"model__dtype": "float16"}, "are for inference"),
        ({"output": "s3://bucket/tuned"}, "set a local folder"),
    ],
)
def test_contradictory_training_settings_are_refused(
    tune: Tune, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tune(**overrides)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("scratch", {"layers": 2}),
        ("stored", "float32"),
        ("min_gain", 0.1),
        ("training.noise", 0.2),
        ("training.class_weights", "balanced"),
        ("training.evaluations_per_epoch", 2),
        ("training.warm_up_share", 0.1),
        ("training.weight_decay", 0.1),
        ("data.conflicts", "keep"),
    ],
)
def test_a_removed_setting_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, value: object
) -> None:
    settings: dict[str, Any] = {"data": {"input": "in"}, "output": "out", "model": "model"}
    *groups, last = setting.split(".")
    group = settings
    for name in groups:
        group = group.setdefault(name, {})
    group[last] = value
    file = tmp_path / "tune.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert main(["train", str(file)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{setting}: is not a setting" in message
