"""What the viewer's page asks for, as plain values: the rows, one row in full, a correction."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from glmbatch.errors import InputError, some_of
from glmbatch.ledger.manifest import read_manifest
from glmbatch.run.prompts import as_text
from glmbatch.settings.columns import Columns
from glmbatch.store.values import prompt_values
from glmbatch.view.corrections import Corrections, can_answer, corrections_folder
from glmbatch.view.prompts import find_text_column, own_columns, shown_prompt
from glmbatch.view.published import CACHE, Published, RowsChanged, ViewedStep, read_published
from glmbatch.view.query import Filters
from glmbatch.view.rows import DEEPEST, Rows


class Viewer:
    """The answers in `output`, those in `beside` to compare them with, and the corrections.

    Always of the last published version: what is asked about an earlier one raises RowsChanged.
    Safe between threads.
    """

    def __init__(
        self,
        output: str,
        beside: str | None = None,
        corrections: str | None = None,
        cache: str = CACHE,
    ) -> None:
        self._output = output
        self._beside = beside
        self._cache = cache
        self._opening = threading.Lock()
        published = read_published(output, cache)
        self.corrections = Corrections(corrections_folder(published.root, corrections))
        # By version and step, the keys of rows of which something was said under an earlier key.
        self._carried: dict[tuple[str, str], dict[bytes, list[bytes]]] = {}
        self._rows = self._open(published)
        other = self._rows.other
        if other is not None and not any(map(self._rows.compares, published.steps)):
            self.close()
            ours = [step.name for step in published.steps]
            theirs = [step.name for step in other.steps]
            raise InputError(
                f"{beside}: has no step of {output}, so nothing can be compared: it has "
                f"{some_of(theirs)}, not one of {some_of(ours)}. Name another output with --beside."
            )

    def close(self) -> None:
        """End all queries."""
        self._rows.close()

    def _open(self, published: Published) -> Rows:
        other = read_published(self._beside, self._cache) if self._beside is not None else None
        return Rows(published, find_text_column(published), other)

    def _current(self) -> Rows:
        """The last published version; it is opened again after a run has published."""
        with self._opening:
            # Of an unchanged manifest this is the same object.
            if read_manifest(self._rows.published.root) is not self._rows.published.manifest:
                before, self._rows = (
                    self._rows,
                    self._open(read_published(self._output, self._cache)),
                )
                before.close()
            return self._rows

    def _of_version(self, version: str) -> Rows:
        rows = self._current()
        if version != rows.published.manifest.run:
            raise RowsChanged("A run has published other answers. Load the page again.")
        return rows

    def _known(self, rows: Rows, step: ViewedStep) -> dict[bytes, list[bytes]]:
        """The keys that rows have now, by one under which a person said something of them.

        Only where they differ: after another prompt or model, the rows have other keys.
        """
        of = (rows.published.manifest.run, step.name)
        if of not in self._carried:
            columns = own_columns(rows.published, step, rows.text_column)
            said = self.corrections.said_of(step, columns) if columns else None
            self._carried[of] = rows.carried(step, said) if said is not None else {}
        return self._carried[of]

    def _right(self, rows: Rows, step: ViewedStep) -> dict[bytes, Any]:
        """What is right for `step`, by row key, including corrections under earlier keys."""
        known = self._known(rows, step)
        right = {}
        for key, truth in self.corrections.of(step).items():
            if key not in known:
                right[key] = truth
            elif can_answer(step, truth):
                right.update(dict.fromkeys(known[key], truth))
        return right

    def output(self) -> dict[str, Any]:
        """What is published: its steps, and how many files and rows."""
        rows = self._current()
        published = rows.published
        steps = []
        for step in published.steps:
            corrected = len(self._right(rows, step))
            steps.append(
                {
                    "name": step.name,
                    "kind": step.kind,
                    "labels": step.labels,
                    "grown": step.grown,
                    "compared": rows.compares(step),
                    "corrected": corrected,
                }
            )
        return {
            "output": self._output,
            "beside": self._beside,
            "corrections": str(self.corrections.file.parent),
            "version": published.manifest.run,
            "files": len(published.files),
            "rows": sum(file.rows for file in published.files),
            "limit": published.manifest.limit,
            "deepest": DEEPEST,
            "steps": steps,
        }

    def facets(self, step: str) -> dict[str, Any]:
        """The number of rows of each label and each error of `step`."""
        rows = self._current()
        return rows.facets(rows.published.step(step))

    def page(self, filters: Filters, offset: int, limit: int) -> dict[str, Any]:
        """Rows of a list, each with what a person has said is right."""
        rows = self._current()
        step = rows.published.step(filters.step)
        corrected = self._right(rows, step)
        known = self.corrections.texts(step, rows.text_column)
        places = rows.page(filters, list(corrected), offset, limit, known)
        lines = rows.lines(filters, places)
        for line, place in zip(lines, places, strict=True):
            line["name"] = rows.published.files[place.file].output_name
            line["truth"] = corrected.get(place.key) if place.key is not None else None
        return {"version": rows.published.manifest.run, "rows": lines}

    def count(self, filters: Filters) -> int:
        """How many rows meet `filters`."""
        rows = self._current()
        step = rows.published.step(filters.step)
        return rows.count(filters, list(self._right(rows, step)))

    def row(self, version: str, file: int, row: int) -> dict[str, Any]:
        """One row in full: its columns, and of each step prompt, answer and probabilities."""
        rows = self._of_version(version)
        published = rows.published
        table = published.row(file, row)
        source = published.source_columns(table.column_names)
        place = rows.other_place(file, row)
        other = rows.other.row(*place) if rows.other is not None and place is not None else None
        steps = []
        for step in published.steps:
            shown = self._step(rows, step, file, table)
            if rows.compares(step):
                shown["beside"] = _answer(step.name, other) if other is not None else None
                shown["is_beside"] = other is not None
            steps.append(shown)
        return {
            "version": version,
            "file": published.files[file].output_name,
            "source": published.files[file].source,
            "source_row": published.numbers(file)[row],
            "text_column": rows.text_column,
            "columns": {name: _text(table.column(name)) for name in source},
            "steps": steps,
        }

    def _step(self, rows: Rows, step: ViewedStep, file: int, table: pa.Table) -> dict[str, Any]:
        columns = Columns(step.name)
        prompt = shown_prompt(rows.published, step, file, table, rows.text_column)
        key = table.column(columns.key)[0].as_py()
        values = {name: table.column(name)[0].as_py() for name in step.columns}
        beside = (columns.answer, columns.scores, columns.error, columns.error_type, columns.key)
        numbers = {}
        for name in step.columns:
            if name not in beside and step.kind != "fields":
                numbers[name.removeprefix(f"{step.name}_")] = values[name]
        return {
            "name": step.name,
            "answer": _answer(step.name, table),
            "scores": values.get(columns.scores),
            "error": values.get(columns.error),
            "error_type": values.get(columns.error_type),
            "numbers": numbers,
            "fields": _fields(step, values),
            "prompt": {"text": prompt.text, "is_cut": prompt.is_cut, "lack": prompt.lack},
            "can_correct": key is not None,
            "truth": self._right(rows, step).get(key) if key is not None else None,
        }

    def correct(
        self, version: str, file: int, row: int, step: str, truth: object
    ) -> dict[str, int]:
        """Keep what is right for a row, or withdraw it; return how many rows are corrected."""
        rows = self._of_version(version)
        viewed = rows.published.step(step)
        key = rows.published.row(file, row).column(Columns(step).key)[0].as_py()
        earlier = [old for old, keys in self._known(rows, viewed).items() if key in keys]
        self.corrections.keep(rows.published, file, row, viewed, truth, earlier)
        return {"corrected": len(self._right(rows, viewed))}


def _answer(step: str, table: pa.Table) -> Any:
    """An answer for a page: a label, labels, a number, or a text."""
    answer = table.column(step)[0].as_py()
    return answer if isinstance(answer, list | float | None) else as_text(answer)


def _text(column: pa.ChunkedArray) -> str | None:
    """The value of a row as a prompt would show it."""
    (value,) = prompt_values(column)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _fields(step: ViewedStep, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each extracted field with how sure the model is of it, where it says."""
    fields = {}
    whole = values.get(step.name)
    for name in step.fields:
        columns = Columns(step.name).field(name)
        value = values.get(columns.answer)
        if isinstance(whole, dict):
            value = whole.get(name)
        sure = values.get(columns.score)
        mean = values.get(columns.mean_log_prob)
        fields[name] = {"value": _plain(value), "score": sure, "mean_log_prob": mean}
    return fields


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
