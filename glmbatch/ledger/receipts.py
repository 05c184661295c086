"""Receipts: what a committed file records about itself in its footer. No folders, no manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, ValidationError

from glmbatch.errors import InputError, StoreRefused, UnusableFile
from glmbatch.ledger.fragments import Fragment
from glmbatch.store.files import digest_file, is_link, reachable, writable
from glmbatch.store.folder import Name
from glmbatch.store.parquet import footer_metadata, open_parquet, write_table
from glmbatch.store.paths import AnyPath, unlink_all

RECEIPT = "glmbatch.receipt"  # the footer's key
LENGTH_BIN = 8  # tokens; prompt lengths are counted in bins of this width

# What a damaged or foreign receipt may say instead ends here, not in the arithmetic of a report.
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class AnswersReceipt(BaseModel, frozen=True, extra="forbid"):
    """What became of one step over one fragment. `run` computed it; seconds are of wall time.

    `computed_rows` are the prompts that went through the model, `known_rows` those whose answers
    were found under their row key; together fewer than `rows` where rows repeat or have no prompt.
    `earlier` names the runs of the answers that the prompts use, by step. `unusable` says why the
    fragment's rows cannot be read; then there are no answers.
    """

    key: str
    run: str
    fragment: str
    step: str
    step_key: str
    model: str = ""  # identity of the weights, tokenizer and numerics behind `step_key`
    earlier: dict[str, str] = {}
    rows: Count
    computed_rows: Count = 0
    known_rows: Count = 0
    faults: dict[str, Count] = {}
    labels: dict[str, Count] = {}
    finish_reasons: dict[str, Count] = {}
    empty_answers: Count = 0
    answer_tokens: Count = 0  # of all answers, whoever computed them
    # Rows by the tokens of their prompt, rounded down to LENGTH_BIN.
    prompt_lengths: dict[Count, Count] = {}
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    began: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    seconds: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    unusable: str | None = None


class OutputReceipt(BaseModel, frozen=True, extra="forbid"):
    """What became of one fragment: its output file and the answers in it.

    `digest` is that of the file's bytes.
    """

    key: str
    run: str
    fragment: Fragment
    output_name: Name
    answers: tuple[AnswersReceipt, ...]
    faulty_rows: Count = 0
    digest: str = ""
    unusable: str | None = None


Receipt = TypeVar("Receipt", bound=BaseModel)


def write_with_receipt(
    path: Path,
    schema: pa.Schema,
    batches: Iterator[pa.RecordBatch],
    receipt: BaseModel,
    *,
    utc_times: bool = False,
) -> None:
    """Write `batches` to `path`, with `receipt` in the footer."""
    with writable(path):
        footer = {RECEIPT: receipt.model_dump_json()}
        write_table(path, schema, batches, footer, utc_times=utc_times)


def read_receipt(path: AnyPath, kind: type[Receipt]) -> Receipt | None:
    """The receipt in the footer of `path`; None when there is no sound one."""
    try:
        text = footer_metadata(path, RECEIPT)
        return None if text is None else kind.model_validate_json(text)
    except (UnusableFile, ValidationError):
        return None


def read_with_receipt(path: AnyPath, kind: type[Receipt]) -> tuple[Receipt, pa.Table] | None:
    """The receipt and the rows of `path`, opened once; None when there is no sound receipt.

    UnusableFile when the rows cannot be read.
    """
    with open_parquet(path) as file:
        receipt = receipt_of(file, kind)
        return None if receipt is None else (receipt, file.read())


def receipt_of(file: pq.ParquetFile, kind: type[Receipt]) -> Receipt | None:
    """The receipt of an opened file; None when there is no sound one."""
    text = (file.metadata.metadata or {}).get(RECEIPT.encode())
    try:
        return kind.model_validate_json(text or b"")
    except ValidationError:
        return None


def find_whole(folder: AnyPath, key: str) -> tuple[AnyPath, str] | None:
    """The file under `key` in `folder` whose bytes match the digest in its name, and their digest.

    One that does not match is deleted: it was damaged after it was committed.
    """
    with reachable(folder):
        for path in folder.glob(f"{key}.*.parquet"):
            try:
                # What a link leads to may go at any time, or not be there at all.
                digest = None if is_link(path) else whole_digest(path, must_read=True)
            except FileNotFoundError:
                # Replaced by a fragment with the same rows, whose answers have the same key.
                return find_whole(folder, key)
            if digest is not None and digest.startswith(digest_in_name(path)):
                return path, digest
            unlink_all(folder, [path])
        return None


def whole_digest(path: AnyPath, *, must_read: bool = False) -> str | None:
    """The digest of a committed file; None where something else is in its place.

    FileNotFoundError when nothing is there, TransientError when the machine failed. A file that
    this user may not read gives None too, or InputError if `must_read`.
    """
    try:
        with reachable(path):
            return digest_file(path)
    except StoreRefused:  # no file is to blame
        raise
    except InputError as error:  # a folder, a link in a circle, a file that may not be read
        if must_read and isinstance(error.__cause__, PermissionError):
            # It may be whole and another user's, so it is not deleted.
            raise
        return None


def key_in_name(path: AnyPath) -> str:
    """The key of a file named `<key>.<digest>.parquet`."""
    return path.name.split(".")[0]


def digest_in_name(path: AnyPath) -> str:
    """The digest of a file named `<key>.<digest>.parquet`, as far as its name has it."""
    return path.name.split(".")[1]
