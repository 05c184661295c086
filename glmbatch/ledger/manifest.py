"""The manifest: what is published, and which published files stay after a run. No models here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from glmbatch.errors import MACHINE_ERRNOS, InputError, TransientError
from glmbatch.ledger.fragments import FileFault, Fragment, Plan
from glmbatch.ledger.receipts import OutputReceipt
from glmbatch.store.errors import one_line
from glmbatch.store.files import committed, naming
from glmbatch.store.folder import Folder, Name
from glmbatch.store.inputs.needs import folder_columns
from glmbatch.store.paths import AnyPath
from glmbatch.store.seal import sealed, unsealed

MANIFEST = "_manifest.json"
# The same once more, for `glmbatch repair`; written after it.
COPY = "_glmbatch/manifest.json"


class PublishedFile(BaseModel, frozen=True, extra="forbid"):
    """One line of the manifest."""

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
    replaced: tuple[Name, ...] = ()
    unusable: tuple[FileFault, ...] = ()
    limit: int | None = None
    steps: dict[str, StepOrigin] = {}
    format: Literal["parquet", "delta"] = "parquet"


def read_manifest(output: AnyPath) -> Manifest | None:
    """The manifest in the folder `output`; None without one.

    InputError when it is damaged or not ours, or when it alone is gone.
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
    """InputError when files are published in `output`, and the manifest that names them is gone."""
    copy = read_copy(output)
    files = copy.files if copy is not None else ()
    if any((output / file.output_name).is_file() for file in files):
        raise InputError(
            f"{output / MANIFEST}: is gone, and what it named is still there. Run glmbatch repair "
            f"{output}, or set data.output."
        )


def read_copy(output: AnyPath) -> Manifest | None:
    """The manifest of the last completed publication; None where it cannot be read."""
    try:
        return _parsed_bytes((output / COPY).read_bytes())
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=4)
def _parsed(path: AnyPath, *stamp: int) -> Manifest:
    """Parsed once for each `stamp`, since every fragment asks."""
    return _parsed_bytes(path.read_bytes())


def _parsed_bytes(content: bytes) -> Manifest:
    return Manifest.model_validate(unsealed(content))


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def write_manifest(output: AnyPath, manifest: Manifest, name: str = MANIFEST) -> None:
    """Write `manifest`, or its copy, into the folder `output`."""
    with committed(output / name) as partial:
        partial.write_text(sealed(manifest.model_dump(mode="json")), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Staying:
    """The published files that a run leaves beside its own.

    `heirs` maps old names of sources to new ones.
    """

    files: list[PublishedFile]
    heirs: dict[str, str]

    @property
    def renamed(self) -> set[str]:
        """The sources whose rows all stand under their new name."""
        return set(self.heirs) - {file.source for file in self.files}


def staying(
    before: Manifest | None,
    plan: Plan,
    *,
    written: Sequence[Fragment] | None = None,
    damaged: Collection[str] = (),
    drop_missing: bool = False,
) -> Staying:
    """The published files that a run of `plan` leaves beside its own.

    `written` are the fragments that it could write, all that are planned if None; `damaged` are the
    sources of which it could not write all. Whoever asks refuses files of other settings.

    - replaced: the source is in the plan. Its files go.
    - renamed: the source is gone, and the plan has its bytes under a name that is new, in the same
      partition folders. Its files go. One new name replaces one old name, so that the rows of a
      second copy do not go with it.
    - missing: the source is gone and nothing took its place. They stay unless `drop_missing`.
    - damaged: the source that replaces them could not be written whole. They stay if nothing of it
      was written; else those of the same bytes stay whose rows no new file has.

    All other files stay: this run does not read their source. A limited run leaves nothing.
    """
    if before is None or before.limit is not None:
        return Staying([], {})
    heirs = _heirs(before, plan)
    new: dict[str, list[Fragment]] = {}
    for fragment in plan.fragments if written is None else written:
        new.setdefault(fragment.source, []).append(fragment)
    planned = {fragment.source for fragment in plan.fragments}
    stay = []
    for file in before.files:
        heir = file.source if file.source in planned else heirs.get(file.source)
        if heir is None:
            # Whether the file is there may cost a request, so it is asked last.
            if not (drop_missing and _is_gone(plan, file.source)):
                stay.append(file)
        elif heir in damaged and _uncovered(file, new.get(heir, [])):
            stay.append(file)
    return Staying(stay, heirs)


def _is_gone(plan: Plan, source: str) -> bool:
    return not (Folder(plan.root) / source).exists()


def mixture(
    stay: Sequence[PublishedFile],
    step_keys: Mapping[str, str],
    plan: Plan,
    damaged: Collection[str],
    *,
    drop_missing: bool,
) -> str | None:
    """Why some files of `stay` do not go with answers under `step_keys`, and the ways out.

    None where all can. `damaged` are sources that could not be read whole.
    """
    other = [file for file in stay if file.step_keys != step_keys]
    if not other:
        return None
    rules: dict[str, list[str]] = {}
    for source in sorted({file.source for file in other}):
        rule = "damaged" if source in damaged else "gone" if _is_gone(plan, source) else "not read"
        rules.setdefault(rule, []).append(source)
    counts = ", ".join(f"{len(names)} {rule} ({names[0]})" for rule, names in rules.items())
    ways = [f"{_WAYS[rule, drop_missing]}." for rule in rules]
    return (
        f"{other[0].output_name} was answered with other settings or weights, and this run cannot "
        f"replace it. Sources: {counts}. {' '.join(ways)} Or set data.output to another folder."
    )


# What lets a run with other settings go on, by what keeps a source and `missing_sources: drop`.
_WAYS = {
    ("gone", False): "Put what is gone back, or set data.missing_sources to drop: its rows go",
    ("gone", True): "Put what is gone back",
    ("damaged", False): "Mend what is damaged, or remove it and set data.missing_sources to drop",
    ("damaged", True): "Mend what is damaged, or remove it: its rows go",
    ("not read", False): "Let data.input cover all",
    ("not read", True): "Let data.input cover all",
}


def _uncovered(file: PublishedFile, fragments: Sequence[Fragment]) -> bool:
    """Whether `file` may stay beside the `fragments` written of the same, damaged source."""
    if not fragments:  # yesterday's rows are better than none
        return True
    same_bytes = file.source_digest == fragments[0].digest
    return same_bytes and not any(overlap(file, fragment) for fragment in fragments)


def _heirs(before: Manifest, plan: Plan) -> dict[str, str]:
    """For each published source that the plan does not read, a new source with its bytes."""
    published: dict[str, list[PublishedFile]] = {}
    for file in before.files:
        published.setdefault(file.source, []).append(file)
    digests = {fragment.source: fragment.digest for fragment in plan.fragments}
    # Sources of this run by their bytes; in order of names, so that the choice is always the same.
    candidates: dict[str, list[str]] = {}
    for source, digest in sorted(digests.items()):
        candidates.setdefault(digest, []).append(source)
    heirs: dict[str, str] = {}
    for source, files in sorted(published.items()):
        same_bytes = candidates.get(files[0].source_digest, [])
        # One that still is there is not renamed, and takes no new name from one that is.
        if source in digests or not same_bytes or not _is_gone(plan, source):
            continue
        for name in same_bytes:
            if folder_columns(name) == folder_columns(source) and _is_new(
                published.get(name, []), files
            ):
                heirs[source] = name
                same_bytes.remove(name)
                break
    return heirs


def _is_new(published: Sequence[PublishedFile], files: Sequence[PublishedFile]) -> bool:
    """Whether a source, with `published` files so far, may be a new name for the source of `files`.

    One that was published with other bytes, or as a copy, is not: the rows of the one that is gone
    must not go in silence. A source whose new name could be read only in part last night has some
    rows public under either name.
    """
    for other in published:
        if other.source_digest != files[0].source_digest:
            return False
        if any(overlap(file, other) for file in files):
            return False
    return True


def overlap(one: PublishedFile, other: PublishedFile | Fragment) -> bool:
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
    files = [*stay, *(published_file(output) for output in written)]
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


def published_file(output: OutputReceipt) -> PublishedFile:
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
