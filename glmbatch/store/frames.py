"""A caller's table in memory: its columns as Arrow, and new columns set beside them.

A pandas or polars DataFrame comes back as one; whatever hands out an Arrow stream, as an Arrow
table. Columns are known by their place, since pandas lets anything be a name. Knows no jobs.
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

# What errors call a caller's table.
WHERE = "the table"
# How other packages' tables become Arrow ones.
CONVERSIONS = ("to_arrow", "toArrow", "to_pyarrow_table", "collect", "compute", "to_pandas")


class Frame(Protocol):
    """All that is asked of a caller's table."""

    @property
    def names(self) -> list[str]:
        """The names of its columns as text, in order; two may be the same."""

    def column(self, place: int) -> pa.Array | pa.ChunkedArray:
        """The column at `place`. InputError when it has no one type."""

    def beside(self, answers: pa.Table) -> Any:
        """The caller's table, of its own kind, with the columns of `answers` after its own."""

    def __len__(self) -> int: ...


def as_frame(table: Any) -> Frame:
    """The caller's `table`, of whatever kind. InputError when it is none."""
    if isinstance(table, pa.Table):
        return _Arrow(table)
    # A caller who has a frame of a package has imported it.
    pandas, polars = sys.modules.get("pandas"), sys.modules.get("polars")
    if pandas is not None and isinstance(table, pandas.DataFrame):
        return _Pandas(table)
    if polars is not None and isinstance(table, polars.DataFrame):
        return _Polars(table)
    return _Arrow(_read(table))


def _read(table: Any) -> pa.Table:
    """The rows of anything that hands out an Arrow stream, all in memory."""
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
            f"{WHERE}: the Arrow stream of this {kind} is no table that can be read: "
            f"{one_line(error)}."
        ) from error
    ways = [f"{name}()" for name in CONVERSIONS if callable(getattr(table, name, None))]
    hint = f" Its {ways[0]} gives one." if ways else ""
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
        except Exception as error:  # whatever pandas' and other packages' own types raise
            raise InputError(
                f"{WHERE}: column {self._name(column.name)!r} has no one type: {one_line(error)}. "
                "Make it text."
            ) from error
        # A pandas column without any value is one of floats, whatever it was to hold.
        return pa.nulls(len(values)) if values.null_count == len(values) else values

    def beside(self, answers: pa.Table) -> pd.DataFrame:
        import pandas as pd

        # Nullable, since a column of whole numbers would else be one of floats after a failure.
        nullable = {pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}
        added: pd.DataFrame = answers.to_pandas(types_mapper=nullable.get)
        # As arrays, so that nothing is matched by index, which may repeat.
        arrays = {name: column.array for name, column in added.items()}
        levels = self.table.columns.nlevels
        if levels == 1:
            return self.table.assign(**arrays)
        # By whole keys: `assign` would write over whatever is below a name.
        joined = self.table.copy(deep=False)
        for name, array in arrays.items():
            joined[(name, *[""] * (levels - 1))] = array
        return joined

    def _name(self, name: Hashable) -> str:
        """A column's name as settings and messages spell it."""
        # pandas itself calls a key ("text", "") by "text".
        if self.table.columns.nlevels > 1 and isinstance(name, tuple) and not any(name[1:]):
            name = name[0]
        return str(name).encode("utf-8", "backslashreplace").decode()

    def __len__(self) -> int:
        return len(self.table)


def _storable(column: pd.Series) -> pd.Series:
    """`column` in a type that Arrow has too; what pandas alone has becomes its text."""
    import pandas as pd

    kind = column.dtype
    if isinstance(kind, pd.SparseDtype):
        return column.astype(kind.subtype)
    values = kind.categories.dtype if isinstance(kind, pd.CategoricalDtype) else kind
    if isinstance(values, (pd.PeriodDtype, pd.IntervalDtype)):
        return column.astype("string")
    return column
