"""The clients of a store: their errors become ours, and keys and conditions hold as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glmbatch.errors import InputError, Interrupted, StoreRefused, TransientError
from glmbatch.store.objects import access
from glmbatch.store.objects.listing import glob_matcher, list_keys
from glmbatch.store.paths import location
from tests.stores import BUCKET, Request, Store
from tests.support import ROOT


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, StoreRefused),
        (401, StoreRefused),
        (403, StoreRefused),
        (404, FileNotFoundError),
        (408, TransientError),
        (412, StoreRefused),
        (429, TransientError),
        (500, TransientError),
        (503, TransientError),
        ("reset", TransientError),
        ("cut", TransientError),
    ],
)
def test_each_error_of_a_store_becomes_ours(
    store: Store, status: int | str, kind: type[Exception]
) -> None:
    path = store.path("a")
    path.write_bytes(b"x" * 1000)
    store.harm = lambda request: status
    with pytest.raises(kind) as read:
        path.read_bytes()
    assert "127.0.0.1" not in str(read.value), "the text of a client may hold secrets"
    if status in (404, "cut"):  # of a listing: no such bucket; of a write: the answer is empty
        return
    with pytest.raises(kind):
        path.write_bytes(b"y")
    with pytest.raises(kind):
        store.path("").listed()


def test_of_two_writers_of_a_guarded_object_one_succeeds(store: Store) -> None:
    path = store.path("out/_manifest.json")
    path.write_bytes(b"before")
    access.guard(path)
    path.write_bytes(b"ours")
    path.write_bytes(b"ours again")
    store.client.put_object(Bucket=BUCKET, Key=access.key_of(path), Body=b"theirs")
    with pytest.raises(Interrupted, match=r"_manifest\.json: another run has written it"):
        path.write_bytes(b"late")
    assert path.read_bytes() == b"theirs"
    access.unguard(path.parent)
    path.write_bytes(b"free")
    assert path.read_bytes() == b"free"


def test_a_lost_answer_to_a_guarded_write_is_no_loss(store: Store) -> None:
    path = store.path("out/_manifest.json")
    access.guard(path)
    lost: list[Request] = []

    def harm(request: Request) -> str | None:
        if request.method == "PUT" and not lost:
            lost.append(request)
            return "lost"
        return None

    store.harm = harm
    path.write_bytes(b"ours")
    assert lost
    path.write_bytes(b"ours again")
    assert path.read_bytes() == b"ours again"
    access.unguard(path)


KEYS = ["a b.parquet", "a%20b", "a+b", "a=b/c", "ü中", "(p)[1]{x}*?", "~t", "a\\b", "-x", "sub/"]


def test_keys_are_listed_and_read_as_they_are(store: Store) -> None:
    for number, key in enumerate(KEYS):
        body = str(number).encode()
        store.client.put_object(Bucket=BUCKET, Key=f"{store.folder}/in/{key}", Body=body)
    folder = store.path("in")
    assert list(folder.keys()) == sorted(KEYS)
    for number, key in enumerate(KEYS[:-1]):
        assert (folder / key).read_bytes() == str(number).encode()
    store.calm()
    assert set(folder.keys("a")) == {key for key in KEYS if key.startswith("a")}
    assert len(folder.keys(most=2)) == 2
    assert len(store.requests) == 2


def test_obstore_lists_the_same_but_refuses_odd_keys(store: Store) -> None:
    for key in ("day=1/", "day=1/a", "day=1/b", "day=2/a", "data"):
        store.client.put_object(Bucket=BUCKET, Key=f"{store.folder}/in/{key}", Body=b"x" * len(key))
    store.client.put_object(Bucket=BUCKET, Key=f"{store.folder}/in/day=1/", Body=b"")
    ours = access.client_of(store.path("in"))
    other = type(ours)(BUCKET, ours.reading, ours.writing)  # as for a store that is not S3
    for prefix in ("in/", "in/day=", "in/day=2/", "in/d", "in/none"):
        expected = list_keys(ours, f"{store.folder}/{prefix}")
        expected.pop(f"{store.folder}/in/day=1/", None)
        assert list_keys(other, f"{store.folder}/{prefix}") == expected
    store.client.put_object(Bucket=BUCKET, Key=f"{store.folder}/in//odd", Body=b"")
    with pytest.raises(InputError, match="a key with an empty part or dots"):
        list_keys(other, f"{store.folder}/in/")


def test_a_bucket_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="no bucket can have this name"):
        location("s3://Bad Bucket!/in").exists()


@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        ("**/*.parquet", ["a.parquet", "x/y/a.parquet"], ["a.csv"]),
        ("day=[!1]/*", ["day=2/a"], ["day=1/a", "day=2/a/b", "day=//"]),
        ("a[]x]?", ["a]b", "axb"], ["a/b", "ab"]),
        ("[^]*", ["^", "^a"], ["a"]),
        ("a[b", ["a[b"], ["ab"]),
    ],
)
def test_globs_match_whole_keys(pattern: str, names: list[str], others: list[str]) -> None:
    matches = glob_matcher(pattern).fullmatch
    assert all(map(matches, names))
    assert not any(map(matches, others))


def test_a_profile_has_credentials_region_and_endpoint(store: Store, tmp_path: Path) -> None:
    store.path("in/a").write_bytes(b"x")
    (tmp_path / "config").write_text(
        f"[profile night]\nregion = us-east-1\nendpoint_url = {store.address}\n"
        "credential_process = /bin/echo "
        '{"Version":1,"AccessKeyId":"of-process","SecretAccessKey":"of-nobody"}\n'.replace(
            '{"', "'{\""
        ).replace('"}', "\"}'")
    )
    code = (
        "import sys\nfrom glmbatch.store.objects.access import storage_options\n"
        "from glmbatch.store.paths import location\npath = location(sys.argv[1])\n"
        "try: print(path.read_bytes(), storage_options(path)['access_key_id'])\n"
        "except Exception as error: print(f'{type(error).__name__}: {error}')"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    settings = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_EC2_METADATA_DISABLED": "true"}

    def printed(**more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, store.url("in/a")],
            env={**kept, **settings, **more},
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
        )
        return done.stdout

    store.calm()
    assert printed(AWS_PROFILE="night") == "b'x' of-process\n"
    assert "Credential=of-process/" in store.requests[-1].headers["Authorization"]
    assert "StoreRefused" in printed(AWS_PROFILE="missing")
    assert "the store refuses it (NoCredentialsError). Check" in printed()
