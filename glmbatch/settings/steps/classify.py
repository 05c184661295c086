"""Classify steps, and the labels, thresholds and verdicts that they take."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from glmbatch.errors import some_of
from glmbatch.settings.columns import Columns
from glmbatch.settings.kinds import Settings, equal_but_for_case, value_for
from glmbatch.settings.steps.step import AbstainedRate, Step, literal


def _distinct(labels: list[str]) -> list[str]:
    if len(labels) < 2:
        raise ValueError(f"a step needs at least two labels; it has {some_of(labels)}")
    if not all(label.strip() for label in labels):
        raise ValueError(f"a label is empty: {some_of(labels)}")
    padded = [label for label in labels if label != label.strip()]
    if padded:
        raise ValueError(f"labels begin or end with a space: {some_of(padded)}; leave it out")
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ValueError(f"labels repeat: {some_of(repeated)}")
    alike = equal_but_for_case(labels)
    if alike:
        raise ValueError(f"labels differ only in case: {some_of(alike)}; keep one of them")
    return labels


def _within_bounds(threshold: float | dict[str, float] | None) -> float | dict[str, float] | None:
    given = threshold.values() if isinstance(threshold, dict) else [threshold]
    for probability in given:
        if probability is not None and not 0 < probability < 1:
            raise ValueError(f"a threshold is between 0 and 1; it is {probability}")
    return threshold


def _sure_enough(least: float | dict[str, float] | None) -> float | dict[str, float] | None:
    given = least.values() if isinstance(least, dict) else [least]
    for probability in given:
        if probability is not None and not 0 < probability <= 1:
            raise ValueError(f"a least probability is above 0 and at most 1; it is {probability}")
    return least


def _two_words(verdicts: list[str] | None) -> list[str] | None:
    if verdicts is not None:
        distinct = {verdict.strip() for verdict in verdicts} - {""}
        if len(distinct) != len(verdicts) or len(verdicts) != 2:
            raise ValueError(f"two different words are needed, not {some_of(verdicts)}")
        first, second = verdicts
        if first.startswith(second) or second.startswith(first):
            # The shorter one would always be as likely as the longer one, or likelier.
            raise ValueError(f"one verdict begins the other: {some_of(verdicts)}; reword one")
    return verdicts


def _described(labels: object) -> dict[Any, str] | None:
    """Labels with their descriptions, "" for none; None if they are given without any."""
    if isinstance(labels, list) and any(isinstance(label, Mapping) for label in labels):
        pairs = []
        for label in labels:
            entry = {"name": label} if isinstance(label, str) else label
            if not isinstance(entry, Mapping) or "name" not in entry:
                raise ValueError("a label is a text, or has a name and a description")
            unknown = sorted(map(str, entry.keys() - {"name", "description"}))
            if unknown:
                raise ValueError(f"a label has a name and a description, and no {some_of(unknown)}")
            pairs.append((entry["name"], entry.get("description")))
    elif isinstance(labels, Mapping):
        pairs = list(labels.items())
    else:
        return None
    names = [str(name) for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"labels repeat: {some_of(repeated)}")
    described = {}
    for name, description in pairs:
        if isinstance(name, list | dict):  # other values that are no text are refused as labels
            raise ValueError(f"the name of a label is a text, not {name!r}")
        if not isinstance(description, str | None):
            raise ValueError(f"the description of label {name!r} is no text; put it in quotes")
        described[name] = " ".join((description or "").split())
    return described


def _with_descriptions(template: str, described: Mapping[Any, str]) -> str:
    """`template` with a line for each label in the place of {labels}, or else at its end."""
    lines = [f"{name}: {text}" if text else str(name) for name, text in described.items()]
    block = literal("\n".join(lines))
    parts = []
    placed = False
    for text, name, spec, conversion in string.Formatter().parse(template):
        parts.append(literal(text))
        if name == "labels" and not spec and not conversion:
            parts.append(block)
            placed = True
        elif name is not None:
            marks = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            parts.append(f"{{{name}{marks}}}")
    return "".join(parts) if placed else f"{template}\n\n{block}"


Labels = Annotated[list[str], AfterValidator(_distinct)]
# For a form; `_within_bounds` says what is wrong in one line.
Probability = Annotated[
    float, Field(json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1})
]
LeastProbability = Annotated[float, Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})]
Threshold = Annotated[
    Probability | dict[str, Probability] | None,
    AfterValidator(_within_bounds),
    Field(
        description="With multiple: the probability from which on a label is in the answer, for "
        "all labels or as label: probability. Empty, and for labels left out: 0.5."
    ),
]
AbstainBelow = Annotated[
    LeastProbability | dict[str, LeastProbability] | None,
    AfterValidator(_sure_enough),
    Field(
        description="Least probability of the chosen label, for all labels or as "
        "label: probability; below it, the row gets no label and the reason `abstained`, which is "
        "no failure. Empty, and for labels left out: 0."
    ),
]
Verdicts = Annotated[
    list[str] | None,
    AfterValidator(_two_words),
    Field(
        description="With multiple: what the model says of a label that applies, and of one that "
        "does not, in the language of the prompt. Empty: yes and no, so that the likelihoods of "
        "`label: yes` and `label: no` are compared."
    ),
]


def check_multiple(
    multiple: bool,
    labels: Sequence[str] | None,
    threshold: float | dict[str, float] | None,
    verdicts: Sequence[str] | None,
) -> None:
    """ValueError if these settings of a step do not go together."""
    if not multiple:
        for setting, value in (("threshold", threshold), ("verdicts", verdicts)):
            if value is not None:
                raise ValueError(f"{setting} is for steps with multiple: true; remove it")
        return
    check_named("threshold", threshold, labels)


def check_named(
    setting: str, given: float | dict[str, float] | None, labels: Sequence[str] | None
) -> None:
    """ValueError if `given` names something else than one of `labels`, which may be unknown."""
    unknown: list[str] = []
    if labels is not None and isinstance(given, dict):
        unknown = sorted(given.keys() - set(labels))
    if unknown:
        raise ValueError(f"{setting} names {some_of(unknown)}, which is no label")


class ClassifyAudits(Settings):
    """Limits on a classify step's labels; a run that exceeds one publishes nothing."""

    max_label_drift: float | None = Field(
        None,
        gt=0,
        description="Maximum shift of the label shares since the last publication, as a population "
        "stability index: 0.1 is a small shift, 0.25 a large one. Start with 0.25. "
        "Empty: no audit.",
    )
    max_abstained_rate: AbstainedRate = None


class ClassifyStep(Step):
    """Choose one label for each row, or judge each label by itself."""

    kind: Literal["classify"] = Field(
        "classify", description="Makes this a step that chooses a label for each row."
    )
    labels: Labels | None = Field(
        None,
        description="Labels to choose from: a list, or a mapping from labels to descriptions, "
        "which the prompt shows in the place of {labels}, or else at its end. "
        "Empty: the labels of the checkpoint's trained head.",
    )
    abstain_below: AbstainBelow = None
    multiple: bool = Field(
        False,
        description="Whether a row may have several labels, or none: each label is judged by "
        "itself, and the answer is a list.",
    )
    number: bool = Field(
        False,
        description="Whether the answer is a number, as a checkpoint's head for regression "
        "predicts it.",
    )
    compare: Literal["sum", "mean", "prior"] = Field(
        "sum",
        description="How labels are compared. sum: by how likely the whole label is. mean: by the "
        "mean log-likelihood of its tokens, which does not put long labels at a disadvantage, but "
        "favors labels whose ends follow from their beginnings. prior: by how much likelier the "
        "row makes it than a prompt with N/A in place of the row's values.",
    )
    threshold: Threshold = None
    verdicts: Verdicts = None
    audits: ClassifyAudits = Field(
        default_factory=ClassifyAudits,
        description="Limits on the labels; a run that exceeds one publishes nothing.",
    )

    @model_validator(mode="before")
    @classmethod
    def _describe_labels(cls, values: object) -> object:
        described = _described(values.get("labels")) if isinstance(values, dict) else None
        if described is None:
            return values
        assert isinstance(values, dict)
        template = values.get("prompt_template", "{text}")
        with suppress(TypeError, ValueError):  # the template's own check says what is wrong
            template = _with_descriptions(template, described)
        # Only text is left of the descriptions, so the step key has them as it has the template.
        return {**values, "labels": list(described), "prompt_template": template}

    @model_validator(mode="after")
    def _multiple_fits(self) -> Self:
        check_multiple(self.multiple, self.labels, self.threshold, self.verdicts)
        check_named("abstain_below", self.abstain_below, self.labels)
        if self.multiple and self.abstain_below is not None:
            raise ValueError("abstain_below is for one label; with multiple: true set threshold")
        if self.compare != "sum" and (self.multiple or self.labels is None):
            raise ValueError(f"compare: {self.compare} is for a choice among labels; remove it")
        return self

    @model_validator(mode="after")
    def _number_fits(self) -> Self:
        if not self.number:
            return self
        of_labels = {
            "labels": self.labels,
            "multiple": self.multiple or None,
            "threshold": self.threshold,
            "verdicts": self.verdicts,
            "abstain_below": self.abstain_below,
            "audits.max_label_drift": self.audits.max_label_drift,
        }
        for setting, value in of_labels.items():
            if value is not None:
                raise ValueError(f"number: true goes without {setting}; remove one of them")
        return self

    @property
    def answer_columns(self) -> list[str]:
        """Names of the columns that the step adds to the output, in order."""
        columns = Columns(self.name)
        return columns.of_number if self.number else columns.of_classify

    def threshold_of(self, label: str) -> float:
        """The probability from which on `label` is in the answer of a row."""
        given = value_for(label, self.threshold)
        return 0.5 if given is None else given

    def least_of(self, label: str) -> float:
        """The least probability with which `label` is chosen; below it, the model abstains."""
        return value_for(label, self.abstain_below) or 0.0
