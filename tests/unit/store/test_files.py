"""Files are committed by one rename, and digested."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glmbatch.errors import InputError, TransientError
from glmbatch.store.files import committed, digest_file


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_committed_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with pytest.raises(KeyError), committed(path) as partial:
        partial.write_bytes(b"half")
        raise KeyError
    assert not list(path.parent.iterdir())
    with committed(path) as partial:
        partial.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_output_that_is_a_file_is_an_input_error(tmp_path: Path) -> None:
    touch(tmp_path, "out")
    with (
        pytest.raises(InputError, match=r"[Ss]et data\.output\."),
        committed(tmp_path / "out" / "x"),
    ):
        pass


def test_a_full_disk_is_a_transient_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    from glmbatch.store.files import writable

    with (
        pytest.raises(TransientError, match="No space left"),
        writable(full),
        full.open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_a_digest_is_of_the_bytes(tmp_path: Path) -> None:
    touch(tmp_path, "a", "b")
    assert digest_file(tmp_path / "a") == digest_file(tmp_path / "b")
    os.truncate(tmp_path / "b", 0)
    assert digest_file(tmp_path / "a") != digest_file(tmp_path / "b")


def test_what_cannot_be_written_is_named_as_the_user_names_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    path = tmp_path / "a" / "b.json"
    for setting in ("data.output", "--corrections"):
        refused = pytest.raises(InputError, match=rf"cannot be .* Remove .*, or set {setting}\.")
        with refused, committed(path, setting) as partial:
            partial.write_text("")
