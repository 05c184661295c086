"""Paths in an object store, with the part of pathlib's interface that this project uses.

objects/ sends the requests. errors.py turns their errors into ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal, TypeAlias

from glmbatch.errors import InputError, StoreRefused, TransientError, shown
from glmbatch.settings.addresses import STORES, has_credentials, misspelt
from glmbatch.store.errors import NOT_IMPLEMENTED, status_of, store_errors
from glmbatch.store.objects import access
from glmbatch.store.objects.clients import Client
from glmbatch.store.objects.listing import Facts, facts_of, glob_matcher, list_keys
from glmbatch.store.objects.reading import AHEAD_BYTES, Where, open_ranges, open_stream

SCHEMES = tuple(f"{scheme}:/" for scheme in STORES)
GLOB_MARKS = frozenset("*?[")


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
        with suppress(FileNotFoundError):
            if access.key_of(self):
                self.facts()
                return "file"
        return "folder" if self._list(most=1) else None

    def stat(self) -> ObjectStatus:
        """The size of the object, and a number that changes with its bytes."""
        return _status(self.facts())

    def facts(self) -> Facts:
        """What the store says of the object."""
        return access.read(self, lambda store, key: facts_of(store.head(key)))

    def modified(self) -> datetime:
        """When it was last written, by the store's clock."""
        return self.facts().modified

    def open(self, mode: str = "rb") -> Any:
        """A file object for reading from start to end, in one request."""
        return self._opened(open_stream)

    def open_ranges(self) -> Any:
        """A file object for random access: each read is one request for exactly its bytes."""
        return self._opened(open_ranges)

    def _opened(self, opener: Callable[[Client, str, Where], Any]) -> Any:
        where = partial(store_errors, self)
        return access.repeated(
            self, lambda: opener(access.client_of(self), access.key_of(self), where)
        )

    def read_bytes(self) -> bytes:
        """The bytes of the object."""
        return access.read(self, lambda store, key: bytes(store.get(key).bytes()))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The text of the object. UnicodeDecodeError when it does not have this encoding."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, content: bytes) -> None:
        """Write the object in one request; replaces an earlier one. See `access.put`."""
        access.put(self, content)

    def create(self, content: bytes) -> bool:
        """Write the object unless it exists; return whether it was written.

        A store may ignore the condition, and then replaces the object. If it is written but the
        answer is lost, it is found to exist.
        """
        try:
            access.change(self, lambda store, key: store.put(key, content, mode="create"))
        except FileExistsError:
            return False
        except (StoreRefused, TransientError) as error:
            if status_of(error) != NOT_IMPLEMENTED:
                raise
            self.write_bytes(content)  # the store has no conditional writes
        return True

    def upload(self, file: Path) -> None:
        """Write the bytes of the local `file`, perhaps in parts; visible only when complete."""
        access.put(self, file)

    def copy_from(self, other: ObjectPath) -> None:
        """Write the bytes of the object `other`, copied inside the store."""
        access.change(self, lambda store, key: store.copy(access.key_of(other), key))

    def download(self, file: Path) -> None:
        """Write the bytes of the object to the local `file`."""

        def get(store: Any, key: str) -> None:
            with file.open("wb") as target:
                for chunk in store.get(key).stream(AHEAD_BYTES):
                    target.write(chunk)

        access.read(self, get)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        with suppress(*([FileNotFoundError] if missing_ok else [])):
            access.delete(self)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: folders exist only in objects' names."""

    def listed(self, prefix: str = "") -> dict[ObjectPath, Facts]:
        """All objects below it whose names begin with `prefix`, sorted, with their facts.

        Leaves out keys such as a/ or a//b, which a path would turn into that of another object.
        """
        found = self._list(prefix).items()
        return {self / name: facts for name, facts in found if not odd_part(name)}

    def keys(self, prefix: str = "", most: int | None = None) -> dict[str, ObjectStatus]:
        """The keys of all objects below it, relative to it and sorted, as `stat` would see them.

        Only the first `most`.
        """
        return {name: _status(facts) for name, facts in self._list(prefix, most).items() if name}

    def times(self, pattern: str) -> dict[ObjectPath, datetime]:
        """When the objects below it that match `pattern` were written, from the listing itself."""
        return {path: facts.modified for path, facts in self._matching(pattern).items()}

    def _list(self, prefix: str = "", most: int | None = None) -> dict[str, Facts]:
        """The objects below it by their keys relative to it; the empty one marks the folder."""
        base = f"{key}/" if (key := access.key_of(self)) else ""
        found = access.repeated(
            self, lambda: list_keys(access.client_of(self), base + prefix, most)
        )
        return {key[len(base) :]: facts for key, facts in found.items()}

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects below it that match `pattern`, in which `**` matches any folders."""
        yield from self._matching(pattern)

    def _matching(self, pattern: str) -> dict[ObjectPath, Facts]:
        matches = glob_matcher(pattern).fullmatch
        # Lists only keys that begin like the pattern up to its first wildcard.
        plain = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        listed = self.listed(plain).items()
        return {path: info for path, info in listed if matches(str(path.relative_to(self)))}

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects below it, at any depth, whose last name matches `pattern`."""
        return (path for path in self.listed() if fnmatchcase(path.name, pattern))


AnyPath: TypeAlias = Path | ObjectPath
# How callers name a file or folder: the text of a setting, or a path made from it.
Address: TypeAlias = str | Path | ObjectPath


def status_opened(file: Any) -> ObjectStatus:
    """The `stat` of the version that an open file of an ObjectPath reads."""
    return _status(file.facts)


def _status(facts: Facts) -> ObjectStatus:
    digest = sha256(facts.version.encode()).hexdigest()
    return ObjectStatus(facts.size, int(digest[:15], 16))
