"""How a step differs from the one that made the published answers, for people."""

from __future__ import annotations

from glmbatch.ledger.manifest import Manifest, StepOrigin
from glmbatch.ledger.rowkeys import answer_settings
from glmbatch.run.work import Question
from glmbatch.settings.job import AnyStep


def what_changed(question: Question, manifest: Manifest | None) -> str | None:
    """How this step differs from the one that made the published answers; None if it does not."""
    if manifest is None or question.name not in manifest.steps:
        return None
    published = {file.step_keys.get(question.name) for file in manifest.files}
    if question.key in published:
        return None
    origin = manifest.steps[question.name]
    changed = _changed_settings(question.step, origin)
    before = origin.model.split("/")
    now = question.model.identity.split("/")
    # The parts of a model's identity, in order.
    parts = ("weights", "tokenizer", "numbers", "form of prompts")
    for part, old, new in zip(parts, before, now, strict=False):
        if old != new:
            changed.append(part)
    return f"changed {', '.join(changed) or 'version of answers'}"


def _changed_settings(step: AnyStep, origin: StepOrigin) -> list[str]:
    now = answer_settings(step)
    names = sorted(now.keys() | origin.settings.keys())
    return [name for name in names if now.get(name) != origin.settings.get(name)]
