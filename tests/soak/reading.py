"""Programs that read an output again and again while runs write it, each in its own process.

    python -m tests.soak.reading    fork a process for each reader that a line on stdin names

Each read goes to the reader's log, as a line of JSON. Knows nothing of glmbatch: a table is read as
its own package does, and a folder as docs/answers.md says.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
COLUMNS = ["file", "row", "size", "night", "text", "mood", "reply"]
CATALOGUE = "soak"  # of Iceberg tables, described by the environment
FRAGMENT = 8  # rows in a file of the output, but for the last one of a source
IMPORTED = (
    "deltalake",
    "duckdb",
    "pandas",
    "pyarrow.dataset",
    "pyarrow.parquet",
    "pyiceberg.catalog.sql",
    "pyiceberg.io.pyarrow",
)
Row = tuple[str | None, ...]


def digest_of(rows: Iterable[Row]) -> str:
    """One digest of the rows, whatever their order."""
    return sha256(json.dumps(sorted(rows, key=repr)).encode()).hexdigest()[:16]


def as_rows(rows: Iterable[Iterable[Any]]) -> list[Row]:
    """The rows with all values as text: packages give numbers and nulls different types."""
    return [tuple(map(_as_text, row)) for row in rows]


def _as_text(value: Any) -> str | None:
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return None if missing else str(value)


def of_arrow(table: Any) -> list[Row]:
    return as_rows(zip(*[table[name].to_pylist() for name in COLUMNS], strict=True))


def torn(rows: Iterable[Row]) -> list[str]:
    """The published files of a folder that were not read as they are, each with all its rows."""
    files: dict[tuple[Any, ...], list[tuple[int, int, Any]]] = defaultdict(list)
    for file, row, size, night, *_ in rows:
        files[file, int(row or 0) // FRAGMENT].append((int(row or 0), int(size or 0), night))
    faults = []
    for (file, number), read in files.items():
        size = read[0][1]
        expected = range(number * FRAGMENT, min(size, (number + 1) * FRAGMENT))
        if sorted(read) != [(row, size, read[0][2]) for row in expected]:
            faults.append(f"{file} {number}: {sorted(read)}")
    return faults


def _s3() -> Any:
    from pyarrow.fs import S3FileSystem

    return S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])


def _place(address: str) -> tuple[str, Any]:
    """The path and pyarrow's file system of a folder."""
    if address.startswith("s3://"):
        return address.removeprefix("s3://"), _s3()
    return address, None


def folder_arrow(address: str) -> list[Row]:
    import pyarrow.dataset as ds

    path, system = _place(address)
    return of_arrow(ds.dataset(path, filesystem=system).to_table(columns=COLUMNS))


def folder_pandas(address: str) -> list[Row]:
    import pandas as pd

    path, system = _place(address)
    frame = pd.read_parquet(path, columns=COLUMNS, filesystem=system)
    return as_rows(frame.itertuples(index=False))


def folder_duckdb(address: str) -> list[Row]:
    import duckdb
    import pyarrow.dataset as ds

    with duckdb.connect() as connection:
        if address.startswith("s3://"):
            # Its own reader of a store is an extension, which it downloads.
            path, system = _place(address)
            read = connection.from_arrow(ds.dataset(path, filesystem=system))
        else:
            files = f"{address}/**/*-??????????.parquet"
            read = connection.sql(f"from read_parquet('{files}', union_by_name=true)")
        return as_rows(read.select(*COLUMNS).fetchall())


def folder_manifest(address: str) -> list[Row]:
    """The rows of the files that the manifest names, each of them with its digest."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow.fs import LocalFileSystem

    path, system = _place(address)
    system = system or LocalFileSystem()

    def content(name: str) -> bytes:
        with system.open_input_stream(f"{path}/{name}") as stream:
            read: bytes = stream.read()
            return read

    rows: list[Row] = []
    for file in json.loads(content("_manifest.json"))["files"]:
        read = content(file["output_name"])
        if sha256(read).hexdigest() != file["digest"]:
            raise FileNotFoundError(f"{file['output_name']} is not that of the manifest")
        rows += of_arrow(pq.read_table(pa.BufferReader(read)))
    return rows


def _delta(address: str) -> Any:
    from deltalake import DeltaTable

    return DeltaTable(address, storage_options={"allow_http": "true"})


def delta_rs(address: str) -> list[Row]:
    return of_arrow(_delta(address).to_pyarrow_table(columns=COLUMNS))


def delta_pandas(address: str) -> list[Row]:
    return as_rows(_delta(address).to_pandas(columns=COLUMNS).itertuples(index=False))


def delta_duckdb(address: str) -> list[Row]:
    import duckdb

    dataset = _delta(address).to_pyarrow_dataset()
    with duckdb.connect() as connection:
        return as_rows(connection.from_arrow(dataset).select(*COLUMNS).fetchall())


def _iceberg(name: str) -> Any:
    from pyiceberg.catalog import load_catalog

    catalog = load_catalog(CATALOGUE, **{"s3.endpoint": os.environ["AWS_ENDPOINT_URL"]})
    return catalog.load_table(name).scan(selected_fields=tuple(COLUMNS))


def iceberg_arrow(name: str) -> list[Row]:
    return of_arrow(_iceberg(name).to_arrow())


def iceberg_pandas(name: str) -> list[Row]:
    return as_rows(_iceberg(name).to_pandas()[COLUMNS].itertuples(index=False))


def iceberg_duckdb(name: str) -> list[Row]:
    connection = _iceberg(name).to_duckdb("answers")
    with connection:
        return as_rows(connection.table("answers").select(*COLUMNS).fetchall())


READERS: dict[str, dict[str, Callable[[str], list[Row]]]] = {
    "parquet": {
        "pyarrow": folder_arrow,
        "pandas": folder_pandas,
        "duckdb": folder_duckdb,
        "manifest": folder_manifest,
    },
    "delta": {"delta-rs": delta_rs, "pandas": delta_pandas, "duckdb": delta_duckdb},
    "iceberg": {"pyiceberg": iceberg_arrow, "pandas": iceberg_pandas, "duckdb": iceberg_duckdb},
}


def _read_on(
    read: Callable[[str], list[Row]], address: str, log: Path, pause_seconds: float
) -> None:
    parent = os.getppid()
    with log.open("w", buffering=1) as file:
        while os.getppid() == parent:
            line: dict[str, Any] = {"began": time.time()}
            try:
                rows = read(address)
                line |= {"rows": len(rows), "digest": digest_of(rows), "torn": torn(rows)}
                line["nights"] = sorted({str(row[3]) for row in rows})
            except Exception as error:  # noqa: BLE001 - the caller decides whether it may fail
                line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            file.write(json.dumps(line) + "\n")
            # On a busy machine and in a store, readers must not take all the time of the runs.
            time.sleep(max(pause_seconds, 2 * (time.time() - line["began"])))


def _serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)  # once, before the processes are forked
    running: list[int] = []
    for order in sys.stdin:
        if order == "stop\n":
            for process in running:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            running.clear()
        else:
            table, address, folder, pause_seconds = json.loads(order)
            for name, read in READERS[table].items():
                process = os.fork()
                if not process:
                    _read_on(read, address, Path(folder) / f"{name}.jsonl", pause_seconds)
                    os._exit(0)
                running.append(process)
        print(flush=True)  # noqa: T201


class Readers:
    """All readers of a format, in processes of their own, from `start` to `stop`.

    Each waits `pause_seconds` after a read, and at least twice as long as the read took.
    """

    def __init__(self, folder: Path, pause_seconds: float = 0.2) -> None:
        self._folder = folder
        self._pause_seconds = pause_seconds
        self._names: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.soak.reading"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(self, table: str, address: str) -> None:
        """Let all readers of the format `table` read the output at `address`."""
        self._names = list(READERS[table])
        for log in self._folder.glob("*.jsonl"):
            log.unlink()
        self._order(json.dumps([table, address, str(self._folder), self._pause_seconds]))

    def stop(self) -> None:
        self._order("stop")

    def close(self) -> None:
        self._process.communicate("stop\n")

    def reads(self) -> dict[str, list[dict[str, Any]]]:
        """What each reader has read since `start`, in order."""
        logs = {}
        for name in self._names:
            path = self._folder / f"{name}.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            logs[name] = [json.loads(line) for line in lines if line.endswith("\n")]
        return logs

    def wait_for_one_each(self, seconds: float) -> dict[str, dict[str, Any]]:
        """The first read of each reader that begins after this call."""
        now = time.time()
        while True:
            fresh = {}
            for name, lines in self.reads().items():
                later = [line for line in lines if line["began"] > now]
                fresh.update({name: later[0]} if later else {})
            if len(fresh) == len(self._names):
                return fresh
            assert time.time() - now < seconds, f"only {sorted(fresh)} still read"
            time.sleep(0.02)

    def _order(self, order: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        self._process.stdout.readline()


if __name__ == "__main__":
    _serve()
