"""A few rows whose answers are known to be good: a run that asks the model asks it about them too, and is held to them.

A model that was damaged, swapped or set up otherwise answers them differently, whatever its files say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from glmbatch.errors import InputError, UnusableFile
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import MANIFEST
from glmbatch.run.asking import ask, keyed, prompts_of
from glmbatch.run.audits import Audit
from glmbatch.run.planning import Assignment
from glmbatch.settings.job import AnyStep, ClassifyStep, JobConfig, answer_columns
from glmbatch.steps.classify import Choice
from glmbatch.steps.generate import Writing
from glmbatch.steps.prompt import RowFault
from glmbatch.store.files import committed, writable
from glmbatch.store.parquet import open_parquet, prompt_values, write_table
from glmbatch.store.paths import location

# How far a label's score may move by rounding alone: in bfloat16 other batches move it by some thousandths.
SCORE_TOLERANCE = 0.02
CASES = 5  # of those that changed, told to people


def freeze(output: str | Path, file: str | Path, rows: int) -> int:
    """Write up to `rows` published rows without fault, spread over all files, to `file`; returns how many."""
    ledger = Ledger(output)
    manifest = ledger.manifest()
    if manifest is None or not manifest.files:
        raise InputError(
            f"{output}: there is no {MANIFEST} with files, so there are no answers to freeze."
        )
    if location(file).resolve().is_relative_to(location(output).resolve()):
        raise InputError(
            f"{file}: lies in the output, where it would be read as answers. Name another place."
        )
    tables = []
    each = -(-rows // len(manifest.files))
    for published in manifest.files:
        with open_parquet(ledger.root / published.output_name) as opened:
            table = opened.read()
        fine = pa.array([True] * len(table), pa.bool_())
        for step in published.step_keys:
            fine = pc.and_(fine, table.column(f"{step}_error").is_null().combine_chunks())
        sound = table.filter(fine)
        apart = max(1, len(sound) // each)
        tables.append(sound.take(pa.array(range(0, len(sound), apart)[:each], pa.int64())))
    frozen = pa.concat_tables(tables, promote_options="permissive").slice(0, rows)
    if not len(frozen):
        raise InputError(f"{output}: no row is without fault, so there are no answers to freeze.")
    with committed(location(file)) as partial, writable(location(file)):
        write_table(partial, frozen.schema.remove_metadata(), iter(frozen.to_batches()), {})
    return len(frozen)


def check_canary(job: JobConfig, assignments: Sequence[Assignment]) -> list[Audit]:
    """For each step, the share of the frozen rows that its loaded model answers otherwise than when they were frozen.

    None where the job has no canary, and for steps whose answers all are published already: those of a run that was
    killed, or that failed this check, are checked before any later run publishes them. A later step's prompts use the
    frozen answers of earlier ones, so each step is held to its own. InputError when the file does not fit the job.
    """
    if job.canary is None:
        return []
    new = {
        receipt.step_key
        for receipt in Ledger(job.data.output).unpublished_receipts()
        if receipt.computed_rows
    }
    table = _frozen(job, job.canary.file)
    return [
        _audit(job, each, table, job.canary.max_change)
        for each in assignments
        if each.step_key in new
    ]


def check_file(job: JobConfig) -> None:
    """InputError when the job's canary cannot be used; asked before any work."""
    if job.canary is not None:
        _frozen(job, job.canary.file)


def _frozen(job: JobConfig, file: str) -> pa.Table:
    needed = {column for step in job.steps for column in job.source_columns(step).values()}
    needed |= {column for step in job.steps for column in answer_columns(step)[:2]}
    try:
        with open_parquet(location(file)) as opened:
            table = opened.read()
    except (UnusableFile, OSError) as error:
        raise InputError(f"{error} Set canary.file.") from error
    missing = sorted(needed - set(table.column_names))
    if missing or not len(table):
        raise InputError(
            f"{file}: has {len(table)} rows, and no column {missing}. Freeze rows of this job anew."
        )
    return table


def _audit(job: JobConfig, assignment: Assignment, table: pa.Table, max_change: float) -> Audit:
    step = job.steps[assignment.step_index]
    columns = {**job.source_columns(step), **{name: name for name in job.earlier_steps(step)}}
    values = {name: prompt_values(table.column(column)) for name, column in columns.items()}
    rows = [{name: values[name][row] for name in values} for row in range(len(table))]
    prompts = prompts_of(job, assignment, step, rows)
    keys, asked = keyed(assignment, prompts)
    _, answers = ask(job, assignment, asked, counted=False)
    expected = table.select(answer_columns(step)[:2]).to_pylist()
    exact = assignment.model.config.dtype == "float32"
    found = [None if key is None else answers[key] for key in keys]
    changed = [
        row
        for row, (answer, before) in enumerate(zip(found, expected, strict=True))
        if answer is None or not _same(step, answer, before, exact)
    ]
    return Audit(
        step=step.name,
        what=f"share of {len(table)} canary rows that changed",
        measured=len(changed) / len(table),
        allowed=max_change,
        seen=tuple(_case(step, row, expected[row], found[row]) for row in changed[:CASES]),
    )


def _case(
    step: AnyStep, row: int, before: dict[str, object], answer: Choice | Writing | RowFault | None
) -> str:
    """Labels are told and written texts are not: alerts carry this to wherever the team reads them."""
    if isinstance(answer, Choice):
        return f"row {row} was {before[step.name]!r}, is {answer.label!r}"
    return f"row {row}"


def _same(
    step: AnyStep, answer: Choice | Writing | RowFault, expected: dict[str, object], exact: bool
) -> bool:
    """Whether the answer is what it was. In half precision texts part where rounding decides between two tokens."""
    if isinstance(answer, Choice) and isinstance(step, ClassifyStep):
        score = expected[f"{step.name}_score"]
        moved = abs(answer.scores[answer.label] - score) if isinstance(score, float) else 1.0
        return answer.label == expected[step.name] and moved <= SCORE_TOLERANCE
    if not isinstance(answer, Writing):
        return False
    text = str(expected[step.name])
    return (
        answer.text == text
        if exact or not text
        else answer.text.startswith(text[: -(-len(text) // 4)])
    )
