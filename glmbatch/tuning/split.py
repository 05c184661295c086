"""Audits labelled rows and splits them so that no text is in two parts. No tensors."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from pydantic import BaseModel

from glmbatch.errors import InputError, counted, some_of
from glmbatch.settings.kinds import equal_but_for_case
from glmbatch.settings.tuning import LabelledData, TuneConfig
from glmbatch.tuning.examples import PARTS, TEXT_ALONE, Example, Part, read_examples

# A label column with more values than this is an id or free text.
MOST_LABELS = 1000
# With fewer rows of a label, one row changes its recall by 5 points or more.
FEW_ROWS = 20
# From this ratio on, the most frequent label begins to dominate the rarest.
UNBALANCED = 10
# Number of labels that an error message lists.
SHOWN = 5


class LabelAudit(BaseModel, frozen=True, extra="forbid"):
    """The audit of the labelled rows. All numbers count rows.

    files          SHA-256 digest of each file
    rows           all rows read
    used           rows in the split
    without_text   left out, because the text is missing
    without_label  left out, because the label or answer is missing
    without_value  left out, because another column of the prompt is null
    repeated       same text and label as an earlier row; used, in the same part as that row
    conflicting    left out, because the text has two labels
    leaking        left out, because the split column puts the text into two parts
    labels         used rows by label, most frequent first
    parts          used rows by part
    warnings       sentences for a person to check
    """

    files: Mapping[str, str]
    rows: int
    used: int
    without_text: int
    without_label: int
    without_value: int = 0
    repeated: int
    conflicting: int
    leaking: int
    labels: Mapping[str, int]
    parts: Mapping[str, int]
    warnings: tuple[str, ...]


class Labelled(NamedTuple):
    """The rows of each part, and the audit."""

    parts: Mapping[Part, list[Example]]
    audit: LabelAudit

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in sorted order, which is the order in the head; empty for answers."""
        return tuple(sorted(self.audit.labels))

    @property
    def several(self) -> bool:
        """Whether a row may have several labels."""
        return self.parts["train"][0].several is not None


def with_metric(config: TuneConfig, labelled: Labelled) -> TuneConfig:
    """`config` with the score that decides. InputError if rows cannot be scored by the one set."""
    metric = config.metric or ("micro_f1" if labelled.several else config.promoted_by)
    if (metric, labelled.several) in (("accuracy", True), ("micro_f1", False)):
        lists = "lists, which have" if labelled.several else "single labels, which have"
        raise InputError(
            f"{config.data.input}: column {config.data.label_column!r} has {lists} no {metric}. "
            f"Set metric to {'micro_f1' if labelled.several else 'accuracy'} or macro_f1."
        )
    return config.model_copy(update={"metric": metric})


def read_labelled(
    data: LabelledData, template: str = TEXT_ALONE, also: Sequence[str] = ()
) -> Labelled:
    """Read, audit and split all rows, as `template` asks about them; see `read_examples`.

    InputError if they cannot be trained on.
    """
    rows = read_examples(data, template, also)
    used, conflicting = rows.examples, 0
    if data.response_column is None:  # a text may have several good answers, but only one label
        used = _without_conflicts(rows.examples)
        conflicting = len(rows.examples) - len(used)
        _check_labels(data, used, conflicting)
    split = split_by_text(used, data)
    if data.split_column is not None:
        split = _split_as_given(used, rows.given)
    _check_split(data, split)
    sizes = {part: len(split[part]) for part in PARTS}
    audit = LabelAudit(
        files=rows.files,
        rows=len(rows.examples) + sum(rows.skipped.values()),
        used=sum(sizes.values()),
        without_text=rows.skipped.get("text", 0),
        without_label=rows.skipped.get("label", 0),
        without_value=rows.skipped.get("value", 0),
        repeated=_repeated(used),
        conflicting=conflicting,
        leaking=len(used) - sum(sizes.values()),
        labels={} if data.response_column is not None else _count_labels(split),
        parts=sizes,
        warnings=(),
    )
    return Labelled(split, audit.model_copy(update={"warnings": tuple(_warnings(audit))}))


def split_by_text(examples: Iterable[Example], data: LabelledData) -> dict[Part, list[Example]]:
    """The rows of each part, after splitting each label's texts by a seeded hash of the text.

    A text with several labels counts for the rarest of them, so that rare labels are in every part.
    All rows with the same text are in the same part. Adding rows moves only rows near the
    boundaries between parts; the order of rows does not matter.
    """
    examples = list(examples)
    texts: dict[str, set[str]] = defaultdict(set)
    frequency = Counter(chain.from_iterable(example.names for example in examples))
    for example in examples:
        rarest = min(example.names, key=lambda name: (frequency[name], name), default="")
        texts[rarest if data.response_column is None else ""].add(example.same)
    part_of: dict[str, Part] = {}
    for label in sorted(texts):
        ordered = _shuffled(texts[label], data.seed)
        # At least one text per label for test and for validation. Only with several labels for a
        # row may there be fewer than three texts; the label is then in other texts too.
        least = 1 if examples[0].several is None or len(ordered) >= len(PARTS) else 0
        test = max(least, round(len(ordered) * data.test_share))
        held_out = test + max(least, round(len(ordered) * data.valid_share))
        for position, text in enumerate(ordered):
            part: Part = "train"
            if position < held_out:
                part = "test" if position < test else "valid"
            # If a text has two labels, the first decides for all its rows.
            part_of.setdefault(text, part)
    split: dict[Part, list[Example]] = {part: [] for part in PARTS}
    for example in examples:
        split[part_of[example.same]].append(example)
    return split


def _shuffled(texts: Iterable[str], seed: int) -> list[str]:
    key = seed.to_bytes(8, "big")

    def digest(text: str) -> bytes:
        return hashlib.blake2b(text.encode(errors="replace"), key=key).digest()

    return sorted(texts, key=digest)


def _split_as_given(
    examples: Sequence[Example], given: Mapping[str, Part]
) -> dict[Part, list[Example]]:
    """The split in the data. A text in two parts stays in test before valid before train."""
    part_of: dict[str, Part] = {}
    for example in examples:
        part = given[example.place]
        if PARTS.index(part) >= PARTS.index(part_of.get(example.same, "train")):
            part_of[example.same] = part
    split: dict[Part, list[Example]] = {part: [] for part in PARTS}
    for example in examples:
        if given[example.place] == part_of[example.same]:
            split[part_of[example.same]].append(example)
    return split


def _without_conflicts(examples: Sequence[Example]) -> list[Example]:
    """The examples whose text has only one label; the others contradict each other."""
    labels: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for example in examples:
        labels[example.same].add(example.names)
    return [example for example in examples if len(labels[example.same]) == 1]


def _repeated(examples: Sequence[Example]) -> int:
    return len(examples) - len({(example.same, example.label) for example in examples})


def _count_labels(split: Mapping[Part, Sequence[Example]]) -> dict[str, int]:
    """Number of rows of each label, most frequent first."""
    counts = Counter[str]()
    for examples in split.values():
        for example in examples:
            counts.update(example.names)
    return dict(counts.most_common())


def _check_labels(data: LabelledData, examples: Sequence[Example], conflicting: int) -> None:
    """InputError unless the labels can be learned; `conflicting` rows were left out before."""
    if not examples:
        raise InputError(
            f"{data.input}: every text has several labels. Correct column {data.label_column!r}."
        )
    texts: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        for name in example.names:
            texts[name].add(example.same)
    if not texts:
        raise InputError(
            f"{data.input}: all lists in column {data.label_column!r} are empty. "
            "Add rows with a label."
        )
    if len(texts) < 2 and examples[0].several is None:
        raise InputError(
            f"{data.input}: all rows have the label {next(iter(texts), None)!r}"
            f"{_but_for(conflicting)}. Add rows with another label."
        )
    alike = equal_but_for_case([*texts])
    if alike:
        raise InputError(
            f"{data.input}: labels in column {data.label_column!r} differ only in case: "
            f"{some_of(alike)}. Write them alike."
        )
    if len(texts) > MOST_LABELS:
        raise InputError(
            f"{data.input}: column {data.label_column!r} has {len(texts)} different values, too "
            "many for labels. Set data.label_column."
        )
    if data.split_column is not None:
        return
    for label, distinct in texts.items():
        if len(distinct) < len(PARTS):
            raise InputError(
                f"{data.input}: label {label!r} has {len(distinct)} different texts, but needs "
                f"{len(PARTS)}: one each for train, valid and test. Add rows, or leave it out."
            )


def _but_for(conflicting: int) -> str:
    if not conflicting:
        return ""
    return f", but for {counted(conflicting, 'row')} whose text has several labels"


def _check_split(data: LabelledData, split: Mapping[Part, Sequence[Example]]) -> None:
    trained = _names(split["train"])
    for part in PARTS:
        if not split[part]:
            advice = f"Add rows, or set data.{part}_share."
            if data.split_column is not None:
                advice = f"Name it in column {data.split_column!r}, or set data.split_column."
            raise InputError(f"{data.input}: no rows are left for {part}. {advice}")
        unseen = sorted(_names(split[part]) - trained)
        if unseen and data.response_column is None:
            raise InputError(
                f"{data.input}: {part} has labels {unseen[:SHOWN]}, which no training row has. "
                "Add training rows with them, or leave them out."
            )


def _names(examples: Sequence[Example]) -> set[str]:
    return set(chain.from_iterable(example.names for example in examples))


def _warnings(audit: LabelAudit) -> list[str]:
    warnings = []
    if audit.labels:
        rarest, fewest = min(audit.labels.items(), key=lambda item: item[1])
        most = max(audit.labels.values())
        if most >= UNBALANCED * fewest:
            warnings.append(
                f"{rarest!r} has {counted(fewest, 'row')}, but the most frequent label {most}; "
                "metric macro_f1 weights all labels equally"
            )
        if fewest < FEW_ROWS:
            warnings.append(
                f"{rarest!r} has only {counted(fewest, 'row')}, so its scores are unreliable"
            )
    if audit.conflicting:
        warnings.append(
            f"{audit.conflicting} of {audit.rows} rows were left out: their text has two labels"
        )
    if audit.leaking:
        warnings.append(
            f"{counted(audit.leaking, 'row')} left out: the text is also in another part"
        )
    unusable = audit.without_text + audit.without_label
    if unusable:
        warnings.append(f"{unusable} of {audit.rows} rows have no text or no label")
    if audit.without_value:
        warnings.append(
            f"{audit.without_value} of {audit.rows} rows were left out: a column of the prompt is "
            "null"
        )
    return warnings
