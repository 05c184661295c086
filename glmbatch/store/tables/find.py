"""The files of an input: those of a table at one version, or those of a file, folder or glob."""

from __future__ import annotations

from glmbatch.errors import InputError, shown
from glmbatch.settings.addresses import TABLE_SCHEME
from glmbatch.settings.conditions import columns_of, parse_condition
from glmbatch.settings.job import DataConfig
from glmbatch.store.files import naming
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.find import SETTING, find_files
from glmbatch.store.inputs.found import Found, Version
from glmbatch.store.inputs.tables import is_marked, refuse_tables_above
from glmbatch.store.tables.delta import LOG, find_delta
from glmbatch.store.tables.iceberg import find_iceberg


def find_input(data: DataConfig, version: Version | None = None) -> Found:
    """The files that `data.input` names; those of a table at `version`, or else `data.version`.

    InputError when it is inside another table, or is none although it should have a version.
    """
    number = data.version if version is None else version.number
    if data.input.startswith(TABLE_SCHEME):
        schema_id = None if version is None else version.schema_id
        return find_iceberg(data.input, number, schema_id, _tested(data))
    folder = Folder(data.input).path
    with naming(SETTING):
        if is_marked(folder, LOG):
            refuse_tables_above(folder, SETTING, itself=False)
            return find_delta(folder, number, _tested(data))
    if number is not None:
        raise InputError(
            f"{shown(data.input)}: is no table, so it has no version {number}. Leave out "
            f"data.version, or set {SETTING} to the folder of a Delta table or to an Iceberg table."
        )
    return find_files(data.input, follow_links=data.follow_links, lines=True)


def _tested(data: DataConfig) -> set[str]:
    """The columns that `data.where` tests; `text` in it may mean the text column."""
    if data.where is None:
        return set()
    return {*columns_of(parse_condition(data.where)), data.text_column}
