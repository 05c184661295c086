"""An output with one step of each kind, published once for all tests of the viewer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import CAUSAL, run

STEPS: list[dict[str, Any]] = [
    {"kind": "classify", "name": "mood", "labels": ["good", "bad", "so so"]},
    {"kind": "classify", "name": "topics", "labels": ["price", "size"], "multiple": True},
    {
        "kind": "extract",
        "name": "facts",
        "fields": [
            {"name": "tone", "choices": ["calm", "angry"]},
            {"name": "what", "type": "text"},
        ],
        "max_tokens": 12,
        "confidence": True,
    },
    {
        "kind": "generate",
        "name": "reply",
        "prompt_template": "{mood} {id}: {body}",
        "max_tokens": 4,
        "max_input_tokens": 60,
        "on_too_long": "truncate",
    },
]
TEXTS = [
    f"第{number}条 review number {number}: {'很好 ' * (number % 5)}end" for number in range(20)
]
TEXTS += [TEXTS[3], None, "long " * 60]


def job(folder: Path, output: str = "out") -> dict[str, Any]:
    """Settings of the job, with a text column that is not named text."""
    return {
        "data": {
            "input": str(folder / "in"),
            "output": str(folder / output),
            "text_column": "body",
            "rows_per_fragment": 8,
        },
        "model": {"path": str(CAUSAL)},
        "steps": STEPS,
        "max_error_rate": 1.0,
        "runtime": {"device": "cpu"},
    }


@pytest.fixture(scope="session")
def published_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("viewed")
    source = folder / "in" / "day=1" / "a.parquet"
    source.parent.mkdir(parents=True)
    columns = {"note": ["x"] * len(TEXTS), "body": TEXTS, "id": list(range(len(TEXTS)))}
    pq.write_table(pa.table(columns), source)
    run(job(folder))
    return folder


@pytest.fixture
def folder(published_once: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the output as `out`, and of its input as `in`."""
    for name in ("in", "out"):
        shutil.copytree(published_once / name, tmp_path / name)
    return tmp_path
