"""Pages of published rows, read by DuckDB. Never holds all rows in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from glmbatch.errors import InputError, TransientError
from glmbatch.settings.columns import Columns
from glmbatch.store.errors import one_line
from glmbatch.view.published import Published, RowsChanged, ViewedStep
from glmbatch.view.query import (
    CHANCE,
    FILE,
    ROW,
    Clause,
    Filters,
    Order,
    differing,
    literal,
    quoted,
    ranking,
    score,
    where,
)
from glmbatch.view.spread import LOT, spread, with_lot

MEMORY = "1GB"
# Rows that can be paged through in one order; further ones are found by a filter.
DEEPEST = 10_000
# Rows of the greatest worth among which those that are like others step back.
SPREAD = 1_000
SHOWN_CHARS = 400


class Place(NamedTuple):
    """A row: the place of its file among the published ones, its own in the file, and its key."""

    file: int
    row: int
    key: bytes | None


class Rows:
    """Queries over one published version, and over the same rows of a second output if given.

    Safe between threads. `text_column` is searched and shown.
    """

    def __init__(
        self, published: Published, text_column: str | None, other: Published | None = None
    ) -> None:
        self.published = published
        self.text_column = text_column
        self.other = other
        self._spill = TemporaryDirectory(prefix="glmbatch-view-")
        self._database = duckdb.connect()
        # No extension is fetched, and no query takes the memory of others.
        self._database.execute(
            f"SET memory_limit='{MEMORY}'; SET temp_directory={literal(self._spill.name)}; "
            "SET autoinstall_known_extensions=false; SET autoload_known_extensions=false; "
            "SET parquet_metadata_cache=true"
        )
        self._places = {str(published.path_of(file)): file for file in range(len(published.files))}
        self._view("published", published)
        described = self._ask("DESCRIBE published")
        self.columns = [str(name) for name, *_ in described if name not in (FILE, ROW)]
        self._compared: set[str] = set()
        self._comparing = threading.Lock()

    def close(self) -> None:
        """End all queries, and delete what they left on disk."""
        self._database.close()
        self._spill.cleanup()

    def _view(self, name: str, published: Published) -> None:
        files = [literal(str(published.path_of(file))) for file in range(len(published.files))]
        self._ask(
            f"CREATE VIEW {name} AS SELECT * FROM read_parquet([{', '.join(files)}], "
            f"union_by_name=true, hive_partitioning=false, filename={literal(FILE)}, "
            "file_row_number=true)"
        )

    def _ask(
        self,
        sql: str,
        values: Sequence[Any] = (),
        cursor: duckdb.DuckDBPyConnection | None = None,
    ) -> list[tuple[Any, ...]]:
        try:
            return (cursor or self._database.cursor()).execute(sql, list(values)).fetchall()
        # A file is gone or another one, or the version was closed.
        except (
            duckdb.IOException,
            duckdb.InvalidInputException,
            duckdb.ConnectionException,
        ) as error:
            raise RowsChanged(f"{self.published.root}: {one_line(error)}.") from error
        except duckdb.OutOfMemoryException as error:
            raise TransientError(
                f"{self.published.root}: this needs more than {MEMORY}. Set a filter."
            ) from error

    def page(
        self,
        filters: Filters,
        corrected: Sequence[bytes],
        offset: int,
        limit: int,
        known: Sequence[str] = (),
    ) -> list[Place]:
        """The rows from `offset` on, at most `limit`, in the order asked for.

        Rows of one question are shown once, but for the order of the files. By worth, rows that are
        like the texts in `known` come later.
        """
        if offset + limit > DEEPEST and filters.order != "file":
            raise InputError(f"only the first {DEEPEST:,} rows are sorted. Set a filter.")
        step = self.published.step(filters.step)
        if filters.order == "file":
            return self._in_files(filters, step, corrected, offset, limit)
        if filters.order != "worth":
            return self._sorted(filters.order, filters, corrected, offset + limit)[offset:]
        best = self._sorted("worth", filters, corrected, max(offset + limit, SPREAD))
        spread_out = chain(self._spread(filters, best[:SPREAD], known), best[SPREAD:])
        drawn = self._sorted("random", filters, corrected, (offset + limit) // LOT + 1)
        return [*islice(with_lot(spread_out, drawn), offset, offset + limit)]

    def _spread(
        self, filters: Filters, best: Sequence[Place], known: Sequence[str]
    ) -> Iterator[Place]:
        """`best` by worth times newness; as they are without a text to compare."""
        if self.text_column is None or not best:
            return iter(best)
        step = self.published.step(filters.step)
        rank = ranking("worth", step, compared=self.compares(step))
        found = self._ask(
            f"SELECT {quoted(FILE)}, {ROW}, coalesce(left({quoted(self.text_column)}::VARCHAR, "
            f"{SHOWN_CHARS}), ''), {rank.sql} FROM {self._source(filters, step)} "
            f"WHERE {self._among(best)}",
            rank.values,
        )
        by_place = {(self._places[name], row): rest for name, row, *rest in found}
        rows = [by_place[place.file, place.row] for place in best]
        # The lowest rank comes first; that of a row of which the model is sure is 1.
        worths = [max(0.0, 1 - rank) for _, rank in rows]
        order = spread([text for text, _ in rows], worths, [text[:SHOWN_CHARS] for text in known])
        return (best[place] for place in order)

    def _in_files(
        self,
        filters: Filters,
        step: ViewedStep,
        corrected: Sequence[bytes],
        offset: int,
        limit: int,
    ) -> list[Place]:
        chosen = self._where(filters, step, corrected)
        key = quoted(Columns(step.name).key)
        return self._placed(
            f"SELECT {quoted(FILE)}, {ROW}, {key} FROM {self._source(filters, step)} "
            f"WHERE {chosen.sql} LIMIT {limit} OFFSET {offset}",
            chosen.values,
        )

    def _sorted(
        self, order: Order, filters: Filters, corrected: Sequence[bytes], count: int
    ) -> list[Place]:
        """The first `count` rows of different keys in `order`."""
        step = self.published.step(filters.step)
        chosen = self._where(filters, step, corrected)
        rank = ranking(order, step, compared=self.compares(step))
        key = quoted(Columns(step.name).key)
        source = self._source(filters.model_copy(update={"order": order}), step)
        asked = 2 * count
        while True:
            # Only places are sorted, so a page of long texts costs no more than one of short ones.
            places = self._placed(
                f"SELECT {quoted(FILE)}, {ROW}, {key} FROM {source} WHERE {chosen.sql} "
                f"ORDER BY {rank.sql} NULLS LAST, {CHANCE.format(key=key)}, {quoted(FILE)}, {ROW} "
                f"LIMIT {asked}",
                [*chosen.values, *rank.values],
            )
            different = _different(places)
            if len(different) >= count or len(places) < asked or asked > 4 * DEEPEST:
                return different[:count]
            asked *= 4

    def _placed(self, sql: str, values: Sequence[Any]) -> list[Place]:
        return [Place(self._places[name], row, key) for name, row, key in self._ask(sql, values)]

    def _where(self, filters: Filters, step: ViewedStep, corrected: Sequence[bytes]) -> Clause:
        # DuckDB has whole paths; a viewer looks for part of a name below the output.
        folder = len(str(self.published.path_of(0))) - len(self.published.files[0].output_name)
        return where(filters, step, self.text_column, corrected, folder)

    def _source(self, filters: Filters, step: ViewedStep) -> str:
        """The published rows, beside those that differ where the order or a filter needs them."""
        if filters.differs and not self.compares(step):
            raise InputError("there is no second output with this step. Name it with --beside.")
        compares = self.compares(step) and filters.order in ("worth", "differs")
        return self._beside(step) if filters.differs or compares else "published"

    def _beside(self, step: ViewedStep) -> str:
        self._compare(step)
        return f"published LEFT JOIN {differing(step)} USING ({quoted(FILE)}, {ROW})"

    def count(self, filters: Filters, corrected: Sequence[bytes]) -> int:
        """How many rows meet `filters`."""
        step = self.published.step(filters.step)
        chosen = self._where(filters, step, corrected)
        source = self._source(filters, step)
        ((rows,),) = self._ask(f"SELECT count(*) FROM {source} WHERE {chosen.sql}", chosen.values)
        return int(rows)

    def facets(self, step: ViewedStep) -> dict[str, dict[str, int]]:
        """The number of rows by label and by error type."""
        answer = quoted(step.name)
        labels: list[tuple[Any, ...]] = []
        if step.kind in ("label", "labels"):
            value = answer if step.kind == "label" else f"unnest({answer})"
            labels = self._ask(f"SELECT {value} AS label, count(*) FROM published GROUP BY 1")
        errors = self._ask(
            f"SELECT {quoted(Columns(step.name).error_type)}, count(*) FROM published GROUP BY 1"
        )
        return {
            "labels": {label: rows for label, rows in labels if label is not None},
            "errors": {error: rows for error, rows in errors if error is not None},
        }

    def lines(self, filters: Filters, places: Sequence[Place]) -> list[dict[str, Any]]:
        """What a list shows of each row, in the order of `places`; long texts are cut."""
        step = self.published.step(filters.step)
        columns = Columns(step.name)
        text = quoted(self.text_column) if self.text_column is not None else "NULL"
        if not places:
            return []
        found = self._ask(
            f"SELECT {quoted(FILE)}, {ROW}, left({text}::VARCHAR, {SHOWN_CHARS}), "
            f"left({quoted(step.name)}::VARCHAR, {SHOWN_CHARS}), {score(step)}, "
            f"{quoted(columns.error_type)} FROM published WHERE {self._among(places)}"
        )
        by_place = {(self._places[name], row): rest for name, row, *rest in found}
        lines = []
        for place in places:
            text_shown, answer, its_score, error = by_place[place.file, place.row]
            line = {"text": text_shown, "answer": answer, "score": its_score, "error": error}
            lines.append({"file": place.file, "row": place.row, **line})
        return lines

    def _among(self, places: Sequence[Place]) -> str:
        """The condition that a row is one of `places`, as SQL."""
        names = {place.file: literal(str(self.published.path_of(place.file))) for place in places}
        wanted = ", ".join(f"({names[place.file]}, {place.row})" for place in places)
        files = ", ".join(names.values())
        return f"{quoted(FILE)} IN ({files}) AND ({quoted(FILE)}, {ROW}) IN ({wanted})"

    def carried(self, step: ViewedStep, said: pa.Table) -> dict[bytes, list[bytes]]:
        """The keys of rows with the same own columns as one in `said`, by the key that it has.

        `said` has keys of `step`, and the source columns that its prompt shows. Leaves out keys
        that are published.
        """
        key, *columns = map(quoted, said.column_names)
        same = [f"one.{name}::VARCHAR IS NOT DISTINCT FROM two.{name}::VARCHAR" for name in columns]
        cursor = self._database.cursor()
        cursor.register("said", said)
        pairs = self._ask(
            f"SELECT DISTINCT two.{key}, one.{key} FROM published one JOIN "
            f"(SELECT * FROM said ANTI JOIN published USING ({key})) two ON {' AND '.join(same)} "
            f"WHERE one.{key} IS NOT NULL",
            cursor=cursor,
        )
        keys: dict[bytes, list[bytes]] = {}
        for earlier, now in pairs:
            keys.setdefault(earlier, []).append(now)
        return keys

    def compares(self, step: ViewedStep) -> bool:
        """Whether there is a second output with the answers of `step`."""
        return self.other is not None and step.name in [one.name for one in self.other.steps]

    def other_place(self, file: int, row: int) -> tuple[int, int] | None:
        """The place of a row in the second output; None if it is not there, or was another row."""
        published = self.published.files[file]
        number = self.published.numbers(file)[row]
        for place, other in enumerate(self.other.files if self.other is not None else ()):
            is_same = (other.source, other.source_digest) == (
                published.source,
                published.source_digest,
            )
            if is_same and 0 <= number - other.first_row < other.covered:
                assert self.other is not None
                numbers = self.other.numbers(place)
                return (place, numbers.index(number)) if number in numbers else None
        return None

    def _compare(self, step: ViewedStep) -> None:
        """Note on which rows the two outputs differ in `step`, once."""
        assert self.other is not None
        with self._comparing:
            if step.name in self._compared:
                return
            if not self._compared:
                self._view("other", self.other)
                self._sources()
            answer = quoted(step.name)
            self._ask(
                f"CREATE TABLE {differing(step)} AS "
                f"SELECT one.{quoted(FILE)}, one.{ROW}, two.{ROW} AS other_row FROM "
                f"(SELECT source, first_row + {ROW} AS number, {quoted(FILE)}, {ROW}, {answer} "
                f"FROM published JOIN sources ON {quoted(FILE)} = sources.path) one JOIN "
                f"(SELECT source, first_row + {ROW} AS number, {ROW}, {answer} "
                f"FROM other JOIN sources ON {quoted(FILE)} = sources.path) two "
                f"ON one.source = two.source AND one.number = two.number "
                f"WHERE one.{answer}::VARCHAR IS DISTINCT FROM two.{answer}::VARCHAR"
            )
            self._compared.add(step.name)

    def _sources(self) -> None:
        """The source of each file, by number; only of sources that did not change in between."""
        assert self.other is not None
        numbers: dict[tuple[object, ...], int] = {}
        lines = []
        for published in (self.published, self.other):
            for place, file in enumerate(published.files):
                # Rows picked by a condition are in the same places only where all of this agrees.
                picked = (file.where, file.first_row, file.span) if file.span else ()
                key = (file.source, file.source_digest, *picked)
                number = numbers.setdefault(key, len(numbers))
                lines.append((str(published.path_of(place)), number, file.first_row))
        self._ask("CREATE TABLE sources (path VARCHAR, source INT, first_row BIGINT)")
        self._database.cursor().executemany("INSERT INTO sources VALUES (?, ?, ?)", lines)


def _different(places: Sequence[Place]) -> list[Place]:
    """The first of the rows with each key; a row without a key is like no other."""
    first: dict[object, Place] = {}
    for place in places:
        first.setdefault(place.key or (place.file, place.row), place)
    return list(first.values())
