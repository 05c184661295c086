"""A damaged manifest is rebuilt from the footers: no row is lost, and none is asked again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.ledger.filelist import LISTS
from glmbatch.ledger.ledger import PUBLISHING, Ledger
from glmbatch.ledger.manifest import COPY, MANIFEST, Manifest
from glmbatch.ledger.quarantine import QUARANTINE
from glmbatch.ledger.repair import repair
from glmbatch.ledger.verification import verify
from glmbatch.settings.job import JobConfig
from glmbatch.store.folder import ASIDE
from tests.support import (
    CLASSIFY,
    Settings,
    Write,
    copy_earlier,
    proved,
    read_quarantine,
    rows_of,
    run,
)

JOB = {"steps": [CLASSIFY], "max_error_rate": 1.0}
Break = Callable[[Path], object]


@pytest.fixture
def nights(write_source: Write, job_settings: Settings, out: Path) -> Callable[[], Manifest]:
    """Two runs: in the second, a source of the first is missing, and its rows stay."""
    write_source("a.parquet", {"text": ["one", None]})
    gone = write_source("day=1/b.parquet", {"text": ["two", ""]})
    run(job_settings(**JOB))
    gone.unlink()

    def second() -> Manifest:
        run(job_settings(**JOB))
        manifest = Ledger(out).manifest()
        assert manifest is not None
        return manifest

    return second


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def change_a_value(path: Path) -> None:
    path.write_text(path.read_text().replace('"faulty_rows": 1', '"faulty_rows": 0', 1))


@pytest.mark.parametrize(
    "damage", [flip, change_a_value, Path.unlink, lambda path: path.write_text("")]
)
@pytest.mark.parametrize("copy_is_there", [True, False])
def test_a_manifest_is_rebuilt_from_the_footers(
    damage: Break,
    copy_is_there: bool,
    nights: Callable[[], Manifest],
    job_settings: Settings,
    out: Path,
) -> None:
    manifest, rows = nights(), rows_of(out)
    damage(out / MANIFEST)
    if damage != Path.unlink:
        with pytest.raises(InputError, match=r"Run glmbatch repair .*out, or set data\.output\."):
            run(job_settings(**JOB))
    if not copy_is_there:
        flip(out / COPY)
    mended = repair(out)
    assert mended.mended == (MANIFEST,)
    assert mended.files == len(manifest.files)
    again = Ledger(out).manifest()
    assert again is not None
    assert proved(again) == proved(manifest)
    assert again.root == manifest.root
    assert verify(out).sound
    summary = run(job_settings(**JOB))
    assert (summary.computed, summary.kept_sources) == (0, 1)
    assert rows_of(out) == rows


@pytest.mark.parametrize(
    "damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])]
)
def test_a_damaged_list_of_files_is_rebuilt(
    damage: Break,
    nights: Callable[[], Manifest],
    job_settings: Settings,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("glmbatch.ledger.manifest.INLINE_FILES", 0)
    manifest, rows = nights(), rows_of(out)
    (path,) = (out / LISTS).iterdir()
    damage(path)
    with pytest.raises(
        InputError, match=rf"json: is damaged.*its list {LISTS}/{path.name}.*Run glmbatch repair"
    ):
        verify(out)
    assert repair(out).mended == (MANIFEST,)
    again = Ledger(out).manifest()
    assert again is not None
    assert proved(again) == proved(manifest)
    assert again.steps == manifest.steps, "the copy has what no footer says"
    assert verify(out).sound
    summary = run(job_settings(**JOB))
    assert (summary.computed, summary.kept_sources) == (0, 1)
    assert rows_of(out) == rows


@pytest.mark.parametrize(("inline", "list_is_there"), [(1_000, False), (0, True), (0, False)])
def test_a_lost_manifest_is_not_an_empty_output(
    inline: int,
    list_is_there: bool,
    nights: Callable[[], Manifest],
    job_settings: Settings,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("glmbatch.ledger.manifest.INLINE_FILES", inline)
    nights()
    (out / MANIFEST).unlink()
    if not list_is_there:
        shutil.rmtree(out / LISTS, ignore_errors=True)
    with pytest.raises(InputError, match="is missing, but its files are still there"):
        run(job_settings(**JOB))
    for path in out.rglob("*.parquet"):
        if "_glmbatch" not in path.parts:
            path.unlink()
    assert run(job_settings(**JOB)).computed == 0, "an empty output starts over"


def test_unknown_files_are_named_and_kept(nights: Callable[[], Manifest], out: Path) -> None:
    nights()
    for path in (MANIFEST, COPY):
        (out / path).unlink()
    twice = out / "a-0000000001.parquet"
    receipt = pq.read_metadata(out / "a-0000000000.parquet").metadata[b"glmbatch.receipt"]
    other = json.loads(receipt)
    other["output_name"] = twice.name
    table = pq.read_table(out / "a-0000000000.parquet")
    pq.write_table(table.replace_schema_metadata({"glmbatch.receipt": json.dumps(other)}), twice)
    (out / "broken.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"x": [1]}), out / "foreign.parquet")
    mended = repair(out)
    notes = "\n".join(mended.notes)
    assert "a-0000000000.parquet: other files have its rows too" in notes or "a-0000000001" in notes
    assert "foreign.parquet: has no receipt for this place" in notes
    assert "broken.parquet: has no receipt for this place" in notes
    assert "the limit of the last run are unknown" in notes
    assert len(list((out / ASIDE).glob("a-*.parquet"))) == 1
    assert (out / "foreign.parquet").exists()
    assert {file.source for file in (Ledger(out).manifest() or pytest.fail()).files} == {
        "a.parquet",
        "day=1/b.parquet",
    }


def test_a_damaged_page_is_detected(nights: Callable[[], Manifest], out: Path) -> None:
    nights()
    (out / COPY).unlink()
    (out / MANIFEST).write_text("{")
    path = out / "a-0000000000.parquet"
    content = bytearray(path.read_bytes())
    content[40:80] = bytes(40)
    path.write_bytes(content)
    mended = repair(out)
    assert any("a-0000000000.parquet: not readable" in note for note in mended.notes)
    assert mended.files == 1


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(b"x")])
def test_the_list_of_failures_is_rebuilt(
    damage: Break, nights: Callable[[], Manifest], out: Path
) -> None:
    nights()
    lines = read_quarantine(out)
    assert len(lines) == 2
    damage(out / QUARANTINE)
    if repair(out).mended:
        assert sorted(map(str, read_quarantine(out))) == sorted(map(str, lines))
    assert verify(out).sound
    assert repair(out).mended == (), "a second repair has nothing to do"


@pytest.mark.parametrize("format", ["parquet", "delta"])
def test_an_output_of_an_earlier_version_is_repaired(format: str, tmp_path: Path) -> None:
    output = copy_earlier(tmp_path) / format
    before = Ledger(output).manifest()
    assert before is not None
    (output / MANIFEST).write_text("[]")
    mended = repair(output)
    after = Ledger(output).manifest()
    assert after is not None
    assert after.files == before.files
    assert mended.rows == sum(file.rows for file in before.files)


def test_the_command_says_what_it_did(
    nights: Callable[[], Manifest], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nights()
    (out / MANIFEST).write_text("x")
    assert main(["verify", str(out)]) == 2
    assert f"Run glmbatch repair {out}" in capsys.readouterr().err
    assert main(["repair", str(out)]) == 0
    assert "2 files, 4 rows; rebuilt: _manifest.json" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    capsys.readouterr()
    assert main(["repair", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mended"] == []


def test_a_damaged_published_file_is_named(nights: Callable[[], Manifest], out: Path) -> None:
    flip(out / nights().files[0].output_name)
    assert "run the job to rebuild it" in "\n".join(repair(out).notes)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_answers_is_not_repaired(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"no such folder|no published file has a receipt"):
        repair(tmp_path / "out")


@pytest.mark.parametrize("killed_again", [False, True])
def test_a_damaged_list_of_moved_files_hides_no_file(
    killed_again: bool, nights: Callable[[], Manifest], job_settings: Settings, out: Path
) -> None:
    manifest = nights()
    other = job_settings(
        **{**JOB, "steps": [{**CLASSIFY, "name": "other"}]},
        data__rows_per_fragment=1,
        data__missing_sources="drop",
    )
    run_killed(other)
    (out / PUBLISHING).write_text("[")
    if killed_again:  # its own list replaces the damaged one
        run_killed(job_settings(**JOB))
    run(job_settings(**JOB))
    after = Ledger(out).manifest()
    assert after is not None
    assert {file.output_name for file in after.files} == {
        file.output_name for file in manifest.files
    }
    assert verify(out).sound
    assert list((out / ASIDE).rglob("*.parquet")), "a file of unknown origin is not deleted"


def run_killed(job: JobConfig) -> None:
    """Run until the files are moved, then fail."""
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("glmbatch.ledger.publication.write_manifest", killed)
        run(job)


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_rows_of_every_partition_are_recovered(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("_x=1/a.parquet", {"text": ["one", None]})
    write_source("day=2/b.parquet", {"text": ["two"]})
    run(job_settings(**JOB))
    (out / MANIFEST).unlink()
    (out / COPY).unlink()
    assert repair(out).rows == 3
    assert verify(out).sound
