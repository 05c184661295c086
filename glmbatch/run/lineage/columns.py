"""From which columns of the input each column of the output is made. Reads no files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from glmbatch.settings.columns import Columns
from glmbatch.settings.steps.any_step import AnyStep
from glmbatch.settings.steps.step import placeholders
from glmbatch.steps.inputs import PromptInputs


@dataclass(frozen=True, slots=True)
class Use:
    """How one column of the output uses a `column` of the input.

    `kind` and `subtype` are OpenLineage's words. `masks` is true if no value can be read from it.
    """

    column: str
    kind: str
    subtype: str
    description: str = ""
    masks: bool = False


def columns_used(
    steps: Sequence[AnyStep],
    inputs: Mapping[str, PromptInputs],
    written: Mapping[str, str],
    copied: Iterable[str],
) -> dict[str, tuple[Use, ...]]:
    """The uses of each output column: of those `written` by a step, and of those `copied`.

    A step also uses what the earlier steps use whose answers are in its prompt or its condition.
    """
    by_step = _by_step(steps, inputs)
    described = {step.name: f"{step.kind} step {step.name}" for step in steps}
    digests = {Columns(step.name).key for step in steps}
    uses: dict[str, tuple[Use, ...]] = {}
    for name in copied:
        uses[name] = (Use(name, "DIRECT", "IDENTITY"),)
    for column, step in written.items():
        found = []
        for name, kind in by_step[step]:
            subtype = "TRANSFORMATION" if kind == "DIRECT" else "CONDITIONAL"
            # A row key is a digest.
            found.append(Use(name, kind, subtype, described[step], masks=column in digests))
        uses[column] = tuple(found)
    return uses


def _by_step(
    steps: Sequence[AnyStep], inputs: Mapping[str, PromptInputs]
) -> dict[str, list[tuple[str, str]]]:
    """The input columns that each step uses: DIRECT in its prompt, INDIRECT in a condition."""
    found: dict[str, list[tuple[str, str]]] = {}
    for step in steps:
        own = inputs[step.name]
        uses = [(column, "DIRECT") for column in own.sources.values()]
        for name in placeholders(step.prompt_template):
            writer = own.fields.get(name, name)
            if writer in own.earlier:
                uses += found[writer]
        if own.when is not None:
            uses += [(column, "INDIRECT") for column in own.when.columns.values()]
            for writer in own.when.answers.values():
                uses += [(column, "INDIRECT") for column, _ in found[writer]]
        found[step.name] = list(dict.fromkeys(uses))
    return found
