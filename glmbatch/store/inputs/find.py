"""Find the files that an input names, and the names that are skipped. Opens no file.

A folder means all files below it that end in `.parquet`; a glob means what it matches.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Literal

from glmbatch.errors import MACHINE_ERRNOS, InputError, TransientError, shown
from glmbatch.store.files import is_link, kind_of, naming, real_path, stamp_if_any, stamp_of
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.found import Found, Skipped
from glmbatch.store.inputs.tables import (
    MARKS,
    first_table,
    refuse_table,
    refuse_tables_above,
    table_of,
)
from glmbatch.store.lines.form import ENDINGS
from glmbatch.store.objects.listing import glob_matcher
from glmbatch.store.paths import GLOB_MARKS, AnyPath, ObjectStatus, is_hidden, odd_part

SETTING = "data.input"
# Why names are not read; continues "3 ...".
OTHER_ENDING = "with another ending"
PARQUET = ".parquet"
HIDDEN = "with a name that begins with . or _"
LINKED_FOLDER = "behind a link to a folder"


def find_files(pattern: str, *, follow_links: bool = False, lines: bool = False) -> Found:
    """The files that `pattern` names; it is a file, a folder or a glob.

    A folder means every `.parquet` file below it, and with `lines` CSV and JSON lines too. Names
    that start with a dot or an underscore are skipped, as by Arrow, Spark and DuckDB, except
    `_x=1`, which is a partition. Links to folders are followed only with `follow_links`. Names
    begin above the partition folders (`day=1`), so that a run over one day gives files the same
    names as a run over all days. InputError when nothing matches, or when the files belong to a
    table of another format.
    """
    with naming(SETTING):
        whole = Folder(pattern).path
        endings = (PARQUET, *ENDINGS) if lines else (PARQUET,)
        listing = _list(whole, pattern, follow_links, endings)
        # A folder that was listed completely has been checked itself.
        refuse_tables_above(listing.root, SETTING, itself=listing.root != whole)
    if not listing.stamps and not listing.refused:
        raise InputError(
            f"{shown(pattern)}: no file to read matches{_instead(listing)}. Set {SETTING}."
        )
    return _from_above_partitions(listing)


@dataclass(slots=True)
class _Listing:
    """The names found below `root` so far. Each folder is listed only once.

    `stamps` maps them to their stamps, or to None. `skipped` maps each name that is not read to the
    reason. `entered` are the folders that links may not lead back into.
    """

    root: AnyPath
    follow_links: bool
    kind: Literal["file", "folder", "glob"]
    endings: tuple[str, ...]
    stamps: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    entered: list[AnyPath] = field(default_factory=list)

    def add(self, name: str, stamp: tuple[int, ...] | None, *, is_link: bool = False) -> None:
        """Add a file that the input names, or refuse it if its name cannot be used."""
        if fault := name_fault(name):
            self.refused[name] = f"{shown(self.root)}/{shown(name)}: {fault}"
            return
        self.stamps[name] = stamp
        if is_link:
            self.links.add(name)

    def skip_by_ending(self, name: str) -> bool:
        """Skip a file below a folder that the input names by its ending; return whether it was."""
        if is_other := not name.casefold().endswith(self.endings):
            self.skipped[name] = OTHER_ENDING
        return is_other

    def skip_hidden(self, name: str, *, is_folder: bool) -> bool:
        """Skip a hidden name, counted once per first hidden part; return whether it was hidden."""
        parts = name.split("/")
        for place, part in enumerate(parts, 1):
            if is_hidden(part):
                inner = is_folder or place < len(parts)
                self.skipped["/".join(parts[:place]) + "/" * inner] = HIDDEN
                return True
        return False

    def walk(self, folder: str) -> None:
        """Add all local files below `folder`, except in folders that were listed before."""
        pending = [folder]
        while pending:
            current = pending.pop()
            if current in self.folders:
                continue
            self.folders.add(current)
            place = Path(self.root) / current
            for entry in _entries(place):
                if entry.name in MARKS:
                    refuse_table(place, table_of(place), SETTING)
                name = f"{current}/{entry.name}" if current else entry.name
                is_folder = _is_folder(entry)
                if is_hidden(entry.name):
                    self.skipped[name + "/" * is_folder] = HIDDEN
                elif not is_folder:
                    if not self.skip_by_ending(name):
                        self.add(name, _stamp_of(entry), is_link=entry.is_symlink())
                elif entry.is_symlink() and not self._may_enter(place / entry.name):
                    self.skipped[name] = LINKED_FOLDER
                else:
                    pending.append(name)

    def _may_enter(self, link: Path) -> bool:
        """Whether to follow a link to a folder: not into a folder that is read or contains one."""
        target = real_path(link)
        self.entered = self.entered or [real_path(self.root)]
        for folder in self.entered:
            if target.is_relative_to(folder) or folder.is_relative_to(target):
                return False
        if self.follow_links:
            self.entered.append(target)
            refuse_tables_above(target, SETTING)
        return self.follow_links


def name_fault(name: str) -> str | None:
    """Why a file cannot be used under its `name`; None if it can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8. Rename the file."
    if part := odd_part(name):
        return f"its key has {part}, which no file name can have. Rename the object."
    return None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        where = f"{shown(folder)}: the folder cannot be read"
        if error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{where} now: {error.strerror}.") from error
        raise InputError(f"{where}: {error.strerror}. Set {SETTING}.") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circular link
        return False


def _stamp_of(entry: os.DirEntry[str]) -> tuple[int, ...] | None:
    try:
        return stamp_of(entry.stat())
    except OSError:  # a link to nowhere
        return None


def _list(whole: AnyPath, pattern: str, follow_links: bool, endings: tuple[str, ...]) -> _Listing:
    kind = kind_of(whole)
    if kind == "file":
        listing = _Listing(whole.parent, follow_links, kind, endings)
        listing.add(whole.name, stamp_if_any(whole), is_link=is_link(whole))
    elif kind == "folder":
        listing = _Listing(whole, follow_links, kind, endings)
        if isinstance(whole, Path):
            listing.walk("")
        else:
            _list_objects(listing, whole.keys(), None)
    elif is_glob(pattern):
        listing = _list_matches(whole, follow_links, endings)
    else:
        origin = f" (from {Path.cwd()})" if isinstance(whole, Path) else ""
        raise InputError(f"{shown(pattern)}: no such file or folder{origin}. Set {SETTING}.")
    return listing


def _list_matches(pattern: AnyPath, follow_links: bool, endings: tuple[str, ...]) -> _Listing:
    root, rest = split_glob(pattern)
    if kind_of(root) != "folder":
        raise InputError(f"{shown(pattern)}: there is no folder {shown(root)}. Set {SETTING}.")
    listing = _Listing(root, follow_links, "glob", endings)
    if not isinstance(root, Path):
        # Lists only keys that begin like the pattern up to its first wildcard.
        _list_objects(listing, root.keys(re.split(r"[*?\[]", rest, maxsplit=1)[0]), rest)
        return listing
    try:
        # From Python 3.13 on, a final ** matches files too, unless a slash follows it.
        matches = list(root.glob(f"{rest}/" if rest.endswith("**") else rest))
    except ValueError as error:
        raise InputError(f"{shown(pattern)}: {error}. Set {SETTING}.") from error
    for match in matches:
        name = match.relative_to(root).as_posix()
        name = "" if name == "." else name
        is_folder = match.is_dir()
        if listing.skip_hidden(name, is_folder=is_folder):
            continue
        if is_folder:
            listing.walk(name)
        else:
            listing.add(name, stamp_if_any(match), is_link=is_link(match))
    _refuse_tables_between(listing)
    return listing


def _refuse_tables_between(listing: _Listing) -> None:
    """InputError if a glob matched single files or folders inside a table of another format."""
    looked_at = set(listing.folders)
    for name in listing.stamps.keys() | listing.folders:
        for folder in PurePath(name).parents:
            if (place := folder.as_posix()) in looked_at:
                continue
            looked_at.add(place)
            refuse_table(listing.root / folder, table_of(listing.root / folder), SETTING)


def _list_objects(
    listing: _Listing, objects: Mapping[str, ObjectStatus], pattern: str | None
) -> None:
    """Add the `objects` by their keys; with a `pattern`, only those that `Matches` names."""
    if table := first_table(objects):
        folder, what = table
        refuse_table(listing.root / folder, what, SETTING)
    matches = Matches(pattern)
    for name, status in objects.items():
        if name.endswith("/") and not status.st_size:
            continue  # some tools mark a folder with such an object
        by_name = matches.file(name)
        if not by_name and not matches.folder_of(name):
            continue
        if odd_part(name) and name.casefold().rstrip("/").endswith(listing.endings):
            listing.add(name, None)
        elif listing.skip_hidden(name, is_folder=False):
            continue
        elif by_name or not listing.skip_by_ending(name):
            listing.add(name, stamp_of(status))


class Matches:
    """Tells which objects a glob names, directly or by a folder; None names all objects."""

    def __init__(self, pattern: str | None) -> None:
        self._matches = None if pattern is None else glob_matcher(pattern).fullmatch
        # A pattern that ends in ** names only folders, as in pathlib.
        self._names_files = pattern is not None and not pattern.endswith("**")
        self._folders: dict[str, bool] = {"": pattern in (None, "**")}

    def file(self, name: str) -> bool:
        """Whether the pattern names the object itself."""
        return self._names_files and self._matches is not None and bool(self._matches(name))

    def folder_of(self, name: str) -> bool:
        """Whether the pattern names a folder above the object."""
        folder = name.rpartition("/")[0]
        if folder not in self._folders:
            named = self._matches is None or bool(self._matches(folder))
            self._folders[folder] = named or self.folder_of(folder)
        return self._folders[folder]


def is_glob(pattern: str) -> bool:
    """Whether `pattern` has wildcards; a file or folder may still have that very name."""
    return not GLOB_MARKS.isdisjoint(pattern)


def split_glob(pattern: AnyPath) -> tuple[AnyPath, str]:
    """The folder in which a glob begins, and the pattern below it."""
    parts = pattern.parts
    fixed = len(list(takewhile(lambda part: not is_glob(part), parts)))
    root = type(pattern)(*parts[:fixed]) if fixed else Path()
    return root, "/".join(parts[fixed:])


def _instead(listing: _Listing) -> str:
    """The end of a message: the names that are not read, and what to do."""
    if not listing.skipped:
        return ""
    parts = ", ".join(map(str, _counted(listing)))
    return f"; not read: {parts}. Rename them, or name them with a glob"


def _counted(listing: _Listing) -> list[Skipped]:
    names: dict[str, list[str]] = {}
    for name, reason in listing.skipped.items():
        if name not in listing.stamps:  # a glob may name a file that its folder would skip
            names.setdefault(reason, []).append(name)
    return [Skipped(reason, len(some), shown(min(some))) for reason, some in sorted(names.items())]


def _from_above_partitions(listing: _Listing) -> Found:
    root = listing.root
    above = ""
    while "=" in root.name:
        above = f"{root.name}/{above}"
        root = root.parent
    refused = {above + name: reason for name, reason in sorted(listing.refused.items())}
    names = sorted(above + name for name in listing.stamps)
    stamps = {above + name: stamp for name, stamp in listing.stamps.items() if stamp is not None}
    links = frozenset(above + name for name in listing.links)
    return Found(root, listing.kind, names, stamps, links, refused, _counted(listing))
