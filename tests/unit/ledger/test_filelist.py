"""The list of many published files: what it holds, and when it is written and deleted."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import InputError
from glmbatch.ledger.filelist import LISTS, FileList, commit_list, read_list
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import MANIFEST, copy_manifest, forget_manifests, write_manifest
from tests.support import CLASSIFY, Settings, Write, run


@dataclass(frozen=True, slots=True)
class Old:
    name: str
    rows: int
    keys: dict[str, str]
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class New(Old):
    basis: str = "digest"
    stamp: list[int] | None = None
    counts: dict[str, int] = field(default_factory=dict)


def entries(kind: Any, **fields: Any) -> list[Any]:
    keys = {"mood": "k", "很好": '"'}
    return [
        kind(f"{number}.parquet", number, keys, ("a", str(number)), **fields) for number in (3, 1)
    ]


def test_a_list_gives_the_entries_back_in_order(tmp_path: Path) -> None:
    written = entries(New, basis="stat", stamp=[1, -(2**62)], counts={"x": 1})
    said = commit_list(tmp_path, written, 4)
    assert (said.files, said.rows) == (2, 4)
    assert read_list(tmp_path, said, New) == tuple(written)


def test_a_list_without_a_newer_column_gives_its_default(tmp_path: Path) -> None:
    said = commit_list(tmp_path, entries(Old), 4)
    assert read_list(tmp_path, said, New) == tuple(entries(New))
    with pytest.raises(ValueError, match="unknown column 'basis'"):
        read_list(tmp_path, commit_list(tmp_path, entries(New), 4), Old)


def test_entries_share_repeated_values(tmp_path: Path) -> None:
    said = commit_list(tmp_path, [New("a", 1, {"k": "v"}, ()) for _ in range(50)], 50)
    assert len({id(entry.keys) for entry in read_list(tmp_path, said, New)}) == 1


def lists(out: Path) -> list[Path]:
    return sorted((out / LISTS).glob("*"))


def test_a_list_is_written_when_it_changes_and_then_replaced(
    write_source: Write, job_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write_source(f"{name}.parquet", {"text": [name]})
    run(job_settings(steps=[CLASSIFY]))
    inline = Ledger(out).manifest()
    monkeypatch.setattr("glmbatch.ledger.manifest.INLINE_FILES", 2)
    run(job_settings(steps=[CLASSIFY]))
    (first,) = lists(out)
    content = json.loads((out / MANIFEST).read_text())
    assert "files" not in content
    said = FileList.model_validate(content["list"])
    assert (said.name, said.files, said.rows) == (f"{LISTS}/{first.name}", 3, 3)
    manifest = Ledger(out).manifest()
    assert inline is not None
    assert manifest is not None
    assert manifest.files == inline.files
    os.utime(first, (1, 1))
    run(job_settings(steps=[CLASSIFY]))
    assert [path.stat().st_mtime for path in lists(out)] == [1]
    write_source("d.parquet", {"text": ["d"]})
    run(job_settings(steps=[CLASSIFY]))
    (second,) = lists(out)
    assert second != first
    monkeypatch.setattr("glmbatch.ledger.manifest.INLINE_FILES", 4)
    run(job_settings(steps=[CLASSIFY]))
    assert lists(out) == []


def test_a_reader_finds_the_list_of_a_run_that_just_published(
    write_source: Write, job_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source("a.parquet", {"text": ["a"]})
    monkeypatch.setattr("glmbatch.ledger.manifest.INLINE_FILES", 0)
    run(job_settings(steps=[CLASSIFY]))
    manifest = Ledger(out).manifest()
    assert manifest is not None
    after = manifest.model_copy(update={"run": "next", "files": (*manifest.files,) * 2})
    read_bytes = Path.read_bytes

    def publishes(path: Path) -> bytes:
        content = read_bytes(path)
        if path.name == MANIFEST:
            monkeypatch.setattr(Path, "read_bytes", read_bytes)
            old = lists(out)
            write_manifest(out, after)
            copy_manifest(out, old)
        return content

    monkeypatch.setattr(Path, "read_bytes", publishes)
    forget_manifests()
    assert Ledger(out).manifest() == after


@pytest.mark.parametrize("name", ["../a.parquet", "/a.parquet", "a//b.parquet", "", "a\0b"])
def test_a_name_in_a_list_may_not_lead_out_of_the_output(
    name: str,
    write_source: Write,
    job_settings: Settings,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_source("a.parquet", {"text": ["a"]})
    monkeypatch.setattr("glmbatch.ledger.manifest.INLINE_FILES", 0)
    run(job_settings(steps=[CLASSIFY]))
    manifest = Ledger(out).manifest()
    assert manifest is not None
    file = replace(manifest.files[0], output_name=name)
    write_manifest(out, manifest.model_copy(update={"files": (file,)}))
    with pytest.raises(InputError, match="is not a name below a folder"):
        Ledger(out).manifest()
