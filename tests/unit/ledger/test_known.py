"""The index of known answers returns exactly the answers under the given keys."""

from __future__ import annotations

import threading
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmbatch.ledger.known.answers import AnswerFile, KnownAnswers
from glmbatch.store.files import digest_file

SCHEMA = pa.schema(
    [
        pa.field("mood", pa.string()),
        pa.field("mood_error", pa.string()),
        pa.field("mood_key", pa.binary(16)),
    ]
)
ONE, TWO, THREE = (bytes([number]) * 16 for number in range(1, 4))


def write(
    path: Path, keys: list[bytes | None], errors: list[str | None] | None = None, step: str = "mood"
) -> AnswerFile:
    """A file in which the answer to each key is the key in hexadecimal."""
    errors = errors or [None] * len(keys)
    answers = [
        None if error or key is None else key.hex() for key, error in zip(keys, errors, strict=True)
    ]
    names = [field.name.replace("mood", step) for field in SCHEMA]
    pq.write_table(pa.table([answers, errors, keys], schema=SCHEMA).rename_columns(names), path)
    return AnswerFile(path, step, digest_file(path))


def found(known: KnownAnswers, keys: set[bytes]) -> dict[bytes, str | None]:
    table = known.find(keys)
    assert table.schema == SCHEMA
    rows = table.to_pylist()
    assert len({row["mood_key"] for row in rows}) == len(rows), "each once"
    return {row["mood_key"]: row["mood"] for row in rows}


HASHED = st.integers(0, 60).map(lambda number: blake2b(bytes([number]), digest_size=16).digest())
# Keys that sometimes share their first half, by which the index finds them.
KEYS = st.builds(
    lambda half, rest: bytes([half]) * 8 + bytes([rest]) * 8, st.integers(0, 3), st.integers(0, 40)
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(files=st.lists(st.lists(st.one_of(st.none(), HASHED), max_size=12), max_size=4))
def test_exactly_the_keys_of_all_files_are_found(
    files: list[list[bytes | None]], tmp_path: Path
) -> None:
    known = KnownAnswers([], "mood", SCHEMA, include_failed=False)
    there: set[bytes] = set()
    for number, keys in enumerate(files):
        known.add(write(tmp_path / f"{number}.parquet", keys))
        there |= {key for key in keys if key is not None}
        asked = there | {b"\xff" * 16, b"\x00" * 16}
        assert found(known, asked) == {key: key.hex() for key in there}
    assert found(known, set()) == {}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(keys=st.lists(KEYS, max_size=20), asked=st.sets(KEYS))
def test_keys_with_the_same_first_half_are_distinguished(
    keys: list[bytes], asked: set[bytes], tmp_path: Path
) -> None:
    known = KnownAnswers(
        [write(tmp_path / "a.parquet", list(keys))], "mood", SCHEMA, include_failed=False
    )
    for key, answer in found(known, asked).items():
        assert key in asked
        assert answer == key.hex()


def test_failed_rows_are_found_only_on_request(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [ONE, TWO, None], [None, "not finite", "empty"])
    assert found(KnownAnswers([file], "mood", SCHEMA, include_failed=False), {ONE, TWO}) == {
        ONE: ONE.hex()
    }
    assert found(KnownAnswers([file], "mood", SCHEMA, include_failed=True), {ONE, TWO}) == {
        ONE: ONE.hex(),
        TWO: None,
    }


def test_answers_of_a_renamed_step_are_found(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [ONE], step="tone")
    assert found(KnownAnswers([file], "mood", SCHEMA, include_failed=False), {ONE}) == {
        ONE: ONE.hex()
    }


def test_a_damaged_or_missing_file_has_no_answers(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{number}.parquet", [key]) for number, key in enumerate((ONE, TWO, THREE))
    ]
    known = KnownAnswers(files, "mood", SCHEMA, include_failed=False)
    files[0].path.unlink()
    write(files[1].path, [TWO, THREE])
    assert found(known, {ONE, TWO, THREE}) == {THREE: THREE.hex()}
    files[2].path.write_bytes(b"not parquet")
    assert found(KnownAnswers(files, "mood", SCHEMA, include_failed=False), {ONE, THREE}) == {}


def test_later_callers_wait_for_the_holder_of_a_key() -> None:
    """The third caller holds a key that the second waits for; there must be no deadlock."""
    known = KnownAnswers([], "mood", SCHEMA, include_failed=False)
    ended: list[str] = []
    with known.hold([ONE]) as first:
        second = known.hold([ONE, TWO])
        held = second.__enter__()
        assert (first.mine, held.mine, held.earlier) == ({ONE}, {TWO}, (first,))

        def wait() -> None:
            held.wait_for_others()
            ended.append("second")

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        assert ended == []
    with known.hold([ONE, TWO]) as third:
        assert (third.mine, third.earlier) == ({ONE}, (held,))
        thread.join(5)
        assert ended == ["second"], "it waits for the first caller, not the present holder"
        second.__exit__(None, None, None)
        third.wait_for_others()


def test_a_caller_that_fails_releases_its_keys() -> None:
    known = KnownAnswers([], "mood", SCHEMA, include_failed=False)
    with pytest.raises(LookupError), known.hold([ONE]):
        raise LookupError
    with known.hold([ONE]) as hold:
        assert (hold.mine, hold.earlier) == ({ONE}, ())


def test_files_without_valid_keys_have_no_answers(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [ONE])
    table = pq.read_table(file.path)
    for number, changed in enumerate(
        (table.drop_columns(["mood_key"]), table.set_column(2, "mood_key", [["x"]]))
    ):
        path = tmp_path / f"other-{number}.parquet"
        pq.write_table(changed, path)
        known = KnownAnswers(
            [AnswerFile(path, "mood", digest_file(path))], "mood", SCHEMA, include_failed=False
        )
        assert found(known, {ONE}) == {}
