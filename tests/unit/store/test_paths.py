"""Paths in an object store act like files, and errors of the store become ours."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from glmbatch.errors import InputError, TransientError, UnusableFile
from glmbatch.ledger.fragments import read_fragment
from glmbatch.run.plan import plan_run
from glmbatch.settings.job import DataConfig, JobConfig
from glmbatch.store.files import committed, digest_file
from glmbatch.store.folder import remove_tree, side_by_side
from glmbatch.store.inputs.find import find_files
from glmbatch.store.paths import ObjectPath, location
from tests.stores import Request, Store
from tests.support import ROOT, Settings

NAMES = [
    "in/day=1/a.parquet",
    "in/day=2/b.parquet",
    "in/day=2/deep/c.parquet",
    "in/notes.txt",
    "in/.hidden.parquet",
    "in/_temporary/d.parquet",
    "in/day=1/_e.parquet",
    "other/f.parquet",
    "inn.parquet",
]


PATTERNS = [
    "in",
    "in/day=2",
    "in/day=1/a.parquet",
    "in/*",
    "in/day=*",
    "in/day=*/*.parquet",
    "in/**/*.parquet",
    "in/**",
    "*/day=[2-9]*",
    "in/day=?/?.parquet",
    "inn.parquet",
]


def test_globs_match_the_same_in_a_store_and_on_disk(store: Store, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        store.path(name).write_bytes(b"")
    store.mark("in")
    store.mark("in/day=1")
    for pattern in PATTERNS:
        here = find_files(str(tmp_path / pattern))
        there = find_files(store.url(pattern))
        assert there.names == here.names, pattern
        assert there.skipped == here.skipped, pattern
        root = str(here.root.relative_to(tmp_path))
        assert str(there.root) == store.url(root).removesuffix("/."), pattern


def test_a_missing_input_names_the_setting(store: Store) -> None:
    store.path("empty/a.txt").write_bytes(b"")
    for address in (
        store.url("nothing"),
        store.url("no/*.parquet"),
        store.url("empty"),
        "s3://no-such-bucket/in",
    ):
        with pytest.raises(InputError, match=r"Set data\.input\.$"):
            find_files(address)
    with pytest.raises(InputError, match="is not an address that can be used here"):
        find_files("http://bucket/in")


def test_credentials_are_refused_but_not_printed() -> None:
    with pytest.raises(ValidationError, match="must not contain credentials") as refused:
        DataConfig(input="s3://AKIA123:geheim@bucket/in", output="out")
    assert "geheim" not in str(refused.value)
    assert (
        DataConfig(input="s3://bucket/a@b.parquet", output="out").input == "s3://bucket/a@b.parquet"
    )


def test_no_path_contains_credentials() -> None:
    with pytest.raises(InputError, match="must not contain credentials") as raised:
        location("s3://KEY:SECRET@bucket/name")
    assert "SECRET" not in str(raised.value)


def test_removing_a_folder_ignores_wildcards_in_its_name(store: Store) -> None:
    for folder in ("o[1]", "o1"):
        store.path(f"{folder}/a/b").write_bytes(b"x")
    remove_tree(store.path("o[1]"))
    assert store.names() == ["o1/a/b"]


def test_a_missing_package_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from glmbatch.store.inputs.find import find_files\n"
        "try: find_files('s3://bucket/in')\n"
        "except Exception as error: print(f'{type(error).__name__}: {error}')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == (
        "InputError: s3://: the package for this store is not installed. "
        "Run pip install 'glmbatch[s3]'.\n"
    )


def once(harm: str | int, method: str = "GET") -> Callable[[Request], str | int | None]:
    left = count()
    return lambda request: harm if request.method == method and next(left) == 0 else None


def job(job_settings: Settings, store: Store) -> JobConfig:
    return JobConfig.model_validate(
        job_settings(data__input=store.url("in"), data__rows_per_fragment=30, on_error="raise")
    )


@pytest.mark.parametrize("harm", ["reset", "cut", "slow", 500, 503])
def test_a_transient_fault_changes_no_row(
    store: Store, job_settings: Settings, harm: str | int
) -> None:
    table = pa.table({"text": [f"row {n}" for n in range(20)]})
    store.put("in/a.parquet", table)
    (one, *_) = plan_run(job(job_settings, store)).plan.fragments
    store.harm = once(harm)
    assert digest_file(store.path("in/a.parquet")) == one.digest
    store.harm = once(harm)
    assert pa.Table.from_batches(read_fragment(one)).equals(table)


@pytest.mark.parametrize("harm", ["reset", 500, 503, 429])
def test_an_unreachable_store_is_a_transient_error(
    store: Store, job_settings: Settings, harm: str | int
) -> None:
    store.put("in/a.parquet", pa.table({"text": ["a"]}))
    plan = plan_run(job(job_settings, store)).plan
    store.harm = lambda request: harm
    for call in (
        lambda: find_files(store.url("in")),
        lambda: list(read_fragment(plan.fragments[0])),
        lambda: digest_file(store.path("in/a.parquet")),
        lambda: location(store.url("out")).write_bytes(b""),
    ):
        with pytest.raises(TransientError, match="the store cannot be reached now"):
            call()


@pytest.mark.parametrize("harm", [403, 400])
def test_denied_access_or_another_region_is_an_input_error(
    store: Store, job_settings: Settings, harm: int
) -> None:
    store.put("in/a.parquet", pa.table({"text": ["a"]}))
    store.harm = lambda request: harm
    with pytest.raises(
        InputError, match=r"refuses it.*credentials and region.*Or set data\.input\."
    ) as refused:
        plan_run(job(job_settings, store))
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(refused.value)
    store.harm = lambda request: harm if request.key.endswith(".parquet") else None
    settings = job(job_settings, store).model_copy(update={"on_error": "quarantine"})
    with pytest.raises(InputError, match=r"a\.parquet: the store refuses it.*Or set data\.input\."):
        plan_run(settings)


def test_an_object_that_changes_during_a_run_is_not_mixed(
    store: Store, job_settings: Settings
) -> None:
    store.put("in/a.parquet", pa.table({"text": ["first"] * 4}))
    (one,) = plan_run(job(job_settings, store)).plan.fragments
    store.put("in/a.parquet", pa.table({"text": ["other"] * 4}))
    with pytest.raises(UnusableFile, match="was changed while the run read it"):
        list(read_fragment(one))


def test_only_the_needed_bytes_of_a_large_object_are_read(
    store: Store, job_settings: Settings
) -> None:
    rows = 36
    ballast = pa.array([os.urandom(1 << 20) for _ in range(rows)])
    table = pa.table({"text": [f"row {n}" for n in range(rows)], "ballast": ballast})
    store.put("in/a.parquet", table, row_group_size=6, use_dictionary=False, compression="none")
    plan = plan_run(job(job_settings, store), digests=False).plan
    store.requests.clear()
    read = pa.Table.from_batches(read_fragment(plan.fragments[1], ["text"]))
    assert read.column(0).to_pylist() == [f"row {n}" for n in range(30, 36)]
    ranges = [request.headers["Range"] for request in store.requests if request.method == "GET"]
    fetched = 0
    for each in ranges:
        begin, end = each.removeprefix("bytes=").split("-")
        fetched += int(end) - int(begin) + 1 if begin else int(end)  # without a begin: the last
    assert fetched < 1 << 20


def test_a_commit_is_one_request_or_nothing(store: Store) -> None:
    path = store.path("out/answers.parquet")
    with pytest.raises(KeyError), committed(path) as partial:
        partial.write_bytes(b"half")
        raise KeyError
    store.harm = lambda request: "reset" if request.changes else None
    with pytest.raises(TransientError), committed(path) as partial:
        partial.write_bytes(b"whole")
    store.calm()
    assert store.names() == []
    store.requests.clear()
    with committed(path) as partial:
        partial.write_bytes(b"whole")
    assert [request.method for request in store.requests] == ["PUT"]
    assert path.read_bytes() == b"whole"


def test_of_several_creators_of_an_object_one_succeeds(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: store.path("one").create(str(n).encode()), range(8)))
    assert made.count(True) == 1
    assert store.path("one").read_bytes() == str(made.index(True)).encode()


def test_work_in_a_store_is_parallel_and_in_order() -> None:
    root, begun = ObjectPath("s3://shop/out"), []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.01 * (number % 3))
        if number == 100:
            raise TransientError("100")
        return number * 2

    assert [*side_by_side(root, work, range(90))] == [*side_by_side(Path("out"), work, range(90))]
    begun.clear()
    found = side_by_side(root, work, range(1000))
    assert [next(found) for _ in range(100)] == [*range(0, 200, 2)]
    with pytest.raises(TransientError, match="100"):
        next(found)
    assert len(begun) < 200, "no later work begins"
