"""Nights of an output of any format, on a disk or in a store, with kills and readers at work.

Every night changes a column in all rows, so a read that mixes two nights shows. A twin output, of
the same format and in the same place, is never killed. `changes` and `history` have more kinds of
change, for a folder on a disk.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from glmbatch.ledger.ledger import PUBLISHING, Ledger
from glmbatch.ledger.manifest import MANIFEST
from glmbatch.ledger.verification import verify
from glmbatch.store.folder import Folder
from glmbatch.store.paths import location
from tests.soak.reading import CATALOGUE, FRAGMENT, Readers, digest_of, of_arrow
from tests.soak.runs import Counters, Forks, Kill, Outcome
from tests.stores import BUCKET, Request, Store
from tests.support import CAUSAL, CLASSIFY, GENERATE

# A stamp counts once it is older than this.
GRAIN_SECONDS = 0.05
# Of a killed run, after which the next one takes over.
LOCK_SECONDS = 4.0
VARIABLE = f"PYICEBERG_CATALOG__{CATALOGUE.upper()}__URI"
WORDS = ["好", "bad", "so", "很好用", "broke"]


@dataclass(frozen=True)
class Cell:
    """What an output is, where it is, and what its sources are: parquet, csv or jsonl."""

    table: str
    place: str
    source: str = "parquet"

    def __str__(self) -> str:
        kind = "folder" if self.table == "parquet" else self.table
        lines = "" if self.source == "parquet" else f" of {self.source}"
        return f"{kind}{lines}, {self.place}"


# Where an output can be.
CELLS = [
    Cell("parquet", "disk"),
    Cell("parquet", "s3"),
    Cell("delta", "disk"),
    Cell("delta", "s3"),
    Cell("iceberg", "disk"),
    Cell("iceberg", "s3"),
    Cell("parquet", "disk", "csv"),
    Cell("parquet", "disk", "jsonl"),
]


@dataclass
class Tally:
    """What happened in one cell. `failed` are reads that raised, where a folder's may."""

    nights: int = 0
    kills: int = 0
    runs: int = 0
    rows: int = 0
    asked: int = 0
    undisturbed: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class RequestKill:
    """Kill a run before or after its n-th request that changes the store.

    With `publishing`, those count that begin with the announcement of a publication.
    """

    kind: str
    at: int
    publishing: bool

    @property
    def name(self) -> str:
        return f"{self.kind} request"


class Killer:
    """Kills the run whose number is in `counters`, as the `harm` of a store's proxy."""

    def __init__(self, kill: RequestKill, counters: Path) -> None:
        self._kill, self._counters = kill, counters
        self._number = 0

    def harm(self, request: Request) -> str | None:
        if not request.changes or not request.key.startswith("killed/") or is_lock(request):
            return None
        if self._kill.publishing and not self._number and not request.key.endswith(PUBLISHING):
            return None
        self._number += 1
        if self._number != self._kill.at:
            return None
        os.killpg(Counters(self._counters).counts[4], signal.SIGKILL)
        # What a process has sent may still be done after its end.
        return "reset" if self._kill.kind == "before" else "lost"


def catalogue_variable(folder: Path) -> tuple[str, str]:
    """The variable that describes the catalogue of all Iceberg tables, a database in `folder`."""
    return VARIABLE, f"sqlite:///{folder}/catalogue.db"


def make_namespace(name: str) -> None:
    from pyiceberg.catalog import load_catalog

    load_catalog(CATALOGUE, uri=os.environ[VARIABLE]).create_namespace(name)


def is_lock(request: Request) -> bool:
    return "/_glmbatch/lock." in request.key


class Nights:
    """One output, its twin, and the sources of both, which change by `seed`."""

    def __init__(
        self, cell: Cell, folder: Path, seed: int, forks: Forks, readers: Readers, store: Store
    ) -> None:
        self.cell = cell
        self.seed = seed
        self.tally = Tally()
        self.trace: list[str] = []
        self._folder = folder
        self._forks, self._readers, self._store = forks, readers, store
        self._in_store = cell.place == "s3"
        self._namespace = re.sub(r"\W", "_", folder.name)
        if cell.table == "iceberg":
            make_namespace(self._namespace)
        store.folder = folder.name
        self._root = f"s3://{BUCKET}/{folder.name}" if self._in_store else str(folder)
        self._sources: dict[str, list[str]] = {}
        self._expected: list[str] = []  # the digest of each night's rows
        self._seconds = 1.0
        forks.grain_seconds = GRAIN_SECONDS
        forks.lock_seconds = LOCK_SECONDS

    def live(self, kills: int, of_a_night: int = 10, seconds: float = 120.0) -> Tally:
        """Live through nights until runs were killed `kills` times. AssertionError at a fault.

        A night has `of_a_night` kills at most. `seconds` is how long a reader may take for a read.
        """
        is_iceberg = self.cell.table == "iceberg"
        output = self._table("killed") if is_iceberg else f"{self._root}/killed"
        try:
            self._change(0)
            for name in ("twin", "killed"):
                outcome = self._run(name, None)
                assert outcome.end == "published", outcome
            self._note_expected()
            self._readers.start(self.cell.table, output)
            try:
                self._readers.wait_for_one_each(seconds)
                while self.tally.kills < kills:
                    self._night(len(self._expected), of_a_night)
                    self._check_agreement(seconds)
            finally:
                self._readers.stop()
            self._check_reads()
        except AssertionError as error:
            happened = "\n".join(self.trace)
            raise AssertionError(f"{self.cell}, seed {self.seed}: {error}\n{happened}") from error
        return self.tally

    def _night(self, night: int, most_kills: int) -> None:
        rng = random.Random(f"{self.seed}/{self.cell}/{night}")
        self._change(night)
        undisturbed = self._run("twin", None)
        assert undisturbed.end == "published", undisturbed
        requests = self._changed_requests()
        outcomes: list[Outcome] = []
        while not outcomes or outcomes[-1].end != "published":
            left = undisturbed.asked - sum(outcome.asked for outcome in outcomes)
            kill = self._kill(rng, undisturbed, requests, left)
            outcomes.append(self._run("killed", kill if len(outcomes) < most_kills else None))
        self._check_asked(undisturbed, outcomes)
        self._note_expected()
        rows, expected = self._rows("killed"), self._rows("twin")
        assert rows == expected, sorted(set(rows) ^ set(expected))[:5]
        findings = verify(f"{self._root}/killed").findings
        assert findings == (), findings
        self.tally.nights += 1
        self.tally.rows += len(rows)

    def _change(self, night: int) -> None:
        """Add, delete and change sources, and write all of them for this night."""
        rng = random.Random(f"{self.seed}/{night}")
        before = set(self._sources)
        if len(before) > 1 and rng.random() < 0.5:
            del self._sources[rng.choice(sorted(before))]
        while len(self._sources) < 2 or rng.random() < 0.3:
            name = f"day={rng.randint(1, 2)}/{rng.randrange(10**6):06}.{self.cell.source}"
            self._sources[name] = _texts(rng, rng.choice([1, 7, 8, 12]))
        texts = self._sources[rng.choice(sorted(self._sources))]
        texts[rng.randrange(len(texts))] = _texts(rng, 1)[0]
        texts += _texts(rng, rng.choice([0, 1, 2]))
        folder = Folder(f"{self._root}/in").path
        for name in before - self._sources.keys():
            (folder / name).unlink()
        for name, texts in self._sources.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(_content(name, night, texts))
        time.sleep(2 * GRAIN_SECONDS)

    def _table(self, output: str) -> str:
        return f"{self._namespace}.{output}"

    def _job(self, output: str) -> dict[str, Any]:
        table = {"table": f"{CATALOGUE}/{self._table(output)}"}
        return {
            "data": {
                **(table if self.cell.table == "iceberg" else {}),
                "input": f"{self._root}/in",
                "output": f"{self._root}/{output}",
                "format": self.cell.table,
                "rows_per_fragment": FRAGMENT,
                "missing_sources": "drop",
            },
            "model": {"path": str(CAUSAL)},
            "steps": [dict(CLASSIFY), dict(GENERATE)],
            "runtime": {
                "device": "cpu",
                "retry_delay_seconds": 0.01,
                "cache": str(self._folder / "cache"),
            },
            "max_error_rate": 1.0,
        }

    def _kill(
        self, rng: random.Random, undisturbed: Outcome, requests: list[str], asked: int
    ) -> Kill | RequestKill:
        """When to kill a run that asks `asked` prompts: at any moment, or while it publishes."""
        publishing = rng.random() < 0.7
        kind: Any = rng.choice(["before", "after", "time", *["prompt"] * (asked > 0)])
        if kind == "prompt":
            return Kill(kind, rng.randint(1, asked))
        if kind == "time":
            by_clock = publishing and not self._in_store
            return Kill(kind, rng.uniform(0, 0.2 if by_clock else self._seconds), by_clock)
        if self._in_store:
            most = _publishing(requests) if publishing else len(requests)
            return RequestKill(kind, rng.randint(1, max(1, most)), publishing)
        shown = undisturbed.complete - undisturbed.shown + 2
        most = shown if publishing else undisturbed.names
        name: Any = f"{kind} name"
        return Kill(name, rng.randint(1, max(1, most)), publishing)

    def _run(self, output: str, kill: Kill | RequestKill | None) -> Outcome:
        """Run until it ends or is killed; wait while the lock of a killed run counts."""
        until = time.monotonic() + 10 * LOCK_SECONDS + 60
        waits = True
        while True:
            self._store.calm()
            if isinstance(kill, RequestKill):
                self._store.harm = Killer(kill, self._forks.counters).harm
            outcome = self._forks.run(
                self._job(output), None if isinstance(kill, RequestKill) else kill
            )
            self._store.harm = lambda request: None
            if "is writing to it" not in outcome.message:
                break
            assert time.monotonic() < until, outcome
            time.sleep(LOCK_SECONDS if waits else 0.5)
            waits = False
        self.trace.append(f"  {output} {kill or ''}: {outcome}")
        self.tally.runs += 1
        if outcome.end == "published":
            self._seconds = outcome.seconds
        if outcome.end == "killed":
            assert kill is not None, outcome
            self.tally.kills += 1
            self.tally.kinds[kill.name] += 1
        else:
            lost = "its lock was not renewed" in outcome.message
            assert outcome.end == "published" or lost, outcome
        return outcome

    def _changed_requests(self) -> list[str]:
        """The keys that the last run changed, without those of its lock."""
        requests = [request for request in self._store.requests if request.changes]
        return [request.key for request in requests if not is_lock(request)]

    def _check_asked(self, undisturbed: Outcome, outcomes: list[Outcome]) -> None:
        """Assert that no answer was asked for again that a killed run had committed."""
        kills = sum(outcome.end != "published" for outcome in outcomes)
        asked = sum(outcome.asked for outcome in outcomes)
        allowed = undisturbed.asked + kills * FRAGMENT * self._forks.in_flight
        self.tally.asked += asked
        self.tally.undisturbed += undisturbed.asked
        assert asked <= allowed, f"asked {asked}, {allowed=}"

    def _note_expected(self) -> None:
        self._expected.append(digest_of(self._rows("twin")))

    def _rows(self, output: str) -> list[Any]:
        """The published rows, sorted. AssertionError if one is there twice."""
        manifest = Ledger(f"{self._root}/{output}").manifest()
        assert manifest is not None
        rows: list[Any] = []
        for file in manifest.files:
            content = location(f"{self._root}/{output}/{file.output_name}").read_bytes()
            rows += of_arrow(pq.read_table(pa.BufferReader(content)))
        assert len({row[:2] for row in rows}) == len(rows), "a row is there twice"
        assert len(rows) == sum(len(texts) for texts in self._sources.values()), "rows are missing"
        return sorted(rows, key=repr)

    def _check_agreement(self, seconds: float) -> None:
        """Assert that every reader reads all rows of the night that has just been published."""
        for name, read in self._readers.wait_for_one_each(seconds).items():
            assert read.get("digest") == self._expected[-1], f"{name} read {read}"

    def _check_reads(self) -> None:
        """Assert that no read shows what was never published."""
        for name, reads in self._readers.reads().items():
            newest = 0
            for read in reads:
                self.tally.reads[name] += 1
                if "error" in read:
                    self.tally.failed[name] += 1
                    assert self.cell.table == "parquet", f"{name} failed: {read['error']}"
                    continue
                assert not read["torn"], f"{name} read parts of files: {read['torn']}"
                if self.cell.table == "parquet" and name != "manifest":
                    self.tally.mixed[name] += len(read["nights"]) > 1
                    continue
                assert read["digest"] in self._expected, f"{name} read a mixture: {read}"
                night = self._expected.index(read["digest"])
                assert night >= newest, f"{name} read night {night} after night {newest}"
                newest = night

    def clean(self) -> None:
        """Delete what is on this machine."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _publishing(requests: list[str]) -> int:
    """How many of the requests the publication sends, to its manifest and a few more."""
    first = next((n for n, key in enumerate(requests) if key.endswith(PUBLISHING)), 0)
    last = max((n for n, key in enumerate(requests) if key.endswith(f"/{MANIFEST}")), default=first)
    return min(len(requests) - first, last - first + 4)


def _texts(rng: random.Random, rows: int) -> list[str]:
    return [f"{rng.randrange(10**8)} {rng.choice(WORDS)}" for _ in range(rows)]


def _content(name: str, night: int, texts: list[str]) -> bytes:
    """The source's bytes, as Parquet, CSV or JSON lines by its ending."""
    size = len(texts)
    table = pa.table(
        {
            "file": [name] * size,
            "row": range(size),
            "size": [size] * size,
            "night": [night] * size,
            "text": texts,
        }
    )
    if name.endswith(".jsonl"):
        return "".join(f"{json.dumps(row)}\n" for row in table.to_pylist()).encode()
    file = io.BytesIO()
    if name.endswith(".csv"):
        pa.csv.write_csv(table, file)
    else:
        pq.write_table(table, file)
    return file.getvalue()
