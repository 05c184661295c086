"""Whether an output has all files of the table's version that it was made from, and no others.

Reads the table's log or metadata, and opens no file of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from glmbatch.errors import InputError
from glmbatch.ledger.manifest import Manifest
from glmbatch.settings.addresses import TABLE_SCHEME
from glmbatch.settings.conditions import columns_of, parse_condition
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.filters import left_out, row_filter
from glmbatch.store.tables.delta import find_delta
from glmbatch.store.tables.iceberg import find_iceberg


def covering(manifest: Manifest) -> Iterator[tuple[Literal["wrong", "unchecked"], str]]:
    """What is wrong or cannot be checked, in words; nothing for an input that is no table.

    A limited run does not cover its version.
    """
    version = manifest.version
    if version is None or manifest.limit is not None:
        return
    where = columns_of(parse_condition(manifest.where)) if manifest.where else []
    try:
        if version.format == "Iceberg":
            address = f"{TABLE_SCHEME}{version.name}"
            found = find_iceberg(address, version.number, version.schema_id, where)
        else:
            found = find_delta(Folder(manifest.root).path, version.number)
    except InputError as error:
        yield "unchecked", f"{version} cannot be read now: {error}"
        return
    published = {file.source for file in manifest.files}
    known = published | {fault.source for fault in manifest.unusable}
    known |= left_out(found, row_filter(manifest.where, "text", found.unsaid))
    # The manifest does not say which column is called `text` in a condition.
    for name in found.names if "text" not in where else ():
        if name not in known:
            yield "wrong", f"{version} has {name}, of which no row is published"
    for name in sorted(published - set(found.names)):
        yield "wrong", f"{version} does not have {name}, of which rows are published"
