"""What may happen to an input, a job or an output before a night, drawn from a seed.

A change depends on the seed and on the names in the input alone, so that two worlds with the same
input change in the same way.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from glmbatch.ledger.ledger import Ledger
from tests.support import CAUSAL, CLASSIFY, GENERATE

MOODS = ["{text}", "Is it good? {text}", "How is it: {text}"]
REPLIES = ["{mood}: {text}", "{text} 很好", "{text}"]
ROWS_PER_FRAGMENT = (8, 8, 8, 5, 13)
TEXT_DIGITS = 10


@dataclass
class World:
    """A folder with an input and an output, and the settings of the job between them."""

    folder: Path
    job: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.input.mkdir(parents=True)
        self.job = {
            "data": {
                "input": str(self.input),
                "output": str(self.output),
                "rows_per_fragment": 8,
                "recheck_share": 0.0,  # nothing but a stamp finds that a source changed
            },
            "model": {"path": str(CAUSAL)},
            "steps": [dict(CLASSIFY), dict(GENERATE)],
            "runtime": {"device": "cpu", "retry_delay_seconds": 0.01},
            "max_error_rate": 1.0,
        }

    @property
    def input(self) -> Path:
        return self.folder / "in"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def sources(self) -> list[Path]:
        """All files of the input, by name, also those that the job does not read."""
        return sorted(self.input.rglob("*.parquet"))

    def reads(self, source: str) -> bool:
        """Whether the job reads the file `source` of the input, which is there."""
        path = self.input / source
        return path.exists() and path.is_relative_to(self.job["data"]["input"])


def read_texts(path: Path) -> list[str | None]:
    """The texts of a source, read without the code under test."""
    texts: list[str | None] = pq.read_table(path).column("text").to_pylist()
    return texts


def _write(path: Path, texts: Sequence[str | None], rng: random.Random) -> None:
    """Write a source anew, under a name that is there at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(texts, pa.string()), "number": range(len(texts))})
    # Plain pages, so that one byte in the file is one character of a text.
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False}
    size = rng.choice([4, 7, 1000])
    pq.write_table(table, path, row_group_size=size, write_statistics=False, **plain)


def _texts(rng: random.Random, rows: int) -> list[str | None]:
    texts: list[str | None] = []
    for _ in range(rows):
        kind = rng.random()
        text = f"{rng.randrange(10**TEXT_DIGITS):0{TEXT_DIGITS}} {rng.choice(['好', 'bad', 'so'])}"
        texts.append(None if kind < 0.06 else "" if kind < 0.09 else text)
        if kind > 0.93 and len(texts) > 1:
            texts[-1] = texts[0]
    return texts


def _new_name(world: World, rng: random.Random) -> Path:
    number = rng.randrange(10**6)
    return world.input / f"day={rng.randint(1, 2)}" / f"{number:06}.parquet"


def new_file(world: World, rng: random.Random) -> None:
    _write(_new_name(world, rng), _texts(rng, rng.choice([1, 3, 9, 20])), rng)


def delete(world: World, rng: random.Random) -> None:
    sources = world.sources()
    if len(sources) > 2:
        rng.choice(sources).unlink()


def empty(world: World, rng: random.Random) -> None:
    """Leave one file, as in a landing folder that is emptied each night, and add another."""
    sources = world.sources()
    stays = rng.choice(sources)
    for source in sources:
        if source != stays:
            source.unlink()
    new_file(world, rng)


def rename(world: World, rng: random.Random) -> None:
    source = rng.choice(world.sources())
    new = _new_name(world, rng)
    if rng.random() < 0.7:  # the rule about renames holds within a folder
        new = source.with_name(new.name)
    new.parent.mkdir(exist_ok=True)
    source.rename(new)


def swap(world: World, rng: random.Random) -> None:
    sources = world.sources()
    if len(sources) > 1:
        one, other = rng.sample(sources, 2)
        aside = world.folder / "aside"
        one.rename(aside)
        other.rename(one)
        aside.rename(other)


def split(world: World, rng: random.Random) -> None:
    source = rng.choice(world.sources())
    texts = read_texts(source)
    at = rng.randint(0, len(texts))
    _write(_new_name(world, rng), texts[:at], rng)
    _write(_new_name(world, rng), texts[at:], rng)
    source.unlink()


def merge(world: World, rng: random.Random) -> None:
    sources = world.sources()
    if len(sources) > 1:
        one, other = rng.sample(sources, 2)
        texts = read_texts(one) + read_texts(other)
        one.unlink()
        other.unlink()
        _write(rng.choice([one, _new_name(world, rng)]), texts, rng)


def touch(world: World, rng: random.Random) -> None:
    time_ns = rng.choice([1, rng.randrange(10**18)])
    os.utime(rng.choice(world.sources()), ns=(time_ns, time_ns))


def copy_over_itself(world: World, rng: random.Random) -> None:
    source = rng.choice(world.sources())
    aside = world.folder / "aside"
    shutil.copyfile(source, aside)
    if rng.random() < 0.5:
        shutil.copystat(source, aside)
    os.replace(aside, source)


def flip(world: World, rng: random.Random) -> None:
    """Change one character of a text in the file's own bytes, perhaps under the old time."""
    source = rng.choice(world.sources())
    texts = [text for text in read_texts(source) if text]
    if not texts:
        return
    text = rng.choice(texts).encode()
    at = rng.randrange(TEXT_DIGITS)
    content = source.read_bytes()
    place = content.index(text) + at
    before = source.stat()
    with source.open("r+b") as file:
        file.seek(place)
        file.write(b"%d" % ((content[place] - ord("0") + 1) % 10))
    if rng.random() < 0.5:
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))


def rewrite(world: World, rng: random.Random) -> None:
    """Change one row in a hundred, at least one, perhaps under the old time."""
    source = rng.choice(world.sources())
    texts = read_texts(source)
    before = source.stat()
    for row in rng.sample(range(len(texts)), min(len(texts), 1 + len(texts) // 100)):
        (texts[row],) = _texts(rng, 1)
    _write(source, texts, rng)
    if rng.random() < 0.5:
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))


def reorder(world: World, rng: random.Random) -> None:
    source = rng.choice(world.sources())
    texts = read_texts(source)
    rng.shuffle(texts)
    _write(source, texts, rng)


def damage(world: World, rng: random.Random) -> None:
    """Change one byte of a published file whose rows can be answered again from its source."""
    drawn, share = rng.random(), rng.random()
    manifest = Ledger(world.output).manifest() if world.output.is_dir() else None
    names = []
    for file in manifest.files if manifest is not None else ():
        if world.reads(file.source) and (world.output / file.output_name).exists():
            names.append(file.output_name)
    if names:
        path = world.output / names[int(drawn * len(names))]
        content = bytearray(path.read_bytes())
        content[int(share * len(content))] ^= 4
        path.write_bytes(content)


def prompt(world: World, rng: random.Random) -> None:
    step = rng.randrange(2)
    template = rng.choice([MOODS, REPLIES][step])
    world.job["steps"][step] = {**world.job["steps"][step], "prompt_template": template}


def fragment_size(world: World, rng: random.Random) -> None:
    world.job["data"]["rows_per_fragment"] = rng.choice(ROWS_PER_FRAGMENT)


def missing_sources(world: World, rng: random.Random) -> None:
    world.job["data"]["missing_sources"] = rng.choice(["keep", "drop"])


def one_folder(world: World, rng: random.Random) -> None:
    """Read one folder of the input, or all of it."""
    whole, day = str(world.input), str(world.input / "day=1")
    world.job["data"]["input"] = whole if world.job["data"]["input"] == day else day


def nothing(world: World, rng: random.Random) -> None:
    pass


CHANGES: dict[str, Callable[[World, random.Random], None]] = {
    "new file": new_file,
    "deleted": delete,
    "emptied": empty,
    "renamed": rename,
    "names swapped": swap,
    "split": split,
    "merged": merge,
    "touched": touch,
    "copied over itself": copy_over_itself,
    "a byte changed": flip,
    "1 % rewritten": rewrite,
    "reordered": reorder,
    "output damaged": damage,
    "prompt changed": prompt,
    "other fragments": fragment_size,
    "missing sources": missing_sources,
    "one folder": one_folder,
    "nothing": nothing,
}
