"""List the keys of a bucket with the facts that a listing has of each object.

S3 is listed by boto3. A listing of obstore fails as a whole if one key has an empty part or dots,
takes `a/` for `a`, begins only at whole parts of a key, and does not say why it failed. Other
stores are listed by obstore, which refuses such a folder by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from glmbatch.errors import InputError
from glmbatch.store.errors import MISSING_STATUS, status_of
from glmbatch.store.objects.clients import Client
from glmbatch.store.objects.requests import count

PAGE_KEYS = 1_000  # S3 lists so many keys in a request


@dataclass(frozen=True, slots=True)
class Facts:
    """What a store says of an object, in a listing and in an answer about it alone."""

    size: int
    version: str
    modified: datetime


def facts_of(meta: Any) -> Facts:
    """The facts in obstore's description of an object."""
    return Facts(meta["size"], _quoted(meta["e_tag"] or meta["version"]), meta["last_modified"])


def _quoted(tag: object) -> str:
    # An S3 store may leave out the quotes in listings.
    return '"{}"'.format(str(tag).strip('"'))


def list_keys(client: Client, prefix: str, most: int | None = None) -> dict[str, Facts]:
    """The keys that begin with `prefix`, sorted, or the first `most` of them.

    No keys if there is no such bucket.
    """
    pages = _pages(client, prefix, most) if client.s3 else _parts(client.reading, prefix, most)
    try:
        return dict(sorted(pages))
    except Exception as error:
        if status_of(error) == MISSING_STATUS or isinstance(error, FileNotFoundError):
            return {}
        raise


def _pages(client: Client, prefix: str, most: int | None) -> Iterator[tuple[str, Facts]]:
    """Keys of S3, in its order, a page with each request."""
    options: dict[str, Any] = {"Bucket": client.bucket, "Prefix": prefix}
    options["MaxKeys"] = min(most or PAGE_KEYS, PAGE_KEYS)
    left = most
    while True:
        page = client.s3.list_objects_v2(**options)
        for entry in page.get("Contents", ())[:left]:
            facts = Facts(entry["Size"], _quoted(entry["ETag"]), entry["LastModified"])
            yield entry["Key"], facts
        left = None if left is None else left - page["KeyCount"]
        if not page["IsTruncated"] or (left is not None and left <= 0):
            return
        options["ContinuationToken"] = page["NextContinuationToken"]


def _parts(store: Any, prefix: str, most: int | None) -> Iterator[tuple[str, Facts]]:
    """Keys of another store, which lists them in order from a folder on."""
    import obstore
    from obstore.exceptions import InvalidPathError

    folder, _, beginning = prefix.rpartition("/")
    # Keys come after `offset`, so one letter less skips none that begins with the prefix.
    offset = prefix[:-1] if len(beginning) > 1 else None
    entries: list[tuple[str, Facts]] = []
    seen = 0
    try:
        pages = obstore.list(store.store, folder or None, offset=offset, chunk_size=PAGE_KEYS)
        for page in pages:
            seen += 1
            for meta in page:
                if meta["path"].startswith(prefix):
                    entries.append((meta["path"], facts_of(meta)))
            is_past = page[-1]["path"] > prefix and not page[-1]["path"].startswith(prefix)
            if is_past or (most is not None and len(entries) >= most):
                break
    except InvalidPathError as error:
        raise InputError(
            f"{folder or 'the bucket'}: an object below it has a key with an empty part or dots, "
            "so it cannot be listed. Rename the object."
        ) from error
    finally:
        count(lists=max(1, seen))
    # An object that marks a folder is empty, and obstore drops the slash from its key.
    folders: set[str] = set()
    for key, _ in entries:
        folders.update(key[: slash.start()] for slash in re.finditer("/", key))
    yield from [entry for entry in entries if entry[1].size or entry[0] not in folders][:most]


# A wildcard, a set of characters, or a character that stands for itself.
_PIECE = re.compile(r"\*+|\?|\[!?\]?[^\]/]*\]|.", re.DOTALL)


def glob_matcher(pattern: str) -> re.Pattern[str]:
    """What matches the keys that a glob names; a part `**` stands for any folders."""
    parts = pattern.split("/")
    text = ""
    for place, part in enumerate(parts):
        is_last = place == len(parts) - 1
        if part == "**":
            text += ".*" if is_last else "(?:.+/)?"
        else:
            one = "[^/]+" if part == "*" else _PIECE.sub(_expression, part)
            text += one if is_last else f"{one}/"
    return re.compile(text, re.DOTALL)


def _expression(match: re.Match[str]) -> str:
    piece = match.group()
    if piece[0] == "*":
        return "[^/]*"
    if piece == "?":
        return "[^/]"
    if piece[0] == "[" and len(piece) > 1:
        inner = piece[1:-1]
        negated = inner[0] == "!"
        kept = re.sub(r"([\\\[^&~|])", r"\\\1", inner[negated:]).replace("]", r"\]")
        return f"(?!/)[{'^' * negated}{kept}]"
    return re.escape(piece)
