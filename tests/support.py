"""Names that test modules share: checkpoints, steps, types of fixtures, and small readers."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from glmbatch.errors import GlmbatchError
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import Manifest, PublishedFile
from glmbatch.ledger.quarantine import QUARANTINE
from glmbatch.settings.job import JobConfig
from glmbatch.settings.tuning import TuneConfig
from glmbatch.store.files import digest_file

if TYPE_CHECKING:
    from glmbatch.report.summary import Summary

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
CAUSAL = GOLDENS / "base-sharded"
CLASSIFIER = GOLDENS / "classifier"
SAMPLE_MODEL = ROOT / "sample_data" / "tiny-chatglm2"
EARLIER = ROOT / "tests" / "fixtures" / "earlier"

# The types of the fixtures `job_settings`, `write_source` and `tune`.
Settings = Callable[..., dict[str, Any]]
Write = Callable[..., Path]
Tune = Callable[..., TuneConfig]

CLASSIFY = {"kind": "classify", "name": "mood", "labels": ["good", "bad", "so so"]}
GENERATE = {
    "kind": "generate",
    "name": "reply",
    "prompt_template": "{mood}: {text}",
    "max_tokens": 6,
}


def some(changes: Sequence[int], count: int = 6) -> list[int]:
    """The first, the last and others of the `changes` at which a test fails or kills a run.

    Always the same ones, unless CHANGES_SEED is set. EVERY_CHANGE=1 tries them all.
    """
    if os.environ.get("EVERY_CHANGE") == "1" or len(changes) <= count:
        return list(changes)
    others = random.Random(os.environ.get("CHANGES_SEED", "1"))
    return [changes[0], *sorted(others.sample(changes[1:-1], count - 2)), changes[-1]]


def overridden(settings: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Change `settings` in place: `data__limit` sets the key `limit` of the group `data`."""
    for name, value in overrides.items():
        *groups, last = name.split("__")
        group = settings
        for part in groups:
            group = group.setdefault(part, {})
        group[last] = value
    return settings


def run(settings: dict[str, Any]) -> Summary:
    """Run the job of these settings in this process."""
    # Import late: conftest.py imports this module before it sets torch's number of threads.
    from glmbatch.run.job import run_job

    return run_job(JobConfig.model_validate(settings))


def run_after_another(settings: dict[str, Any], write_source: Write) -> Summary:
    """Publish one more row once a run that goes on has published and released its lock."""
    until = time.monotonic() + 120
    while not Path(settings["data"]["output"], "_manifest.json").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    write_source("another.parquet", {"text": ["three"]})
    while True:
        try:
            return run(settings)
        except GlmbatchError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def rows_of(output: Path) -> list[dict[str, Any]]:
    """All rows that a reader of the output folder finds."""
    rows: list[dict[str, Any]] = ds.dataset(output, partitioning=None).to_table().to_pylist()
    return rows


def touch_published(output: Path) -> None:
    """Give published files other times, so that a run looks at their sources again."""
    for path in output.glob("**/*-??????????.parquet"):
        path.touch()


def proved(manifest: Manifest) -> list[PublishedFile]:
    """What the footers prove of each file: not the stamps that let a run leave its source alone."""
    bare: dict[str, Any] = {"basis": "", "stamp": None, "place": None, "counts": {}}
    return [replace(file, **bare) for file in manifest.files]


def committed(output: Path) -> set[str]:
    """Names of the undamaged answer files in the output. Each name contains the file's digest.

    If a later run keeps them all, it has repeated no committed inference.
    """
    return {path.name for path in output.glob("_glmbatch/answers/[!.]*.parquet")}


def column_of(output: Path, name: str) -> list[Any]:
    """The values of one column of the output."""
    return [row[name] for row in rows_of(output)]


def read_quarantine(output: Path, step: str | None = None) -> list[dict[str, Any]]:
    """The rows of the quarantine list, or only those of `step`."""
    lines: list[dict[str, Any]] = pq.read_table(output / QUARANTINE).to_pylist()
    return [line for line in lines if step in (None, line["step"])]


def assert_manifest_lists_what_is_there(output: Path) -> None:
    """Assert that the manifest lists exactly the visible files, with their digests."""
    manifest = Ledger(output).manifest()
    assert manifest is not None
    listed = {file.output_name: file.digest for file in manifest.files}
    visible = {}
    for path in output.rglob("*.parquet"):
        name = path.relative_to(output).as_posix()
        if not name.startswith("_"):
            visible[name] = digest_file(path)
    assert listed == visible


def copy_earlier(folder: Path) -> Path:
    """Copy the earlier input and outputs to `folder`, and put the new path into the manifests."""
    copy = folder / "earlier"
    shutil.copytree(EARLIER, copy)
    for manifest in copy.glob("*/_manifest.json"):
        text = manifest.read_text()
        assert '"/tmp/earlier/in"' in text
        manifest.write_text(text.replace("/tmp/earlier/in", str(copy / "in")))
    return copy
