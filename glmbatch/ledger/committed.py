"""The files `<key>.<digest>.parquet` that runs committed to one folder. Knows no manifest.

The folder is listed once, a file is digested again only when its status changed, and receipts are
read once while anybody uses them. So a run takes no step that grows with all fragments for each.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple
from weakref import WeakValueDictionary

import pyarrow as pa

from glmbatch.errors import UnusableFile
from glmbatch.ledger.receipts import (
    BundleReceipt,
    Receipt,
    digest_in_name,
    file_name,
    read_receipt,
    read_with_receipt,
    whole_digest,
)
from glmbatch.store.files import Digests, is_link, reachable
from glmbatch.store.folder import Listing, commit_all, unlink_all
from glmbatch.store.paths import AnyPath

# Receipts of fragments, each some 2 KB: 4 MB in all.
RECEIPTS = 2048
# The answers of a few fragments: the next step and the output file read what was just committed.
TABLE_BYTES = 32 << 20


class Committed(NamedTuple, Generic[Receipt]):
    """A committed file: its receipt, its path, and the SHA-256 of its bytes."""

    receipt: Receipt
    path: AnyPath
    digest: str


class CommittedFiles(Generic[Receipt]):
    """The committed files of `folder`, whose receipts are of class `kind`.

    Safe to use from several threads. `names` lists them; other processes may change the folder
    unless `names.alone`.
    """

    def __init__(self, folder: AnyPath, kind: type[Receipt], digests: Digests) -> None:
        self.folder = folder
        self.names = Listing(folder)
        self._kind = kind
        self._digests = digests
        self._recent: Recent[Receipt] = Recent()

    def find(self, key: str) -> Committed[Receipt] | None:
        """The file under `key` whose bytes match its name; None without one.

        Deletes a file that does not match, or whose receipt is not valid or has another key.
        """
        whole = self.find_whole(key)
        if whole is None:
            return None
        path, digest = whole
        receipt = self.receipt(path)
        if receipt is not None and getattr(receipt, "key", None) == key:
            return Committed(receipt, path, digest)
        if path.exists():
            self.remove([path])
            return None
        self.names.discard(path.name)
        return self.find(key)  # another process has just replaced it

    def find_whole(self, key: str, *, again: bool = False) -> tuple[AnyPath, str] | None:
        """The file under `key` whose bytes match the digest in its name, and its digest.

        None if there is none. Deletes files that do not match, because they were damaged after
        their commit. InputError when a file may not be read, TransientError when the machine
        failed.
        """
        with reachable(self.folder):
            for name in self.names.find(key, again=again):
                path = self.folder / name
                try:
                    digest = self._own_digest(path, must_read=True)
                except FileNotFoundError:
                    # Just replaced for another fragment with the same rows, and so the same key.
                    self.names.discard(name)
                    return self.find_whole(key, again=True)
                if digest is not None:
                    return path, digest
                self.remove([path])
        return None

    def find_sound(self, key: str) -> tuple[AnyPath, Receipt] | None:
        """The file under `key` whose bytes match its name, and its receipt. Deletes nothing."""
        for path in self.paths(key):
            with suppress(FileNotFoundError):  # just replaced
                if self._own_digest(path) is None:
                    continue
                receipt = self.receipt(path)
                if receipt is not None and getattr(receipt, "key", None) == key:
                    return path, receipt
        return None

    def _own_digest(self, path: AnyPath, *, must_read: bool = False) -> str | None:
        """The SHA-256 of a file if its name contains it, else None; raises as `whole_digest`."""
        # A link does not count: its target may disappear at any time.
        if is_link(path):
            return None
        digest = whole_digest(path, self._digests, must_read=must_read)
        return digest if digest is not None and digest.startswith(digest_in_name(path)) else None

    def read(self, key: str) -> tuple[Receipt, pa.Table] | None:
        """The receipt and the rows of the file under `key`; None without one.

        Deletes a file without a valid receipt. UnusableFile when the rows cannot be read.
        """
        whole = self.find_whole(key)
        if whole is None:
            return None
        path, _ = whole
        # The file was proven just now, so the copy in memory matches it.
        content = self._recent.find(path.name)
        if content is not None and content.table is not None:
            return content.receipt, content.table
        try:
            read = read_with_receipt(path, self._kind)
        except UnusableFile:
            if path.exists():
                raise
            self.names.discard(path.name)
            return self.read(key)  # another process has just replaced it
        if read is None:
            self.remove([path])
            return None
        self._recent.keep(path.name, Content(*read))
        return read

    def receipt(self, path: AnyPath) -> Receipt | None:
        """The receipt of a file; None if it has no valid one. The file itself is not proven."""
        content = self._recent.find(path.name)
        if content is not None:
            return content.receipt
        receipt = read_receipt(path, self._kind)
        if receipt is not None:
            self._recent.keep(path.name, Content(receipt, None))
        return receipt

    def paths(self, key: str | None = None) -> list[AnyPath]:
        """All files in order, or those under `key`, also of other processes. None is proven."""
        with reachable(self.folder):
            if key is None:
                names = self.names.all()
            else:
                names = list(self.names.find(key, again=not self.names.alone))
        return [self.folder / name for name in names]

    def commit_all(self, files: Iterable[tuple[Path, str, str, Content[Receipt]]]) -> None:
        """Move finished files to their places: for each its path, key, digest and content."""
        moves = []
        contents = []
        for partial, key, digest, content in files:
            path = self.folder / file_name(key, digest)
            moves.append((partial, path))
            contents.append((path.name, content))
        commit_all(moves)
        for name, content in contents:
            self.names.add(name)
            self._recent.keep(name, content)

    def remove(self, paths: Iterable[AnyPath]) -> None:
        """Delete the files `paths`, as far as they exist."""
        gone = list(paths)
        unlink_all(self.folder, gone)
        for path in gone:
            self.names.discard(path.name)


@dataclass(frozen=True, slots=True)
class Content(Generic[Receipt]):
    """The receipt of a committed file, and its rows if they are in memory too."""

    receipt: Receipt
    table: pa.Table | None


class Recent(Generic[Receipt]):
    """The content of files that this process read or wrote, by a name that contains the digest.

    Keeps the newest, and every receipt that is in use elsewhere. Safe to use from several threads.
    Callers must first check that the file on disk still has that digest.
    """

    def __init__(self) -> None:
        self._contents: OrderedDict[str, Content[Receipt]] = OrderedDict()
        self._used: WeakValueDictionary[str, Receipt] = WeakValueDictionary()
        self._table_bytes = 0
        self._receipts = 0
        self._lock = threading.Lock()

    def find(self, name: str) -> Content[Receipt] | None:
        """The content of the file `name`; None if it is not in memory."""
        with self._lock:
            content = self._contents.get(name)
            if content is not None:
                self._contents.move_to_end(name)
                return content
            receipt = self._used.get(name)
            return None if receipt is None else Content(receipt, None)

    def keep(self, name: str, content: Content[Receipt]) -> None:
        """Keep the content of the file `name`, dropping the least recently used if needed."""
        with self._lock:
            # Rows are dropped before receipts: they are large, and a receipt saves opening a file.
            if name in self._contents:
                self._drop(name)
            self._contents[name] = content
            self._receipts += _count(content)
            self._used[name] = content.receipt
            self._table_bytes += content.table.nbytes if content.table is not None else 0
            while self._receipts > RECEIPTS and len(self._contents) > 1:
                self._drop(next(iter(self._contents)))
            if self._table_bytes > TABLE_BYTES:
                self._forget_tables()

    def _drop(self, name: str) -> None:
        content = self._contents.pop(name)
        self._receipts -= _count(content)
        self._forget_table(content)

    def _forget_tables(self) -> None:
        """Drop the rows of the least recently used files until the others are small enough."""
        for name, content in list(self._contents.items()):
            if self._table_bytes <= TABLE_BYTES:
                break
            if self._forget_table(content):
                self._contents[name] = Content(content.receipt, None)

    def _forget_table(self, content: Content[Receipt]) -> bool:
        """Subtract the rows of `content` from the cache's size; return whether it had any."""
        if content.table is None:
            return False
        self._table_bytes -= content.table.nbytes
        return True


def _count(content: Content[Any]) -> int:
    """The number of fragments that the receipt of `content` is about."""
    return len(content.receipt.parts) if isinstance(content.receipt, BundleReceipt) else 1
