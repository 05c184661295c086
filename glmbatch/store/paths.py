"""Names in an object store, with the part of pathlib's interface that this code uses.

fsspec and the store's own package (s3fs, gcsfs, adlfs) do the work, find the credentials and retry
what fails; their errors become ours in errors.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeAlias, TypeVar, cast

from glmbatch.errors import InputError, StoreRefused, TransientError, shown
from glmbatch.settings.addresses import has_credentials, misspelt
from glmbatch.store.errors import EXISTS_STATUS, NOT_IMPLEMENTED, status_of, store_errors

# Scheme of an address to what is to be installed for it.
STORES = {"s3": "'glmbatch[s3]'", "gs": "gcsfs", "az": "adlfs"}
SCHEMES = tuple(f"{scheme}:/" for scheme in STORES)
GLOB_MARKS = frozenset("*?[")
AHEAD_BYTES = 8 << 20
REQUESTS_AT_ONCE = 16
KEPT_BYTES, KEPT_OBJECTS = 1 << 20, 64


def location(address: Address) -> AnyPath:
    """Where `address` leads: `s3://bucket/name` to a store, all else to this machine's files.

    InputError for a scheme that is not known.
    """
    if isinstance(address, Path | ObjectPath):
        return address
    try:
        address.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{shown(address)}: the name is not UTF-8. Rename it.") from error
    if has_credentials(str(address)):
        raise InputError(
            "an address of an object store holds credentials. Set them in the environment instead."
        )
    if reason := misspelt(str(address)):
        raise InputError(f"{address}: {reason}.")
    _, mark, rest = str(address).partition("://")
    if not mark:
        return Path(address)
    if not rest.strip("/"):
        raise InputError(
            f"{address}: is no address of an object store; write s3://bucket/name (or gs://, "
            "az://)."
        )
    # To a store these are names of other objects, which no path on this machine could keep apart.
    if part := odd_part(rest.removesuffix("/")):
        raise InputError(
            f"{shown(address)}: has {part}, so it names other objects than the address without it. "
            "Leave it out, or rename the objects."
        )
    return ObjectPath(str(address))


def is_hidden(name: PurePath | str) -> bool:
    """Whether readers of a folder skip the file or folder `name`, as Spark does."""
    for part in name.split("/") if isinstance(name, str) else name.parts:
        if part[:1] == "." or (part[:1] == "_" and "=" not in part):
            return True
    return False


def odd_part(key: str) -> str | None:
    """What stands between the slashes of `key` that is no name of a file; None when all are."""
    for part in key.split("/"):
        if part in ("", ".", ".."):
            return f"a part {part!r}" if part else "an empty part between slashes"
    return None


def is_remote(address: str) -> bool:
    """Whether `address` leads out of this machine's files."""
    return "://" in address


Item = TypeVar("Item")
Made = TypeVar("Made")


def side_by_side(
    root: AnyPath, work: Callable[[Item], Made], items: Iterable[Item]
) -> Iterator[Made]:
    """What `work` makes of each of `items` below `root`, in order; in a store, several at once."""
    if isinstance(root, Path):
        yield from map(work, items)
        return
    waiting = iter(items)
    # In windows, so that a caller that stops early has not asked about everything.
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        while window := list(islice(waiting, 4 * REQUESTS_AT_ONCE)):
            yield from pool.map(work, window)


def unlink_all(root: AnyPath, paths: Iterable[AnyPath]) -> None:
    """Remove the files `paths` below `root`, as far as they are there; no folder in their place."""

    def unlink(path: AnyPath) -> None:
        with suppress(IsADirectoryError):
            path.unlink(missing_ok=True)

    for _ in side_by_side(root, unlink, paths):
        pass


@dataclass(frozen=True, slots=True)
class ObjectStatus:
    """What `stat` says of an object.

    `st_mtime_ns` is not a time, since a store's times have whole seconds. It is a number made of
    the object's ETag, which changes whenever other bytes are written.
    """

    st_size: int
    st_mtime_ns: int
    st_ino: int = 0


class ObjectPath(PurePosixPath):
    """An object in a store, or the folder that objects' names make. Holds nothing but its name."""

    __slots__ = ()

    def __str__(self) -> str:
        text = super().__str__()  # where the two slashes of s3:// are one
        return text.replace(":/", "://", 1) if text.startswith(SCHEMES) else text

    def __fspath__(self) -> str:
        raise TypeError(f"{self} has no place among the files of this machine")

    def resolve(self) -> ObjectPath:
        return self

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def stat(self) -> ObjectStatus:
        info = self.info()
        return ObjectStatus(
            int(info["size"] or 0), int(sha256(version_of(info).encode()).hexdigest()[:15], 16)
        )

    def info(self) -> dict[str, Any]:
        return cast(dict[str, Any], self._call("info"))

    def modified(self) -> datetime:
        """When it was written last, by the clock of the store."""
        return cast(datetime, self._call("modified"))

    def open(self, mode: str = "rb") -> Any:
        """For reading from its begin to its end, some megabytes with each request."""
        return self._opened(cache_type="readahead", block_size=AHEAD_BYTES)

    def open_ranges(self) -> Any:
        """For reading here and there: each read is one request for just its bytes."""
        return self._opened(cache_type="none")

    def _opened(self, **options: object) -> Any:
        info = self.info()
        # The ledger reads small objects several times; by version, so a new version is read again.
        if info["type"] == "file" and info["size"] <= KEPT_BYTES:
            return BytesIO(_content(self, version_of(info)))
        return self._call("open", "rb", **options)

    def read_bytes(self) -> bytes:
        return cast(bytes, self._call("cat_file"))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        self._call("pipe_file", content)

    def create(self, content: bytes) -> bool:
        """Write it unless it exists; whether it was written. A store may ignore the condition."""
        try:
            self._call("pipe_file", content, mode="create")
        except FileExistsError:
            return False
        except (StoreRefused, TransientError) as error:
            status = status_of(error)
            if status == NOT_IMPLEMENTED:  # the store knows no conditions at all
                self.write_bytes(content)
            elif status in EXISTS_STATUS:
                return False
            else:
                raise
        return True

    def upload(self, file: Path) -> None:
        """Make it the bytes of `file`, in one request or in parts: visible once it is whole."""
        with store_errors(self):
            self._store().put_file(str(file), str(self))

    def copy_from(self, other: ObjectPath) -> None:
        """Make it the bytes of `other`, inside the store."""
        with store_errors(self):
            self._store().cp_file(str(other), str(self))

    def download(self, file: Path) -> None:
        with store_errors(self):
            self._store().get_file(str(self), str(file))

    def unlink(self, missing_ok: bool = False) -> None:
        with suppress(*([FileNotFoundError] if missing_ok else [])):
            self._call("rm_file")

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: names alone make folders."""

    def remove_tree(self) -> None:
        unlink_all(self, self.listed())  # by name: the store's package takes a folder for a pattern

    def listed(self, prefix: str = "") -> dict[ObjectPath, dict[str, Any]]:
        """All objects below it whose names begin with `prefix`, in order, with the store's facts.

        Not those whose keys a path cannot hold as they are, such as a/ or a//b: it would be the
        path of another object.
        """
        scheme = self.parts[0]
        files = sorted(self._infos(prefix).items())
        return {ObjectPath(f"{scheme}//{name}"): info for name, info in files if not odd_part(name)}

    def keys(self, prefix: str = "", most: int | None = None) -> dict[str, int]:
        """The keys of all objects below it as they are, without its own, and their sizes.

        From S3 only the first `most`; the packages of other stores know no such limit.
        """
        base = len(str(self).partition("://")[2]) + 1
        infos = sorted(self._infos(prefix, max_items=most).items())
        return {name[base:]: int(info["size"] or 0) for name, info in infos if name[base:]}

    def _infos(self, prefix: str, **options: object) -> dict[str, dict[str, Any]]:
        try:
            found = self._call("find", prefix=prefix, detail=True, **options)
            return cast(dict[str, dict[str, Any]], found)
        except FileNotFoundError:  # there is no such bucket
            return {}

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Objects that `pattern` names; `**` stands for any folders. Lists by its fixed prefix."""
        from fsspec.utils import glob_translate

        matches = re.compile(glob_translate(pattern)).fullmatch
        # Only names with the pattern's plain beginning are listed.
        plain = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        for path in self.listed(plain):
            if matches(str(path.relative_to(self))):
                yield path

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """Objects at any depth whose last name `pattern` fits."""
        return (path for path in self.listed() if fnmatchcase(path.name, pattern))

    def _kind(self) -> str | None:
        try:
            return str(self.info()["type"])
        except FileNotFoundError:
            return None

    def _store(self) -> Any:
        return _filesystem(self.parts[0].removesuffix(":"))

    def _call(self, method: str, *arguments: object, **options: object) -> Any:
        with store_errors(self):
            return getattr(self._store(), method)(str(self), *arguments, **options)


AnyPath: TypeAlias = Path | ObjectPath
# What callers name a file or folder by: a setting's text, or a path that was made of one.
Address: TypeAlias = str | Path | ObjectPath


def version_of(info: dict[str, Any]) -> str:
    """What tells versions of an object apart: its ETag, by whichever name the package gives it."""
    return str(info.get("ETag") or info.get("etag") or info)


@lru_cache(KEPT_OBJECTS)
def _content(path: ObjectPath, version: str) -> bytes:
    """The bytes of a small object, which the ledger may read again: each part is a request."""
    return path.read_bytes()


@lru_cache
def _filesystem(scheme: str) -> Any:
    """One for all threads of the process, which share its connections. Listings are not cached."""
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise InputError(
            f"{scheme}://: the package for this store is not installed. Run pip install "
            f"{STORES[scheme]}."
        ) from error
