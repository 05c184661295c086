"""Labelled rows: read, audited, and split so that no text stands on both sides. Text only; no tensors."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from glmbatch.errors import InputError
from glmbatch.settings.tuning import LabelledData
from glmbatch.store.files import digest_file, find_files
from glmbatch.store.parquet import is_text, open_parquet, prompt_values, read_rows
from glmbatch.store.paths import location

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
MOST_LABELS = 1000
SHOWN = 5


class Example(NamedTuple):
    """A text and its label, or the answer to be written to it, and where they stand: "a.parquet row 7"."""

    place: str
    text: str
    label: str

    @property
    def same(self) -> str:
        """What texts share that are the same to a reader, whatever the form of letters, their case and the blanks."""
        return " ".join(unicodedata.normalize("NFKC", self.text).casefold().split())


class LabelAudit(BaseModel, frozen=True, extra="forbid"):
    """What was found in the labelled rows. `warnings` say what a person should look at.

    `rows` as read, `used` of them split; `without_text`, `without_label`, `conflicting` and `leaking` were left out.
    `repeated` rows have a text and label that stood before, and stay on its side of the split.
    """

    files: Mapping[str, str]
    rows: int
    used: int
    without_text: int
    without_label: int
    repeated: int
    conflicting: int
    leaking: int
    labels: Mapping[str, int]
    parts: Mapping[str, int]
    warnings: tuple[str, ...]


class Labelled(NamedTuple):
    """The rows of each part, and what was found in them."""

    parts: Mapping[Part, list[Example]]
    audit: LabelAudit

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted(self.audit.labels))


class Rows(NamedTuple):
    """All rows with a text and a label; the part that `given` names by their place, and the digest of each file."""

    examples: list[Example]
    given: Mapping[str, Part]
    skipped: Mapping[str, int]
    files: Mapping[str, str]


def read_labelled(data: LabelledData) -> Labelled:
    """Read, audit and split all rows. InputError when nothing sound can be trained on them."""
    examples, given, skipped, files = read_rows_of(data)
    rows = len(examples) + sum(skipped.values())
    kept, conflicting = _without_conflicts(examples, data)
    if data.response_column is None:
        _check_labels(data, kept)
    split = _as_given(kept, given) if data.split_column is not None else _by_text(kept, data)
    leaking = len(kept) - sum(map(len, split.values()))
    counts = Counter(
        each.label for part in split.values() for each in part if data.response_column is None
    )
    _check_split(data, split)
    audit = LabelAudit(
        files=files,
        rows=rows,
        used=sum(map(len, split.values())),
        without_text=skipped.get("text", 0),
        without_label=skipped.get("label", 0),
        repeated=len(kept) - len({(each.same, each.label) for each in kept}),
        conflicting=conflicting,
        leaking=leaking,
        labels=dict(counts.most_common()),
        parts={part: len(split[part]) for part in PARTS},
        warnings=tuple(_warnings(counts, rows, skipped, conflicting, leaking)),
    )
    return Labelled(split, audit)


def read_rows_of(data: LabelledData) -> Rows:
    """All rows of the files, those without text or label counted and left out. InputError when none is left."""
    root, names = find_files(data.input)
    files: dict[str, str] = {}
    examples: list[Example] = []
    given: dict[str, Part] = {}
    skipped = Counter[str]()
    for name in names:
        files[name] = digest_file(root / name)
        texts, labels, parts = _columns(str(root / name), data)
        for row, (text, label, part) in enumerate(zip(texts, labels, parts, strict=True)):
            if not isinstance(text, str) or not text.strip():
                skipped["text"] += 1
            elif not isinstance(label, str) or not label.strip():
                skipped["label"] += 1
            else:
                kept = label.strip() if data.response_column is None else label
                examples.append(Example(f"{name} row {row}", text, kept))
                if data.split_column is not None:
                    given[examples[-1].place] = _part(f"{name} row {row}", part, data.split_column)
    rows = len(examples) + sum(skipped.values())
    if not examples:
        raise InputError(
            f"{data.input}: none of {rows} rows has a text and a label. Set data.text_column."
        )
    return Rows(examples, given, skipped, files)


def text_keys(examples: Sequence[Example]) -> np.ndarray:
    """For each example the first 8 bytes of a digest of what its text has in common with others that are the same."""
    digests = (
        hashlib.blake2b(each.same.encode(errors="replace"), digest_size=8).digest()
        for each in examples
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def _columns(where: str, data: LabelledData) -> list[list[str | bytes | None]]:
    """Texts, labels and parts (None without a split column) of one file; a folder `name=value` above it is a column."""
    names = [
        data.text_column,
        data.response_column or data.label_column,
        *([data.split_column] if data.split_column else []),
    ]
    with open_parquet(location(where)) as file:
        schema, groups, rows = (
            file.schema_arrow,
            range(file.metadata.num_row_groups),
            file.metadata.num_rows,
        )
    parts = [part.partition("=") for part in location(where).parts[:-1]]
    folders = {
        name: unquote(value) for name, mark, value in parts if mark and name not in schema.names
    }
    answer = "label_column" if data.response_column is None else "response_column"
    for setting, name in zip(("text_column", answer, "split_column"), names, strict=False):
        if name in folders:
            continue
        if schema.names.count(name) != 1:
            raise InputError(
                f"{where}: no column {name!r}; it has {[*schema.names, *folders]}. Set data.{setting}."
            )
        kind = schema.field(name).type
        if not is_text(kind) and not (
            setting == "label_column" and (pa.types.is_integer(kind) or kind == pa.bool_())
        ):
            wanted = "text or whole numbers" if setting == "label_column" else "text"
            raise InputError(
                f"{where}: column {name!r} holds {kind}, not {wanted}. Set data.{setting}."
            )
    stored = [name for name in names if name not in folders]
    batches = (
        list(read_rows(location(where), list(groups), 0, rows, stored)) if stored and rows else []
    )
    columns: list[list[str | bytes | None]] = []
    for name in names:
        values = (
            [prompt_values(batch.column(name)) for batch in batches]
            if name in stored
            else [[folders[name]] * rows]
        )
        columns.append([value for part in values for value in part])
    return columns if data.split_column else [*columns, [None] * rows]


def _part(where: str, value: str | bytes | None, column: str) -> Part:
    for part in PARTS:
        if value == part:
            return part
    raise InputError(
        f"{where}: {column!r} is {value!r}, not one of {', '.join(PARTS)}. Set data.split_column."
    )


def _without_conflicts(
    examples: Sequence[Example], data: LabelledData
) -> tuple[list[Example], int]:
    labels: dict[str, set[str]] = defaultdict(set)
    for each in examples:
        labels[each.same].add(each.label)
    conflicting = sum(len(labels[each.same]) > 1 for each in examples)
    if data.response_column is not None:
        return list(examples), 0  # there may be many good answers
    if data.conflicts == "keep":
        return list(examples), conflicting
    return [each for each in examples if len(labels[each.same]) == 1], conflicting


def _as_given(examples: Sequence[Example], given: Mapping[str, Part]) -> dict[Part, list[Example]]:
    """The split that the data names; a text that stands on two sides stays on that which is held out longest."""
    side: dict[str, Part] = {}
    for each in examples:
        part = given[each.place]
        if PARTS.index(part) >= PARTS.index(side.get(each.same, "train")):
            side[each.same] = part
    split: dict[Part, list[Example]] = {part: [] for part in PARTS}
    for each in examples:
        if given[each.place] == side[each.same]:
            split[side[each.same]].append(each)
    return split


def _by_text(examples: Sequence[Example], data: LabelledData) -> dict[Part, list[Example]]:
    """Each label's texts in an order that the seed and the texts alone decide, cut into three parts.

    Rows of one text stay together, and a row that is added or moved changes no other's side but at the cuts.
    """
    texts: dict[str, set[str]] = defaultdict(set)
    for each in examples:
        texts[each.label if data.response_column is None else ""].add(each.same)
    side: dict[str, Part] = {}
    seed = data.seed.to_bytes(8, "big")
    for label in sorted(texts):
        ordered = sorted(
            texts[label],
            key=lambda text: hashlib.blake2b(text.encode(errors="replace"), key=seed).digest(),
        )
        test, valid = (
            max(1, round(len(ordered) * share)) for share in (data.test_share, data.valid_share)
        )
        for at, text in enumerate(ordered):
            side.setdefault(
                text, "test" if at < test else "valid" if at < test + valid else "train"
            )
    split: dict[Part, list[Example]] = {part: [] for part in PARTS}
    for each in examples:
        split[side[each.same]].append(each)
    return split


def _check_labels(data: LabelledData, examples: Sequence[Example]) -> None:
    texts: dict[str, set[str]] = defaultdict(set)
    for each in examples:
        texts[each.label].add(each.same)
    if len(texts) < 2:
        raise InputError(
            f"{data.input}: all rows have the label {next(iter(texts), None)!r}; a choice needs two."
        )
    if len(texts) > MOST_LABELS:
        raise InputError(
            f"{data.input}: {len(texts)} labels, as if {data.label_column!r} were no label. Set data.label_column."
        )
    for label, found in texts.items():
        if len(found) < len(PARTS) and data.split_column is None:
            raise InputError(
                f"{data.input}: {label!r} has {len(found)} different texts, it needs {len(PARTS)}: one to train on, "
                "two to hold out. Add rows of it, or leave it out."
            )


def _check_split(data: LabelledData, split: Mapping[Part, Sequence[Example]]) -> None:
    trained = {each.label for each in split["train"]}
    for part in PARTS:
        if not split[part]:
            raise InputError(
                f"{data.input}: no row is left for {part}. Add rows, or set data.{part}_share."
            )
        unseen = sorted({each.label for each in split[part]} - trained)
        if unseen and data.response_column is None:
            raise InputError(
                f"{data.input}: {part} has the labels {unseen[:SHOWN]}, which no training row has. Add rows of them, "
                "or leave them out."
            )


def _warnings(
    counts: Mapping[str, int], rows: int, skipped: Mapping[str, int], conflicting: int, leaking: int
) -> list[str]:
    most, fewest = max(counts.values(), default=1), min(counts.values(), default=20)
    rare = [label for label, count in counts.items() if count == fewest] or [""]
    said = [
        (
            most >= 10 * fewest,
            f"{rare[0]!r} has {fewest} rows, the most frequent label {most}; see class_weights",
        ),
        (fewest < 20, f"{rare[0]!r} has {fewest} rows: its scores say little"),
        (
            conflicting,
            f"{conflicting} of {rows} rows have a text that stands there with two labels",
        ),
        (leaking, f"{leaking} rows were left out: their text stands on a held-out side too"),
        (sum(skipped.values()), f"{sum(skipped.values())} of {rows} rows have no text or no label"),
    ]
    return [text for holds, text in said if holds]
