"""The summary of a run as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from glmbatch.errors import GlmbatchError, counted, some_of
from glmbatch.ledger.fragments import FileFault
from glmbatch.ledger.manifest import read_manifest
from glmbatch.ledger.quarantine import QUARANTINE
from glmbatch.ledger.tables.delta import is_table
from glmbatch.report.facts import answers, by_count, size, store_requests, tokens, unchanged
from glmbatch.report.summary import StepSummary, Summary, short
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.needs import folder_values
from glmbatch.store.parquet import open_parquet
from glmbatch.store.tables.catalogs import table_name

LEFT_OUT_SHOWN = 20  # the rest are only counted: a whole landing folder may be damaged


def describe(summary: Summary) -> str:
    """The summary as text for people; it ends with where to read the answers and the report."""
    return "\n\n".join("\n".join(block) for block in _blocks(summary))


def _blocks(summary: Summary) -> Iterator[list[str]]:
    """The paragraphs of the text, each a list of lines."""
    yield [
        f"{size(summary)}, {summary.seconds:.1f} s -> {summary.output}",
        f"run {summary.run}",
        *([f"reads {summary.version}"] if summary.version else []),
        *([f"where {summary.filtered}"] if summary.filtered else []),
        *([f"object store: {store_requests(summary.requests)}"] if summary.requests else []),
    ]
    for step in summary.steps:
        yield _step(step)
    if not summary.computed:
        yield ["Nothing was new: no inference was executed and no model was loaded."]
    if summary.faulty_rows or summary.unusable:
        yield _failures(summary)
    if summary.skipped:
        yield [f"not read: {', '.join(map(str, summary.skipped))}"]
    if summary.measured or summary.audits:
        lines = [f"measured: {each}" for each in summary.measured]
        yield [*lines, *(f"audit {audit}" for audit in summary.audits)]
    if summary.notes:
        yield [f"note: {note}" for note in summary.notes]
    if summary.unchanged_sources:
        yield [f"unchanged sources: {unchanged(summary)}"]
    if summary.silently_changed:
        names = some_of(summary.silently_changed)
        yield [f"other bytes under the same size and times: {names}. Check the disk."]
    if summary.kept_sources:
        yield [
            f"sources of earlier runs that stay published: {summary.kept_sources:,} "
            "(see data.missing_sources)"
        ]
    if summary.renamed_sources:
        yield [f"renamed sources: {summary.renamed_sources:,}"]
    for sample in summary.samples:
        yield [f"  {name}: {short(value)}" for name, value in sample.items() if value is not None]
    yield _where_to_read(summary)


def _step(step: StepSummary) -> list[str]:
    lines = [f"{step.name}: {answers(step)}"]
    if step.labels:
        lines.append(f"  labels: {by_count(step.labels)}")
    if step.completion_tokens:
        lines.append(f"  tokens: {tokens(step.prompt_tokens, step.completion_tokens)}")
    if step.faults:
        lines.append(f"  errors: {by_count(step.faults)}")
    return lines


def _failures(summary: Summary) -> list[str]:
    return [
        f"{counted(summary.faulty_rows, 'row')} failed, files left out: {len(summary.unusable):,}",
        *left_out(summary.unusable, "  "),
        f"  list of failed rows: {Folder(summary.output) / QUARANTINE}",
    ]


def left_out(faults: Sequence[FileFault], before: str) -> Iterator[str]:
    """One line for each of the first LEFT_OUT_SHOWN files left out, and the number of the rest.

    Each line begins with `before`.
    """
    for fault in faults[:LEFT_OUT_SHOWN]:
        yield f"{before}{fault.reason}"
    if len(faults) > LEFT_OUT_SHOWN:
        yield f"{before}and {len(faults) - LEFT_OUT_SHOWN:,} more"


def _where_to_read(summary: Summary) -> list[str]:
    lines = []
    # The answers are published: a store that cannot be read now must not fail the run.
    with suppress(GlmbatchError, OSError):
        lines.append(f"Read the answers: {_reader(summary)}")
    if summary.report:
        lines.append(f"Read about the run: {summary.report}")
    return lines


def _reader(summary: Summary) -> str:
    """The line of Python that reads the answers, with what it imports."""
    # Listing the folder of a table would also return rows of its older versions.
    if summary.table:
        catalog, identifier = table_name(summary.table)
        return (
            "from pyiceberg.catalog import load_catalog; "
            f"load_catalog({catalog!r}).load_table({identifier!r}).scan().to_pandas()"
        )
    if is_table(summary.output):
        return f"import deltalake; deltalake.DeltaTable({summary.output!r}).to_pandas()"
    partitioning = _partitioning(summary.output)
    # `import pyarrow` alone does not import it.
    also = ", pyarrow.dataset" if "pyarrow.dataset" in partitioning else ""
    return f"import pandas{also}; pandas.read_parquet({summary.output!r}{partitioning})"


def _partitioning(output: str) -> str:
    """What pandas must know about the folders of a plain output; empty if it finds that itself.

    It fails if a file has a column of its folders' names too, or if such a column has a null. And
    it would add columns for names in folders that are no columns of the table.
    Raises as `read_manifest` and `open_parquet`.
    """
    manifest = read_manifest(Folder(output).path)
    if manifest is None:
        return ""
    names = sorted(file.output_name for file in manifest.files)
    values = folder_values(names)
    if not values:
        return ""
    # pandas takes the columns of the first file for those of all.
    with open_parquet(Folder(output) / names[0]) as file:
        own = set(file.schema_arrow.names)
    if manifest.version is not None:
        own.update(manifest.version.hidden)
    others = [(column, "string") for column in values if column not in own]
    if not others:
        return ", partitioning=None"
    if own.isdisjoint(values) and not any(None in named for named in values.values()):
        return ""
    schema = f"pyarrow.schema({others})"
    return f", partitioning=pyarrow.dataset.partitioning({schema}, flavor='hive')"
