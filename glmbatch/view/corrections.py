"""What people say is right: labelled rows in one Parquet file, outside the published data.

    FOLDER/corrections.parquet    a row's own columns, a column with the truth of each step, and the
                                  row keys; null where nobody has said what is right

`glmbatch train` and `glmbatch evaluate` read the folder as it is. The file is replaced as a whole,
so a kill leaves it as it was before or after a correction.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import InputError
from glmbatch.settings.columns import Columns
from glmbatch.settings.steps.extract import ExtractStep
from glmbatch.settings.steps.json_schema import allows
from glmbatch.store.errors import one_line
from glmbatch.store.files import committed, real_path, stamp_if_any, writable
from glmbatch.store.folder import Folder
from glmbatch.store.locks import exclusive
from glmbatch.store.modes import narrow
from glmbatch.store.parquet import open_parquet, write_table
from glmbatch.store.paths import AnyPath
from glmbatch.store.types import take_rows
from glmbatch.view.published import Published, ViewedStep

FILE = "corrections.parquet"
TYPES = {"labels": pa.list_(pa.string()), "number": pa.float64()}


class Corrections:
    """The corrections in a folder. Safe between threads and processes."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self._lock = threading.Lock()
        self._stamp: object = None
        self._table: pa.Table | None = None

    def of(self, step: ViewedStep) -> dict[bytes, Any]:
        """What is right for `step`, by row key."""
        with self._lock:
            table = self._read()
        columns = Columns(step.name)
        if table is None or not {step.name, columns.key} <= set(table.column_names):
            return {}
        keys = table.column(columns.key).to_pylist()
        truths = zip(keys, table.column(step.name).to_pylist(), strict=True)
        return {key: truth for key, truth in truths if key is not None and truth is not None}

    def said_of(self, step: ViewedStep, columns: Sequence[str]) -> pa.Table | None:
        """The keys of `step` and these columns of the rows that have a truth; None without them."""
        with self._lock:
            table = self._read()
        names = [Columns(step.name).key, *columns]
        if table is None or not {step.name, *names} <= set(table.column_names):
            return None
        known = pc.indices_nonzero(table.column(step.name).is_valid())
        return take_rows(table.select(names), known)

    def texts(self, step: ViewedStep, column: str | None) -> list[str]:
        """The values of `column` in the rows that have a truth of `step`; [] without them."""
        said = self.said_of(step, [column]) if column is not None else None
        values = said.column(column).to_pylist() if said is not None else []
        return [str(value) for value in values if value is not None]

    def keep(  # noqa: PLR0913, PLR0917 - a row, and its truth
        self,
        published: Published,
        file: int,
        row: int,
        step: ViewedStep,
        truth: object,
        known_as: Collection[bytes] = (),
    ) -> None:
        """Keep what is right for `step` in a published row; None withdraws it.

        `known_as` are the row's keys in earlier versions. InputError if `truth` cannot be an
        answer, or the row has no key.
        """
        if truth is not None:
            check_truth(step, truth)
        found = published.row(file, row)
        keys = {one.name: found.column(Columns(one.name).key)[0].as_py() for one in published.steps}
        if keys[step.name] is None:
            raise InputError(f"this row was not asked of {step.name}, so nothing can be corrected.")
        labelled = _labelled(published, found, step, truth)
        with self._lock:
            with writable(self.file, "--corrections"):
                self.file.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(self.file.with_name(".lock")):
                table = _changed(self._read(), labelled, step, keys, truth, known_as)
                self._write(table, published.path_of(file))

    def _read(self) -> pa.Table | None:
        """The file as it is now; another viewer may have written it."""
        stamp = stamp_if_any(self.file)
        if stamp != self._stamp or stamp is None:
            self._table = None
            if stamp is not None:
                with open_parquet(self.file) as opened:
                    self._table = opened.read().replace_schema_metadata()
            self._stamp = stamp
        return self._table

    def _write(self, table: pa.Table, source: Path) -> None:
        with committed(self.file, "--corrections") as partial:
            write_table(partial, table.schema, iter(table.to_batches()), {})
            # Who may not read the answers, or the corrections so far, may not read these.
            narrow(partial, [source, self.file])


def corrections_folder(output: AnyPath, given: str | None) -> Path:
    """Where the corrections of `output` are kept, on this machine: beside it, or as given.

    For an output in a store, it is in the current folder. InputError if it is inside the output, in
    a store, or no folder to write to.
    """
    name = f"{output.name}-corrections"
    if given is not None:
        chosen = Folder(given).local
        if chosen is None:
            raise InputError(f"{given}: is in a store. Set --corrections to a local folder.")
        folder = chosen
    else:
        folder = output.with_name(name) if isinstance(output, Path) else Path(name)
    if isinstance(output, Path) and real_path(folder).is_relative_to(real_path(output)):
        raise InputError(
            f"{folder}: is inside the output, where it would be read as answers. "
            "Set --corrections to another folder."
        )
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(
            f"{folder}: is a file, or you may not write there. Set --corrections to a folder."
        )
    return folder.absolute()


def can_answer(step: ViewedStep, truth: object) -> bool:
    """Whether `truth` is something that `step` could have answered."""
    try:
        check_truth(step, truth)
    except InputError:
        return False
    return True


def check_truth(step: ViewedStep, truth: object) -> None:
    """InputError unless `truth` is something that `step` could have answered."""
    if step.kind == "label" and truth not in step.labels:
        raise InputError(f"{truth!r} is no label of {step.name}.")
    if step.kind == "labels":
        if not isinstance(truth, list) or not set(truth) <= set(step.labels):
            raise InputError(f"{truth!r} is no list of labels of {step.name}.")
    elif step.kind == "number":
        if isinstance(truth, bool) or not isinstance(truth, int | float):
            raise InputError(f"{truth!r} is no number.")
    elif not isinstance(truth, str):
        raise InputError(f"{truth!r} is no text.")
    elif step.kind == "fields":
        _check_fields(step, truth)


def _check_fields(step: ViewedStep, truth: str) -> None:
    try:
        values = json.loads(truth)
    except ValueError as error:
        raise InputError(f"the fields of {step.name} are no JSON: {one_line(error)}.") from error
    named = isinstance(values, dict) and values
    if not named or (step.fields and not set(values) <= set(step.fields)):
        raise InputError(f"{step.name} needs a JSON object with {', '.join(step.fields)}.")
    for field in step.settings.fields if isinstance(step.settings, ExtractStep) else ():
        value = values.get(field.name)  # null where it is not known what is right
        if value is not None and not allows(field.json_schema(), value):
            raise InputError(f"{value!r} does not fit the field {field.describe()[2:]}.")


def _labelled(published: Published, row: pa.Table, step: ViewedStep, truth: object) -> pa.Table:
    """The row's own columns, its keys, and the truth of `step`; that of other steps is null."""
    labelled = row.select(published.source_columns(row.column_names)).replace_schema_metadata()
    for other in published.steps:
        kind = TYPES.get(other.kind, pa.string())
        values = pa.array([truth if other.name == step.name else None], kind)
        labelled = labelled.append_column(other.name, values)
    for other in published.steps:
        name = Columns(other.name).key
        labelled = labelled.append_column(name, row.column(name))
    return labelled


def _changed(  # noqa: PLR0913, PLR0917 - a row, and its truth
    table: pa.Table | None,
    labelled: pa.Table,
    step: ViewedStep,
    keys: dict[str, bytes | None],
    truth: object,
    known_as: Collection[bytes],
) -> pa.Table:
    """`table` with the truth of `step`; a row of which nothing is known any more is left out."""
    if table is None:
        return labelled if truth is not None else labelled.slice(0, 0)
    try:
        table = pa.concat_tables([table, labelled], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"the columns are of other types than in the corrections so far: {one_line(error)}. "
            "Set --corrections to another folder."
        ) from error
    new = len(table) - 1
    truths = table.column(step.name).to_pylist()
    same = _same_questions(table, step, keys, truths[:new], known_as)
    for row in same:
        truths[row] = truth
    if same:
        truths[new] = None
    place = table.column_names.index(step.name)
    table = table.set_column(place, step.name, pa.array(truths, table.schema.field(place).type))
    own = {*labelled.column_names} - {*keys}
    steps = [name for name in table.column_names if name not in own and _has_key(table, name)]
    kept = [True] * len(table)
    for row in (new, *same):
        kept[row] = any(table.column(name)[row].is_valid for name in steps)
    return take_rows(table, pc.indices_nonzero(pa.array(kept)))


def _has_key(table: pa.Table, name: str) -> bool:
    """Whether `name` has the truth of a step, maybe one that the output no longer has."""
    return Columns(name).key in table.column_names


def _same_questions(
    table: pa.Table,
    step: ViewedStep,
    keys: dict[str, bytes | None],
    truths: Sequence[object],
    known_as: Collection[bytes],
) -> list[int]:
    """The rows that have what is right for the same question, or else the one that may take it."""
    columns = {name: table.column(Columns(name).key).to_pylist() for name in keys}
    its_keys = {keys[step.name], *known_as}
    same = []
    for row, truth in enumerate(truths):
        if truth is not None and columns[step.name][row] in its_keys:
            same.append(row)
    for row in range(len(truths)) if not same else ():
        if all(columns[name][row] == key for name, key in keys.items()):
            return [row]
    return same
