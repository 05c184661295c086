"""`glmbatch verify`: proof, without a model, that an output matches its manifest and its sources.

Reads; changes nothing. A finding names the file, the row where one is to blame, and what is wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel

from glmbatch.errors import InputError, UnusableFile
from glmbatch.ledger.comparison import differences, open_source, pair_columns
from glmbatch.ledger.delta import LOG, table_files
from glmbatch.ledger.ledger import STAGED, Ledger
from glmbatch.ledger.manifest import MANIFEST, Manifest, PublishedFile
from glmbatch.ledger.publication import PUBLISHING
from glmbatch.ledger.quarantine import QUARANTINE, read_quarantine
from glmbatch.ledger.receipts import OutputReceipt, receipt_of, whole_digest
from glmbatch.settings.columns import Columns
from glmbatch.store.files import PARTIAL, reachable
from glmbatch.store.folder import Folder
from glmbatch.store.parquet import open_parquet, read_opened
from glmbatch.store.paths import AnyPath, is_hidden


class Finding(BaseModel, frozen=True, extra="forbid"):
    """`wrong`: the output is not as it should be. `unchecked`: its source is gone or has changed.

    `waiting`: not published, of a run that was refused or killed; what is published is not touched
    by it.
    """

    kind: Literal["wrong", "unchecked", "waiting"]
    file: str
    what: str
    row: int | None = None

    def __str__(self) -> str:
        row = "" if self.row is None else f" row {self.row}:"
        return f"{self.kind}: {self.file}:{row} {self.what}"


class Verification(BaseModel, frozen=True, extra="forbid"):
    """What was looked at, and what was found; sound without findings of kind "wrong"."""

    output: str
    files: int
    rows: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return all(finding.kind != "wrong" for finding in self.findings)


def verify(output: str | Path) -> Verification:
    """Look at everything that is published in `output`. InputError when nothing is."""
    ledger = Ledger(output)
    manifest = ledger.manifest()
    if manifest is None:
        raise InputError(
            f"{output}: there is no {MANIFEST}, so nothing is published here. Give the job's "
            "data.output."
        )
    _source_digest.cache_clear()  # a source may have changed since this process looked last
    findings = [*_strangers(ledger, manifest), *_mixed_keys(manifest), *_gaps(manifest)]
    faulty: Counter[str] = Counter()
    for file in manifest.files:
        findings += _file_findings(ledger.root, manifest, file, faulty)
    findings += _quarantine_findings(ledger, manifest, faulty)
    return Verification(
        output=str(output),
        files=len(manifest.files),
        rows=sum(file.rows for file in manifest.files),
        findings=tuple(findings),
    )


def describe(verification: Verification) -> str:
    """The findings as text for a person."""
    counts = Counter(finding.kind for finding in verification.findings)
    end = "sound" if verification.sound else f"{counts['wrong']} things are wrong"
    if counts["unchecked"]:
        end += f"; not compared with {counts['unchecked']} sources, which are gone or newer"
    head = f"{verification.output}: {verification.files} files, {verification.rows} rows: {end}"
    return "\n".join([*(str(finding) for finding in verification.findings), head])


@lru_cache(maxsize=1024)
def _source_digest(path: AnyPath) -> str:
    """Taken once: a source has many fragments."""
    return whole_digest(path) or ""


def _wrong(file: str, what: str, row: int | None = None) -> Finding:
    return Finding(kind="wrong", file=file, what=what, row=row)


def _strangers(ledger: Ledger, manifest: Manifest) -> Iterator[Finding]:
    """Files that a reader of the folder would take for answers, and what was left half-written."""
    named = {file.output_name for file in manifest.files}
    if manifest.format == "delta":
        for name in sorted(named ^ table_files(ledger.root)):
            yield _wrong(
                name, f"stands in {LOG if name not in named else MANIFEST} alone; run the job again"
            )
    with reachable(ledger.root):
        paths = sorted(ledger.root.rglob("*"))
    for path in paths:
        name = path.relative_to(ledger.root).as_posix()
        if name == PUBLISHING:
            yield _wrong(name, "a publication did not come to its end; run the job again")
        elif path.name.endswith(PARTIAL):
            yield _wrong(name, "is half-written; the next run takes it away")
        elif name.startswith(f"{STAGED}/"):
            yield Finding(
                kind="waiting",
                file=name,
                what="is of a run that was refused or killed; the next one takes it",
            )
        elif (
            manifest.format == "parquet"
            and name not in named
            and _is_seen(path.relative_to(ledger.root))
        ):
            yield _wrong(
                name, f"is not in {MANIFEST}: of a run that did not end, or not of glmbatch"
            )


def _is_seen(name: PurePath) -> bool:
    return name.suffix == ".parquet" and not is_hidden(name)


def _mixed_keys(manifest: Manifest) -> Iterator[Finding]:
    first = manifest.files[0] if manifest.files else None
    for file in manifest.files:
        if first is not None and file.step_keys != first.step_keys:
            yield _wrong(
                file.output_name,
                f"was answered with other settings or weights than {first.output_name}",
            )


def _gaps(manifest: Manifest) -> Iterator[Finding]:
    """Rows of a source that no file has, or two files have."""
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
                    f"has rows of {source} that another file has too",
                    file.first_row,
                )
            # A damaged source may lack rows; its fault is in the manifest.
            elif file.first_row > next_row and source not in damaged:
                yield _wrong(
                    file.output_name,
                    f"rows {next_row} to {file.first_row - 1} of {source} are in no file",
                )
            next_row = max(next_row, file.first_row + file.rows)
        path = Folder(manifest.root) / source
        # Rows behind the last file: only the source itself can tell of them.
        total = _rows_of(path)
        same = all(file.source_digest == files[0].source_digest for file in files)
        whole = manifest.limit is None and source not in damaged and same
        if (
            whole
            and total is not None
            and next_row < total
            # Digested last: only a source that is longer than its answers needs a second look.
            and _source_digest(path) == files[0].source_digest
        ):
            yield _wrong(
                files[-1].output_name,
                f"rows {next_row} to {total - 1} of {source} are in no file",
            )


def _rows_of(path: AnyPath) -> int | None:
    try:
        with open_parquet(path) as file:
            return int(file.metadata.num_rows)
    except (UnusableFile, OSError):
        return None


def _file_findings(
    root: AnyPath, manifest: Manifest, file: PublishedFile, faulty: Counter[str]
) -> Iterator[Finding]:
    name = file.output_name
    path = root / name
    if not path.is_file():
        yield _wrong(name, "is gone")
        return
    # Looked at all the same: a changed file gets its other findings too.
    if whole_digest(path) != file.digest:
        yield _wrong(
            name, f"was changed after it was published: its digest is not that of {MANIFEST}"
        )
    try:
        # Opened once: a footer of many columns takes long to read.
        with open_parquet(path) as published:
            receipt = receipt_of(published, OutputReceipt)
            if receipt is None:
                yield _wrong(name, "has no receipt in its footer")
                return
            yield from _receipt_findings(file, receipt)
            yield from _answer_findings(published, file, receipt, faulty)
            yield from _source_findings(published, manifest, file, receipt)
    except UnusableFile as error:
        yield _wrong(name, str(error))


def _receipt_findings(file: PublishedFile, receipt: OutputReceipt) -> Iterator[Finding]:
    fragment = receipt.fragment
    pairs = {
        "key": (receipt.key, file.output_key),
        "digest of the source": (fragment.digest, file.source_digest),
        "first row": (fragment.first_row, file.first_row),
        "number of rows": (fragment.rows, file.rows),
        "number of failed rows": (receipt.faulty_rows, file.faulty_rows),
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
    """Every row has an answer or a reason for every step, and the receipt counts the reasons."""
    steps = [answers.step for answers in receipt.answers]
    names: list[str] = []
    for step in steps:
        columns = Columns(step)
        names += [columns.answer, columns.error, columns.key]
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
        # One finding for each kind: the first row leads to the others.
        for row in _rows_where(pc.equal(answered, reason))[:1]:
            yield _wrong(
                file.output_name, f"step {step!r} has neither an answer nor a reason, or both", row
            )
        for row in _rows_where(pc.and_(answered, pc.invert(key)))[:1]:
            yield _wrong(file.output_name, f"step {step!r} has an answer without its key", row)
        failed = pc.or_(failed, reason.combine_chunks())
        faulty[file.source] += int(pc.sum(reason).as_py() or 0)
    count = int(pc.sum(failed).as_py() or 0)
    if count != file.faulty_rows:
        yield _wrong(
            file.output_name, f"{count} of its rows failed, {MANIFEST} says {file.faulty_rows}"
        )


def _rows_where(condition: pa.ChunkedArray | pa.Array) -> list[int]:
    return [row for row, holds in enumerate(condition.to_pylist()) if holds]


def _source_findings(
    published: pq.ParquetFile, manifest: Manifest, file: PublishedFile, receipt: OutputReceipt
) -> Iterator[Finding]:
    """The source's own columns stand in the output as they are, row for row."""
    source = Folder(manifest.root) / file.source
    if not source.is_file():
        yield Finding(kind="unchecked", file=file.output_name, what=f"{source} is gone")
        return
    if _source_digest(source) != file.source_digest:
        yield Finding(
            kind="unchecked",
            file=file.output_name,
            what=f"{source} was changed after it was answered",
        )
        return
    fragment = receipt.fragment
    with open_source(source, fragment) as (opened, others):
        pairs, lost = pair_columns(opened, published)
        for name in lost:
            yield _wrong(file.output_name, f"has no column {name!r}, which {source} has")
        ours = read_opened(
            published, range(published.num_row_groups), 0, file.rows, where=file.output_name
        )
        theirs = read_opened(
            opened, fragment.row_groups, fragment.skip_rows, fragment.rows, where=source
        )
        other_types = manifest.format == "delta" or others
        for name, row in differences(ours, theirs, pairs, other_types=other_types):
            yield _wrong(
                file.output_name,
                f"column {name!r} is not what row {file.first_row + row} of {source} has",
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
                f"lists {listed[source]} failures of {source}; its files hold {faulty[source]}",
            )
