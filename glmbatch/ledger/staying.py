"""Which published files stay beside those of a run, and whether they may. Knows no models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from glmbatch.errors import counted
from glmbatch.ledger.fragments import Fragment, Plan
from glmbatch.ledger.manifest import Manifest, PublishedFile
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.needs import folder_columns


@dataclass(frozen=True, slots=True)
class Staying:
    """The published files that stay beside those of a run.

    `heirs` maps the old names of renamed sources to the new ones.
    """

    files: list[PublishedFile]
    heirs: dict[str, str]

    @property
    def renamed(self) -> set[str]:
        """The old names of renamed sources of which no file stays."""
        return set(self.heirs) - {file.source for file in self.files}


def staying(
    before: Manifest | None,
    plan: Plan,
    *,
    written: Sequence[Fragment] | None = None,
    damaged: Collection[str] = (),
    drop_missing: bool = False,
) -> Staying:
    """The published files that stay beside those of a run of `plan`.

    `written` are the fragments that the run wrote, or all planned ones if None. `damaged` are the
    sources of which it could not write every fragment. The caller refuses files that were made with
    other settings (see `mixture`).

    - unchanged: the plan leaves the source alone. Its files stay. Replaced: it is in the plan. Its
      files are removed.
    - renamed: the source is missing, and the plan has a file with the same bytes, in the same
      partition folders, under a new name. Its files are removed. One new name replaces one old
      name, so that a second copy keeps its rows.
    - missing: the source is missing and no file replaces it, or `data.where` leaves out all of its
      rows. Its files stay unless `drop_missing`, or a table does not have the source any more.
    - damaged: the source was replaced or renamed, but not all of it could be written. If nothing
      was written, its files stay. Otherwise files from the same bytes stay if no new file has
      their rows.

    All other files stay, because the run does not read their source. If the files before are those
    of a limited run, none stays.
    """
    if before is None or before.limit is not None:
        return Staying([], {})
    heirs = _heirs(before, plan)
    new: dict[str, list[Fragment]] = {}
    for fragment in plan.fragments if written is None else written:
        new.setdefault(fragment.source, []).append(fragment)
    planned = {fragment.source for fragment in plan.fragments}
    is_kept = _kept(plan, drop_missing=drop_missing)
    stay = []
    for file in before.files:
        heir = file.source if file.source in planned else heirs.get(file.source)
        if heir is None:
            if is_kept(file.source):
                stay.append(file)
        elif heir in damaged and _uncovered(file, new.get(heir, [])):
            stay.append(file)
    return Staying(stay, heirs)


def _kept(plan: Plan, *, drop_missing: bool) -> Callable[[str], bool]:
    """Whether the files of a source stay that the plan does not read, and nothing replaces."""
    is_gone = _gone(plan)
    left_out = set(plan.left_out)

    def is_kept(source: str) -> bool:
        if source in plan.unchanged:
            return True
        if source in left_out:
            return not drop_missing
        # A table removes a file on purpose, and its rows may be in others now. Of other inputs this
        # is asked only if it matters, because that costs a request in a store.
        return (plan.version is None and not drop_missing) or not is_gone(source)

    return is_kept


def _gone(plan: Plan) -> Callable[[str], bool]:
    """Whether the input no longer has a source, of those that the plan does not read."""
    if plan.version is None:
        return lambda source: not (Folder(plan.root) / source).exists()
    others = {*plan.left_out, *(fault.source for fault in plan.unusable)}
    return lambda source: source not in others


class Filtered(BaseModel, frozen=True, extra="forbid"):
    """What the condition `where` left out: all rows of `sources`, and `rows` of other sources.

    `all_rows` if no row of any source meets it.
    """

    where: str
    sources: int
    rows: int
    all_rows: bool = False

    def __str__(self) -> str:
        sources, rows = counted(self.sources, "file"), counted(self.rows, "row")
        end = "; no row meets it" if self.all_rows else ""
        return f"{self.where}: leaves out {sources}, and {rows} of others{end}"


def filtered(plan: Plan, unchanged: Sequence[PublishedFile] = ()) -> Filtered | None:
    """What `data.where` left out, also of `unchanged` files; None without a condition."""
    if plan.where is None:
        return None
    parts: list[Fragment | PublishedFile] = [*plan.fragments, *unchanged]
    rows = sum(part.covered - part.rows for part in parts)
    all_rows = not any(part.rows for part in parts)
    return Filtered(where=plan.where, sources=len(plan.left_out), rows=rows, all_rows=all_rows)


def mixture(
    stay: Sequence[PublishedFile],
    made_with: tuple[Mapping[str, str], str],
    plan: Plan,
    damaged: Collection[str],
    *,
    drop_missing: bool,
) -> str | None:
    """A message if files in `stay` were not `made_with` what this run's are, with the ways out.

    None if all were: with the same step keys and calibration. `damaged` are the sources that could
    not be read completely.
    """
    other = [file for file in stay if file.made_with != made_with]
    if not other:
        return None
    answered = any(file.step_keys != made_with[0] for file in other)
    what = "was calibrated otherwise, and this run cannot replace it"
    if answered:
        what = "was answered with other settings or weights, and this run cannot replace it"
    ways = ways_out(other, plan, damaged, drop_missing=drop_missing)
    return f"{other[0].output_name} {what}. {ways}"


def ways_out(
    files: Sequence[PublishedFile], plan: Plan, damaged: Collection[str], *, drop_missing: bool
) -> str:
    """Why a run of `plan` does not replace these published `files`, and what to do about it."""
    is_gone = _gone(plan)
    rules: dict[str, list[str]] = {}
    for source in sorted({file.source for file in files}):
        rule = "damaged" if source in damaged else "gone" if is_gone(source) else "not read"
        rules.setdefault(rule, []).append(source)
    counts = ", ".join(f"{len(names)} {rule} ({names[0]})" for rule, names in rules.items())
    ways = [f"{_WAYS[rule, drop_missing]}." for rule in rules]
    return f"Sources: {counts}. {' '.join(ways)} Or set data.output to another folder."


# What to do about files that stay, by the reason why they do and by `missing_sources: drop`.
_WAYS = {
    ("gone", False): (
        "Restore the files that are gone, or set data.missing_sources to drop to remove their rows"
    ),
    ("gone", True): "Restore the files that are gone",
    ("damaged", False): (
        "Replace the damaged files, or delete them and set data.missing_sources to drop"
    ),
    ("damaged", True): "Replace the damaged files, or delete them to remove their rows",
    ("not read", False): "Let data.input and data.where cover all sources",
    ("not read", True): "Let data.input cover all sources",
}


def _uncovered(file: PublishedFile, fragments: Sequence[Fragment]) -> bool:
    """Whether `file` stays beside the `fragments` that were written from its damaged source."""
    if not fragments:  # the rows of an earlier run are better than none
        return True
    same_bytes = file.source_digest == fragments[0].digest
    return same_bytes and not any(overlap(file, fragment) for fragment in fragments)


def _heirs(before: Manifest, plan: Plan) -> dict[str, str]:
    """For each published source that the plan does not read, a new source with its bytes."""
    is_gone = _gone(plan)
    published: dict[str, list[PublishedFile]] = {}
    for file in before.files:
        published.setdefault(file.source, []).append(file)
    digests = {fragment.source: fragment.digest for fragment in plan.fragments}
    # Sources of this run by digest, sorted by name so that the choice is always the same.
    candidates: dict[str, list[str]] = {}
    for source, digest in sorted(digests.items()):
        candidates.setdefault(digest, []).append(source)
    heirs: dict[str, str] = {}
    for source, files in sorted(published.items()):
        same_bytes = candidates.get(files[0].source_digest, [])
        # A source that still exists was not renamed, so it must not take a new name.
        exists = source in digests or source in plan.unchanged
        if exists or not same_bytes or not is_gone(source):
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
    """Whether a source with these `published` files may be a new name for the source of `files`.

    It may not if it was published before with other bytes or as a copy: then the rows of the
    missing source would disappear silently. If the last run could read only a part of the renamed
    file, some rows are published under each name; that is no obstacle.
    """
    for other in published:
        if other.source_digest != files[0].source_digest:
            return False
        if any(overlap(file, other) for file in files):
            return False
    return True


def overlap(one: PublishedFile, other: PublishedFile | Fragment) -> bool:
    """Whether the row ranges of two files from the same bytes share a row."""
    return (
        one.first_row < other.first_row + other.covered
        and other.first_row < one.first_row + one.covered
    )
