"""Paths in an object store, with the part of pathlib's interface that this project uses.

fsspec and the store's own package (s3fs, gcsfs, adlfs) do the work, find the credentials and retry
failed requests. errors.py turns their errors into ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal, TypeAlias, cast

from glmbatch.errors import InputError, StoreRefused, TransientError, shown
from glmbatch.settings.addresses import has_credentials, misspelt
from glmbatch.store.errors import EXISTS_STATUS, NOT_IMPLEMENTED, status_of, store_errors

# The scheme of an address, and the package to install for it.
STORES = {"s3": "'glmbatch[s3]'", "gs": "gcsfs", "az": "adlfs"}
SCHEMES = tuple(f"{scheme}:/" for scheme in STORES)
GLOB_MARKS = frozenset("*?[")
AHEAD_BYTES = 8 << 20  # fetched with each request when an object is read from start to end
BUCKET_PARTS = 2  # the parts of a bucket's own path: its scheme and its name
# The cache of small objects: the largest size in bytes, and how many of them.
KEPT_BYTES, KEPT_OBJECTS = 1 << 20, 64
# Options with which a whole object costs one request: by default s3fs asks for its size before.
WHOLE = {"s3:": {"max_concurrency": 1}}
# When an object was last written, in the `info` of s3fs, gcsfs and adlfs.
TIMES = ("LastModified", "mtime", "last_modified")


def location(address: Address) -> AnyPath:
    """The path of `address`: an ObjectPath for `s3://bucket/name`, else a path on this machine.

    InputError for an unknown scheme, an address with credentials, or a name that is not UTF-8.
    """
    return address if isinstance(address, Path | ObjectPath) else _checked(address)


@lru_cache(1024)  # a fragment's file is opened several times by its name
def _checked(address: str) -> AnyPath:
    try:
        address.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{shown(address)}: the name is not UTF-8. Rename it.") from error
    if has_credentials(address):
        raise InputError(
            "an address in an object store must not contain credentials. Set them in the "
            "environment."
        )
    if reason := misspelt(address):
        raise InputError(f"{address}: {reason}.")
    _, mark, rest = address.partition("://")
    if not mark:
        return Path(address)
    if not rest.strip("/"):
        raise InputError(
            f"{address}: is not an address in an object store. Write s3://bucket/name (or gs://, "
            "az://)."
        )
    # A store treats a//b and a/b as two objects, but in a path they would be the same.
    if part := odd_part(rest.removesuffix("/")):
        raise InputError(
            f"{shown(address)}: has {part}, so it names other objects than the address without it. "
            "Leave it out, or rename the objects."
        )
    return ObjectPath(address)


def is_hidden(name: PurePath | str) -> bool:
    """Whether readers of a folder skip the file or folder `name`: the rule of Spark.

    A part is hidden if it begins with a dot, or with an underscore and has no `=`.
    """
    for part in name.split("/") if isinstance(name, str) else name.parts:
        if part[:1] == "." or (part[:1] == "_" and "=" not in part):
            return True
    return False


def odd_part(key: str) -> str | None:
    """A part of `key` between slashes that a path cannot keep, in words; None if there is none."""
    for part in key.split("/"):
        if part in ("", ".", ".."):
            return f"a part {part!r}" if part else "an empty part between slashes"
    return None


def is_remote(address: str) -> bool:
    """Whether `address` is in a store or has another scheme, not a local path."""
    return "://" in address


@dataclass(frozen=True, slots=True)
class ObjectStatus:
    """The `stat` of an object, with its size in bytes.

    `st_mtime_ns` is not a time, because a store's times have only whole seconds. It is a number
    made from the object's ETag, which changes whenever other bytes are written.
    """

    st_size: int
    st_mtime_ns: int
    st_ino: int = 0


class _Kept(BytesIO):
    """The bytes of a small object as a file, with the `details` that fsspec's files have."""

    def __init__(self, content: bytes, details: dict[str, Any]) -> None:
        super().__init__(content)
        self.details = details


class ObjectPath(PurePosixPath):
    """The path of an object in a store, or of a folder, which exists only in objects' names.

    Methods have the meaning of pathlib's. FileNotFoundError when an object is missing, StoreRefused
    when the store refuses the access, TransientError when it cannot be reached.
    """

    __slots__ = ()

    def __str__(self) -> str:
        text = super().__str__()  # pathlib has turned s3:// into s3:/
        return text.replace(":/", "://", 1) if text.startswith(SCHEMES) else text

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a file on this machine")

    def resolve(self) -> ObjectPath:
        """The path itself, because a store has no links."""
        return self

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        return self.kind() is not None

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self.kind() == "file"

    def is_dir(self) -> bool:
        """Whether there are objects below this name, but none of this name."""
        return self.kind() == "folder"

    def kind(self) -> Literal["file", "folder"] | None:
        """`file` for an object, `folder` for a name with objects below it, else None."""
        try:
            return "file" if self.info()["type"] == "file" else "folder"
        except FileNotFoundError:
            return None

    def stat(self) -> ObjectStatus:
        """The size of the object, and a number that changes with its bytes."""
        return _status(self.info())

    def info(self) -> dict[str, Any]:
        """The facts about the object, as fsspec's `info` gives them."""
        return cast(dict[str, Any], self._call("info"))

    def modified(self) -> datetime:
        """When it was last written, by the store's clock."""
        return cast(datetime, self._call("modified"))

    def open(self, mode: str = "rb") -> Any:
        """A file object for reading from start to end; each request fetches AHEAD_BYTES."""
        return self._opened(cache_type="readahead", block_size=AHEAD_BYTES)

    def open_ranges(self) -> Any:
        """A file object for random access: each read is one request for exactly its bytes."""
        return self._opened(cache_type="none")

    def _opened(self, **options: object) -> Any:
        with store_errors(self):
            file = self._store().open(str(self), "rb", **options)
            info = file.details
            if info["type"] != "file" or file.size > KEPT_BYTES:
                return file
            # The ledger reads small objects several times. Through `file`, because s3fs then
            # refuses bytes of another version.
            kept = _kept(self, version_of(info))
            if not kept:
                kept.append(file.read())
            return _Kept(kept[0], info)

    def read_bytes(self) -> bytes:
        """The bytes of the object."""
        return cast(bytes, self._call("cat_file", **WHOLE.get(self.parts[0], {})))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The text of the object. UnicodeDecodeError when it does not have this encoding."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Write the object in one request; replaces an earlier one."""
        self._call("pipe_file", content)

    def create(self, content: bytes) -> bool:
        """Write the object unless it exists; return whether it was written.

        A store may ignore the condition, and then replaces the object.
        """
        try:
            self._call("pipe_file", content, mode="create")
        except FileExistsError:
            return False
        except (StoreRefused, TransientError) as error:
            status = status_of(error)
            if status == NOT_IMPLEMENTED:  # the store has no conditional writes
                self.write_bytes(content)
            elif status in EXISTS_STATUS:
                return False
            else:
                raise
        return True

    def upload(self, file: Path) -> None:
        """Write the bytes of the local `file`, perhaps in parts; visible only when complete."""
        with store_errors(self):
            self._store().put_file(str(file), str(self))

    def copy_from(self, other: ObjectPath) -> None:
        """Write the bytes of the object `other`, copied inside the store."""
        with store_errors(self):
            self._store().cp_file(str(other), str(self))

    def download(self, file: Path) -> None:
        """Write the bytes of the object to the local `file`."""
        with store_errors(self):
            self._store().get_file(str(self), str(file))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        with suppress(*([FileNotFoundError] if missing_ok else [])):
            self._call("rm_file")

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: folders exist only in objects' names."""

    def listed(self, prefix: str = "") -> dict[ObjectPath, dict[str, Any]]:
        """All objects below it whose names begin with `prefix`, sorted, with the facts of `info`.

        Leaves out keys such as a/ or a//b, which a path would turn into that of another object.
        """
        scheme = self.parts[0]
        files = sorted(self._infos(prefix).items())
        return {ObjectPath(f"{scheme}//{name}"): info for name, info in files if not odd_part(name)}

    def keys(self, prefix: str = "", most: int | None = None) -> dict[str, ObjectStatus]:
        """The keys of all objects below it, relative to it and sorted, as `stat` would see them.

        From S3 only the first `most`; the packages of other stores have no such limit.
        """
        base = len(str(self).partition("://")[2]) + 1
        infos = sorted(self._infos(prefix, max_items=most).items())
        return {name[base:]: _status(info) for name, info in infos if name[base:]}

    def times(self, pattern: str) -> dict[ObjectPath, datetime]:
        """When the objects below it that match `pattern` were written, from the listing itself."""
        infos = self._matching(pattern).items()
        return {path: next(filter(None, map(info.get, TIMES))) for path, info in infos}

    def _infos(self, prefix: str, **options: object) -> dict[str, dict[str, Any]]:
        place = self
        # Without a prefix, s3fs sends two requests more when there is nothing.
        if not prefix and self.parts[0] == "s3:" and len(self.parts) > BUCKET_PARTS:
            place, prefix = self.parent, f"{self.name}/"
        try:
            found = place._call("find", prefix=prefix, detail=True, **options)
            return cast(dict[str, dict[str, Any]], found)
        except FileNotFoundError:  # no such bucket
            return {}

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects below it that match `pattern`, in which `**` matches any folders."""
        yield from self._matching(pattern)

    def _matching(self, pattern: str) -> dict[ObjectPath, dict[str, Any]]:
        from fsspec.utils import glob_translate

        matches = re.compile(glob_translate(pattern)).fullmatch
        # Lists only keys that begin like the pattern up to its first wildcard.
        plain = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        listed = self.listed(plain).items()
        return {path: info for path, info in listed if matches(str(path.relative_to(self)))}

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects below it, at any depth, whose last name matches `pattern`."""
        return (path for path in self.listed() if fnmatchcase(path.name, pattern))

    def _store(self) -> Any:
        return _filesystem(self.parts[0].removesuffix(":"))

    def _call(self, method: str, *arguments: object, **options: object) -> Any:
        with store_errors(self):
            return getattr(self._store(), method)(str(self), *arguments, **options)


AnyPath: TypeAlias = Path | ObjectPath
# How callers name a file or folder: the text of a setting, or a path made from it.
Address: TypeAlias = str | Path | ObjectPath


def version_of(info: dict[str, Any]) -> str:
    """The version of an object: its ETag, the same from a listing as from a look at the object."""
    # Its name differs between packages, and an S3 store may leave out its quotes in listings.
    if tag := info.get("ETag"):
        return '"{}"'.format(str(tag).strip('"'))
    return str(info.get("etag") or info)


def status_opened(file: Any) -> ObjectStatus:
    """The `stat` of the version that an open file of an ObjectPath reads."""
    return _status(file.details)


def _status(info: dict[str, Any]) -> ObjectStatus:
    digest = sha256(version_of(info).encode()).hexdigest()
    return ObjectStatus(int(info["size"] or 0), int(digest[:15], 16))


@lru_cache(KEPT_OBJECTS)
def _kept(path: ObjectPath, version: str) -> list[bytes]:
    """The bytes of a small object, once its reader has put them here."""
    return []


@lru_cache
def _filesystem(scheme: str) -> Any:
    """The fsspec file system of `scheme`, with connections that all threads share.

    Listings are not cached. InputError when its package is not installed.
    """
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        raise InputError(
            f"{scheme}://: the package for this store is not installed. Run pip install "
            f"{STORES[scheme]}."
        ) from error
