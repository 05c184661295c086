"""The manifest: what is published, and which published files stay when a run ends. Knows no models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from glmbatch.errors import InputError
from glmbatch.ledger.fragments import FileFault, Plan
from glmbatch.ledger.receipts import OutputReceipt
from glmbatch.store.files import naming
from glmbatch.store.paths import AnyPath, location

MANIFEST = "_manifest.json"


class PublishedFile(BaseModel, frozen=True, extra="forbid"):
    """One line of the manifest."""

    output_name: str
    output_key: str
    source: str
    source_digest: str
    first_row: int
    rows: int
    faulty_rows: int
    digest: str
    step_keys: dict[str, str]
    answers_keys: tuple[str, ...]


class StepOrigin(BaseModel, frozen=True, extra="forbid"):
    """What a step key was made of, for people: the step's settings, and the identity of its model."""

    settings: dict[str, Any]
    model: str


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What is published: the last thing a run writes. A reader that wants all or nothing waits for it.

    Sources are named from the folder `root`. `replaced` files belong to it no more, and are gone unless a run was
    killed. `limit` is that of the run: then these are not all rows. `steps` says what its step keys were made of.
    With the format "delta" the same files are a Delta table, and what was replaced stays for its older versions.
    """

    run: str
    root: str
    files: tuple[PublishedFile, ...]
    replaced: tuple[str, ...] = ()
    unusable: tuple[FileFault, ...] = ()
    limit: int | None = None
    steps: dict[str, StepOrigin] = {}
    format: Literal["parquet", "delta"] = "parquet"


def read_manifest(output: AnyPath) -> Manifest | None:
    """The manifest of the folder `output`; None when nothing is published there. InputError for another's file."""
    path = output / MANIFEST
    try:
        with naming("data.output"):
            status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _parsed(path, status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=4)
def _parsed(path: AnyPath, *stamp: int) -> Manifest:
    """Parsed once for each `stamp`, since every fragment asks."""
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path}: is not a manifest of glmbatch: {error.errors()[0]['msg']}. Set data.output."
        ) from error


def merged_manifest(  # noqa: PLR0913 - five facts about the run and one of the job's choice
    run: str,
    plan: Plan,
    before: Manifest | None,
    outputs: Sequence[OutputReceipt],
    unusable: Sequence[FileFault],
    *,
    keep_missing: bool = True,
    format: Literal["parquet", "delta"] = "parquet",
) -> Manifest:
    """What is published once `outputs` are.

    They replace the earlier files of their sources, and of sources with the same bytes that are there no more, which
    were renamed. Other sources stay, those that are there no more only with `keep_missing`. Of a source that could not
    be read whole tonight, earlier files of the same bytes stay where no new one covers their rows, and all of them
    where nothing of it could be read.
    """
    files = [_published_file(output) for output in outputs]
    earlier = before.files if before and before.limit is None else ()
    by_source: dict[str, list[PublishedFile]] = {}
    for file in files:
        by_source.setdefault(file.source, []).append(file)
    damaged, digests = {fault.source for fault in unusable}, {file.source_digest for file in files}

    def stays(old: PublishedFile) -> bool:
        new = by_source.get(old.source, [])
        if not new:
            renamed = old.source_digest in digests or not keep_missing
            return not renamed or (location(plan.root) / old.source).exists()
        covered = any(
            file.first_row < old.first_row + old.rows and old.first_row < file.first_row + file.rows
            for file in new
        )
        same = old.source_digest == new[0].source_digest and old.step_keys == new[0].step_keys
        return old.source in damaged and same and not covered

    stay = [old for old in earlier if stays(old)]
    kept = {file.output_name for file in [*stay, *files]}
    gone = set(before.replaced) if before else set()
    if (
        before is not None and before.format == "parquet"
    ):  # a Delta table's older versions need their files
        gone |= {file.output_name for file in before.files}
    return Manifest(
        run=run,
        root=plan.root,
        files=tuple(sorted([*stay, *files], key=lambda file: file.output_name)),
        replaced=tuple(sorted(gone - kept)),
        unusable=tuple(unusable),
        limit=plan.limit,
        format=format,
    )


def _published_file(output: OutputReceipt) -> PublishedFile:
    return PublishedFile(
        output_name=output.output_name,
        output_key=output.key,
        source=output.fragment.source,
        source_digest=output.fragment.digest,
        first_row=output.fragment.first_row,
        rows=output.fragment.rows,
        faulty_rows=output.faulty_rows,
        digest=output.digest,
        step_keys={answers.step: answers.step_key for answers in output.answers},
        answers_keys=tuple(answers.key for answers in output.answers),
    )
