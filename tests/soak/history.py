"""One output's nights of change with kills, compared with those of an undisturbed twin."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from glmbatch.ledger.ledger import PUBLISHING, Ledger
from glmbatch.ledger.manifest import MANIFEST, PublishedFile
from glmbatch.ledger.quarantine import QUARANTINE
from glmbatch.ledger.verification import verify
from tests.soak.changes import CHANGES, World, new_file, read_texts
from tests.soak.runs import Forks, Kill, Outcome, Runs
from tests.support import proved

# A stamp counts once it is older than this in most histories, and in some the two seconds of users.
GRAIN_SECONDS = 0.05
USERS_GRAIN_SECONDS = 2.0
NIGHTS = 8


@dataclass
class Tally:
    """What a soak did. `allowed` counts the prompts that its nights might have asked at most."""

    kills: int = 0
    asked: int = 0
    undisturbed: int = 0
    allowed: int = 0
    rows: int = 0
    histories: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    nights: Counter[str] = field(default_factory=Counter)


class History:
    """An output that lives through nights drawn from `seed`, and its twin that is never killed."""

    def __init__(self, folder: Path, seed: int, forks: Forks, runs: Runs, tally: Tally) -> None:
        self.folder = folder
        self.seed = seed
        self.forks = forks
        self.runs = runs
        self.tally = tally
        self.twin = World(folder / "twin")
        self.killed = World(folder / "killed")
        self.trace: list[str] = []
        self._went_on = True
        self._seconds = 0.0  # of the last run that was not killed
        self._answers: dict[tuple[str, ...], tuple[Any, ...]] = {}

    def live(self, nights: int = NIGHTS) -> None:
        """Live through the nights. AssertionError with all that happened at the first fault."""
        self.tally.histories += 1
        try:
            for world in (self.twin, self.killed):
                rng = random.Random(self.seed)
                for _ in range(4):
                    new_file(world, rng)
            for night in range(nights):
                self._night(night)
            self._compare_with_fresh()
        except AssertionError as error:
            happened = "\n".join(self.trace)
            raise AssertionError(f"SOAK_SEED={self.seed}: {error}\n{happened}") from error

    def _night(self, night: int) -> None:
        rng = random.Random(f"{self.seed}/{night}")
        settles = rng.random() < 0.5
        goes_on = night == 0 or rng.random() < 0.7
        names = self._names(rng, night, goes_on=goes_on)
        self.tally.changes.update(names)
        self.trace.append(f"night {night}: {names}, {settles=}, {goes_on=}")
        self._change(self.twin, night, names, settles=settles)
        backup = self.folder / "backup"
        if self.twin.output.exists():
            shutil.copytree(self.twin.output, backup)
        undisturbed = self.forks.run(self.twin.job)
        self._change(self.killed, night, names, settles=settles)
        before = manifest_bytes(self.killed)
        outcomes = [self._killed_run(rng, undisturbed) for _ in range(rng.choice([1, 1, 2, 3]))]
        if goes_on:
            outcomes.append(self._run(None))
        self._check_asked(undisturbed, outcomes)
        if goes_on:
            self._check_published(undisturbed, outcomes[-1])
        elif manifest_bytes(self.killed) == before and undisturbed.end == "published":
            # Nothing was published, so the twin forgets its night.
            self._count_cut_off(before)
            shutil.rmtree(self.twin.output)
            if backup.exists():
                backup.rename(self.twin.output)
        shutil.rmtree(backup, ignore_errors=True)
        self._count_night(undisturbed, settles=settles, goes_on=goes_on)
        if undisturbed.end != "published":
            self._mend()

    def _names(self, rng: random.Random, night: int, *, goes_on: bool) -> list[str]:
        """The names of the night's changes, in order."""
        if not night:
            return ["nothing"]
        names = rng.choices(sorted(CHANGES), k=rng.choice([1, 1, 2, 3]))
        # What a run had begun to publish when it was killed may be gone in the next night.
        if not self._went_on and rng.random() < 0.7:
            names.append(rng.choice(["deleted", "emptied", "one folder"]))
        if not goes_on:
            names += rng.choices(["reordered", "1 % rewritten", "a byte changed"], k=2)
        self._went_on = goes_on
        # Damage comes last, and in a night that ends well: the source must still be there.
        if not goes_on:
            names = [name for name in names if name != "output damaged"]
        return sorted(names, key=lambda name: name == "output damaged")

    def _mend(self) -> None:
        """End a refused night with settings that are not refused.

        It was refused because a source that it did not read has answers with other settings.
        """
        self.trace.append("mended")
        for world in (self.twin, self.killed):
            world.job["data"].update(missing_sources="drop", input=str(world.input))
        undisturbed = self.forks.run(self.twin.job)
        assert undisturbed.end == "published", undisturbed
        self._check_published(undisturbed, self._run(None))

    def _change(self, world: World, night: int, names: list[str], *, settles: bool) -> None:
        for number, name in enumerate(names):
            CHANGES[name](world, random.Random(f"{self.seed}/{night}/{number}"))
        if settles:
            time.sleep(self.forks.grain_seconds * 1.05 + 0.01)

    def _killed_run(self, rng: random.Random, undisturbed: Outcome) -> Outcome:
        kinds = ["before name", "after name", "time", "prompt"]
        kind: Any = rng.choice(kinds if undisturbed.asked else kinds[:3])
        if kind == "time":
            return self._run(Kill(kind, rng.uniform(0, self._seconds or undisturbed.seconds)))
        if kind == "prompt":
            return self._run(Kill(kind, rng.randint(1, undisturbed.asked)))
        # Many of them in the middle of the publication.
        ranges = [(1, max(1, undisturbed.names))]
        if undisturbed.complete:
            ranges.append((undisturbed.shown, undisturbed.complete))
        least, most = rng.choice(ranges)
        return self._run(Kill(kind, rng.randint(least, most)))

    def _run(self, kill: Kill | None) -> Outcome:
        outcome = self.runs.run(self.killed.job, kill)
        self.trace.append(f"  {kill}: {outcome}")
        if outcome.end == "published":
            self._seconds = outcome.seconds
        if kill is not None and outcome.end == "killed":
            self.tally.kills += 1
            self.tally.kinds[kill.kind] += 1
        return outcome

    def _check_asked(self, undisturbed: Outcome, outcomes: list[Outcome]) -> None:
        kills = sum(outcome.end == "killed" for outcome in outcomes)
        task = self.killed.job["data"]["rows_per_fragment"] * self.runs.in_flight
        asked = sum(outcome.asked for outcome in outcomes)
        allowed = undisturbed.asked + kills * task
        self.trace.append(f"  asked {asked}, undisturbed {undisturbed.asked}, {allowed=}")
        self.tally.asked += asked
        self.tally.undisturbed += undisturbed.asked
        self.tally.allowed += allowed
        assert asked <= allowed

    def _check_published(self, undisturbed: Outcome, last: Outcome) -> None:
        assert (last.end == "published") == (undisturbed.end == "published"), undisturbed
        if last.end != "published":
            assert last.end in (undisturbed.end, "refused")
            return
        rows = rows_of(self.killed)
        self.tally.rows += len(rows)
        assert_same(rows, rows_of(self.twin))
        assert list(entries_of(self.killed)) == list(entries_of(self.twin))
        assert failures_of(self.killed) == failures_of(self.twin)
        self._check_sound(rows)
        templates = [step["prompt_template"] for step in self._steps()]
        for row in rows.values():
            key = (*templates, str(row["text"]))
            answer = row["mood"], row["reply"], row["mood_key"], row["reply_key"]
            assert self._answers.setdefault(key, answer) == answer, row

    def _steps(self) -> list[dict[str, Any]]:
        return [{"prompt_template": "{text}", **step} for step in self.killed.job["steps"]]

    def _check_sound(self, rows: dict[tuple[str, int], dict[str, Any]]) -> None:
        """Assert that every source that was read is published as it is now."""
        sources = {}
        for finding in verify(self.killed.output).findings:
            assert finding.kind == "unchecked", finding
            sources[finding.file] = finding
        for file in entries_of(self.killed):
            if file.output_name in sources:
                assert not self.killed.reads(file.source), sources[file.output_name]
        texts: dict[str, list[str | None]] = {}
        for (source, _), row in sorted(rows.items()):
            texts.setdefault(source, []).append(row["text"])
        for path in self.killed.sources():
            name = path.relative_to(self.killed.input).as_posix()
            if self.killed.reads(name):
                assert texts.get(name, []) == read_texts(path), name
        if self.killed.job["data"].get("missing_sources") == "drop":
            assert all((self.killed.input / name).exists() for name in texts)

    def _compare_with_fresh(self) -> None:
        """Compare with the answers of a run that knows nothing."""
        fresh = replace(self.killed, folder=self.folder / "fresh")
        shutil.copytree(self.killed.input, fresh.input, dirs_exist_ok=True)
        self._mend()
        data = {**self.killed.job["data"], "input": str(fresh.input), "output": str(fresh.output)}
        fresh.job = {**self.killed.job, "data": data}
        assert self.forks.run(fresh.job).end == "published"
        expected = rows_of(fresh)
        assert_same(rows_of(self.killed), expected)

    def _count_cut_off(self, before: bytes) -> None:
        """Count a night whose publication had begun, so that readers see a part of it."""
        if before:
            named = [finding.file for finding in verify(self.killed.output).findings]
            self.tally.nights["cut off"] += PUBLISHING in named

    def _count_night(self, undisturbed: Outcome, *, settles: bool, goes_on: bool) -> None:
        nights = self.tally.nights
        nights["all"] += 1
        nights["settled"] += settles
        nights["given up"] += not goes_on
        nights["refused"] += undisturbed.end != "published"


def manifest_bytes(world: World) -> bytes:
    path = world.output / MANIFEST
    return path.read_bytes() if path.exists() else b""


def entries_of(world: World) -> Iterator[PublishedFile]:
    """What is published, without what depends on the run: its id, times and inodes."""
    manifest = Ledger(world.output).manifest()
    assert manifest is not None
    for file in proved(manifest):
        yield replace(file, digest="")


def failures_of(world: World) -> list[dict[str, Any]]:
    """The list of failed rows."""
    lines: list[dict[str, Any]] = pq.read_table(world.output / QUARANTINE).to_pylist()
    return sorted(lines, key=lambda line: (line["source"], line["row"], line["step"]))


def rows_of(world: World) -> dict[tuple[str, int], dict[str, Any]]:
    """The published rows by source and row. AssertionError if one is there twice."""
    manifest = Ledger(world.output).manifest()
    assert manifest is not None
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for file in manifest.files:
        with (world.output / file.output_name).open("rb") as opened:
            for number, row in enumerate(pq.read_table(opened).to_pylist(), file.first_row):
                place = (file.source, number)
                assert place not in rows, f"{place} is there twice"
                rows[place] = row
    return rows


def assert_same(
    rows: dict[tuple[str, int], dict[str, Any]], expected: dict[tuple[str, int], dict[str, Any]]
) -> None:
    """Assert that the rows are equal, and their scores up to rounding."""
    assert rows.keys() == expected.keys(), sorted(rows.keys() ^ expected.keys())
    for place, row in rows.items():
        other = expected[place]
        assert row.keys() == other.keys(), place
        for name, value in row.items():
            if name == "mood_scores" and value is not None:
                assert all(
                    math.isclose(value[label], other[name][label], abs_tol=1e-4) for label in value
                ), place
            else:
                assert value == other[name], (place, name)


def soak(folder: Path, seed: int, kills: int, runs: Runs | None = None) -> Iterator[Tally]:
    """Live through histories until runs were killed `kills` times; the tally after each.

    `runs` starts the runs that are killed: without it, those of `run_job`.
    """
    tally = Tally()
    forks = Forks(folder)
    try:
        while tally.kills < kills:
            forks.grain_seconds = random.Random(seed).choice(
                [USERS_GRAIN_SECONDS, *[GRAIN_SECONDS] * 9]
            )
            if runs is not None:
                runs.grain_seconds = forks.grain_seconds
            history = folder / str(seed)
            History(history, seed, forks, runs or forks, tally).live()
            shutil.rmtree(history)
            seed += 1
            yield tally
    finally:
        forks.close()


def described(tally: Tally) -> str:
    return json.dumps(vars(tally), indent=1)
