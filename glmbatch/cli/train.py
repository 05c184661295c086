"""The plan of a training as text, for `glmbatch train --dry-run`."""

from __future__ import annotations

import math

from glmbatch.errors import counted
from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.finetune import preview
from glmbatch.tuning.report import TrainingPlan


def shown_plan(config: TuneConfig, *, as_json: bool) -> str:
    """What a training with these settings would do, as text or JSON."""
    plan = preview(config)
    return plan.model_dump_json(indent=1) if as_json else describe_plan(plan)


def describe_plan(plan: TrainingPlan) -> str:
    """What a training would do, as text for a terminal."""
    audit, settings = plan.audit, plan.settings
    training = settings["training"]
    shortest, median, longest = plan.tokens
    texts, answers = plan.cut
    counts = {"rows": audit.rows, "used": audit.used, **audit.parts}
    lines = [", ".join(f"{name} {count:,}" for name, count in counts.items())]
    if audit.labels:
        lines.append("labels: " + ", ".join(f"{name} {n:,}" for name, n in audit.labels.items()))
    lines += [f"warning: {warning}" for warning in audit.warnings]
    tested, needed = audit.parts.get("test", 0), settings["least_test_rows"]
    if tested < needed:
        lines.append(
            f"warning: nothing can be promoted: {counted(tested, 'test row')}, and {needed} are "
            f"needed (least_test_rows), so some {_round(audit.used * needed / max(tested, 1)):,} "
            "labelled rows"
        )
    if plan.advice:
        lines.append(f"advice: {plan.advice}")
    lines += [
        f"prompt: {settings['prompt_template']!r}{', in the chat format' * bool(settings['chat'])}",
        f"tokens of a training row: {shortest} to {longest}, median {median}; "
        f"cut texts {texts}, cut answers {answers}",
    ]
    if training["distill"]:
        lines.append(
            f"learned from TF-IDF: {training['distill']:g} of each row's target, and "
            f"{counted(plan.mixed, 'mixed text')} an epoch"
        )
    beaten = ", ".join(settings["must_beat"]) or "nothing"
    lines += [
        f"{training['method']} over {settings['model']['path']}: {plan.steps:,} steps in "
        f"{training['epochs']} epochs, learning rate {training['learning_rate']:g}",
        f"promoted by {settings['metric']} if it beats: {beaten}; current run: "
        f"{plan.current or 'none'}",
        f"run: {plan.run}{' (already trained)' * plan.is_trained}",
    ]
    return "\n".join(lines)


def _round(rows: float) -> int:
    """`rows` rounded up to two digits."""
    step = int(10 ** max(len(str(int(rows))) - 2, 0))
    return math.ceil(rows / step) * step
