"""Calibrated confidence: how often answers are right of which the model is so sure. Asks no model.

The scores in the ledger stay as the model gave them, so that another calibration asks no row again.
`glmbatch evaluate --calibrate` fits the maps; here they are read and applied.

Shapes: N confidences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field, ValidationError, model_validator

from glmbatch.errors import InputError, some_of
from glmbatch.settings.columns import Columns
from glmbatch.settings.job import AnyStep, ExtractStep
from glmbatch.settings.steps.any_step import calibrated_columns
from glmbatch.store.files import naming, reachable, real_path

# Confidences nearer to 0 or 1 count as this: a model is never so sure, but float32 rounds to 1.
NEAREST = 1e-7
Chance = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Platt(BaseModel, frozen=True, extra="forbid"):
    """The log-odds of the confidence, times `slope`, plus `offset`, are those of being right."""

    kind: Literal["platt"] = "platt"
    slope: Annotated[Number, Field(ge=0)]
    offset: Number

    def chances(self, confidence_N: np.ndarray) -> np.ndarray:
        """How often answers of these confidences are right."""
        return sigmoid(self.slope * log_odds(confidence_N) + self.offset)


class Isotonic(BaseModel, frozen=True, extra="forbid"):
    """How often answers of some `scores` are `right`, both rising; straight lines between them."""

    kind: Literal["isotonic"] = "isotonic"
    scores: Annotated[tuple[Chance, ...], Field(min_length=1)]
    right: tuple[Chance, ...]

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if len(self.scores) != len(self.right):
            raise ValueError("scores and right differ in length")
        for values in (self.scores, self.right):
            if any(one > other for one, other in pairwise(values)):
                raise ValueError("scores and right must rise")
        return self

    def chances(self, confidence_N: np.ndarray) -> np.ndarray:
        """How often answers of these confidences are right."""
        chance_N: np.ndarray = np.interp(confidence_N, self.scores, self.right)
        return chance_N


AnyMap = Annotated[Platt | Isotonic, Field(discriminator="kind")]


class Fitted(BaseModel, frozen=True, extra="forbid"):
    """A map, and what it was fitted on: so many rows, of which `texts` differ.

    The calibration error and the log loss are of the raw confidence, and of maps that were fitted
    without the rows that they are measured on.
    """

    map: AnyMap
    rows: int
    texts: int
    ece_before: float
    ece_after: float
    log_loss_before: float
    log_loss_after: float


class StepCalibration(BaseModel, frozen=True, extra="forbid"):
    """The maps of one step: by its own name, or by field or label. `key` is its confidence key."""

    key: str
    maps: dict[str, Fitted]


class Calibration(BaseModel, frozen=True, extra="forbid"):
    """The file that `glmbatch evaluate --calibrate` writes, and the setting `calibration` names."""

    steps: dict[str, StepCalibration]


def read_calibration(address: str) -> Calibration:
    """The calibration in the file at `address`. InputError when it cannot be used."""
    try:
        with naming("calibration"), reachable(address):
            content = real_path(address).read_bytes()
        return Calibration.model_validate_json(content)
    except FileNotFoundError as error:
        raise InputError(f"{address}: there is no such file. Set calibration.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f"{address}: is no calibration: {place}: {first['msg']}. {_again(address)}"
        ) from error


def maps_of(
    address: str, calibration: Calibration, keys: Mapping[str, str]
) -> dict[str, dict[str, Platt | Isotonic]]:
    """The maps of each step of a job; `keys` has the confidence keys of its steps.

    InputError when one was fitted for a step that the job does not have as it was.
    """
    found: dict[str, dict[str, Platt | Isotonic]] = {name: {} for name in keys}
    for name, fitted in calibration.steps.items():
        if name not in keys:
            raise InputError(
                f"{address}: was fitted for a step {name!r}, and the job has "
                f"{some_of(list(keys), name)}. {_again(address)}"
            )
        if fitted.key != keys[name]:
            raise InputError(
                f"{address}: was fitted for another prompt, model or labels than step {name!r} "
                f"has now. {_again(address)}"
            )
        found[name] = {part: each.map for part, each in fitted.maps.items()}
    return found


def _again(address: str) -> str:
    return f"Fit it again: glmbatch evaluate JOB ROWS --calibrate {address}"


def calibration_digest(maps: Mapping[str, Mapping[str, Platt | Isotonic]]) -> str:
    """The digest of the `maps` of some steps, 32 hex digits; "" if no step has any."""
    parts = []
    for step, of_step in maps.items():
        parts += [[step, part, each.model_dump()] for part, each in of_step.items()]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32] if parts else ""


def with_calibrated(
    step: AnyStep, maps: Mapping[str, Platt | Isotonic], answers: pa.Table
) -> pa.Table:
    """The answers of `step`, with how often such answers are right in columns behind them."""
    chances = {}
    for part, raw_N in confidences(step, answers).items():
        if part in maps:
            chance_N = maps[part].chances(raw_N)
            chances[part] = pa.array(chance_N, pa.float64(), mask=np.isnan(raw_N))
    if not chances:
        return answers
    arrays: Sequence[pa.Array] = list(chances.values())
    if pa.types.is_list(answers.column(step.name).type):  # several labels: a struct of them all
        unanswered = answers.column(step.name).is_null().combine_chunks()
        arrays = [pa.StructArray.from_arrays(arrays, list(chances), mask=unanswered)]
    for name, array in zip(calibrated_columns(step, chances), arrays, strict=True):
        answers = answers.append_column(pa.field(name, array.type), array)
    return answers


def confidences(step: AnyStep, answers: pa.Table) -> dict[str, np.ndarray]:
    """How sure the model is of each answer, from 0 to 1: by the step, or by its fields or labels.

    Not a number where there is no answer. Empty if the step does not say how sure the model is.
    """
    columns = Columns(step.name)
    answered = answers.column(columns.answer).is_valid()
    found = {}
    if isinstance(step, ExtractStep):
        for field in step.fields:
            raw = _raw(columns.field(field.name), answers)
            if raw is not None:
                kept = pc.and_(answered, _is_kept(columns.abstained, field.name, answers))
                found[field.name] = _where(kept, raw)
    elif pa.types.is_list(answers.schema.field(columns.answer).type):
        scores = answers.column(columns.scores)
        for label in scores.type:
            found[label.name] = _where(answered, pc.struct_field(scores, [label.name]))
    else:
        raw = _raw(columns, answers)
        if raw is not None:
            found[step.name] = _where(answered, raw)
    return found


def _raw(columns: Columns, answers: pa.Table) -> pa.ChunkedArray | None:
    if columns.score in answers.column_names:
        return answers.column(columns.score)
    if columns.mean_log_prob in answers.column_names:
        # A text without a token has none to doubt, and the model never abstains from it.
        return pc.exp(pc.fill_null(answers.column(columns.mean_log_prob), 0.0))
    return None


def _is_kept(abstained: str, field: str, answers: pa.Table) -> pa.Array:
    """Whether each row has the value of `field`, which the model was sure enough of."""
    if abstained not in answers.column_names:
        return pa.array([True] * len(answers), pa.bool_())
    lists = answers.column(abstained).to_pylist()
    return pa.array([field not in (fields or ()) for fields in lists], pa.bool_())


def _where(answered: pa.ChunkedArray, values: pa.ChunkedArray) -> np.ndarray:
    numbers: np.ndarray = pc.if_else(answered, values, None).cast(pa.float64()).to_numpy()
    return numbers


def log_odds(confidence_N: np.ndarray) -> np.ndarray:
    """The log-odds of each confidence."""
    inside_N = np.clip(confidence_N, NEAREST, 1 - NEAREST)
    odds_N: np.ndarray = np.log(inside_N) - np.log1p(-inside_N)
    return odds_N


def sigmoid(odds_N: np.ndarray) -> np.ndarray:
    """The probability of each log-odds."""
    small_N = np.exp(-np.abs(odds_N))  # at most 1, so that nothing overflows
    chance_N: np.ndarray = np.where(odds_N >= 0, 1.0, small_N) / (1 + small_N)
    return chance_N
