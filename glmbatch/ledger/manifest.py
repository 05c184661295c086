"""The manifest: what is published, and what will be after a run. Knows no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from glmbatch.errors import MACHINE_ERRNOS, InputError, TransientError
from glmbatch.ledger.fragments import FileFault, Plan
from glmbatch.ledger.receipts import OutputReceipt
from glmbatch.store.errors import one_line
from glmbatch.store.files import committed, naming
from glmbatch.store.folder import Name
from glmbatch.store.paths import AnyPath
from glmbatch.store.seal import sealed, unsealed

MANIFEST = "_manifest.json"
# A copy for `glmbatch repair`, written when the publication is complete.
COPY = "_glmbatch/manifest.json"


class PublishedFile(BaseModel, frozen=True, extra="forbid"):
    """One published file.

    It has `rows` rows of `source` from `first_row` on, with the answers of `step_keys` (by step).
    Digests are SHA-256. `faulty_rows` counts rows on which any step failed.
    """

    output_name: Name
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
    """What a step key was made from, for people: the step's settings and its model's identity."""

    settings: dict[str, Any]
    model: str


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What is published. A run writes it last; a reader that wants all or nothing waits for it.

    - Sources are paths below the folder `root`. `run` published last.
    - `replaced` files are no longer published. They are deleted unless a run was killed.
    - `unusable` lists the files that the run left out.
    - `limit` is `data.limit` of the run: if set, the files do not have all rows.
    - `steps` says what the step keys of the run were made from.
    - With the `format` "delta" the same files form a Delta table. Replaced files then stay for the
      older versions of the table.
    """

    run: str
    root: str
    files: tuple[PublishedFile, ...]
    replaced: tuple[Name, ...] = ()
    unusable: tuple[FileFault, ...] = ()
    limit: int | None = None
    steps: dict[str, StepOrigin] = {}
    format: Literal["parquet", "delta"] = "parquet"


def read_manifest(output: AnyPath) -> Manifest | None:
    """The manifest in the folder `output`; None if nothing is published there.

    InputError when it is damaged, not of glmbatch, or missing while its files are still there.
    TransientError when the machine failed.
    """
    path = output / MANIFEST
    try:
        with naming("data.output"):
            status = path.stat()
        return _parsed(path, status.st_mtime_ns, status.st_size, status.st_ino)
    except (FileNotFoundError, NotADirectoryError):
        _refuse_loss(output)
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{path}: cannot be read now: {error.strerror}.") from error
        raise InputError(
            f"{path}: is damaged, or not of glmbatch: {_reason(error)}. Run glmbatch repair "
            f"{output}, or set data.output."
        ) from error


def _refuse_loss(output: AnyPath) -> None:
    """InputError when published files are in `output` but their manifest is missing."""
    copy = read_copy(output)
    files = copy.files if copy is not None else ()
    if any((output / file.output_name).is_file() for file in files):
        raise InputError(
            f"{output / MANIFEST}: is missing, but its files are still there. Run glmbatch repair "
            f"{output}, or set data.output."
        )


def read_copy(output: AnyPath) -> Manifest | None:
    """The manifest of the last completed publication, from its copy; None if it cannot be read."""
    try:
        return _parsed_bytes((output / COPY).read_bytes())
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=4)
def _parsed(path: AnyPath, *stamp: int) -> Manifest:
    """The manifest at `path`. Cached by `stamp`, because every fragment needs it."""
    return _parsed_bytes(path.read_bytes())


def _parsed_bytes(content: bytes) -> Manifest:
    return Manifest.model_validate(unsealed(content))


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def write_manifest(output: AnyPath, manifest: Manifest, name: str = MANIFEST) -> None:
    """Write `manifest` to the file `name` in the folder `output`, by one rename; safe to repeat."""
    with committed(output / name) as partial:
        partial.write_text(sealed(manifest.model_dump(mode="json")), encoding="utf-8")


def next_manifest(  # noqa: PLR0913 - the run, and what is published before and after it
    run: str,
    plan: Plan,
    before: Manifest | None,
    *,
    written: Sequence[OutputReceipt],
    stay: Sequence[PublishedFile],
    unusable: Sequence[FileFault],
    steps: Mapping[str, StepOrigin],
    format: Literal["parquet", "delta"] = "parquet",
) -> Manifest:
    """The manifest for when the files of `written` are published beside those that `stay`.

    `before` is the current manifest. `unusable` are the files that the run left out, and `steps`
    the origins of its step keys.
    """
    files = [*stay, *(published_file(output) for output in written)]
    replaced = set(before.replaced) if before else set()
    # In a Delta table nothing is marked as replaced, because older versions need their files.
    if before is not None and before.format == "parquet":
        replaced |= {file.output_name for file in before.files}
    return Manifest(
        run=run,
        root=plan.root,
        files=tuple(sorted(files, key=lambda file: file.output_name)),
        replaced=tuple(sorted(replaced - {file.output_name for file in files})),
        unusable=tuple(unusable),
        limit=plan.limit,
        steps=dict(steps),
        format=format,
    )


def published_file(output: OutputReceipt) -> PublishedFile:
    """The manifest's entry for the file of `output`."""
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
