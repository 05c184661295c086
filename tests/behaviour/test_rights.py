"""Only users who can read a source can read its answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from glmbatch.errors import InputError
from glmbatch.ledger.committed import CommittedFiles
from glmbatch.ledger.quarantine import QUARANTINE
from glmbatch.ledger.receipts import AnswersReceipt
from glmbatch.run.canary import freeze
from glmbatch.store.files import Digests
from tests.support import CLASSIFY, Settings, Write, run

OTHER_GROUP = 1234


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("umask", "mode", "other_group", "file", "own"),
    [
        (0o022, 0o644, False, 0o644, 0o755),
        (0o022, 0o600, False, 0o600, 0o700),
        (0o022, 0o400, False, 0o600, 0o700),
        (0o022, 0o640, False, 0o640, 0o750),
        (0o022, 0o640, True, 0o600, 0o700),
        (0o022, 0o644, True, 0o644, 0o755),
        (0o002, 0o660, False, 0o660, 0o770),
        (0o002, 0o600, False, 0o600, 0o700),
        (0o077, 0o644, False, 0o600, 0o700),
        (0o000, 0o604, False, 0o666, 0o777),
    ],
)
def test_a_file_is_as_private_as_its_source(
    umask: int,
    mode: int,
    other_group: bool,
    file: int,
    own: int,
    write_source: Write,
    job_settings: Settings,
    out: Path,
) -> None:
    source = write_source("a.parquet", {"text": ["one", "two", None]})
    if other_group and os.geteuid():
        pytest.skip("only root gives a file to another group")
    if other_group:
        os.chown(source, -1, OTHER_GROUP)
    source.chmod(mode)
    os.umask(umask)
    run(job_settings(steps=[CLASSIFY], max_error_rate=0.9))
    assert mode_of(out / "a-0000000000.parquet") == file
    assert mode_of(out / "_glmbatch") == own
    assert mode_of(out / QUARANTINE) == file
    canary = out.with_name("canary.parquet")
    freeze(out, canary, 2)
    assert mode_of(canary) == file


def test_one_private_source_makes_shared_files_private(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    write_source("a.parquet", {"text": ["one", None]})
    write_source("b.parquet", {"text": ["two"]}).chmod(0o600)
    run(job_settings(steps=[CLASSIFY], max_error_rate=0.9))
    assert mode_of(out / "a-0000000000.parquet") == 0o644
    assert mode_of(out / "b-0000000000.parquet") == 0o600
    assert (mode_of(out / "_glmbatch"), mode_of(out / QUARANTINE)) == (0o700, 0o600)
    canary = out.with_name("canary.parquet")
    freeze(out, canary, 1)
    assert mode_of(canary) == 0o600


def test_answers_become_private_with_their_source(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    source = write_source("a.parquet", {"text": ["one"]})
    run(job_settings(steps=[CLASSIFY]))
    assert mode_of(out / "a-0000000000.parquet") == 0o644
    source.chmod(0o600)
    assert run(job_settings(steps=[CLASSIFY])).computed == 0
    assert mode_of(out / "a-0000000000.parquet") == 0o600
    source.chmod(0o644)
    run(job_settings(steps=[CLASSIFY]))
    assert mode_of(out / "a-0000000000.parquet") == 0o600, "permissions were widened"


def test_a_setgid_folder_shares_with_the_sources_group(
    write_source: Write, job_settings: Settings, out: Path
) -> None:
    if os.geteuid():
        pytest.skip("only root gives a folder to another group")
    source = write_source("a.parquet", {"text": ["one"]})
    os.chown(source, -1, OTHER_GROUP)
    source.chmod(0o640)
    out.mkdir()
    os.chown(out, -1, OTHER_GROUP)
    out.chmod(0o2750)
    run(job_settings(steps=[CLASSIFY]))
    published = out / "a-0000000000.parquet"
    assert (mode_of(published), published.stat().st_gid) == (0o640, OTHER_GROUP)
    assert mode_of(out / "_glmbatch") == 0o750


def test_answers_of_another_user_are_not_deleted() -> None:
    if os.geteuid():
        pytest.skip("only root may act as another user")
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        kept = folder / f"key.{sha256(b'answers').hexdigest()[:32]}.parquet"
        kept.write_bytes(b"answers")
        kept.chmod(0o600)
        os.seteuid(65534)
        try:
            with pytest.raises(InputError, match="cannot be read: Permission denied"):
                CommittedFiles(folder, AnswersReceipt, Digests()).find_whole("key")
        finally:
            os.seteuid(0)
        assert CommittedFiles(folder, AnswersReceipt, Digests()).find_whole("key") is not None
