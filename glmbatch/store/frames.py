"""A caller's table in memory: its columns as Arrow, and new columns beside them.

A pandas or polars DataFrame is returned as one, anything else with an Arrow stream as an Arrow
table. Columns are addressed by position, because any object may be a name in pandas. Knows no jobs.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from glmbatch.errors import InputError
from glmbatch.store.errors import one_line
from glmbatch.store.footers import kept_metadata

if TYPE_CHECKING:
    import pandas as pd

# The name of the caller's table in messages.
WHERE = "the table"
# Methods with which other packages convert their tables to Arrow.
CONVERSIONS = ("to_arrow", "toArrow", "to_pyarrow_table", "collect", "compute", "to_pandas")


class Frame(Protocol):
    """The whole interface to a caller's table; its length is the number of rows."""

    @property
    def names(self) -> list[str]:
        """The names of its columns as text, in order, perhaps with duplicates."""

    def column(self, place: int) -> pa.Array | pa.ChunkedArray:
        """The column at position `place`. InputError when its values have no common type."""

    def beside(self, answers: pa.Table) -> Any:
        """The caller's table, in its own type, with the columns of `answers` after its own.

        `answers` has a row for each row of the table, in the same order.
        """

    def __len__(self) -> int: ...


def as_frame(table: Any) -> Frame:
    """A `Frame` over the caller's `table`. InputError when it is not a table that we can read."""
    if isinstance(table, pa.Table):
        return _Arrow(table)
    # Not imported here: if the caller has a frame of a package, it is already imported.
    pandas, polars = sys.modules.get("pandas"), sys.modules.get("polars")
    if pandas is not None and isinstance(table, pandas.DataFrame):
        return _Pandas(table)
    if polars is not None and isinstance(table, polars.DataFrame):
        return _Polars(table)
    return _Arrow(_read(table))


def _read(table: Any) -> pa.Table:
    """The rows of anything with an Arrow stream, read into memory."""
    kind = f"{type(table).__module__.partition('.')[0]}.{type(table).__name__}"
    dataset, hub = sys.modules.get("pyarrow.dataset"), sys.modules.get("datasets")
    try:
        if hub is not None and isinstance(table, hub.Dataset):
            return table.with_format("arrow")[:]
        if dataset is not None and isinstance(table, (dataset.Dataset, dataset.Scanner)):
            return table.to_table()
        if hasattr(table, "__arrow_c_stream__") or hasattr(table, "__arrow_c_array__"):
            return pa.table(table)
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{WHERE}: the Arrow stream of this {kind} cannot be read as a table: "
            f"{one_line(error)}."
        ) from error
    ways = [f"{name}()" for name in CONVERSIONS if callable(getattr(table, name, None))]
    hint = f" Convert it with {ways[0]}." if ways else ""
    kind = kind.removeprefix("builtins.")
    raise InputError(
        f"{WHERE}: is a {kind}, not a pandas DataFrame or an Arrow table, and has no Arrow stream "
        f"(__arrow_c_stream__).{hint}"
    )


@dataclass(frozen=True, slots=True)
class _Arrow:
    table: pa.Table

    @property
    def names(self) -> list[str]:
        return list(self.table.schema.names)

    def column(self, place: int) -> pa.ChunkedArray:
        return self.table.column(place)

    def beside(self, answers: pa.Table) -> pa.Table:
        fields = [*self.table.schema, *answers.schema]
        rows = range(len(self.table))
        schema = pa.schema(fields, kept_metadata(self.table.schema, fields, rows))
        return pa.Table.from_arrays([*self.table.columns, *answers.columns], schema=schema)

    def __len__(self) -> int:
        return int(self.table.num_rows)


@dataclass(frozen=True, slots=True)
class _Polars:
    table: Any

    @property
    def names(self) -> list[str]:
        return list(self.table.columns)

    def column(self, place: int) -> pa.Array | pa.ChunkedArray:
        return self.table.to_series(place).to_arrow()

    def beside(self, answers: pa.Table) -> Any:
        import polars

        return self.table.hstack(polars.from_arrow(answers))

    def __len__(self) -> int:
        return int(self.table.height)


@dataclass(frozen=True, slots=True)
class _Pandas:
    table: pd.DataFrame

    @property
    def names(self) -> list[str]:
        return [self._name(name) for name in self.table.columns]

    def column(self, place: int) -> pa.Array | pa.ChunkedArray:
        column = self.table.iloc[:, place]
        try:
            values = pa.Array.from_pandas(_storable(column))
        except Exception as error:  # pandas and extension types raise errors of any class
            raise InputError(
                f"{WHERE}: column {self._name(column.name)!r} has no single type: "
                f"{one_line(error)}. Convert it to text."
            ) from error
        # pandas stores a column without values as floats, so the type says nothing.
        return pa.nulls(len(values)) if values.null_count == len(values) else values

    def beside(self, answers: pa.Table) -> pd.DataFrame:
        import pandas as pd

        # Nullable types: with a null for a failure, pandas would turn integers into floats.
        nullable = {pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}
        added: pd.DataFrame = answers.to_pandas(types_mapper=nullable.get)
        # As arrays, so that pandas does not match rows by index, which may have duplicates.
        arrays = {name: column.array for name, column in added.items()}
        levels = self.table.columns.nlevels
        if levels == 1:
            return self.table.assign(**arrays)
        # By complete keys: `assign` would overwrite all columns below a first-level name.
        joined = self.table.copy(deep=False)
        for name, array in arrays.items():
            joined[(name, *[""] * (levels - 1))] = array
        return joined

    def _name(self, name: Hashable) -> str:
        """A column's name as settings and messages spell it."""
        # pandas itself accepts "text" for the key ("text", "").
        if self.table.columns.nlevels > 1 and isinstance(name, tuple) and not any(name[1:]):
            name = name[0]
        return str(name).encode("utf-8", "backslashreplace").decode()

    def __len__(self) -> int:
        return len(self.table)


def _storable(column: pd.Series) -> pd.Series:
    """`column` in a type that Arrow has too; types that only pandas has become text."""
    import pandas as pd

    kind = column.dtype
    if isinstance(kind, pd.SparseDtype):
        return column.astype(kind.subtype)
    values = kind.categories.dtype if isinstance(kind, pd.CategoricalDtype) else kind
    if isinstance(values, (pd.PeriodDtype, pd.IntervalDtype)):
        return column.astype("string")
    return column
