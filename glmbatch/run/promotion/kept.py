"""Measurements that are kept in the output, so that nothing is measured twice. Knows no models.

    OUTPUT/_glmbatch/measured/<key>.json         the score of each labelled row for one step
    OUTPUT/_glmbatch/measured/published.json     which of them are of what is published

So a step is compared with the published one even if that one's model is gone. Without these files,
steps are measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from glmbatch.errors import GlmbatchError
from glmbatch.report.counts import Measured
from glmbatch.run.work import Question
from glmbatch.store.files import committed
from glmbatch.store.folder import Folder, by_age
from glmbatch.store.paths import AnyPath
from glmbatch.store.seal import sealed, unsealed

logger = logging.getLogger(__name__)

MEASURED = "_glmbatch/measured"
PUBLISHED = "published"
KEPT = 100  # of all steps; those of what is published stay beside them
TEXT_CHARS = 16  # of a row's id, which begins with a digest of its text


class Kept(BaseModel, frozen=True, extra="forbid"):
    """The scores of one step over labelled rows, None for rows that do not count.

    `made_with` has the step keys of the step and of the earlier ones that it uses, `inputs` a
    digest of their columns and conditions. `ids` tell which rows of two measurements are the same,
    and `values` is a digest of what their prompts and conditions read there.
    """

    step: str
    made_with: dict[str, str]
    inputs: str
    ids: tuple[str, ...]
    values: str
    scores: tuple[float | None, ...]

    @property
    def key(self) -> str:
        """The same key means the same measurement."""
        return digest(self.model_dump(mode="json", exclude={"scores"}))


def digest(parts: object) -> str:
    """32 hexadecimal digits for JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def columns_read(questions: Sequence[Question]) -> set[str]:
    """The columns that the prompts and conditions of `questions` read."""
    columns: set[str] = set()
    for question in questions:
        when = question.inputs.when
        columns.update(question.inputs.sources.values(), when.columns.values() if when else ())
    return columns


def asked_with(question: Question, questions: Mapping[str, Question]) -> list[Question]:
    """The question and the earlier ones whose answers it uses, in step order."""
    names = {question.name}
    for name in reversed([*questions]):
        if name in names:
            names.update(questions[name].inputs.earlier)
    return [each for name, each in questions.items() if name in names]


def inputs_of(questions: Sequence[Question]) -> str:
    """A digest of the columns and conditions of `questions`."""
    inputs = {each.name: each.inputs for each in questions}
    read = {
        name: own.model_dump(mode="json", exclude_defaults=True) for name, own in inputs.items()
    }
    return digest(read)


class KeptMeasurements:
    """The measurements kept in the output folder `root`."""

    def __init__(self, root: AnyPath) -> None:
        self._folder = root / MEASURED

    def find(self, key: str) -> Kept | None:
        """The measurement under `key`; None if it is not there, or damaged."""
        content = self._read(key)
        try:
            kept = None if content is None else Kept.model_validate(content)
        except ValidationError:
            return None
        return kept if kept is not None and kept.key == key else None

    def keep(self, kept: Kept) -> None:
        """Keep a measurement; the oldest ones go, except those of what is published."""
        self._write(kept.key, kept.model_dump())
        published = {PUBLISHED, *self._marks().values()}
        for path in by_age(self._folder, ".json")[:-KEPT]:
            if path.name.removesuffix(".json") not in published:
                path.unlink(missing_ok=True)

    def of_published(self, step: str, step_keys: Mapping[str, str]) -> Kept | None:
        """The measurement of the published `step`, None if it was not measured.

        `step_keys` are those of what is published.
        """
        marked = self._marks().get(step)
        keys = [path.name.removesuffix(".json") for path in by_age(self._folder, ".json")]
        # A killed publication may have left an older mark, so the keys decide.
        for key in [*([marked] if marked else []), *reversed(keys)]:
            kept = self.find(key)
            if (
                kept is not None
                and kept.step == step
                and kept.made_with.items() <= step_keys.items()
            ):
                return kept
        return None

    def mark_published(self, measured: Sequence[Measured]) -> None:
        """Note that these measurements are of what is published now.

        An error is logged: the publication is complete.
        """
        marks = {each.step: each.kept for each in measured}
        if marks == self._marks():
            return
        try:
            self._write(PUBLISHED, marks)
        except (GlmbatchError, OSError) as error:
            logger.warning("%s: what is published could not be noted: %s", self._folder, error)

    def _marks(self) -> dict[str, str]:
        marks = self._read(PUBLISHED)
        return marks if isinstance(marks, dict) else {}

    def _read(self, key: str) -> Any:
        try:
            return unsealed((self._folder / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def _write(self, key: str, content: dict[str, Any]) -> None:
        with committed(self._folder / f"{key}.json") as partial:
            partial.write_text(sealed(content), encoding="utf-8")


def kept_in(output: str) -> KeptMeasurements:
    """The measurements kept in the folder `output`."""
    return KeptMeasurements(Folder(output).path)
