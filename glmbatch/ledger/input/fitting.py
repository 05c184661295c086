"""Fit a plan to its output: one unit for each INT96 column, and a Delta table's types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from glmbatch.errors import InputError, UnusableFile, counted, shown
from glmbatch.ledger.fragments import FileFault, Plan, none_usable
from glmbatch.ledger.manifest import Manifest, PublishedFile
from glmbatch.ledger.staying import staying, ways_out
from glmbatch.ledger.tables.delta import is_table
from glmbatch.ledger.tables.table import check_sources, table_over
from glmbatch.ledger.tables.types import FORMATS
from glmbatch.settings.job import DataConfig
from glmbatch.settings.kinds import OutputFormat
from glmbatch.store.folder import Folder
from glmbatch.store.parquet import TimeUnit
from glmbatch.store.times import ALL_ROWS, Times, look_at_times, one_unit, with_common_columns


def fit_times(
    data: DataConfig, plan: Plan, manifest: Manifest | None, *, raise_faults: bool
) -> Plan:
    """The plan with one unit for each INT96 column, without files whose times the unit cannot hold.

    A column needs one unit: a folder with two types for a column cannot be read as one table.
    """
    times, reasons = _times_of_sources(plan)
    if not times and not reasons:
        return plan
    plan = _without(plan, reasons, raise_faults)
    stay = staying(manifest, plan, drop_missing=data.missing_sources == "drop").files
    kept = [Folder(data.output) / file.output_name for file in stay]
    files = manifest.files if manifest is not None else ()
    published = [Folder(data.output) / file.output_name for file in files]
    units: dict[str, TimeUnit] = {}
    misfits = {}
    for group in with_common_columns(times):
        # The only unit of times in a table.
        unit = one_unit(group.values(), kept, published) if data.format == "parquet" else "us"
        units.update(dict.fromkeys(group, unit))
        for source, its_times in group.items():
            if problem := its_times.misfit(unit):
                misfits[source] = f"{Folder(plan.root) / source}: {problem}"
    plan = _without(plan, misfits, raise_faults)
    fragments = []
    for fragment in plan.fragments:
        fragments.append(fragment.model_copy(update={"int96": units.get(fragment.source, "")}))
    return plan.model_copy(update={"fragments": tuple(fragments)})


def _times_of_sources(plan: Plan) -> tuple[dict[str, Times], dict[str, str]]:
    """The INT96 times of each source that has any, and why other sources cannot be used."""
    # Fragments of one large row group share one scan.
    rows: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for fragment in plan.fragments:
        if fragment.int96:
            place = (fragment.source, fragment.path, fragment.row_groups)
            # Of picked rows, all in their row groups.
            most = ALL_ROWS if fragment.span else fragment.skip_rows + fragment.rows
            rows[place] = max(rows.get(place, 0), most)

    def look(place: tuple[str, str, tuple[int, ...]]) -> Times | str:
        try:
            found = look_at_times(place[1], place[2], 0, rows[place])
        except UnusableFile as error:
            return str(error)
        return found

    times: dict[str, Times] = {}
    reasons: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:
        for (source, path, _), outcome in zip(rows, pool.map(look, rows), strict=True):
            if isinstance(outcome, str):
                reasons[source] = outcome
                continue
            times[source] = times.get(source, outcome).joined(outcome)
            if times[source].finer and times[source].far:
                reasons[source] = f"{path}: {times[source].misfit('us')}"
    for source in reasons:
        times.pop(source, None)
    return times, reasons


def _without(plan: Plan, reasons: Mapping[str, str], raise_faults: bool) -> Plan:
    """The plan without the sources in `reasons`. UnusableFile instead if `raise_faults`."""
    if raise_faults:
        for reason in reasons.values():
            raise UnusableFile(reason)
    rows: Counter[str] = Counter()
    fragments = []
    for fragment in plan.fragments:
        rows[fragment.source] += fragment.rows
        if fragment.source not in reasons:
            fragments.append(fragment)
    faults = list(plan.unusable)
    for source, reason in reasons.items():
        faults.append(FileFault(source=source, reason=shown(reason), rows=rows[source]))
    if not fragments and not plan.unchanged:
        raise none_usable(plan.root, faults)
    return plan.model_copy(update={"fragments": tuple(fragments), "unusable": tuple(faults)})


def fit_format(data: DataConfig, plan: Plan, manifest: Manifest | None) -> Plan:
    """The plan with the types that a table as output gives to each fragment's columns.

    InputError if the output is a table of another format, or if a published file that should stay
    is gone, in any format.
    """
    table = table_over(data.output, data.format, data.table or "")
    published: OutputFormat = manifest.format if manifest is not None else "parquet"
    if published == "delta" or is_table(data.output):
        published = "delta" if is_table(data.output) else "parquet"
    if published not in ("parquet", data.format):
        raise InputError(
            f"{data.output}: is {FORMATS[published].a_table}. Set data.format to {published}, or "
            "data.output."
        )
    drop_missing = data.missing_sources == "drop"
    stay = staying(manifest, plan, drop_missing=drop_missing).files
    _refuse_lost(data.output, plan, stay, drop_missing=drop_missing)
    if table is None:
        return plan
    sources = {fragment.source: fragment for fragment in plan.fragments}
    files = manifest.files if manifest is not None else ()
    names = dict.fromkeys([file.output_name for file in files], False)
    names |= dict.fromkeys([file.output_name for file in stay], True)
    typed = check_sources(table, sources, names, plan.version)
    fragments = []
    for fragment in plan.fragments:
        fragments.append(fragment.model_copy(update={"typed": typed.get(fragment.source, "")}))
    return plan.model_copy(update={"fragments": tuple(fragments)})


def _refuse_lost(
    output: str, plan: Plan, stay: Sequence[PublishedFile], *, drop_missing: bool
) -> None:
    """InputError when a file that should stay in the output is gone."""
    # Those of unchanged sources were just looked at.
    others = {file.output_name: file for file in stay if file.source not in plan.unchanged}
    places = Folder(output).stamps([*others], len(stay))
    lost = [file for file, place in zip(others.values(), places, strict=True) if place is None]
    if lost:
        damaged = {fault.source for fault in plan.unusable}
        raise InputError(
            f"{output}: {lost[0].output_name} should stay published but is gone: others "
            f"deleted it ({counted(len(lost), 'such file')}). "
            f"{ways_out(lost, plan, damaged, drop_missing=drop_missing)}"
        )
