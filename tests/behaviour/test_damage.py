"""Damage to any file that glmbatch wrote causes neither a traceback nor wrong rows.

Each test damages one file of an output. Every command that reads the output then returns a result
or a one-line error. The next run publishes what an undisturbed run publishes, if necessary after
`glmbatch repair`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glmbatch.errors import GlmbatchError, InputError
from glmbatch.ledger.filelist import LISTS
from glmbatch.ledger.ledger import PUBLISHING, Ledger
from glmbatch.ledger.manifest import COPY, MANIFEST, copy_manifest, write_manifest
from glmbatch.ledger.quarantine import QUARANTINE, REFUSED
from glmbatch.ledger.repair import describe, repair
from glmbatch.ledger.verification import verify
from glmbatch.report.text import describe as describe_run
from glmbatch.run.canary import freeze
from glmbatch.run.job import run_job
from glmbatch.run.preview import preview
from glmbatch.settings.job import JobConfig
from glmbatch.store.seal import sealed, unsealed
from tests.support import CLASSIFY, Settings, Write, rows_of

# Each kind of file, by the prefix of its path below the output.
CLASSES = (
    "a-",
    "day=1/",
    "gone-",
    MANIFEST,
    QUARANTINE,
    "_glmbatch/answers",
    "_glmbatch/staged",
    "_glmbatch/reports",
    "_glmbatch/lock",
    COPY,
    LISTS,
    PUBLISHING,
    REFUSED,
)
OTHER_SHAPES = (
    b"",
    b"[]",
    b"{}",
    b"null",
    b"[1]",
    b"[" * 100_000,
    b"1" * 6_000,
    b"NaN",
    b"\xff\xfe",
    b'{"a": 1, "a": 2}',
    b'{"files": null, "names": "x"}',
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests, because a manifest records the absolute path of its input."""
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def kept(place: Path) -> Path:
    """Copies that every test starts from.

    `kept/before` is `place` before any damage: the second night was killed while publishing.
    `kept/twin` is the output of an undisturbed second night.
    """
    return place.with_name(f"{place.name}-kept")


@pytest.fixture
def job(tmp_path: Path, place: Path, job_settings: Settings, write_source: Write) -> JobConfig:
    return JobConfig.model_validate(
        job_settings(
            data__input=str(place / "in"),
            data__output=str(place / "out"),
            data__rows_per_fragment=3,
            steps=[CLASSIFY],
            max_error_rate=1.0,
            runtime__retries=0,
        )
    )


@pytest.fixture
def output(
    place: Path,
    kept: Path,
    job: JobConfig,
    write_source: Write,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Path:
    """The undamaged output: one complete night, then one that was killed while publishing.

    Where a test damages the list of files, the manifest names one.
    """
    if not kept.exists():
        night(place, job, write_source, tmp_path)
        shutil.copytree(place, kept / "before", symlinks=True)
        run_job(job)
        shutil.copytree(place / "out", kept / "twin")
    shutil.rmtree(place)
    shutil.copytree(kept / "before", place, symlinks=True)
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("beginning") == LISTS:
        request.getfixturevalue("monkeypatch").setattr("glmbatch.ledger.manifest.INLINE_FILES", 0)
        manifest = Ledger(place / "out").manifest()
        assert manifest is not None
        write_manifest(place / "out", manifest)
        copy_manifest(place / "out")
    return place / "out"


def night(place: Path, job: JobConfig, write_source: Write, tmp_path: Path) -> None:
    write_source("a.parquet", {"text": ["one", None, "two", "three"]})
    write_source("day=1/a.parquet", {"text": ["four"]})
    write_source("gone.parquet", {"text": ["five", ""]})
    shutil.copytree(tmp_path / "in", place / "in")
    run_job(job)
    (place / "in" / "gone.parquet").unlink()
    shutil.copy(write_source("new.parquet", {"text": ["six", None]}), place / "in")
    strict = job.model_copy(update={"max_error_rate": 0.0})
    with pytest.raises(GlmbatchError, match="nothing published"):
        run_job(strict)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("glmbatch.ledger.publication.write_manifest", killed)
        run_job(job)
    # Add the traces of another refused run.
    (place / "out" / "_glmbatch" / "staged").mkdir(exist_ok=True)
    with pytest.raises(GlmbatchError, match="nothing published"):
        run_job(strict)


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder outside the output. It must be unchanged at the end of the test."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    for name in ("keep.parquet", ".x.partial", "deep/report.html", "lock"):
        (folder / name).write_text(name)
    yield folder
    found = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(folder).as_posix(): text for path, text in found.items()} == {
        name: name for name in ("keep.parquet", ".x.partial", "deep/report.html", "lock")
    }


def as_sorted(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(row, default=str, sort_keys=True) for row in rows)


def attempt(call: Callable[[], object]) -> Exception | None:
    """Make the call and return its error, which must be one of ours and one line long."""
    try:
        call()
    except GlmbatchError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600, "the message quotes the content"
        return error
    return None


def assert_harmless(output: Path, job: JobConfig, kept: Path, *, may_stop: bool = False) -> None:
    """Read the output in every way, then run the job: its rows must equal those of the twin."""
    attempt(lambda: verify(output))
    attempt(lambda: preview(job))
    attempt(lambda: freeze(output, output.parent / "canary.parquet", 4))
    error = attempt(lambda: describe_run(run_job(job)))
    if error is not None and "glmbatch repair" in str(error):
        attempt(lambda: describe(repair(output)))
        error = attempt(lambda: run_job(job))
    if error is not None:
        # Rows of a deleted source cannot be rebuilt.
        lost = ": gone-" in str(error) and "should stay published but is gone" in str(error)
        assert lost or may_stop, error
        return
    if as_sorted(rows_of_readable(output)) != as_sorted(rows_of(kept / "twin")):
        # Nor can they if the file is damaged, but `verify` must report them as wrong.
        wrong = [finding for finding in verify(output).findings if finding.kind == "wrong"]
        assert any(finding.file.startswith("gone-") for finding in wrong), wrong


def rows_of_readable(output: Path) -> list[dict[str, Any]]:
    try:
        return rows_of(output)
    except (OSError, ValueError):
        return []


def files_of(output: Path, beginning: str) -> list[Path]:
    files = [path for path in sorted(output.rglob("*")) if path.is_file()]
    return [path for path in files if path.relative_to(output).as_posix().startswith(beginning)]


def damaged(content: bytes, kind: str, chance: random.Random) -> bytes:
    changed = bytearray(content)
    at = chance.randrange(len(changed)) if changed else 0
    match kind:
        case "flip":
            changed[at : at + 1] = bytes([changed[at] ^ 1 << chance.randrange(8)])
        case "high bit":
            changed[at : at + 1] = bytes([changed[at] | 0x80])
        case "zeros":
            changed[at : at + 32] = bytes(len(changed[at : at + 32]))
        case "cut":
            del changed[at:]
        case "longer":
            changed += chance.randbytes(20)
        case "other":
            changed[:] = chance.choice(OTHER_SHAPES)
    return bytes(changed)


@pytest.mark.parametrize("kind", ["flip", "high bit", "zeros", "cut", "longer", "other"])
@pytest.mark.parametrize("beginning", CLASSES)
def test_damaged_bytes_do_not_change_the_rows(
    beginning: str, kind: str, output: Path, job: JobConfig, kept: Path
) -> None:
    chance = random.Random(f"{beginning} {kind}")
    path = chance.choice(files_of(output, beginning))
    content = path.read_bytes()
    path.write_bytes(damaged(content or b"process 1 of somewhere", kind, chance))
    assert_harmless(output, job, kept)


@pytest.mark.parametrize(
    "thing", ["link", "link to folder", "link to nothing", "circle", "folder", "full folder"]
)
@pytest.mark.parametrize("beginning", CLASSES)
def test_replacing_a_file_by_a_link_or_folder_is_harmless(
    beginning: str, thing: str, output: Path, job: JobConfig, kept: Path, outside: Path
) -> None:
    path = files_of(output, beginning)[0]
    path.unlink()
    targets = {
        "link": outside / "keep.parquet",
        "link to folder": outside,
        "link to nothing": outside / "none",
        "circle": path,
    }
    if thing in targets:
        path.symlink_to(targets[thing])
    else:
        path.mkdir()
    if thing == "full folder":
        (path / "x").touch()
    # The run does not delete what it did not write. It says what to remove.
    assert_harmless(
        output, job, kept, may_stop=thing in ("full folder", "link to folder", "folder")
    )


@pytest.mark.parametrize("beginning", CLASSES)
def test_an_unreadable_file_is_harmless(
    beginning: str, output: Path, job: JobConfig, kept: Path
) -> None:
    if os.geteuid():
        files_of(output, beginning)[0].chmod(0)
        assert_harmless(output, job, kept, may_stop=True)
        return
    for path in (output.parent, *output.parent.rglob("*")):
        os.chown(path, 65534, 65534)
    files_of(output, beginning)[0].chmod(0)
    above = [folder for folder in output.parents if folder.stat().st_uid == 0]
    modes = {folder: folder.stat().st_mode for folder in above}
    for folder in above:
        folder.chmod(modes[folder] | 0o055)
    os.seteuid(65534)
    try:
        assert_harmless(output, job, kept, may_stop=True)
    finally:
        os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


@pytest.mark.parametrize(
    "folder",
    [
        "_glmbatch",
        "_glmbatch/answers",
        "_glmbatch/staged",
        "_glmbatch/reports",
        "_glmbatch/results",
        LISTS,
        "day=1",
    ],
)
def test_nothing_behind_a_link_is_written_or_deleted(
    folder: str, output: Path, job: JobConfig, kept: Path, outside: Path
) -> None:
    shutil.rmtree(output / folder, ignore_errors=True)
    (output / folder).symlink_to(outside)
    with pytest.raises(InputError, match=r"link.*Replace it with a folder, or set data\.output"):
        run_job(job)


def test_a_link_in_the_output_is_reported_before_any_work(
    job_settings: Settings, write_source: Write, outside: Path, out: Path
) -> None:
    write_source("day=7/a.parquet", {"text": ["good"]})
    out.mkdir(exist_ok=True)
    (out / "day=7").symlink_to(outside)
    with pytest.raises(InputError, match=r"link.*Replace it with a folder, or set data\.output"):
        preview(JobConfig.model_validate(job_settings(steps=[CLASSIFY])))


@pytest.mark.parametrize(
    "name",
    [
        "../outside/keep.parquet",
        "/{outside}/keep.parquet",
        "..",
        ".",
        "_link/keep.parquet",
        "x/../../outside/keep.parquet",
        "a\0b",
    ],
)
@pytest.mark.parametrize("where", ["replaced", "output_name", "publishing", "old publishing"])
def test_names_outside_the_output_delete_nothing(
    name: str, where: str, output: Path, job: JobConfig, kept: Path, outside: Path
) -> None:
    name = name.replace("/{outside}", str(outside))
    (output / "_link").symlink_to(outside)
    shutil.rmtree(output.parent / "outside", ignore_errors=True)
    shutil.copytree(outside, output.parent / "outside")
    manifest = unsealed((output / MANIFEST).read_bytes())
    if where == "replaced":
        manifest["replaced"] = [name]
    if where == "output_name":
        manifest["files"][0]["output_name"] = name
    (output / MANIFEST).write_text(sealed(manifest))
    if where == "publishing":
        (output / PUBLISHING).write_text(sealed({"names": [name]}))
    if where == "old publishing":
        (output / PUBLISHING).write_text(json.dumps([name]))
    assert_harmless(output, job, kept)
    assert (output.parent / "outside" / "keep.parquet").read_text() == "keep.parquet"
