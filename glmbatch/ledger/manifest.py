"""The manifest: what is published, and which published files stay after a run. No models here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from glmbatch.errors import InputError
from glmbatch.ledger.fragments import FileFault, Fragment, Plan
from glmbatch.ledger.receipts import OutputReceipt
from glmbatch.store.files import naming
from glmbatch.store.folder import Folder
from glmbatch.store.paths import AnyPath

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
    """What a step key was made of, for people: the step's settings, and its model's identity."""

    settings: dict[str, Any]
    model: str


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """What is published. A run writes it last; a reader that wants all or nothing waits for it.

    Sources are named from the folder `root`. `replaced` files no longer belong to it, and are gone
    unless a run was killed. `limit` is that of the run: then these are not all rows. `steps` says
    what its step keys were made of. With the format "delta" the same files are a Delta table, and
    what was replaced stays for its older versions.
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
    """The manifest in the folder `output`; None without one. InputError if it is not ours."""
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


def staying(
    before: Manifest | None,
    plan: Plan,
    *,
    written: Sequence[Fragment] | None = None,
    damaged: Collection[str] = (),
    drop_missing: bool = False,
) -> list[PublishedFile]:
    """The published files that a run of `plan` leaves beside its own.

    `written` are the fragments that it could write, all that are planned if None; `damaged` are the
    sources of which it could not write all. Whoever asks refuses files of other settings.

    - replaced: the source is in the plan. Its files go.
    - renamed: the source is gone, and the plan has its bytes under a name that is new for them. Its
      files go. One new name replaces one old name, so that the rows of a second copy do not go with
      it.
    - missing: the source is gone and nothing took its place. They stay unless `drop_missing`.
    - damaged: the source that replaces them could not be written whole. They stay if nothing of it
      was written; else those of the same bytes stay whose rows no new file has.

    All other files stay: this run does not read their source. A limited run leaves nothing.
    """
    if before is None or before.limit is not None:
        return []
    successors = _successors(before, plan, drop_missing=drop_missing)
    new: dict[str, list[Fragment]] = {}
    for fragment in plan.fragments if written is None else written:
        new.setdefault(fragment.source, []).append(fragment)

    stay = []
    for file in before.files:
        if file.source not in successors:
            stay.append(file)
            continue
        source = successors[file.source]
        if source is None or source not in damaged:
            continue
        if _uncovered(file, new.get(source, [])):
            stay.append(file)
    return stay


def _uncovered(file: PublishedFile, fragments: Sequence[Fragment]) -> bool:
    """Whether `file` may stay beside the `fragments` written of the same, damaged source."""
    if not fragments:  # yesterday's rows are better than none
        return True
    same_bytes = file.source_digest == fragments[0].digest
    return same_bytes and not any(_overlap(file, fragment) for fragment in fragments)


def _successors(before: Manifest, plan: Plan, *, drop_missing: bool) -> dict[str, str | None]:
    """The published sources that a run of `plan` replaces, and by which source (None: dropped)."""
    published: dict[str, list[PublishedFile]] = {}
    for file in before.files:
        published.setdefault(file.source, []).append(file)
    digests = {fragment.source: fragment.digest for fragment in plan.fragments}
    # Sources of this run by their bytes; in order of names, so that the choice is always the same.
    heirs: dict[str, list[str]] = {}
    for source, digest in sorted(digests.items()):
        heirs.setdefault(digest, []).append(source)
    successors: dict[str, str | None] = {}
    for source, files in sorted(published.items()):
        if source in digests:
            successors[source] = source
            continue
        same_bytes = heirs.get(files[0].source_digest, [])
        heir = next((name for name in same_bytes if _is_new(published.get(name, []), files)), None)
        # Whether the file is there may cost a request, so it is asked last.
        if (drop_missing or heir) and not (Folder(plan.root) / source).exists():
            successors[source] = None if drop_missing else heir
            if heir is not None:
                same_bytes.remove(heir)
    return successors


def _is_new(published: Sequence[PublishedFile], files: Sequence[PublishedFile]) -> bool:
    """Whether a source, with `published` files so far, may be a new name for the source of `files`.

    Both have the same bytes.

    A copy that was published too is not: when its original is deleted, the original's rows must not
    go in silence. A source whose new name could be read only in part last night has some rows
    public under either name.
    """
    for file in files:
        for other in published:
            if other.source_digest == file.source_digest and _overlap(file, other):
                return False
    return True


def _overlap(one: PublishedFile, other: PublishedFile | Fragment) -> bool:
    """Whether two row ranges of files with the same bytes share a row."""
    return (
        one.first_row < other.first_row + other.rows and other.first_row < one.first_row + one.rows
    )


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
    """What is published once the files of `written` are, beside those of `before` that `stay`."""
    files = [*stay, *(_published_file(output) for output in written)]
    replaced = set(before.replaced) if before else set()
    # The files of an older version of a Delta table are not replaced: its readers need them.
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
