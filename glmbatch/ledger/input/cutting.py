"""Find the input's files, check them against the job, and cut those that changed into fragments."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from glmbatch.errors import InputError, UnusableFile, shown
from glmbatch.ledger.fragments import (
    FileFault,
    Fragment,
    Plan,
    none_usable,
    output_name,
    telling_size,
)
from glmbatch.ledger.input.opening import (
    LinesFile,
    check_table,
    file_digest,
    first_look,
    look_once,
    open_rows,
    read_footer,
    stored_fields,
)
from glmbatch.ledger.input.ranges import limited, ranges
from glmbatch.ledger.input.unchanged import Look, PublishedSource, is_sampled
from glmbatch.settings.conditions import columns_of
from glmbatch.settings.job import CACHE, DataConfig
from glmbatch.store.files import (
    DIGEST_CHARS,
    naming,
    real_path,
    too_long,
    whole_name,
)
from glmbatch.store.inputs.filters import (
    RowFilter,
    check_filter,
    in_folders,
    kept_rows,
    row_filter,
)
from glmbatch.store.inputs.found import Found, Version
from glmbatch.store.inputs.needs import SchemaNeeds, check_schema, from_folders
from glmbatch.store.inputs.nesting import refuse_nesting, refuse_reach
from glmbatch.store.lines.form import LINE_ERROR, form_of
from glmbatch.store.lines.stored import sweep_lines
from glmbatch.store.paths import AnyPath
from glmbatch.store.tables.find import find_input
from glmbatch.store.tables.fitting import differing, fitted_fields, schema_text


class _Outcome(NamedTuple):
    """What became of one usable file: its stamp, and its fragments unless it is unchanged.

    `rechecked` files were digested although their stamp is the recorded one; `silent` ones have
    other bytes than their stamp says. The filter may have `left_out` all rows of a published file.
    """

    look: Look
    fragments: list[Fragment] | None
    rechecked: bool = False
    silent: bool = False
    left_out: bool = False


def plan_fragments(  # noqa: PLR0913 - the input, what is known of it, and how much to read
    data: DataConfig,
    needs: SchemaNeeds,
    published: Mapping[str, PublishedSource],
    *,
    again: Collection[str] = (),
    version: Version | None = None,
    seed: str = "",
    raise_faults: bool = False,
    digests: bool = True,
    cache: str = CACHE,
) -> Plan:
    """Check every file of the input against the job's `needs`, and cut it into fragments.

    A `published` source is left alone if its stamp or its bytes are the recorded ones, unless it is
    in `again`; then its digest is known if its stamp is the same. `seed` draws the sources to
    digest again all the same. Fragments are in the order of file names, then of rows. Without
    `digests` only footers are read. A table is read at the `version` of an earlier plan, if any.

    Rows of lines are stored in `cache`. Unusable files are listed in the plan; with `raise_faults`,
    the first raises UnusableFile. InputError when all are unusable, or two would have one output.
    """
    found = find_input(data, version)
    refuse_nesting(found, data.input, data.output)
    keeps = row_filter(data.where, data.text_column, found.unsaid)
    check_table(found, data.input, needs, keeps)
    found, left_out = in_folders(found, keeps, data.input, data.where)
    look = _Looker(found, data, needs, published, frozenset(again), seed, digests, keeps, cache)
    outcomes = look.left_alone()
    names = [name for name in found.names if name not in outcomes]
    faults = [FileFault(source=shown(name), reason=why) for name, why in found.refused.items()]
    if raise_faults and faults:
        raise UnusableFile(faults[0].reason)
    for name, outcome in zip(names, look.at_all(names), strict=True):
        if isinstance(outcome, _Outcome):
            outcomes[name] = outcome
        elif raise_faults:
            raise outcome
        else:
            faults.append(_fault(found.root, name, outcome))
    if not outcomes:
        raise none_usable(shown(data.input), faults)
    plan = _joined(outcomes, faults, found, data, left_out)
    refuse_reach(found, data.input, data.output, (part.output_name for part in plan.fragments))
    return plan


def _joined(
    outcomes: Mapping[str, _Outcome],
    faults: Sequence[FileFault],
    found: Found,
    data: DataConfig,
    left_out: Sequence[str],
) -> Plan:
    """The plan of all usable files, in the order of `outcomes`; the filter left out others too.

    InputError when two would have the same output.
    """
    parts: list[Fragment] = []
    stamps: dict[str, tuple[int, ...]] = {}
    unchanged: dict[str, tuple[int, ...]] = {}
    for name, outcome in outcomes.items():
        parts += outcome.fragments or []
        if outcome.left_out:
            continue
        kind = unchanged if outcome.fragments is None else stamps
        # A table's own record of a file can be compared with the next without a look at the file.
        kind[name] = found.stamps[name] if found.version else outcome.look.recorded
    _refuse_same_output(parts, unchanged)
    return Plan(
        root=whole_name(found.root),
        fragments=tuple(limited(parts, data.limit)),
        unusable=tuple(faults),
        limit=data.limit,
        skipped=tuple(found.skipped),
        unchanged=unchanged,
        stamps=stamps,
        where=data.where,
        left_out=(*left_out, *(name for name, outcome in outcomes.items() if outcome.left_out)),
        rechecked=sum(outcome.rechecked for outcome in outcomes.values()),
        silent=tuple(name for name, outcome in outcomes.items() if outcome.silent),
        version=found.version,
        columns=schema_text(found.columns) if found.columns is not None else "",
    )


def _fault(root: AnyPath, name: str, error: UnusableFile) -> FileFault:
    """The record of a file `name` that is left out because of `error`."""
    size_bytes = 0 if error.rows is not None else telling_size(root / name)
    reason = shown(error)
    return FileFault(source=name, reason=reason, size_bytes=size_bytes, rows=error.rows)


@dataclass(frozen=True, slots=True)
class _Looker:
    """Looks at the files `found` in an input; the other fields are those of `plan_fragments`."""

    found: Found
    data: DataConfig
    needs: SchemaNeeds
    published: Mapping[str, PublishedSource]
    again: frozenset[str]
    seed: str
    digests: bool
    keeps: RowFilter
    cache: str

    def left_alone(self) -> dict[str, _Outcome]:
        """The files whose stamps when they were found are the recorded ones, without a look.

        Their bytes, links and columns were checked when they were published.
        """
        outcomes = {}
        for name, stamp in self.found.stamps.items():
            source = self.published.get(name)
            same = source is not None and stamp == source.stamp and self._is_kept_so(name)
            if same and name not in self.again and not self._is_drawn(name):
                outcomes[name] = _Outcome(Look(stamp, settled=True), None)
        return outcomes

    def _is_kept_so(self, name: str) -> bool:
        """Whether the published rows of the source `name` were chosen by the same condition."""
        return self.published[name].where == self.keeps.text_for(name)

    def at_all(self, names: Sequence[str]) -> Iterator[_Outcome | UnusableFile]:
        """What became of each file, or why it cannot be used, in order."""
        is_named = self.found.kind in ("file", "folder")
        given = real_path(self.data.input if is_named else self.found.root)

        def outcome(name: str) -> _Outcome | UnusableFile:
            try:
                with naming("data.input"):
                    return self._at(name, given)
            except UnusableFile as error:
                return error

        sweep_lines(self.cache)
        # SHA-256 releases Python's lock, so four threads digest as fast as a disk reads.
        with ThreadPoolExecutor(4) as pool:
            yield from pool.map(outcome, names)

    def _at(self, name: str, given: AnyPath) -> _Outcome:
        """One file. UnusableFile if it is a link that leads out of `given`."""
        path = self.found.root / name
        self._refuse_link(path, given)
        # Before the footer, so that `read_fragment` detects every later change.
        look = first_look(self.found, name)
        try:
            return self._outcome(path, name, look)
        except UnusableFile:
            if (later := look_once(path)).stamp == look.stamp:
                raise
        # It was replaced, or only linked, which changes its stamp too.
        return self._outcome(path, name, later)

    def _outcome(self, path: AnyPath, name: str, look: Look) -> _Outcome:
        """One file that has the stamp of `look`. UnusableFile if it has another one by now."""
        source = self.published.get(name)
        leave = source is not None and name not in self.again and self._is_kept_so(name)
        drawn = leave and self._is_drawn(name)
        stamp = self.found.stamps[name] if self.found.version else look.stamp
        same_stamp = source is not None and stamp == source.stamp
        digest = ""
        # Nothing but a file is digested: reading a pipe would wait for its writer.
        if source is not None and self.digests and path.is_file():
            trusted = same_stamp and not drawn
            digest = source.digest if trusted else file_digest(path, look)
            if leave and digest == source.digest:
                return _Outcome(look, None, rechecked=same_stamp and drawn)
        lines: dict[str, str] = {}
        if (form := form_of(name, self.data.lines)) is not None:
            # Stored under their digest, so also for a look alone.
            digest = digest or file_digest(path, look)
            lines = self._stored(LinesFile(path, form, look.stamp, digest), name)
        fragments = self._cut(path, name, look, lines)
        if self.digests and not digest:
            digest = file_digest(path, look)
        fragments = [fragment.model_copy(update={"digest": digest}) for fragment in fragments]
        # Its published rows met another condition. They stay, as those of a folder left out do.
        keep = source is not None and self.data.missing_sources == "keep"
        empty = bool(fragments[0].span) and not any(fragment.rows for fragment in fragments)
        if keep and empty and not self._is_kept_so(name):
            return _Outcome(look, None, left_out=True)
        silent = same_stamp and source is not None and digest not in ("", source.digest)
        return _Outcome(look, fragments, silent=silent)

    def _is_drawn(self, name: str) -> bool:
        """Whether the unchanged source `name` is to be digested again in this run."""
        may_change = self.found.version is None
        return may_change and self.digests and is_sampled(name, self.seed, self.data.recheck_share)

    def _refuse_link(self, path: AnyPath, given: AnyPath) -> None:
        if not self.data.follow_links and not real_path(path).is_relative_to(given):
            raise UnusableFile(
                f"{shown(path)}: is a link that leads out of the input. Copy the file, or set "
                "data.follow_links if you trust everyone who can write there."
            )

    def _stored(self, file: LinesFile, name: str) -> dict[str, str]:
        """Store the rows of a file of lines; the fields of its fragments that say where and how."""
        wanted = {needed.name for needed in self.needs.read if not needed.is_history}
        left = self.keeps.left_of(name)
        if not isinstance(left, bool):
            wanted |= {*columns_of(left)} - {LINE_ERROR}
        return stored_fields(file, self.cache, wanted - self.found.given(name).keys())

    def _cut(
        self, path: AnyPath, name: str, look: Look, lines: Mapping[str, str]
    ) -> list[Fragment]:
        """The fragments of one file, without its digest; `lines` says where its rows are stored."""
        left = self.keeps.left_of(name)
        kept = None
        with open_rows(path, look.stamp, lines) as file:
            schema = file.schema_arrow
            group_rows, written = read_footer(path, file)
            folders = self.found.given(name)
            try:
                if self.found.columns is not None:
                    unsaid = self.found.unsaid.get(name, {})
                    table = self.found.columns
                    written["fitted"] = differing(shown(path), schema, table, folders, unsaid)
                    schema = pa.schema(fitted_fields(list(schema), written["fitted"]))
                check_schema(shown(path), name, schema, self.needs, folders)
                if not isinstance(left, bool):
                    check_filter(shown(path), name, left, schema, folders)
                _check_output_name(name, self.data)
            except UnusableFile as error:
                error.rows = sum(group_rows)
                raise
            if not isinstance(left, bool):
                kept = list(kept_rows(file, left, str(path), written.get("fitted", "")))
        partitions = from_folders(folders, [needed.name for needed in self.needs.read], schema)
        chosen = self.data.columns_out
        fragments = []
        for part in ranges(group_rows, self.data.rows_per_fragment, kept):
            fragments.append(
                Fragment(
                    source=name,
                    path=str(path),
                    digest="",
                    stamp=look.stamp,
                    partitions=partitions,
                    columns=chosen,
                    where=self.keeps.text_for(name),
                    **written,
                    **lines,
                    **part._asdict(),
                )
            )
        return fragments


def _refuse_same_output(ranges: list[Fragment], unchanged: Iterable[str]) -> None:
    # For example a.parquet and a, which one glob may match.
    sources = {output_name(source, 0): source for source in unchanged} if ranges else {}
    for fragment in ranges:
        name = output_name(fragment.source, 0)
        first = sources.setdefault(name, fragment.source)
        if first != fragment.source:
            raise InputError(
                f"{first} and {fragment.source} would both be written to {name}. "
                "Rename one, or set data.input to leave it out."
            )


def _check_output_name(name: str, data: DataConfig) -> None:
    """UnusableFile when the output file of `name` would have a name that cannot be used."""
    longest = output_name(name, 0)
    if data.format != "parquet":
        longest = f"{longest}.{DIGEST_CHARS * '0'}"  # as run/publish.py adds it
    if problem := too_long(data.output, longest):
        raise UnusableFile(f"{shown(name)}: the name of its output {problem}. Rename the file.")
    if data.format == "iceberg" and "://" in data.output and {*data.output, *name} & {"?", "#"}:
        raise UnusableFile(
            f"{shown(name)}: readers of an Iceberg table in a store take ? and # in {data.output} "
            "and below it for the end of a name. Rename the file, or set data.output."
        )
