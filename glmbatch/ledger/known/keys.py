"""The row keys in a file of answers, read as numbers. No Python object is made for a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from glmbatch.errors import UnusableFile
from glmbatch.ledger.rowkeys import KEY_BYTES
from glmbatch.settings.columns import Columns
from glmbatch.store.parquet import read_valued_columns
from glmbatch.store.paths import AnyPath


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """A file with the answers of `step`. `digest` is its SHA-256, or the beginning of it.

    A published file keeps its bytes and its digest from run to run. Its `spare_key` is the key of
    the committed file with the same answers; other files have none.
    """

    path: AnyPath
    step: str
    digest: str
    is_published: bool = False
    spare_key: str = ""


class Keys(NamedTuple):
    """The row keys of a file [K]: the first half of each as a number, its row, whether it failed.

    Rows without a key are left out.
    """

    halves_K: np.ndarray
    rows_K: np.ndarray
    failed_K: np.ndarray


def read_keys(file: AnswerFile) -> Keys:
    """The row keys in `file`; UnusableFile when they cannot be read."""
    columns = Columns(file.step)
    table = read_valued_columns(file.path, [columns.key, columns.error], [columns.error])
    return keys_of(table, file.step, str(file.path))


def keys_of(table: pa.Table, step: str, where: str) -> Keys:
    """The row keys in the answers `table` of `step`, which errors call `where`.

    A table without the column of errors has none.
    """
    columns = Columns(step)
    try:
        # A Delta table stores keys with a variable width.
        keys = table.column(columns.key).cast(pa.binary(KEY_BYTES))
    except pa.ArrowException as error:
        raise UnusableFile(f"{where}: its row keys are invalid: {error}") from error
    halves = [np.empty(0, np.uint64)]
    for chunk in keys.chunks:
        halves.append(_first_halves(chunk))
    halves_K = np.concatenate(halves)
    rows_K = np.arange(len(halves_K), dtype=np.uint32)
    failed_K = np.zeros(len(halves_K), bool)
    if columns.error in table.column_names:
        failed_K = table.column(columns.error).is_valid().to_numpy()
    if keys.null_count:
        valid_K = keys.is_valid().to_numpy()
        return Keys(halves_K[valid_K], rows_K[valid_K], failed_K[valid_K])
    return Keys(halves_K, rows_K, failed_K)


def _first_halves(keys: pa.Array) -> np.ndarray:
    values = keys.buffers()[1]
    if values is None or not len(keys):
        return np.zeros(len(keys), np.uint64)
    numbers = np.frombuffer(values, np.uint64, 2 * len(keys), keys.offset * KEY_BYTES)
    return numbers[::2]
