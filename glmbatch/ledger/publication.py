"""Publish a run's files all together. Knows no steps and no models.

    OUTPUT/<the input's folders>/<file>-<first row>.parquet    published rows
    OUTPUT/_manifest.json                  the published files; written last
    OUTPUT/_glmbatch/files/*.parquet       the list that the manifest names, if it is long
    OUTPUT/_quarantine.parquet             rows that failed, with file, row and reason
    OUTPUT/_glmbatch/publishing.json       files of publications that were not completed
    OUTPUT/_glmbatch/overwritten/          files that they overwrite (see outputs.py)
    OUTPUT/_glmbatch/refused.parquet       rows that failed in a run that published nothing

After a kill at any moment, the next run undoes what was not completed: what was overwritten when it
takes the lock, and what was added when it publishes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from glmbatch.errors import MACHINE_ERRNOS, GlmbatchError, InputError, TransientError
from glmbatch.ledger.filelist import find_lists
from glmbatch.ledger.ledger import ANSWERS, LOCK, PUBLISHING, Ledger
from glmbatch.ledger.manifest import Manifest, copy_manifest, write_manifest
from glmbatch.ledger.outputs import OVERWRITTEN, STAGED, keep_overwritten, staged_name
from glmbatch.ledger.quarantine import OWN, REFUSED, Line, write_quarantine
from glmbatch.ledger.receipts import OutputReceipt, read_receipt
from glmbatch.ledger.tables.columns import Commit
from glmbatch.ledger.tables.table import Table, commit_table, plan_commit, table_over
from glmbatch.store.errors import one_line
from glmbatch.store.files import PARTIAL, committed, reachable, writable
from glmbatch.store.folder import Folder, Name, commit_all, remove_tree, unlink_all
from glmbatch.store.locks import check_held
from glmbatch.store.modes import narrow
from glmbatch.store.paths import AnyPath
from glmbatch.store.seal import sealed, unsealed

logger = logging.getLogger(__name__)

_NAMES = TypeAdapter(list[Name])


def publish(
    ledger: Ledger,
    manifest: Manifest,
    outputs: Sequence[OutputReceipt],
    quarantine: Sequence[Line],
    leave_alone: Callable[[Manifest], Manifest],
) -> None:
    """Move staged files into place, write `manifest`, and delete replaced files; safe to repeat.

    `quarantine` replaces the list of failed rows. `leave_alone` adds to the manifest what lets the
    next run leave sources alone, once all files are in their places. Interrupted when another run
    took over the lock; TransientError when a staged file is missing or the machine failed;
    InputError when the output cannot be written.
    """
    root = ledger.root
    check_held(root / LOCK)  # in a store, another run may have taken over the lock
    # Only files that still exist, so that the list does not grow with each run.
    manifest = manifest.model_copy(
        update={"replaced": tuple(ledger.folder.existing(manifest.replaced))}
    )
    announced = read_announced(root)
    stale = announced.names
    table = table_over(root, manifest.format, manifest.table)
    version = None if table is None else _next_version(table, ledger, manifest, outputs)
    if version is not None:
        stale -= version.known  # older versions of the table need their files
    # Before the first move, so that files moved before a kill are found again.
    moves = {output.output_name for output in outputs}
    _announce(root, stale | moves, lost=announced.lost, commits=version is not None)
    _move_staged(ledger, outputs)
    manifest = leave_alone(manifest)
    if table is not None and version is not None:
        _commit(ledger, table, manifest, version, after_a_kill=announced.exists)
    write_quarantine(root, quarantine)
    old_lists = find_lists(root)
    # Moving the files may have taken longer than a lock in a store lives without renewal.
    check_held(root / LOCK)
    write_manifest(root, manifest)
    with writable(root):
        if announced.lost and manifest.format == "parquet":
            put_strangers_aside(ledger.folder, {file.output_name for file in manifest.files})
        _delete_replaced(ledger.folder, manifest, stale)
        _sweep(ledger.folder, manifest)
    copy_manifest(root, old_lists)
    ledger.index_keys(manifest)


class Announced(NamedTuple):
    """The names of files that killed publications had begun to move into place.

    `lost` is true if a list of such names was damaged and no publication was completed since.
    `exists` is true if there is a list at all.
    """

    names: set[str]
    lost: bool
    exists: bool = True


def read_announced(root: AnyPath) -> Announced:
    """What killed publications announced in `publishing.json`; no names if none was killed.

    TransientError when the file cannot be read now.
    """
    path = root / PUBLISHING
    try:
        content = unsealed(path.read_bytes())
        # Earlier versions wrote the bare list.
        listed = {"names": content} if isinstance(content, list) else content
        names = set(_NAMES.validate_python(listed["names"]))
        return Announced(names, lost=bool(listed.get("lost", False)))
    except FileNotFoundError:
        return Announced(set(), lost=False, exists=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{path}: cannot be read now: {error.strerror}.") from error
        logger.warning("%s: is damaged: %s", path, one_line(error))
        return Announced(set(), lost=True)


def _announce(root: AnyPath, names: Collection[str], *, lost: bool, commits: bool) -> None:
    """Record the files to be moved, for the next publication if this one is killed.

    `lost` is recorded too, until a publication has searched for the files of a lost list. One that
    `commits` a table is announced in any case.
    """
    if not names and not lost and not commits:  # nothing is moved, nothing was announced before
        return
    listed: dict[str, Any] = {"names": sorted(names)}
    if lost:
        listed["lost"] = True
    with committed(root / PUBLISHING) as partial:
        partial.write_text(sealed(listed), encoding="utf-8")


def put_strangers_aside(folder: Folder, named: Collection[str]) -> list[str]:
    """Move our own files that are not in `named` out of readers' sight; return their names.

    They are what a killed publication moved into place, if its list of names is lost.
    """
    moved = []
    for name in sorted(folder.visible_files() - set(named)):
        path = folder / name
        if read_receipt(path, OutputReceipt) is not None:
            logger.warning("%s: is not published; moved to %s", path, folder.put_aside(name))
            moved.append(name)
    return moved


def _commit(
    ledger: Ledger, table: Table, manifest: Manifest, version: Commit, *, after_a_kill: bool
) -> None:
    check_held(ledger.root / LOCK)
    rows = {file.output_name: file.rows for file in manifest.files}
    # The run that did not end may stand still in the middle of its commit in a store, or have sent
    # one to a catalogue. On a disk it holds its lock until it is dead.
    fences = after_a_kill and (ledger.folder.local is None or table.format == "iceberg")
    commit_table(table, rows, version, run=manifest.run, fences=fences)


def _next_version(
    table: Table, ledger: Ledger, manifest: Manifest, outputs: Sequence[OutputReceipt]
) -> Commit:
    places = {file.output_name: ledger.root / file.output_name for file in manifest.files}
    for output in outputs:
        places[output.output_name] = ledger.outputs.path(output)
    return plan_commit(table, places, manifest.version)


@contextmanager
def _lock_lost_first(root: AnyPath) -> Iterator[None]:
    """If the block fails because another run took over and deleted what was staged, say that."""
    try:
        yield
    except GlmbatchError:
        check_held(root / LOCK)
        raise


def _move_staged(ledger: Ledger, outputs: Sequence[OutputReceipt]) -> None:
    root = ledger.folder
    if not outputs:
        return
    with reachable(root / STAGED):
        staged = {path.name for path in (root / STAGED).glob("*.parquet")}

    root.check_places(output.output_name for output in outputs)
    keep_overwritten(root, ledger.manifest(), outputs)
    moves = []
    others = []
    for output in outputs:
        name = staged_name(output)
        if name in staged:
            moves.append((root / STAGED / name, root / output.output_name))
        else:
            others.append(output)

    def check(output: OutputReceipt) -> None:
        path = root / output.output_name
        if path.is_file():  # earlier versions did not restrict who may read the file
            narrow(path, [output.fragment.path])
        # Already moved by a killed publication, unless it is an older file of the same name.
        receipt = ledger.outputs.published(output.output_name, output.digest)
        if receipt is None or receipt.key != output.key:
            raise TransientError(f"{path}: its staged file is missing. Run the job again.")

    with _lock_lost_first(root.path):
        for _ in root.map(check, others):  # the results must be consumed: the map is lazy
            pass
        commit_all(moves)


def _delete_replaced(root: Folder, manifest: Manifest, stale: set[str]) -> None:
    check_held(root / LOCK)  # another run may have published by now what would be deleted
    names = {*manifest.replaced, *stale} - {file.output_name for file in manifest.files}
    for _ in root.map(lambda name: _delete_own(root, name), sorted(names)):
        pass
    # Once another run has published, the list of a refused run is out of date.
    unlink_all(root.path, [root / PUBLISHING, root / REFUSED])
    remove_tree(root / STAGED)


def _delete_own(root: Folder, name: str) -> None:
    """Delete the formerly published file `name`; move it aside if it no longer has a receipt."""
    if not (root / name).is_file():
        return
    try:
        path = root.place(name)
    except InputError as error:
        logger.warning("%s It is not deleted.", error)
        return
    if read_receipt(path, OutputReceipt) is not None:
        path.unlink(missing_ok=True)
    else:
        logger.warning("%s: has no glmbatch receipt; moved to %s", path, root.put_aside(name))


def _sweep(root: Folder, manifest: Manifest) -> None:
    """Delete unused answers, what was overwritten, and the partial files of killed runs."""
    used = set(manifest.spared)
    for file in manifest.files:
        used.update(file.answers_keys)
    stale = root.partials()
    for name in root.names(OWN):
        folder, _, last = name.rpartition("/")
        if folder == ANSWERS and last.endswith(".parquet"):
            unused = last.split(".")[0] not in used  # its key, without a path for each name
        else:
            # The lock is held, so no other run is writing it.
            is_partial = last.startswith(".") and last.endswith(PARTIAL)
            unused = is_partial or folder == OVERWRITTEN
        if unused:
            stale.append(root / name)
    unlink_all(root.path, stale)
