"""Columns from folder names are decoded, used in prompts, and then part of the keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from glmbatch.errors import InputError
from glmbatch.ledger.ledger import Ledger
from glmbatch.run.canary import freeze
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from glmbatch.store.inputs.needs import folder_columns
from tests.support import CLASSIFY, GENERATE, Settings, Write, read_quarantine, rows_of, run


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("a.parquet", {}),
        ("lang=zh/a.parquet", {"lang": "zh"}),
        ("x/lang=zh/y/day=1/a.parquet", {"lang": "zh", "day": "1"}),
        ("lang=a%2Fb%3A %25+/a.parquet", {"lang": "a/b: %+"}),
        ("lang=%E4%B8%AD/a.parquet", {"lang": "中"}),
        ("lang=caf%E9/a.parquet", {"lang": "café"}),
        ("my%20lang=x=y/a.parquet", {"my lang": "x=y"}),
        ("lang=__HIVE_DEFAULT_PARTITION__/a.parquet", {"lang": None}),
        ("lang=/a.parquet", {"lang": ""}),
        ("=zh/lang=zh.parquet", {}),
    ],
)
def test_folders_give_columns(name: str, columns: dict[str, str | None]) -> None:
    assert folder_columns(name) == columns


def asking(settings: dict[str, Any], **step: Any) -> dict[str, Any]:
    settings["steps"] = [{**CLASSIFY, "prompt_template": "{lang}: {text}", **step}]
    return settings


def keys(output: Path) -> list[bytes]:
    return [row["mood_key"] for row in rows_of(output)]


def test_a_prompt_may_use_a_folders_value(
    write_source: Write, job_settings: Settings, out: Path, tmp_path: Path
) -> None:
    for lang in ("zh", "en"):
        write_source(f"lang={lang}/a.parquet", {"text": ["the same"]})
    settings = asking(job_settings())
    assert [step.to_run for step in preview(JobConfig.model_validate(settings)).steps] == [1, 1]
    assert run(settings).computed == 2
    from_folders = keys(out)
    assert len(set(from_folders)) == 2
    assert run(settings).computed == 0
    # The same answers as if the file had the column.
    write_source("plain/a.parquet", {"text": ["the same"] * 2, "lang": ["en", "zh"]})
    here = {"data__input": str(tmp_path / "in" / "plain"), "data__output": str(tmp_path / "o2")}
    run(asking(job_settings(**here)))
    assert keys(tmp_path / "o2") == from_folders
    # Another folder gives another prompt, although the bytes are the same.
    (tmp_path / "in" / "lang=en").rename(tmp_path / "in" / "lang=de")
    assert run(settings).computed == 1


def test_keys_ignore_folders_that_no_prompt_uses(
    write_source: Write, job_settings: Settings, out: Path, tmp_path: Path
) -> None:
    write_source("lang=zh/a.parquet", {"text": ["one"]})
    run(job_settings())
    manifest = Ledger(out).manifest()
    assert manifest is not None
    (tmp_path / "in" / "lang=zh").rename(tmp_path / "in" / "lang=en")
    run(job_settings())
    after = Ledger(out).manifest()
    assert after is not None
    keys = {file.answers_keys for file in manifest.files}
    assert {file.answers_keys for file in after.files} == keys


def test_text_and_id_may_come_from_a_folder(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("lang=zh/a.parquet", {"n": [1, 2]})
    write_source("lang=__HIVE_DEFAULT_PARTITION__/b.parquet", {"n": [3]})
    settings = job_settings(
        data__text_column="lang", data__id_column="lang", max_error_rate=0.5, steps=[CLASSIFY]
    )
    assert run(settings).faulty_rows == 1
    (line,) = read_quarantine(out)
    assert (line["id"], line["error"]) == (None, "text is null")
    settings = asking(job_settings(data__id_column="lang", max_error_rate=0.9))
    settings["data"]["output"] += "2"
    write_source("lang=zh/a.parquet", {"text": [None, "x"]})
    write_source("lang=__HIVE_DEFAULT_PARTITION__/b.parquet", {"text": ["y"]})
    run(settings)
    lines = read_quarantine(Path(settings["data"]["output"]))
    assert [(line["id"], line["error"]) for line in lines] == [
        (None, "lang is null"),
        ("zh", "text is null"),
    ]


def test_a_files_own_column_wins_over_its_folder(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("lang=zh/a.parquet", {"text": ["x"], "lang": ["own"]})
    write_source("b.parquet", {"text": ["x"], "lang": ["own"]})
    run(asking(job_settings()))
    assert len(set(keys(out))) == 1


def test_later_steps_and_canaries_use_a_folders_value(
    write_source: Write, job_settings: Settings, out: Path, tmp_path: Path
) -> None:
    write_source("lang=zh/a.parquet", {"text": ["x", "y"]})
    settings = job_settings(canary=str(tmp_path / "canary.parquet"))
    settings["steps"] = [CLASSIFY, {**GENERATE, "prompt_template": "{mood} {lang}: {text}"}]
    del settings["canary"]
    run(settings)
    assert freeze(out, tmp_path / "canary.parquet", 2) == 2
    settings["canary"] = str(tmp_path / "canary.parquet")
    write_source("lang=zh/b.parquet", {"text": ["z"]})
    audits = run(settings).audits
    assert [audit.measured for audit in audits] == [0, 0]


@pytest.mark.parametrize("setting", ["prompt_template", "id_column"])
def test_a_column_missing_from_folders_too_is_refused(
    write_source: Write, job_settings: Settings, setting: str
) -> None:
    write_source("lang=zh/a.parquet", {"text": ["x"]})
    settings = job_settings()
    if setting == "id_column":
        settings["data"]["id_column"] = "long"
    else:
        settings["steps"] = [{**CLASSIFY, "prompt_template": "{long}: {text}"}]
    with pytest.raises(
        InputError, match=rf"no column 'long'; it has \['text', 'lang'\].*{setting}"
    ):
        run(settings)


@pytest.mark.parametrize("name", ["lang", "Lang"])
def test_a_step_named_like_a_folders_column_is_refused(
    write_source: Write, job_settings: Settings, name: str
) -> None:
    write_source("lang=zh/a.parquet", {"text": ["x"]})
    with pytest.raises(InputError, match="already has a column 'lang' in its folder's name"):
        run(job_settings(steps=[{**CLASSIFY, "name": name}]))


def test_a_file_with_an_answer_column_loses_only_itself(
    write_source: Write, job_settings: Settings
) -> None:
    for number in range(3):
        write_source(f"{number}.parquet", {"text": ["x"]})
    write_source("9.parquet", {"text": ["x"], "Mood": ["own"]})
    summary = run(job_settings(max_error_rate=0.25))
    assert "already has a column 'Mood', which step 'mood'" in summary.unusable[0].reason
    with pytest.raises(InputError, match="already has a column 'Mood'"):
        run(job_settings(max_error_rate=0.25, on_error="raise"))


@pytest.mark.parametrize("names", [2000, 20])
def test_long_lists_of_columns_are_shortened(
    write_source: Write, job_settings: Settings, names: int
) -> None:
    columns = {f"feature_column_{number:05}" * 3: [1] for number in range(names)}
    write_source("a.parquet", pa.table({**columns, "Texts": ["x"]}))
    with pytest.raises(InputError, match=r"names, the closest \['Texts'\]\. Set") as refused:
        run(job_settings())
    assert len(str(refused.value)) < 400
