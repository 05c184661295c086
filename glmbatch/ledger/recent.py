"""A cache of receipts and answers that this process read or wrote recently. Reads no files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import pyarrow as pa
from pydantic import BaseModel

# A receipt takes some 2 KB: 2 MB in all.
RECEIPTS = 1024
# The answers of a few fragments: the next step and the output file read what was just committed.
TABLE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Content:
    """The receipt of a committed file, and its rows if they are in memory too."""

    receipt: BaseModel
    table: pa.Table | None


class Recent:
    """The content of committed files, by file name. Safe to use from several threads.

    A name contains the file's digest, so the content of a name never changes. Callers must first
    check that the file on disk still has that digest.
    """

    def __init__(self) -> None:
        self._contents: OrderedDict[str, Content] = OrderedDict()
        self._table_bytes = 0
        self._lock = threading.Lock()

    def find(self, name: str) -> Content | None:
        """The content of the file `name`; None if it is not in the cache."""
        with self._lock:
            content = self._contents.get(name)
            if content is not None:
                self._contents.move_to_end(name)
            return content

    def keep(self, name: str, content: Content) -> None:
        """Keep the content of the file `name`, dropping the least recently used if needed."""
        with self._lock:
            # Rows are dropped before receipts: they are large, and a receipt saves opening a file.
            self._forget_table(self._contents.pop(name, None))
            self._contents[name] = content
            self._table_bytes += content.table.nbytes if content.table is not None else 0
            while len(self._contents) > RECEIPTS:
                self._forget_table(self._contents.popitem(last=False)[1])
            for old_name, old in list(self._contents.items()):
                if self._table_bytes <= TABLE_BYTES:
                    break
                if self._forget_table(old):
                    self._contents[old_name] = Content(old.receipt, None)

    def _forget_table(self, content: Content | None) -> bool:
        """Subtract the rows of `content` from the cache's size; return whether it had any."""
        if content is None or content.table is None:
            return False
        self._table_bytes -= content.table.nbytes
        return True
