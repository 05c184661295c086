"""`glmbatch repair`: rebuild a manifest or list of failed rows that is damaged or missing.

The receipts in the footers of the published files say what the files contain. The copy of the
manifest in `_glmbatch` has the rest. Nothing is deleted. A file that cannot be accounted for is
named, and moved to OUTPUT/_glmbatch/aside if its rows would appear twice. Asks no model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from pydantic import BaseModel

from glmbatch.errors import InputError, UnusableFile, counted
from glmbatch.ledger.fragments import FileFault
from glmbatch.ledger.ledger import PUBLISHING, Ledger
from glmbatch.ledger.manifest import (
    COPY,
    MANIFEST,
    Manifest,
    PublishedFile,
    copy_manifest,
    published_file,
    read_copy,
    write_manifest,
)
from glmbatch.ledger.publication import read_announced
from glmbatch.ledger.quarantine import (
    QUARANTINE,
    Line,
    line_of_file,
    mended_quarantine,
    read_lines,
    write_quarantine,
)
from glmbatch.ledger.receipts import OutputReceipt, has_digest, read_receipt, whole_digest
from glmbatch.ledger.staying import overlap
from glmbatch.ledger.tables.table import Table, table_in
from glmbatch.store.files import modified, whole_address
from glmbatch.store.parquet import open_parquet
from glmbatch.store.paths import AnyPath

RUN = "repair"  # the run id with which a repair holds the lock


class Repair(BaseModel, frozen=True, extra="forbid"):
    """The result of a repair.

    `mended` names the lists that were rebuilt. `notes` has a sentence for each fact that could not
    be recovered and each file that could not be accounted for. `files` and `rows` are published.
    """

    output: str
    files: int
    rows: int
    mended: tuple[str, ...]
    notes: tuple[str, ...]


def repair(output: str | Path) -> Repair:
    """Rebuild the manifest and the list of failed rows of `output` where needed. Safe to repeat.

    InputError when nothing is published there, or a run holds the output.
    """
    ledger = Ledger(output)
    if not ledger.root.is_dir():
        raise InputError(f"{output}: there is no such folder. Give the job's data.output.")
    ledger.open(RUN)
    try:
        mended: list[str] = []
        notes: list[str] = []
        manifest = _sound_manifest(ledger)
        if manifest is None:
            manifest = _rebuild(ledger, notes)
            mended.append(MANIFEST)
        if _mend_quarantine(ledger, manifest):
            mended.append(QUARANTINE)
        for file in manifest.files:
            if not has_digest(ledger.root / file.output_name, file.digest):
                notes.append(f"{file.output_name}: damaged or missing; run the job to rebuild it")
        return Repair(
            output=str(output),
            files=len(manifest.files),
            rows=sum(file.rows for file in manifest.files),
            mended=tuple(mended),
            notes=tuple(notes),
        )
    finally:
        ledger.close(RUN)


def describe(repair: Repair) -> str:
    """The result as text for people, in lines without a final newline."""
    done = f"rebuilt: {', '.join(repair.mended)}" if repair.mended else "both lists are intact"
    size = f"{counted(repair.files, 'file')}, {counted(repair.rows, 'row')}"
    end = f"{repair.output}: {size}; {done}"
    look = f"Compare the output with its sources: glmbatch verify {repair.output}"
    return "\n".join([*repair.notes, end, *([look] if repair.mended else [])])


def _sound_manifest(ledger: Ledger) -> Manifest | None:
    try:
        return ledger.manifest()
    except InputError:
        return None


@dataclass(slots=True)
class _Found:
    """A file that may be published: its manifest entry, how far to trust it, and its receipt."""

    line: PublishedFile
    known: bool  # whether the copy of the manifest has it with this digest
    written: float  # modification time in seconds since 1970
    receipt: OutputReceipt | None = None


def _rebuild(ledger: Ledger, notes: list[str]) -> Manifest:
    """Rebuild the manifest from footers and its copy, write it, and return it.

    InputError when there are no files.
    """
    last = read_copy(ledger.root)
    copy = None if last is None else last.manifest
    files = _choose(ledger, list(_find(ledger, copy, notes)), notes)
    if not files:
        raise InputError(
            f"{ledger.root}: no published file has a receipt, so there is nothing to rebuild "
            f"{MANIFEST} from. Give the job's data.output; if this is it, move the folder away, "
            "and run the job again."
        )
    manifest = _assemble(ledger, copy, files, notes)
    _note_mixture(manifest, notes)
    if ledger.folder.holds(MANIFEST):
        notes.append(f"{MANIFEST}: the old file is now {ledger.folder.put_aside(MANIFEST)}")
    if read_announced(ledger.root).lost:
        notes.append(f"{PUBLISHING}: the old file is now {ledger.folder.put_aside(PUBLISHING)}")
    write_manifest(ledger.root, manifest)
    copy_manifest(ledger.root)
    return manifest


def _find(ledger: Ledger, copy: Manifest | None, notes: list[str]) -> Iterable[_Found]:
    """All our files at the place that their receipt names, and damaged ones that the copy lists."""
    lines = {file.output_name: file for file in copy.files} if copy is not None else {}
    table = _table(ledger, copy)
    names = ledger.folder.visible_files() | lines.keys() if table is None else table.list_files()
    for name in sorted(names):
        path = ledger.root / name
        receipt = read_receipt(path, OutputReceipt) if path.is_file() else None
        line = lines.get(name)
        if receipt is None and line is not None and path.is_file():
            notes.append(f"{name}: is damaged; the next run replaces it if its source is there")
            yield _Found(line, False, modified(path))
            continue
        if receipt is None or not _is_at_its_place(name, receipt, table):
            notes.append(f"{name}: {_what_it_is(path)}; left unchanged")
            continue
        digest = whole_digest(path)
        if line is not None and line.output_key == receipt.key:
            # If its digest differs now, `verify` reports it and the next run replaces the file.
            yield _Found(line, digest == line.digest, modified(path), receipt)
            continue
        try:
            _prove(path, receipt)
        except UnusableFile as error:
            notes.append(f"{error} Left unchanged")
            continue
        found = receipt.model_copy(update={"digest": digest, "output_name": name})
        yield _Found(published_file(found), False, modified(path), receipt)


def _table(ledger: Ledger, copy: Manifest | None) -> Table | None:
    """The table over the published files; None without one. The copy says its name now."""
    table = table_in(ledger.root)
    if table is None or copy is None:
        return table
    return replace(table, name=copy.table or table.name)


def _what_it_is(path: AnyPath) -> str:
    if not path.exists():
        return "was published, but is missing"
    return "has no receipt for this place, so it is damaged or not of glmbatch"


def _is_at_its_place(name: str, receipt: OutputReceipt, table: Table | None) -> bool:
    if table is None:
        return name == receipt.output_name
    # In a table the digest is part of the name.
    return name.startswith(receipt.fragment.output_name.removesuffix(".parquet") + ".")


def _prove(path: AnyPath, receipt: OutputReceipt) -> None:
    """UnusableFile unless all pages of the file match their checksums and hold all its rows."""
    with open_parquet(path) as file:
        rows = sum(batch.num_rows for batch in file.iter_batches())
    if rows != receipt.fragment.rows:
        raise UnusableFile(f"{path}: has {rows} rows, its receipt says {receipt.fragment.rows}.")


def _choose(ledger: Ledger, candidates: list[_Found], notes: list[str]) -> list[_Found]:
    """The candidates to publish, none with the rows of another; moves the others aside."""
    chosen: dict[str, list[_Found]] = defaultdict(list)
    # First those that the copy knows, then the newest.
    for candidate in sorted(candidates, key=lambda one: (one.known, one.written), reverse=True):
        line = candidate.line
        beside = [other.line for other in chosen[line.source]]
        same = all(other.source_digest == line.source_digest for other in beside)
        if same and not any(overlap(line, other) for other in beside):
            chosen[line.source].append(candidate)
        else:
            place = ledger.folder.put_aside(line.output_name)
            notes.append(f"{line.output_name}: other files have its rows too; moved to {place}")
    return sorted(chain(*chosen.values()), key=lambda one: one.written, reverse=True)


def _assemble(
    ledger: Ledger, copy: Manifest | None, files: Sequence[_Found], notes: list[str]
) -> Manifest:
    lines = tuple(sorted((one.line for one in files), key=lambda line: line.output_name))
    if copy is not None:
        return copy.model_copy(update={"files": lines})
    notes.append(
        f"{COPY}: is missing or damaged too, so the steps' settings and the limit of the last run "
        "are unknown; the manifest now says that there was no limit"
    )
    receipts = [one.receipt for one in files if one.receipt is not None]
    table = _table(ledger, None)
    return Manifest(
        run=receipts[0].run,
        root=_root(receipts, notes),
        files=lines,
        unusable=_left_out(read_lines(ledger.root / QUARANTINE) or []),
        format="parquet" if table is None else table.format,
        table="" if table is None else table.name,
    )


def _root(receipts: Sequence[OutputReceipt], notes: list[str]) -> str:
    """The root of the sources: the folder that most files came from; "" if it is unknown."""
    roots: Counter[str] = Counter()
    for receipt in receipts:
        source, path = receipt.fragment.source, receipt.fragment.path
        if path.endswith(f"/{source}"):
            roots[path.removesuffix(f"/{source}")] += 1
    root = next((name for name, _ in roots.most_common(1)), "")
    if not root or whole_address(root) != root:
        notes.append(f"{MANIFEST}: the folder of the input is unknown; the next run sets it")
        return ""
    return root


def _left_out(lines: Iterable[Line]) -> tuple[FileFault, ...]:
    faults = []
    for line in lines:
        if not line["step"] and line["source"]:
            reason = line["error"] or ""
            faults.append(FileFault(source=line["source"], reason=reason, first_row=line["row"]))
    return tuple(faults)


def _note_mixture(manifest: Manifest, notes: list[str]) -> None:
    settings = {(*sorted(file.step_keys.items()), file.calibration) for file in manifest.files}
    if len(settings) > 1:
        notes.append(
            f"these files were answered with {len(settings)} different settings or weights, as "
            "after a killed publication; run the job again"
        )


def _mend_quarantine(ledger: Ledger, manifest: Manifest) -> bool:
    """Make the list of failed rows match the files; return whether it had to be rewritten."""
    lines = mended_quarantine(ledger.root, manifest.files)
    listed = {(line["source"], line["row"]) for line in lines if not line["step"]}
    for fault in manifest.unusable:
        if (fault.source, fault.first_row) not in listed:
            lines.append(line_of_file(fault))
    listed_lines = read_lines(ledger.root / QUARANTINE)
    if listed_lines is not None and len(listed_lines) == len(lines):
        return False
    if ledger.folder.holds(QUARANTINE):
        ledger.folder.put_aside(QUARANTINE)
    write_quarantine(ledger.root, lines)
    return True
