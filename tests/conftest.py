"""Shared by all tests: one torch thread, no telemetry, and a job over small files.

The job's checkpoint is a real one with a few layers.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.cli.server import own_server
from glmbatch.glm.engine.pool import EnginePool
from glmbatch.ledger.input import opening
from glmbatch.settings.tuning import TuneConfig
from glmbatch.store.paths import AnyPath
from tests.stores import Store, s3_store
from tests.support import (
    CAUSAL,
    CLASSIFY,
    GENERATE,
    SAMPLE_MODEL,
    Settings,
    Tune,
    Write,
    overridden,
)
from tests.unit.tuning.rows import GOOD, labelled

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """When several processes share the tests, start the long files first, so all end together."""
    if hasattr(config, "workerinput"):  # this process is an xdist worker

        def place(item: pytest.Item) -> tuple[bool, bool]:
            is_long = item.get_closest_marker("prefect") is not None
            return not is_long, item.get_closest_marker("slow") is None

        items.sort(key=place)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Clients' variables for one Prefect server of the session: home, address and password."""
    home = str(tmp_path_factory.mktemp("prefect"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PREFECT_HOME", home)
        with own_server() as client:
            yield {"PREFECT_HOME": home, **client}


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One S3 server for the session."""
    with s3_store(tmp_path_factory.mktemp("s3") / "log") as store:
        yield store


@pytest.fixture
def store(s3: Store) -> Iterator[Store]:
    """An empty folder in an object store that causes no faults."""
    s3.folder = uuid.uuid4().hex
    s3.calm()
    yield s3
    s3.calm()


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """The catalogue `lake` in SQLite, with an empty namespace `shop` and a warehouse."""
    from pyiceberg.catalog import load_catalog

    address = f"sqlite:///{tmp_path}/catalog.db"
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__URI", address)
    opened = load_catalog("lake", uri=address, warehouse=str(tmp_path / "warehouse"))
    opened.create_namespace("shop")
    return opened


@pytest.fixture
def rows() -> list[str | None]:
    """Varied texts that can all be answered."""
    return [
        f"第{number}条 review number {number}: {'很好 ' * (number % 5)}end" for number in range(23)
    ]


@pytest.fixture
def write_source(tmp_path: Path) -> Write:
    """Write a Parquet file of the given columns below `in/`; return its path."""

    def write(name: str, columns: dict[str, Any], **options: Any) -> Path:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        pq.write_table(table, path, **options)
        return path

    return write


@pytest.fixture
def own_engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without a loaded engine, and leave none to other tests."""
    pool = EnginePool()
    monkeypatch.setattr("glmbatch.run.session._ENGINES", pool)
    yield
    for engine in list(pool._engines.values()):
        pool.discard(engine)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output folder of the job that `job_settings` makes."""
    return tmp_path / "out"


@pytest.fixture
def job_settings(tmp_path: Path) -> Settings:
    """Make settings of a job over `in/` that classifies and generates.

    Keywords override single settings, with __ after the group: `data__limit=3`.
    """

    def settings(**overrides: Any) -> dict[str, Any]:
        job: dict[str, Any] = {
            "data": {
                "input": str(tmp_path / "in"),
                "output": str(tmp_path / "out"),
                "rows_per_fragment": 8,
            },
            "model": {"path": str(CAUSAL)},
            "steps": [dict(CLASSIFY), dict(GENERATE)],
            "runtime": {"device": "cpu", "retry_delay_seconds": 0.01},
        }
        return overridden(job, overrides)

    return settings


def tune_settings(source: Path, output: Path, overrides: Mapping[str, Any]) -> TuneConfig:
    """The settings of a small fine-tuning over the rows in `source`."""
    config: dict[str, Any] = {
        "data": {"input": str(source), "valid_share": 0.2, "test_share": 0.2},
        "output": str(output),
        "model": {"path": str(SAMPLE_MODEL)},
        # Full fine-tuning of so small a model learns the rows in a few epochs. LoRA does not.
        "training": {
            "method": "full",
            "epochs": 3,
            "batch_rows": 16,
            "learning_rate": 4e-3,
            "gradient_checkpointing": False,
        },
        "runtime": {"device": "cpu"},
        "prompt_template": "{text}",  # short prompts train fastest
        # 48 test rows, which TF-IDF answers without a mistake.
        "must_beat": ["current"],
        "least_test_rows": 20,
    }
    return TuneConfig.model_validate(overridden(config, overrides))


def write_days(folder: Path) -> None:
    """Write 240 labelled rows in two days below `folder`."""
    rows = labelled(240)
    for day in range(2):
        part = {name: values[120 * day : 120 * day + 120] for name, values in rows.items()}
        (folder / f"day={day}").mkdir(parents=True)
        pq.write_table(pa.table(part), folder / f"day={day}" / "a.parquet")


@pytest.fixture
def tune(tmp_path: Path) -> Tune:
    """Make settings of a small fine-tuning over 240 rows in two days.

    Keywords override single settings, with __ after the group: `training__epochs=6`.
    """
    write_days(tmp_path / "in")
    return lambda **overrides: tune_settings(tmp_path / "in", tmp_path / "tuned", overrides)


@pytest.fixture(scope="session")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows of `tune` in `in/`, and a checkpoint that learned them in `tuned/`."""
    from glmbatch.tuning.finetune import finetune  # imports torch

    folder = tmp_path_factory.mktemp("good")
    write_days(folder / "in")
    assert finetune(tune_settings(folder / "in", folder / "tuned", GOOD)).promoted
    return folder


@pytest.fixture
def good(good_run: Path, tmp_path: Path) -> Tune:
    """As `tune`, where the training with the settings GOOD is done, and its checkpoint promoted."""
    shutil.copytree(good_run / "tuned", tmp_path / "tuned", symlinks=True)
    return lambda **overrides: tune_settings(good_run / "in", tmp_path / "tuned", overrides)


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sources that runs digest from now on."""
    names: list[str] = []
    digest = opening.digest_file

    def counting(path: AnyPath, *stamp: Any) -> str:
        names.append(path.name)
        return digest(path, *stamp)

    monkeypatch.setattr(opening, "digest_file", counting)
    return names
