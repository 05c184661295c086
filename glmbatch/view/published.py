"""What is published in an output, as its readers find it: files, steps and columns. No queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from glmbatch.errors import InputError, TransientError, UnusableFile, some_of
from glmbatch.ledger.manifest import MANIFEST, Manifest, PublishedFile, StepOrigin, read_manifest
from glmbatch.ledger.receipts import OutputReceipt, read_receipt
from glmbatch.report.facts import label_shares
from glmbatch.report.report import read_report
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import RuntimeConfig
from glmbatch.settings.steps.any_step import AnyStep
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.found import given_columns
from glmbatch.store.parquet import open_parquet, read_rows, with_constants
from glmbatch.store.paths import AnyPath
from glmbatch.store.snapshot import copied_name, fetch_published

CACHE = RuntimeConfig().cache
Kind = Literal["label", "labels", "number", "text", "fields"]
_ANY_STEP: TypeAdapter[AnyStep] = TypeAdapter(AnyStep)


class RowsChanged(TransientError):
    """A published file is gone or another one: a run has published meanwhile."""


@dataclass(frozen=True, slots=True)
class ViewedStep:
    """One step of what is published.

    kind      what its answers are
    labels    those that it chooses from, in the order of their probabilities; else ()
    fields    names of the values of an extract step; else ()
    settings  what the manifest says of the step; None if this version cannot read it
    columns   its answer columns
    grown     by label, how much larger its share of the rows is than in the run before
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    fields: tuple[str, ...]
    settings: AnyStep | None
    columns: tuple[str, ...]
    grown: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Published:
    """The last published version of the output in the folder `root`.

    `paths` are its files on this machine, copies if `root` is in a store. `schema` has the columns
    of the newest file; other files may have others.
    """

    root: AnyPath
    paths: Sequence[Path]
    manifest: Manifest
    steps: tuple[ViewedStep, ...]
    schema: pa.Schema

    @property
    def files(self) -> Sequence[PublishedFile]:
        """The published files; a row is named by the place of its file here and its own in it."""
        return self.manifest.files

    def path_of(self, file: int) -> Path:
        """The path of the file at place `file`."""
        return self.paths[file]

    def step(self, name: str) -> ViewedStep:
        """The step named `name`. InputError if there is none."""
        for step in self.steps:
            if step.name == name:
                return step
        names = [step.name for step in self.steps]
        raise InputError(f"{self.root}: has no step {name!r}; it has {some_of(names, name)}.")

    def row(self, file: int, row: int) -> pa.Table:
        """One row with all its columns, those of its folders' names included.

        InputError if there is no such row; UnusableFile if its file cannot be read.
        """
        if not (0 <= file < len(self.files) and 0 <= row < self.files[file].rows):
            raise InputError(f"{self.root}: there is no row {row} in file {file}.")
        try:
            with open_parquet(self.path_of(file)) as opened:
                group = first = 0
                while first + opened.metadata.row_group(group).num_rows <= row:
                    first += opened.metadata.row_group(group).num_rows
                    group += 1
            table = pa.Table.from_batches(read_rows(self.path_of(file), [group], row - first, 1))
        except (OSError, UnusableFile) as error:
            if self.path_of(file).exists():
                raise
            raise RowsChanged(f"{self.path_of(file)}: is gone.") from error
        given = given_columns(self.files[file].output_name, self.manifest.version)
        return with_constants(
            table, {name: given[name] for name in given if name not in table.column_names}
        )

    def numbers(self, file: int) -> Sequence[int]:
        """The number in the source of each row of a file. UnusableFile if it cannot be read."""
        published = self.files[file]
        if not published.span:
            return range(published.first_row, published.first_row + published.rows)
        receipt = read_receipt(self.path_of(file), OutputReceipt)
        if receipt is None:
            raise UnusableFile(f"{self.path_of(file)}: has no receipt in its footer.")
        numbers: list[int] = receipt.fragment.numbers.tolist()
        return numbers

    def source_columns(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that are no answers."""
        answers: set[str] = set()
        for step in self.steps:
            answers.update(step.columns)
        return [name for name in names if name not in answers]


def read_published(output: str, cache: str = CACHE) -> Published:
    """What is published in the folder `output`. InputError if nothing is.

    Files in a store are fetched below the local folder `cache`.
    """
    root = Folder(output).path
    manifest = read_manifest(root)
    if manifest is None or not manifest.files:
        raise InputError(f"{output}: has no {MANIFEST} that lists files, so nothing to look at.")
    paths = _paths(root, manifest, cache)
    with open_parquet(paths[-1]) as newest:
        schema = newest.schema_arrow
    grown = _grown_labels(output, manifest.run)
    steps = []
    for name in manifest.files[-1].step_keys:
        origin = manifest.steps.get(name)
        steps.append(_viewed_step(name, origin, schema, grown.get(name, {})))
    return Published(root, paths, manifest, tuple(steps), schema)


def _paths(root: AnyPath, manifest: Manifest, cache: str) -> list[Path]:
    if isinstance(root, Path):
        return [root / file.output_name for file in manifest.files]
    digests = {file.output_name: file.digest for file in manifest.files}
    copies = fetch_published(root, digests, f"{cache}/viewed")
    return [copies / copied_name(name, digest) for name, digest in digests.items()]


def _viewed_step(
    name: str, origin: StepOrigin | None, schema: pa.Schema, grown: Mapping[str, float]
) -> ViewedStep:
    settings = _settings(name, origin)
    columns = [column for column in schema.names if column == name or column.startswith(f"{name}_")]
    if settings is not None:
        columns = [column for column in settings.answer_columns if column in schema.names]
    labels: list[str] = []
    if Columns(name).scores in columns:
        labels = [field.name for field in schema.field(Columns(name).scores).type]
    fields: list[str] = []
    if settings is not None and settings.kind == "extract":
        fields = [field.name for field in settings.fields]
    kind = _kind(schema.field(name).type, labels, fields)
    return ViewedStep(name, kind, tuple(labels), tuple(fields), settings, tuple(columns), grown)


def _kind(answer: pa.DataType, labels: Sequence[str], fields: Sequence[str]) -> Kind:
    if labels:
        return "labels" if pa.types.is_list(answer) else "label"
    if fields or pa.types.is_struct(answer):
        return "fields"
    return "number" if pa.types.is_floating(answer) else "text"


def _settings(name: str, origin: StepOrigin | None) -> AnyStep | None:
    """The step as its run had it, but for its model, audits and condition."""
    if origin is None:
        return None
    # `form` is a version number, and no setting.
    given = {key: value for key, value in origin.settings.items() if key != "form"}
    try:
        return _ANY_STEP.validate_python({**given, "name": name})
    except ValidationError:  # a later version has settings that this one does not know
        return None


def _grown_labels(output: str, run: str) -> dict[str, dict[str, float]]:
    """By step and label, how much its share grew since the run before; without a report, none."""
    report = read_report(output, run)
    if report is None or not report.labels_before:
        return {}
    grown = {}
    for step in report.summary.steps:
        if report.labels_before.get(step.name):
            shares = label_shares(report, step)
            grown[step.name] = {
                share.label: share.share - share.share_before
                for share in shares
                if share.share > share.share_before
            }
    return grown
