"""Refuse an output that would be read as input, or that contains the input."""

from __future__ import annotations

from collections.abc import Iterable

from glmbatch.errors import InputError, shown
from glmbatch.store.files import kind_of, naming, real_path
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.find import Matches, split_glob
from glmbatch.store.inputs.found import Found
from glmbatch.store.paths import AnyPath, is_hidden


def refuse_nesting(found: Found, pattern: str, output: str) -> None:
    """InputError when `output` is read with the input `pattern`, or contains `found` files."""
    place = real_path(output)
    with naming("data.output"):
        kind = kind_of(place)
    if kind not in ("folder", None):
        raise InputError(f"{shown(output)}: is a file where a folder is expected. Set data.output.")
    # Other globs are checked by `refuse_reach`, once the names of the output files are known.
    recursive = found.kind in ("folder", "table") or "**" in pattern
    if recursive and place.is_relative_to(real_path(found.root)):
        raise _inside(output, str(found.root))
    # A folder is resolved once for all its files, and a file only if it is a link itself.
    inside: dict[str, bool] = {}
    for name in found.names:
        folder = name.rpartition("/")[0]
        if folder not in inside:
            inside[folder] = _is_within(found.root / folder, place)
        if inside[folder] or (name in found.links and _is_within(found.root / name, place)):
            path = found.root / name
            raise InputError(
                f"{shown(output)}: holds the input file {shown(path)}. Set data.output to a "
                "separate folder."
            )


def _is_within(path: AnyPath, place: AnyPath) -> bool:
    resolved = real_path(path)
    return resolved == place or place in resolved.parents


def refuse_reach(found: Found, pattern: str, output: str, names: Iterable[str]) -> None:
    """InputError when the glob `pattern` matches one of the files `names` written to `output`."""
    if found.kind != "glob":
        return
    root, rest = split_glob(Folder(pattern).path)
    place, base = real_path(output), real_path(root)
    if not place.is_relative_to(base):
        return
    inner = str(place.relative_to(base))
    matches = Matches(rest)
    for name in names:
        written = name if inner == "." else f"{inner}/{name}"
        if not is_hidden(written) and (matches.file(written) or matches.folder_of(written)):
            raise _inside(output, pattern)


def _inside(output: str, pattern: str) -> InputError:
    return InputError(
        f"{shown(output)}: lies inside the input {shown(pattern)}, so answers would be read as "
        "rows. Set data.output."
    )
