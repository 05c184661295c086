"""`glmbatch verify`: check, without a model, that an output matches its manifest and its sources.

Changes nothing. A finding names the file, the row if there is one, and what is wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from glmbatch.errors import InputError, UnusableFile
from glmbatch.ledger.comparison import (
    Sources,
    differences,
    kept_count,
    open_source,
    pair_columns,
    rows_where,
    source_rows,
)
from glmbatch.ledger.input.covering import covering
from glmbatch.ledger.ledger import PUBLISHING, Ledger
from glmbatch.ledger.manifest import MANIFEST, Manifest, PublishedFile, forget_manifests
from glmbatch.ledger.outputs import STAGED
from glmbatch.ledger.quarantine import QUARANTINE, read_quarantine
from glmbatch.ledger.receipts import OutputReceipt, receipt_of, whole_digest
from glmbatch.ledger.tables.table import table_faults, table_over
from glmbatch.settings.columns import NO_ERRORS, Columns
from glmbatch.store.files import PARTIAL, reachable
from glmbatch.store.folder import Folder
from glmbatch.store.parquet import open_parquet, read_opened
from glmbatch.store.paths import AnyPath, is_hidden


class Finding(BaseModel, frozen=True, extra="forbid"):
    """One finding about a `file` of the output, and perhaps a `row` of the file, from 0.

    - `wrong`: the output is damaged or contradicts its manifest or its source.
    - `unchecked`: the source is missing or has changed, so the file could not be compared with it.
    - `waiting`: staged by a run that was refused or killed; published files are not affected.
    """

    kind: Literal["wrong", "unchecked", "waiting"]
    file: str
    what: str
    row: int | None = None

    def __str__(self) -> str:
        row = "" if self.row is None else f" row {self.row}:"
        return f"{self.kind}: {self.file}:{row} {self.what}"


class Verification(BaseModel, frozen=True, extra="forbid"):
    """How much was checked, and the findings. `earlier` counts files of older table versions."""

    output: str
    files: int
    rows: int
    findings: tuple[Finding, ...]
    earlier: int = 0

    @property
    def sound(self) -> bool:
        """Whether no finding is of the kind `wrong`."""
        return all(finding.kind != "wrong" for finding in self.findings)


def verify(output: str | Path) -> Verification:
    """Check everything that is published in `output`; reads all files and changes nothing.

    InputError when nothing is published there.
    """
    ledger = Ledger(output)
    forget_manifests()
    manifest = ledger.manifest()
    if manifest is None:
        raise InputError(
            f"{output}: there is no {MANIFEST}, so nothing is published here. Give the job's "
            "data.output."
        )
    faulty: Counter[str] = Counter()
    of_files: list[Finding] = []
    with TemporaryDirectory(prefix="glmbatch-") as folder:
        sources = Sources(folder)
        for file in manifest.files:
            of_files += _file_findings(ledger.root, manifest, file, faulty, sources)
        gaps = list(_gaps(manifest, sources))
    findings = [*_strangers(ledger, manifest), *_mixed_keys(manifest), *gaps, *of_files]
    findings += _quarantine_findings(ledger, manifest, faulty)
    for kind, what in covering(manifest):
        findings.append(Finding(kind=kind, file=MANIFEST, what=what))
    return Verification(
        output=str(output),
        files=len(manifest.files),
        rows=sum(file.rows for file in manifest.files),
        findings=tuple(findings),
        earlier=_earlier(ledger, manifest),
    )


def _earlier(ledger: Ledger, manifest: Manifest) -> int:
    if manifest.format == "parquet":
        return 0
    return len(ledger.folder.visible_files() - {file.output_name for file in manifest.files})


def _wrong(file: str, what: str, row: int | None = None) -> Finding:
    return Finding(kind="wrong", file=file, what=what, row=row)


def _strangers(ledger: Ledger, manifest: Manifest) -> Iterator[Finding]:
    """Findings for files that readers would mistake for answers, and for unfinished files."""
    named = {file.output_name for file in manifest.files}
    if (table := table_over(ledger.root, manifest.format, manifest.table)) is not None:
        for name, what in table_faults(table, named):
            yield _wrong(name or MANIFEST, what)
    with reachable(ledger.root):
        paths = sorted(ledger.root.rglob("*"))
    for path in paths:
        name = path.relative_to(ledger.root).as_posix()
        if name == PUBLISHING:
            yield _wrong(name, "a publication was not completed; run the job again")
        elif path.name.endswith(PARTIAL):
            yield _wrong(name, "is incomplete; the next run deletes it")
        elif name.startswith(f"{STAGED}/"):
            yield Finding(
                kind="waiting",
                file=name,
                what="is of a run that was refused or killed; the next run uses or deletes it",
            )
        elif (
            manifest.format == "parquet"
            and name not in named
            and path.suffix == ".parquet"
            and not is_hidden(path.relative_to(ledger.root))
        ):
            yield _wrong(
                name, f"is not in {MANIFEST}: of a run that was killed, or not of glmbatch"
            )


def _mixed_keys(manifest: Manifest) -> Iterator[Finding]:
    for file in manifest.files:
        if file.made_with != manifest.files[0].made_with:
            first = manifest.files[0].output_name
            what = f"was answered with other settings or weights than {first}, or other maps"
            yield _wrong(file.output_name, what)


def _gaps(manifest: Manifest, sources: Sources) -> Iterator[Finding]:
    """Findings for rows of a source that are in no file or in two."""
    ranges: dict[str, list[PublishedFile]] = defaultdict(list)
    for file in manifest.files:
        ranges[file.source].append(file)
    damaged = {fault.source for fault in manifest.unusable}
    for source, files in ranges.items():
        next_row = 0
        for file in sorted(files, key=lambda file: file.first_row):
            if file.first_row < next_row:
                yield _wrong(
                    file.output_name,
                    f"has rows of {source} that are also in another file",
                    file.first_row,
                )
            # A damaged source may lack rows; the manifest lists its fault.
            elif file.first_row > next_row and source not in damaged:
                yield _wrong(
                    file.output_name,
                    f"rows {next_row} to {file.first_row - 1} of {source} are in no file",
                )
            next_row = max(next_row, file.first_row + file.covered)
        path = Folder(manifest.root) / source
        # Only the source itself shows whether rows are missing after the last file.
        total = sources.rows(path)
        same = all(file.source_digest == files[0].source_digest for file in files)
        whole = manifest.limit is None and source not in damaged and same
        if (
            whole
            and total is not None
            and next_row < total
            # Checked last, because digesting reads the whole source.
            and sources.digest(path) == files[0].source_digest
        ):
            yield _wrong(
                files[-1].output_name,
                f"rows {next_row} to {total - 1} of {source} are in no file",
            )


def _file_findings(
    root: AnyPath,
    manifest: Manifest,
    file: PublishedFile,
    faulty: Counter[str],
    sources: Sources,
) -> Iterator[Finding]:
    name = file.output_name
    path = root / name
    if not path.is_file():
        yield _wrong(name, "is gone")
        return
    # A changed file is still checked for other findings.
    if whole_digest(path) != file.digest:
        yield _wrong(
            name, f"was changed after it was published: its digest is not the one in {MANIFEST}"
        )
    try:
        # Opened once, because a footer with many columns takes long to read.
        with open_parquet(path) as published:
            receipt = receipt_of(published, OutputReceipt)
            if receipt is None:
                yield _wrong(name, "has no receipt in its footer")
                return
            yield from _receipt_findings(file, receipt)
            yield from _answer_findings(published, file, receipt, faulty)
            yield from _source_findings(published, manifest, file, receipt, sources)
    except UnusableFile as error:
        yield _wrong(name, str(error))


def _receipt_findings(file: PublishedFile, receipt: OutputReceipt) -> Iterator[Finding]:
    fragment = receipt.fragment
    pairs = {
        "key": (receipt.key, file.output_key),
        "digest of the source": (fragment.digest, file.source_digest),
        "first row": (fragment.first_row, file.first_row),
        "number of rows": (fragment.rows, file.rows),
        "condition on its rows": (fragment.where, file.where),
        "rows that it covers": (fragment.covered, file.covered),
        "number of failed rows": (receipt.faulty_rows, file.faulty_rows),
        "calibration": (receipt.calibration, file.calibration),
        "step keys": (
            {answers.step: answers.step_key for answers in receipt.answers},
            file.step_keys,
        ),
    }
    for what, (inside, outside) in pairs.items():
        if inside != outside:
            yield _wrong(
                file.output_name,
                f"its receipt and {MANIFEST} differ in the {what}: {inside}, {outside}",
            )


def _answer_findings(
    published: pq.ParquetFile, file: PublishedFile, receipt: OutputReceipt, faulty: Counter[str]
) -> Iterator[Finding]:
    """Check that each row has an answer or a reason for each step, and that the counts match.

    Adds the failures to `faulty`, by source.
    """
    steps = [answers.step for answers in receipt.answers]
    names: list[str] = []
    for step in steps:
        columns = Columns(step)
        names += [columns.answer, columns.error, columns.error_type, columns.key]
    missing = sorted(set(names) - set(published.schema_arrow.names))
    if missing:
        yield _wrong(file.output_name, f"has no column {missing[0]!r}")
        return
    table = published.read(columns=names)
    if len(table) != file.rows:
        yield _wrong(file.output_name, f"has {len(table)} rows, {MANIFEST} says {file.rows}")
    failed = pa.array([False] * len(table), pa.bool_())
    for step in steps:
        columns = Columns(step)
        answered = table.column(columns.answer).is_valid()
        reason = table.column(columns.error).is_valid()
        key = table.column(columns.key).is_valid()
        # One finding of each kind, for the first such row, is enough.
        excused = pc.is_in(table.column(columns.error_type), pa.array(NO_ERRORS))
        for row in rows_where(pc.equal(answered, pc.or_(reason, excused)))[:1]:
            yield _wrong(
                file.output_name, f"step {step!r} has neither an answer nor a reason, or both", row
            )
        for row in rows_where(pc.and_(answered, pc.invert(key)))[:1]:
            yield _wrong(file.output_name, f"step {step!r} has an answer without its key", row)
        failed = pc.or_(failed, reason.combine_chunks())
        faulty[file.source] += int(pc.sum(reason).as_py() or 0)
    count = int(pc.sum(failed).as_py() or 0)
    if count != file.faulty_rows:
        yield _wrong(
            file.output_name, f"{count} of its rows failed, {MANIFEST} says {file.faulty_rows}"
        )


def _source_findings(
    published: pq.ParquetFile,
    manifest: Manifest,
    file: PublishedFile,
    receipt: OutputReceipt,
    sources: Sources,
) -> Iterator[Finding]:
    """Check that the output has the source's own columns unchanged, row by row."""
    source = Folder(manifest.root) / file.source
    if not source.is_file():
        yield Finding(kind="unchecked", file=file.output_name, what=f"{source} is gone")
        return
    if sources.digest(source) != file.source_digest:
        yield Finding(
            kind="unchecked",
            file=file.output_name,
            what=f"{source} was changed after it was answered",
        )
        return
    fragment = receipt.fragment
    with open_source(sources.parquet(source, fragment), fragment) as (opened, others):
        pairs, faults = pair_columns(opened, published, fragment, [*file.step_keys])
        if manifest.limit is None and (kept := kept_count(opened, fragment)) != file.rows:
            faults.append(f"has {file.rows} rows, but {kept} meet {fragment.where}")
        yield from (_wrong(file.output_name, what) for what in faults)
        ours = read_opened(
            published, range(published.num_row_groups), 0, file.rows, where=file.output_name
        )
        theirs = source_rows(opened, fragment)
        other_types = manifest.format != "parquet" or others
        for name, row in differences(ours, theirs, pairs, other_types=other_types):
            yield _wrong(
                file.output_name,
                f"column {name!r} differs from row {file.first_row + row} of {source}",
                row,
            )


def _quarantine_findings(
    ledger: Ledger, manifest: Manifest, faulty: Counter[str]
) -> Iterator[Finding]:
    listed = Counter(
        line["source"] for line in read_quarantine(ledger.root, manifest.files) if line["step"]
    )
    for source in sorted(listed.keys() | faulty.keys()):
        if listed[source] != faulty[source]:
            yield _wrong(
                QUARANTINE,
                f"lists {listed[source]} failures of {source}; its files have {faulty[source]}",
            )
