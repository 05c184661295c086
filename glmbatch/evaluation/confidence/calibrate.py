"""Fit maps from confidence to how often answers are right, and write them. Asks no model.

Platt scaling (Platt, 1999) has two parameters, and so needs few rows. Isotonic regression takes any
rising map, if that is better on rows that it was not fitted on. Texts that repeat are always in one
part, or the map would be measured on what it has seen.

Shapes: R rows, N rows to fit to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from glmbatch.errors import InputError
from glmbatch.evaluation.bootstrap import SEED
from glmbatch.evaluation.confidence.judged import Judged
from glmbatch.evaluation.results import StepResult
from glmbatch.steps.calibration import (
    NEAREST,
    Calibration,
    Fitted,
    Isotonic,
    Platt,
    StepCalibration,
    log_odds,
    sigmoid,
)
from glmbatch.store.files import committed
from glmbatch.tuning.scores import bins_of, calibration_error

LEAST_TEXTS = 100  # below, chance alone moves a map by several points
ISOTONIC_TEXTS = 1_000  # below, steps of an isotonic map have too few rows each
LEAST_OF_EACH = 10  # of the rows that a label applies to, and of the others, for a map of its own
PARTS = 5
STEPS = 100  # of Newton's method, which needs about ten
CLEAR = 2.0  # standard errors by which an isotonic map must be better

AS_IT_IS = Platt(slope=1, offset=0)

Map = Platt | Isotonic
Fit = Callable[[np.ndarray, np.ndarray], Map]


def write_calibration(
    file: str | os.PathLike[str], steps: Sequence[StepResult], keys: Mapping[str, str]
) -> None:
    """Write the maps of `steps`, with their confidence `keys`. InputError when there is none."""
    fitted = {
        step.step: StepCalibration(key=keys[step.step], maps=dict(step.calibration))
        for step in steps
        if step.calibration
    }
    if not fitted:
        few = []
        for step in steps:
            few += [f"{name} has {texts:,}" for name, texts in step.uncalibrated.items()]
        raise InputError(
            f"--calibrate {file}: {', '.join(few) or 'no step with a truth has a confidence'}; "
            f"{LEAST_TEXTS} different texts with a truth, an answer and a confidence are needed. "
            "Label more rows, or set confidence: true."
        )
    with committed(Path(file).expanduser(), "--calibrate") as partial:
        content = Calibration(steps=fitted).model_dump_json(indent=1)
        partial.write_text(f"{content}\n", encoding="utf-8")


def fit_maps(
    judged: Iterable[Judged], group_R: np.ndarray, *, several: bool
) -> tuple[dict[str, Fitted], dict[str, int]]:
    """A map for each part that is judged, and the texts of the parts that have too few.

    `group_R` has the number of each row's text. With `several` labels, those that apply too rarely
    or too often share the map of all labels together.
    """
    parts = {}
    few = {}
    for name, confidence_R, right_R in judged:
        known_R = ~np.isnan(confidence_R)
        texts = len(np.unique(group_R[known_R]))
        if texts < LEAST_TEXTS:
            few[name] = texts
        else:
            parts[name] = (confidence_R[known_R], right_R[known_R], group_R[known_R])
    rare = []
    for name, (_, right_N, _) in parts.items():
        if several and min(right_N.sum(), (~right_N).sum()) < LEAST_OF_EACH:
            rare.append(name)
    found = {name: fit_map(*rows) for name, rows in parts.items() if name not in rare}
    if rare:
        confidence_N, right_N, group_N = map(np.concatenate, zip(*parts.values(), strict=True))
        found |= dict.fromkeys(rare, fit_map(confidence_N, right_N, group_N))
    return {name: found[name] for name in parts}, few


def fit_map(confidence_N: np.ndarray, right_N: np.ndarray, group_N: np.ndarray) -> Fitted:
    """The best map for these rows, with its errors on rows that it was not fitted on.

    The confidence stays as it is where no map is better: a map must lower the log loss, and must
    not raise the calibration error.
    """
    texts, text_N = np.unique(group_N, return_inverse=True)
    part_N = np.random.default_rng(SEED).permutation(len(texts))[text_N] % PARTS
    fit: Fit = keep_as_it_is
    after_N = confidence_N
    most = _error(confidence_N, right_N)
    platt_N = _without(fit_platt, confidence_N, right_N, part_N)
    is_lower = _losses(platt_N, right_N).mean() < _losses(confidence_N, right_N).mean()
    if is_lower and _error(platt_N, right_N) <= most:
        fit, after_N = fit_platt, platt_N
    if len(texts) >= ISOTONIC_TEXTS:
        other_N = _without(fit_isotonic, confidence_N, right_N, part_N)
        gain_N = _losses(after_N, right_N) - _losses(other_N, right_N)
        if _is_clear(gain_N, text_N) and _error(other_N, right_N) <= most:
            fit, after_N = fit_isotonic, other_N
    return Fitted(
        map=fit(confidence_N, right_N),
        rows=len(right_N),
        texts=len(texts),
        ece_before=most,
        ece_after=_error(after_N, right_N),
        log_loss_before=float(_losses(confidence_N, right_N).mean()),
        log_loss_after=float(_losses(after_N, right_N).mean()),
    )


def _without(
    fit: Fit, confidence_N: np.ndarray, right_N: np.ndarray, part_N: np.ndarray
) -> np.ndarray:
    """How often answers are right by maps that were fitted without the part of each row."""
    chance_N = np.empty(len(right_N))
    for part in range(PARTS):
        inside_N = part_N == part
        map = fit(confidence_N[~inside_N], right_N[~inside_N])
        chance_N[inside_N] = map.chances(confidence_N[inside_N])
    return chance_N


def _error(chance_N: np.ndarray, right_N: np.ndarray) -> float:
    return calibration_error(bins_of(right_N, chance_N))


def _losses(chance_N: np.ndarray, right_N: np.ndarray) -> np.ndarray:
    of_truth_N: np.ndarray = np.where(right_N, chance_N, 1 - chance_N)
    loss_N: np.ndarray = -np.log(np.maximum(of_truth_N, NEAREST))
    return loss_N


def _is_clear(gain_N: np.ndarray, text_N: np.ndarray) -> bool:
    """Whether the mean gain is above 0 by more than chance, if other texts had been labelled."""
    mean = gain_N.mean()
    error = np.sqrt((np.bincount(text_N, gain_N - mean) ** 2).sum()) / len(gain_N)
    return bool(mean > CLEAR * error)


def keep_as_it_is(confidence_N: np.ndarray, right_N: np.ndarray) -> Platt:
    """The map that changes nothing."""
    return AS_IT_IS


def fit_platt(confidence_N: np.ndarray, right_N: np.ndarray) -> Platt:
    """The likeliest slope and offset, by Newton's method.

    The targets are a little away from 0 and 1, as Platt has them, so that there is always a
    likeliest map. Where surer answers are right less often, the slope is 0.
    """
    odds_N = log_odds(confidence_N)
    rights, wrongs = right_N.sum(), (~right_N).sum()
    target_N = np.where(right_N, (rights + 1) / (rights + 2), 1 / (wrongs + 2))
    base = float(log_odds(np.array([target_N.mean()]))[0])
    inputs_N2 = np.stack([odds_N, np.ones_like(odds_N)], axis=1)
    weights_2 = np.array([0.0, base])
    if np.ptp(odds_N) > 0:
        weights_2 = _newton(inputs_N2, target_N, weights_2)
    slope, offset = map(float, weights_2)
    return Platt(slope=slope, offset=offset) if slope > 0 else Platt(slope=0, offset=base)


def _newton(inputs_N2: np.ndarray, target_N: np.ndarray, weights_2: np.ndarray) -> np.ndarray:
    loss = _cross_entropy(inputs_N2 @ weights_2, target_N)
    for _ in range(STEPS):
        chance_N = sigmoid(inputs_N2 @ weights_2)
        gradient_2 = inputs_N2.T @ (chance_N - target_N)
        curve_22 = inputs_N2.T @ (inputs_N2 * (chance_N * (1 - chance_N))[:, None])
        step_2 = np.linalg.solve(curve_22 + 1e-12 * np.eye(2), gradient_2)
        size = 1.0
        # The loss is convex, so that a shorter step is always better, until rounding decides.
        while (new := _cross_entropy(inputs_N2 @ (weights_2 - size * step_2), target_N)) > loss:
            size /= 2
            if size < 1e-9:
                return weights_2
        weights_2 = weights_2 - size * step_2
        if loss - new <= 1e-12 * loss:
            return weights_2
        loss = new
    return weights_2


def _cross_entropy(odds_N: np.ndarray, target_N: np.ndarray) -> float:
    return float((np.logaddexp(0, odds_N) - target_N * odds_N).sum())


def fit_isotonic(confidence_N: np.ndarray, right_N: np.ndarray) -> Isotonic:
    """The rising map with the least squared error, never quite 0 or 1."""
    score_N, chance_N = pool(confidence_N, right_N.astype(np.float64))
    # A chance of 0 or 1 would claim what no number of rows shows (Laplace's rule).
    least = 1 / (len(right_N) + 2)
    chance_N = np.clip(chance_N, least, 1 - least)
    # Between two equal chances, the line needs no point.
    inner_N = (chance_N[1:-1] == chance_N[:-2]) & (chance_N[1:-1] == chance_N[2:])
    kept_N = np.concatenate([[True], ~inner_N, [True]])[: len(score_N)]
    return Isotonic(scores=tuple(score_N[kept_N].tolist()), right=tuple(chance_N[kept_N].tolist()))


def pool(score_N: np.ndarray, value_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct scores in order, and the rising values nearest to `value_N` there.

    By pooling adjacent violators: where values fall, they get their common mean.
    """
    score_N, place_N, rows_N = np.unique(score_N, return_inverse=True, return_counts=True)
    blocks: list[tuple[float, int, int]] = []  # sum of values, rows, scores
    for total, rows in zip(np.bincount(place_N, value_N), rows_N, strict=True):
        block = (float(total), int(rows), 1)
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
            before = blocks.pop()
            block = (before[0] + block[0], before[1] + block[1], before[2] + block[2])
        blocks.append(block)
    means = [total / rows for total, rows, _ in blocks]
    return score_N, np.repeat(means, [scores for _, _, scores in blocks])
