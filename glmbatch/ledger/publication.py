"""How a run's files become public, all together and safe to repeat. Knows no steps and no models.

    OUTPUT/<the input's folders>/<file>-<first row>.parquet    published rows
    OUTPUT/_manifest.json                  what is published; written last
    OUTPUT/_quarantine.parquet             rows that failed, with file, row and reason
    OUTPUT/_glmbatch/publishing.json       files of publications that were not completed
    OUTPUT/_glmbatch/refused.parquet       rows that failed in a run that published nothing

A kill at any moment leaves what the next publication finds and completes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa

from glmbatch.errors import TransientError, UnusableFile
from glmbatch.ledger.delta import Commit, commit_table, plan_commit
from glmbatch.ledger.ledger import ANSWERS, LOCK, STAGED, Ledger, staged_name
from glmbatch.ledger.manifest import MANIFEST, Manifest, PublishedFile
from glmbatch.ledger.receipts import OutputReceipt, key_in_name, read_receipt
from glmbatch.store.files import PARTIAL, committed, move, remove_tree
from glmbatch.store.folder import Folder
from glmbatch.store.locks import check_held
from glmbatch.store.parquet import open_parquet, write_table
from glmbatch.store.paths import AnyPath, unlink_all

logger = logging.getLogger(__name__)

QUARANTINE = "_quarantine.parquet"
PUBLISHING = "_glmbatch/publishing.json"
REFUSED = "_glmbatch/refused.parquet"


def publish(
    ledger: Ledger, manifest: Manifest, outputs: Sequence[OutputReceipt], quarantine: pa.Table
) -> None:
    """Move staged files into place, write `manifest`, delete what was replaced; safe to repeat.

    If it is killed halfway, the next publication finds in `publishing.json` and the manifest what
    to delete. Interrupted when another run took over the lock; TransientError when a staged file is
    gone.
    """
    root = ledger.root
    check_held(root / LOCK)  # in a store another run may have taken it over
    # So that the list of what is replaced does not grow from run to run.
    manifest = manifest.model_copy(
        update={"replaced": tuple(ledger.folder.existing(manifest.replaced))}
    )
    stale = _announced(root)
    version = None
    if manifest.format == "delta":
        version = _delta_version(ledger, manifest, outputs)
        stale -= version.known  # older versions of the table need theirs
    # Before the first move: what is moved and then killed must be found again.
    _announce(root, stale | {output.output_name for output in outputs})
    _move_staged(ledger.folder, outputs)
    if version is not None:
        commit_table(root, {file.output_name: file.rows for file in manifest.files}, version)
    _write_list(root / QUARANTINE, quarantine)
    # Moving may have taken longer than a lock in a store lives without a sign.
    check_held(root / LOCK)
    with committed(root / MANIFEST) as partial:
        partial.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    _delete_replaced(ledger.folder, manifest, stale)
    _sweep(root, manifest)


def read_quarantine(
    output: AnyPath, files: Sequence[PublishedFile], told: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The published lines of rows that failed, of the rows of these published files alone.

    And those of whole files, but for the sources that this run has `told` of itself.
    """
    path = output / QUARANTINE
    if not path.is_file():
        return []
    try:
        with open_parquet(path) as file:
            lines = file.read().to_pylist()
    except UnusableFile as error:  # a list for people; the rows themselves carry their reasons
        logger.warning("%s: it is written again, without the rows of earlier runs", error)
        return []
    ranges: dict[str, list[range]] = {}
    for file in files:
        rows = range(file.first_row, file.first_row + file.rows)
        ranges.setdefault(file.source, []).append(rows)

    def is_of_files(line: dict[str, Any]) -> bool:
        source = line["source"]
        if not line["step"]:  # why a file, or the rest of one, could not be read
            return source in ranges and source not in told
        return any(line["row"] in rows for rows in ranges.get(source, ()))

    return [line for line in lines if is_of_files(line)]


def write_refused(output: AnyPath, failed: pa.Table) -> AnyPath:
    """Write the failed rows of a run that publishes nothing; returns the path of the list.

    The next publication deletes it.
    """
    _write_list(output / REFUSED, failed)
    return output / REFUSED


def _write_list(path: AnyPath, rows: pa.Table) -> None:
    with committed(path) as partial:
        write_table(partial, rows.schema, iter(rows.to_batches()), {})


def _announced(root: AnyPath) -> set[str]:
    """Names that killed publications were to move into place before they wrote their manifest."""
    path = root / PUBLISHING
    return set(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else set()


def _announce(root: AnyPath, names: Collection[str]) -> None:
    """Write down which files will be moved, for the next publication if this one is killed."""
    with committed(root / PUBLISHING) as partial:
        partial.write_text(json.dumps(sorted(names)), encoding="utf-8")


def _delta_version(ledger: Ledger, manifest: Manifest, outputs: Sequence[OutputReceipt]) -> Commit:
    places = {file.output_name: ledger.root / file.output_name for file in manifest.files}
    for output in outputs:
        places[output.output_name] = ledger.output_path(output)
    return plan_commit(ledger.root, places)


def _move_staged(root: Folder, outputs: Sequence[OutputReceipt]) -> None:
    staged = {path.name for path in (root / STAGED).glob("*.parquet")}

    def move_one(output: OutputReceipt) -> None:
        path = root / output.output_name
        if staged_name(output) in staged:
            move(root / STAGED / staged_name(output), path)
            return
        # A publication that was killed has moved it, unless this is an older file of the same name.
        receipt = read_receipt(path, OutputReceipt) if path.is_file() else None
        if receipt is None or receipt.key != output.key:
            raise TransientError(f"{path}: its staged file was taken away. Run the job again.")

    for _ in root.map(move_one, outputs):  # the moves happen as the results are taken
        pass


def _delete_replaced(root: Folder, manifest: Manifest, stale: set[str]) -> None:
    names = {file.output_name for file in manifest.files}
    root.delete({*manifest.replaced, *stale} - names)
    (root / PUBLISHING).unlink(missing_ok=True)
    # The list of a refused run has no more use once another run has published.
    (root / REFUSED).unlink(missing_ok=True)
    remove_tree(root / STAGED)


def _sweep(root: AnyPath, manifest: Manifest) -> None:
    """Delete the answers that nothing published uses, and what killed runs left half-written."""
    used: set[str] = set()
    for file in manifest.files:
        used.update(file.answers_keys)
    answers: list[AnyPath] = [*(root / ANSWERS).glob("*.parquet")]
    unlink_all(root, [path for path in answers if key_in_name(path) not in used])
    # The lock is held, so no other run is writing them.
    partials = [*root.glob(f".*{PARTIAL}"), *(root / "_glmbatch").rglob(f".*{PARTIAL}")]
    unlink_all(root, partials)
