"""Whether a changed step may replace the published one: numbers alone. No model, no files.

Shapes: R rows, G texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glmbatch.errors import AuditError
from glmbatch.evaluation.bootstrap import SWAPS, swapped
from glmbatch.report.counts import Measured
from glmbatch.settings.job import EvaluateConfig
from glmbatch.settings.kinds import value_for

# A loss is refused beyond this many points if chance alone makes one so large this rarely. Found by
# simulation: benchmarks/promotion.py.
LIMITS = ((0.01, 0.025), (0.03, 0.10))
SEED = 20_261_126  # any number; with the same one, the same rows give the same probability
ROUNDING = 1e-9


def paired(before_R: np.ndarray, now_R: np.ndarray, group_R: np.ndarray) -> dict[str, float]:
    """The mean scores of the same rows before and now, and how rarely chance makes such a loss.

    `worse` and `better` are numbers of texts; rows with the same number in `group_R` are of one.
    """
    gain_G = np.bincount(group_R, now_R - before_R)
    moved_G = gain_G[np.abs(gain_G) > ROUNDING]
    return {
        "before": float(before_R.mean()),
        "gain": float((now_R - before_R).mean()),
        "worse": int((moved_G < 0).sum()),
        "better": int((moved_G > 0).sum()),
        "p": _chance(moved_G),
    }


def _chance(gain_G: np.ndarray) -> float:
    """How often a sum as low comes about if lot decides, for each text, which score is new.

    For scores of 0 and 1 this is McNemar's test, one-sided.
    """
    dice = np.random.default_rng(SEED)
    # What is swapped is lost on one side and gained on the other.
    as_low = sum(bool(moved >= -ROUNDING / 2) for moved in swapped(gain_G, dice))
    return (as_low + 1) / (SWAPS + 1)


def judged(measured: Measured, config: EvaluateConfig) -> Measured:
    """The measurement with the reason why its step may not be published, if there is one.

    A step that did not change is never refused: what is published is no better.
    """
    if measured.change is None:
        return measured
    least = value_for(measured.step, config.least_score)
    reasons = []
    if least is not None and measured.score < least - ROUNDING:
        reasons.append(f"evaluate.least_score asks for {least:g}")
    if measured.gain is not None and config.least_gain is not None:
        if measured.gain < config.least_gain - ROUNDING:
            reasons.append(f"evaluate.least_gain asks for {100 * config.least_gain:+.3g} points")
    elif (
        measured.gain is not None and measured.p is not None and is_loss(measured.gain, measured.p)
    ):
        reasons.append("so large a loss is hardly chance")
    if not reasons:
        return measured
    return measured.model_copy(update={"refused": f"{measured}; {' and '.join(reasons)}"})


def is_loss(gain: float, p: float) -> bool:
    """Whether a gain is a loss that its step must not be published with."""
    return any(-gain > points - ROUNDING and p <= chance for points, chance in LIMITS)


def passed(measured: Sequence[Measured]) -> bool:
    """Whether every changed step may be published."""
    return all(each.refused is None for each in measured)


def check_measured(measured: Sequence[Measured]) -> None:
    """AuditError that names the steps that must not be published, if there are any.

    Its text completes a sentence that begins with "nothing published:".
    """
    refused = [each.refused for each in measured if each.refused is not None]
    if refused:
        raise AuditError(
            f"{'. '.join(refused)}. No row of the input was asked, and the answers before stay. "
            "Mend the prompt, the model or the settings. To accept the change, run once with "
            "--set evaluate.least_gain=-1 --set evaluate.least_score=0."
        )
