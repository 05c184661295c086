"""Find the files of labelled rows, which are read from Parquet alone."""

from __future__ import annotations

from glmbatch.errors import InputError, shown
from glmbatch.store.inputs.find import SETTING, find_files
from glmbatch.store.inputs.found import Found
from glmbatch.store.lines.form import is_lines


def labelled_files(address: str, setting: str = SETTING) -> Found:
    """The files of labelled rows at `address`: a file, a folder or a glob.

    InputError as for `find_files`, and for CSV and JSON lines; it names the `setting`.
    """
    try:
        found = find_files(address, lines=True)
    except InputError as error:
        raise type(error)(str(error).replace(SETTING, setting)) from error
    for reason in found.refused.values():
        raise InputError(reason)
    for name in found.names:
        if is_lines(name):
            advice = "Convert the file."
            if found.kind != "file":
                advice = "Convert the file, or name the Parquet files alone, as in rows/*.parquet."
            raise InputError(
                f"{shown(found.root / name)}: labelled rows must be Parquet, not CSV or JSON "
                f"lines. {advice}"
            )
    return found
