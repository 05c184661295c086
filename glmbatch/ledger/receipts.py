"""Receipts: what a committed file records about itself in its footer. Knows no manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, ValidationError, model_validator

from glmbatch.errors import InputError, StoreRefused, UnusableFile
from glmbatch.ledger.fragments import Fragment
from glmbatch.store.files import DIGEST_CHARS, Digests, digest_file, reachable, writable
from glmbatch.store.folder import Name
from glmbatch.store.parquet import footer_metadata, open_parquet, write_table
from glmbatch.store.paths import AnyPath

RECEIPT = "glmbatch.receipt"  # the footer's key
LENGTH_BIN = 8  # tokens; prompt lengths are counted in bins of this width

# Bounds that refuse a damaged or foreign receipt here, before a report calculates with it.
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class AnswersReceipt(BaseModel, frozen=True, extra="forbid"):
    """The record of one step over one fragment, made by `run`.

    - `computed_rows` counts the distinct prompts that the model was asked, `known_rows` those whose
      answers were found by row key. Their sum is below `rows` if rows repeat or have no prompt.
    - `faults`, `labels` and `finish_reasons` count rows by kind. `not_asked` rows did not meet the
      step's condition, and the model `abstained` from others; both are no faults. `unlabelled` ones
      have an answer without a label, which only steps with several labels give; None where an
      earlier version did not count them.
    - `earlier` maps each step whose answers the prompts use to the run that made these.
    - `began` is in seconds since 1970; `seconds` is wall time.
    - `unusable` says why the fragment cannot be read; then there are no answers.
    - `bundle` is the key of the file with the answers; empty if the file has the receipt's own key.
    """

    key: str
    bundle: str = ""
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
    not_asked: Count = 0
    abstained: Count = 0
    unlabelled: Count | None = None
    labels: dict[str, Count] = {}
    finish_reasons: dict[str, Count] = {}
    empty_answers: Count = 0
    answer_tokens: Count = 0  # of all answers, also of known ones
    # Numbers of rows by the tokens in their prompt, rounded down to a multiple of LENGTH_BIN.
    prompt_lengths: dict[Count, Count] = {}
    prompt_tokens: Count = 0
    completion_tokens: Count = 0
    began: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    seconds: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    unusable: str | None = None

    @property
    def file_key(self) -> str:
        """The key of the file with the answers."""
        return self.bundle or self.key


class BundleReceipt(BaseModel, frozen=True, extra="forbid"):
    """The record of one step over the fragments of a bundle, made by `run`: an answers file.

    The file has the rows of each of `parts`, in this order. Fragments with the same rows share a
    part, and fragments that cannot be read have none.
    """

    key: str
    run: str
    step: str
    step_key: str
    parts: Annotated[tuple[AnswersReceipt, ...], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _read_earlier(cls, content: Any) -> Any:
        # Earlier versions wrote one fragment to each file, with its receipt alone.
        if not isinstance(content, dict) or "parts" in content:
            return content
        own = {name: content.get(name) for name in ("key", "run", "step", "step_key")}
        return {**own, "parts": [content]}

    def split(self, table: pa.Table) -> dict[str, pa.Table]:
        """The rows of each part in `table`, the rows of the file, by the part's key."""
        tables = {}
        start = 0
        for part in self.parts:
            tables[part.key] = table.slice(start, part.rows)
            start += part.rows
        return tables


class AnswerCounts(BaseModel, frozen=True, extra="forbid"):
    """What is known of the answers of one step without opening a file, as in AnswersReceipt."""

    rows: Count
    faults: dict[str, Count] = {}
    not_asked: Count = 0
    abstained: Count = 0
    unlabelled: Count | None = None
    labels: dict[str, Count] = {}
    finish_reasons: dict[str, Count] = {}
    empty_answers: Count = 0
    answer_tokens: Count = 0


class OutputReceipt(BaseModel, frozen=True, extra="forbid"):
    """The record of one fragment's output file and of the answers in it, made by `run`.

    `answers` are in step order. `digest` is the SHA-256 of the file, which its own footer cannot
    hold: it is filled in afterwards. `faulty_rows` counts rows on which any step failed. `unusable`
    says why the fragment cannot be read; then there is no file. `calibration` is the digest of the
    maps behind its calibrated columns, if it has any.
    """

    key: str
    run: str
    fragment: Fragment
    output_name: Name
    answers: tuple[AnswersReceipt, ...]
    faulty_rows: Count = 0
    digest: str = ""
    unusable: str | None = None
    calibration: str = ""


Receipt = TypeVar("Receipt", bound=BaseModel)


def write_with_receipt(
    path: Path,
    schema: pa.Schema,
    batches: Iterator[pa.RecordBatch],
    receipt: BaseModel,
    *,
    utc_times: bool = False,
) -> None:
    """Write `batches` to the Parquet file `path`, with `receipt` in its footer.

    InputError when `path` cannot be written, TransientError when the machine failed.
    """
    with writable(path):
        footer = {RECEIPT: receipt.model_dump_json()}
        write_table(path, schema, batches, footer, utc_times=utc_times)


def read_receipt(path: AnyPath, kind: type[Receipt]) -> Receipt | None:
    """The receipt in the footer of `path`; None if there is no valid one."""
    try:
        text = footer_metadata(path, RECEIPT)
        return None if text is None else kind.model_validate_json(text)
    except (UnusableFile, ValidationError):
        return None


def read_with_receipt(path: AnyPath, kind: type[Receipt]) -> tuple[Receipt, pa.Table] | None:
    """The receipt and the rows of `path`, opened once; None if there is no valid receipt.

    UnusableFile when the rows cannot be read.
    """
    with open_parquet(path) as file:
        receipt = receipt_of(file, kind)
        return None if receipt is None else (receipt, file.read())


def receipt_of(file: pq.ParquetFile, kind: type[Receipt]) -> Receipt | None:
    """The receipt of an open file; None if there is no valid one."""
    text = (file.metadata.metadata or {}).get(RECEIPT.encode())
    try:
        return kind.model_validate_json(text or b"")
    except ValidationError:
        return None


def whole_digest(
    path: AnyPath, digests: Digests | None = None, *, must_read: bool = False
) -> str | None:
    """The SHA-256 of a committed file, from `digests` if given; None if it is no such file.

    A file that this user may not read gives None, or InputError if `must_read`. FileNotFoundError
    when there is no file, TransientError when the machine failed, StoreRefused from a store.
    """
    try:
        with reachable(path):
            return digest_file(path) if digests is None else digests.of(path)
    except StoreRefused:  # the file is not at fault
        raise
    except InputError as error:  # a folder, a circular link, a file that may not be read
        if must_read and isinstance(error.__cause__, PermissionError):
            # The caller deletes damaged files, but this one may be a whole file of another user.
            raise
        return None


def has_digest(path: AnyPath, digest: str, digests: Digests | None = None) -> bool:
    """Whether there is a file `path` with the SHA-256 `digest`; raises as `whole_digest`."""
    try:
        return whole_digest(path, digests) == digest
    except FileNotFoundError:
        return False


def file_name(key: str, digest: str) -> str:
    """The name of the committed file under `key` with the SHA-256 `digest`."""
    return f"{key}.{digest[:DIGEST_CHARS]}.parquet"


def key_in_name(path: AnyPath) -> str:
    """The key of a file named `<key>.<digest>.parquet`."""
    return path.name.split(".")[0]


def digest_in_name(path: AnyPath) -> str:
    """The beginning of the digest of a file named `<key>.<digest>.parquet`."""
    return path.name.split(".")[1]
