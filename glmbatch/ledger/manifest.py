"""The manifest: what is published, and what will be after a run. Knows no models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from glmbatch.errors import MACHINE_ERRNOS, InputError, TransientError
from glmbatch.ledger.filelist import FileList, ListMissing, commit_list, read_list
from glmbatch.ledger.fragments import FileFault, Plan
from glmbatch.ledger.receipts import AnswerCounts, OutputReceipt
from glmbatch.settings.kinds import OutputFormat
from glmbatch.store.errors import one_line
from glmbatch.store.files import committed, naming, reachable, writable
from glmbatch.store.folder import Folder, Name, unlink_all
from glmbatch.store.inputs.found import Version
from glmbatch.store.paths import AnyPath
from glmbatch.store.seal import sealed, unsealed

MANIFEST = "_manifest.json"
# A copy for `glmbatch repair`, written when the publication is complete.
COPY = "_glmbatch/manifest.json"
# Of more published files the manifest names a list; up to here readers find them in its JSON.
INLINE_FILES = 1_000
LIST = "list"  # the key that stands for `files` in the JSON


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """One published file.

    It has `rows` rows of `source` from `first_row` on, with the answers of `step_keys` (by step).
    Digests are SHA-256. `faulty_rows` counts rows on which any step failed. `calibration` is the
    digest of the maps behind calibrated columns, if any. The four fields before it let a run leave
    an unchanged source alone (see input/unchanged.py): `basis` identifies what decided the file
    besides its source, `stamp` and `place` are the stamps of the source and of the file, and
    `counts` has what is known of its answers, by step. `where` and `span` are as in
    `Fragment`. A new field needs a default, which older
    manifests get.
    """

    # A plain dataclass, because 100,000 models take three times the memory and the time.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

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
    basis: str = ""
    stamp: tuple[int, ...] | None = None
    place: tuple[int, ...] | None = None
    counts: dict[str, AnswerCounts] = field(default_factory=dict)
    calibration: str = ""
    where: str = ""
    span: int = 0

    @property
    def covered(self) -> int:
        """The number of rows of the source, from `first_row`, that have a place here or none."""
        return self.span or self.rows

    @property
    def made_with(self) -> tuple[dict[str, str], str]:
        """The step keys and the digest of the calibration, which are the same for all files."""
        return self.step_keys, self.calibration


class StepOrigin(BaseModel, frozen=True, extra="forbid"):
    """What a step key was made from, for people: the step's settings and its model's identity."""

    settings: dict[str, Any]
    model: str


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What is published. A run writes it last; a reader that wants all or nothing waits for it.

    - Sources are paths below the folder `root`. `run` published last.
    - `replaced` files are no longer published. They are deleted unless a run was killed.
    - `unusable` lists the files that the run left out.
    - `where` is `data.where` of the run. Each file has the condition that chose its own rows.
    - `version` is that of the table which the run read; None for other inputs.
    - `spared` maps keys of answers files that no published file uses to a source and its digest.
      While these stay the same, the condition of another night may bring their rows back.
    - `limit` is `data.limit` of the run: if set, the files do not have all rows.
    - `steps` says what the step keys of the run were made from.
    - With another `format` than Parquet the same files form a table, an Iceberg table with the name
      `table`. Replaced files then stay for the older versions of the table.
    """

    run: str
    root: str
    files: tuple[PublishedFile, ...]
    replaced: tuple[Name, ...] = ()
    unusable: tuple[FileFault, ...] = ()
    limit: int | None = None
    steps: dict[str, StepOrigin] = {}
    format: OutputFormat = "parquet"
    table: str = ""
    where: str | None = None
    version: Version | None = None
    spared: dict[str, tuple[str, str]] = {}


class Copy(NamedTuple):
    """The manifest of the last completed publication, without files if `list_lost`."""

    manifest: Manifest
    list_lost: bool


def read_manifest(output: AnyPath) -> Manifest | None:
    """The manifest in the folder `output`; None if nothing is published there.

    InputError when it is damaged, not of glmbatch, or missing while its files are still there.
    TransientError when the machine failed.
    """
    path = output / MANIFEST
    stamp: tuple[int, ...] = ()
    try:
        with naming("data.output"):
            stamp = _stamp(path)
        return _parsed(output, stamp)
    except (FileNotFoundError, NotADirectoryError):
        _refuse_loss(output)
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRNOS:
            raise TransientError(f"{path}: cannot be read now: {error.strerror}.") from error
        if isinstance(error, ListMissing) and stamp != _stamp(path):
            return read_manifest(output)  # a run has just published, and deleted the older list
        raise InputError(
            f"{path}: is damaged, or not of glmbatch: {_reason(error)}. Run glmbatch repair "
            f"{output}, or set data.output."
        ) from error


def _refuse_loss(output: AnyPath) -> None:
    """InputError when published files are in `output` but their manifest is missing."""
    copy = read_copy(output)
    if copy is None:
        return
    if copy.list_lost:
        remain = bool(Folder(output).visible_files())
    else:
        remain = any((output / file.output_name).is_file() for file in copy.manifest.files)
    if remain:
        raise InputError(
            f"{output / MANIFEST}: is missing, but its files are still there. Run glmbatch repair "
            f"{output}, or set data.output."
        )


def read_copy(output: AnyPath) -> Copy | None:
    """The manifest of the last completed publication, from its copy; None if it cannot be read."""
    try:
        manifest, file_list = _unsealed((output / COPY).read_bytes())
    except (OSError, ValueError):
        return None
    try:
        return Copy(_with_files(output, manifest, file_list), list_lost=False)
    except (OSError, ValueError):
        return Copy(manifest, list_lost=True)


def _stamp(path: AnyPath) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


# Two, because one of 100,000 files takes 80 MB.
@lru_cache(maxsize=2)
def _parsed(output: AnyPath, stamp: tuple[int, ...]) -> Manifest:
    """The manifest in `output`. Cached by its `stamp`, because every fragment needs it."""
    return _with_files(output, *_unsealed((output / MANIFEST).read_bytes()))


def forget_manifests() -> None:
    """Drop the manifests in memory, so that the next reader proves them and their lists again."""
    _parsed.cache_clear()


def _unsealed(content: bytes) -> tuple[Manifest, FileList | None]:
    """The manifest in the JSON `content`, without files if a list has them, and that list."""
    said = unsealed(content)
    if not isinstance(said, dict) or LIST not in said or "files" in said:
        return Manifest.model_validate(said), None
    file_list = FileList.model_validate(said.pop(LIST))
    return Manifest.model_validate({**said, "files": ()}), file_list


def _with_files(output: AnyPath, manifest: Manifest, file_list: FileList | None) -> Manifest:
    if file_list is None:
        return manifest
    files = read_list(output, file_list, PublishedFile)
    return manifest.model_copy(update={"files": files})


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def write_manifest(output: AnyPath, manifest: Manifest) -> None:
    """Write `manifest` to the folder `output`, by one rename; safe to repeat.

    More than INLINE_FILES files are committed before as a list, which the manifest names. The list
    of the manifest before stays (see `copy_manifest`).
    """
    files = manifest.files
    if len(files) <= INLINE_FILES:
        content = manifest.model_dump(mode="json")
    else:
        file_list = commit_list(output, files, sum(file.rows for file in files))
        content = manifest.model_copy(update={"files": ()}).model_dump(mode="json")
        del content["files"]
        content[LIST] = file_list.model_dump()
    with committed(output / MANIFEST) as partial:
        partial.write_text(sealed(content), encoding="utf-8")


def copy_manifest(output: AnyPath, old_lists: Iterable[AnyPath] = ()) -> None:
    """Copy the manifest for `glmbatch repair`, then delete those `old_lists` that it does not name.

    `old_lists` are from before the manifest was written: a run that took over the lock may by now
    have committed the list of its own manifest.
    """
    with reachable(output):
        content = (output / MANIFEST).read_bytes()
    with committed(output / COPY) as partial:
        partial.write_bytes(content)
    _, file_list = _unsealed(content)
    named = None if file_list is None else output / file_list.name
    with writable(output):
        unlink_all(output, [path for path in old_lists if path != named])


def next_manifest(  # noqa: PLR0913 - the run, and what is published before and after it
    run: str,
    plan: Plan,
    before: Manifest | None,
    *,
    written: Sequence[OutputReceipt],
    stay: Sequence[PublishedFile],
    unusable: Sequence[FileFault],
    steps: Mapping[str, StepOrigin],
    format: OutputFormat = "parquet",
    table: str = "",
) -> Manifest:
    """The manifest for when the files of `written` are published beside those that `stay`.

    `before` is the current manifest. `unusable` are the files that the run left out, and `steps`
    the origins of its step keys.
    """
    files = [*stay, *(published_file(output) for output in written)]
    replaced = set(before.replaced) if before else set()
    # In a table nothing is marked as replaced, because older versions need their files.
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
        table=table,
        where=plan.where,
        version=plan.version,
        spared=_spared(plan, before, files),
    )


def _spared(
    plan: Plan, before: Manifest | None, files: Sequence[PublishedFile]
) -> dict[str, tuple[str, str]]:
    """The answers to spare when `files` are published, of rows that only a condition leaves out."""
    if plan.where is None or before is None or not before.files or not files:
        return {}
    if files[0].step_keys != before.files[0].step_keys:
        return {}
    spared = dict(before.spared)
    for file in before.files:
        spared |= dict.fromkeys(file.answers_keys, (file.source, file.source_digest))
    digests = {file.source: file.source_digest for file in files}
    left_out = set(plan.left_out)
    used = set(chain.from_iterable(file.answers_keys for file in files))
    return {
        key: (source, digest)
        for key, (source, digest) in spared.items()
        if key not in used and (digests.get(source) == digest or source in left_out)
    }


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
        answers_keys=tuple(answers.file_key for answers in output.answers),
        calibration=output.calibration,
        where=output.fragment.where,
        span=output.fragment.span,
    )
