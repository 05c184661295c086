"""Receipts: what a committed file records about itself in its footer. No folders, no manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from glmbatch.errors import UnusableFile
from glmbatch.ledger.fragments import Fragment
from glmbatch.store.files import digest_file, writable
from glmbatch.store.parquet import footer_metadata, open_parquet, write_table
from glmbatch.store.paths import AnyPath

RECEIPT = "glmbatch.receipt"  # the footer's key
LENGTH_BIN = 8  # tokens; prompt lengths are counted in bins of this width
DIGEST_CHARS = 32  # of a digest's 64, in a file's name


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
    rows: int
    computed_rows: int = 0
    known_rows: int = 0
    faults: dict[str, int] = {}
    labels: dict[str, int] = {}
    finish_reasons: dict[str, int] = {}
    empty_answers: int = 0
    answer_tokens: int = 0  # of all answers, whoever computed them
    # Rows by the tokens of their prompt, rounded down to LENGTH_BIN.
    prompt_lengths: dict[int, int] = {}
    prompt_tokens: int = 0
    completion_tokens: int = 0
    began: float = 0.0
    seconds: float = 0.0
    unusable: str | None = None


class OutputReceipt(BaseModel, frozen=True, extra="forbid"):
    """What became of one fragment: its output file and the answers in it.

    `digest` is that of the file's bytes.
    """

    key: str
    run: str
    fragment: Fragment
    output_name: str
    answers: tuple[AnswersReceipt, ...]
    faulty_rows: int = 0
    digest: str = ""
    unusable: str | None = None


Receipt = TypeVar("Receipt", bound=BaseModel)


def write_with_receipt(
    path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], receipt: BaseModel
) -> None:
    """Write `batches` to `path`, with `receipt` in the footer."""
    with writable(path):
        write_table(path, schema, batches, {RECEIPT: receipt.model_dump_json()})


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
        text = (file.metadata.metadata or {}).get(RECEIPT.encode())
        try:
            receipt = kind.model_validate_json(text or b"")
        except ValidationError:
            return None
        return receipt, file.read()


def find_whole(folder: AnyPath, key: str) -> tuple[AnyPath, str] | None:
    """The file under `key` in `folder` whose bytes match the digest in its name, and their digest.

    One that does not match is deleted: it was damaged after it was committed.
    """
    for path in folder.glob(f"{key}.*.parquet"):
        try:
            digest = digest_file(path)
        except FileNotFoundError:
            # Replaced by a fragment with the same rows, whose answers have the same key.
            return find_whole(folder, key)
        if digest.startswith(digest_in_name(path)):
            return path, digest
        path.unlink(missing_ok=True)
    return None


def key_in_name(path: AnyPath) -> str:
    """The key of a file named `<key>.<digest>.parquet`."""
    return path.name.split(".")[0]


def digest_in_name(path: AnyPath) -> str:
    """The digest of a file named `<key>.<digest>.parquet`, as far as its name has it."""
    return path.name.split(".")[1]
