"""Plan a run: its fragments, then a question and a key for each step and fragment.

Reads footers, digests files and looks at INT96 times. Loads no weights, reads no other rows and
writes nothing to the output but its lock.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from glmbatch.errors import InputError, UnusableFile, shown
from glmbatch.ledger.delta.table import check_sources, is_table
from glmbatch.ledger.fragments import FileFault, Fragment, Plan, none_usable, plan_fragments
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import Manifest
from glmbatch.ledger.rowkeys import answers_key, output_key, step_key
from glmbatch.ledger.staying import mixture, staying
from glmbatch.report.log import log_plan
from glmbatch.run.models import (
    check_step,
    fitting_models,
    job_models,
    locate_model,
    needs_network,
    tokenizer_of,
)
from glmbatch.run.session import session
from glmbatch.run.work import (
    Assignment,
    FragmentWork,
    Model,
    PromptInputs,
    Question,
    Run,
    RunContext,
    Work,
    now,
    plan_passes,
)
from glmbatch.settings.job import (
    AnyStep,
    DataConfig,
    GenerateStep,
    JobConfig,
    answer_columns,
)
from glmbatch.steps.classify import encode_labels
from glmbatch.steps.prompt import longest_prompt, uses_chat
from glmbatch.store.files import real_path
from glmbatch.store.folder import Folder
from glmbatch.store.inputs.needs import NeededColumn, SchemaNeeds
from glmbatch.store.parquet import TimeUnit
from glmbatch.store.times import Times, look_at_times, one_unit, with_common_columns


def check_job(job: JobConfig) -> None:
    """Check a job without network, digests or server. InputError when a run could not start."""
    from glmbatch.glm.checkpoint.load import read_checkpoint

    with session(plan_run(job, digests=False)):
        pass  # proves that the output can be written and that no other run holds it
    for model in job_models(job):
        # The flow retries what needs the network, and only the cluster may have the device.
        elsewhere = needs_network(model.path, model.revision, model.adapter)
        if not elsewhere and job.runtime.cluster is None:
            located = locate_model(model, job.runtime)
            read_checkpoint(located.path, located.adapter)


def prompt_inputs(job: JobConfig) -> dict[str, PromptInputs]:
    """Where each step's placeholders get their values, by step name.

    The only place that knows the rule of the text column: both {text} and the column's own name
    stand for it.
    """
    inputs = {}
    for step in job.steps:
        columns = job.source_columns(step)
        texts = [name for name, column in columns.items() if column == job.data.text_column]
        inputs[step.name] = PromptInputs(
            columns=columns, earlier=tuple(job.earlier_steps(step)), texts=tuple(texts)
        )
    return inputs


def schema_needs(job: JobConfig, inputs: dict[str, PromptInputs]) -> SchemaNeeds:
    """The columns that the job reads from each file, and those that it writes."""
    read: list[NeededColumn] = []
    written: dict[str, str] = {}
    for index, step in enumerate(job.steps):
        written.update(dict.fromkeys(answer_columns(step), step.name))
        for name, column in inputs[step.name].columns.items():
            is_text = name in inputs[step.name].texts
            setting = "data.text_column" if is_text else f"steps[{index}].prompt_template"
            read.append(NeededColumn(column, setting, is_text))
    if job.data.id_column is not None:
        read.append(NeededColumn(job.data.id_column, "data.id_column", False))
    return SchemaNeeds(tuple(read), written)


def plan_run(job: JobConfig, *, digests: bool = True) -> Run:
    """Cut the input into fragments, after checking it against the job and the output.

    Without `digests` only footers are read: such a plan can be inspected but not run. InputError
    when nothing can be run.
    """
    context = RunContext(
        id=uuid.uuid4().hex,
        began=now(),
        output=job.data.output,
        format=job.data.format,
        on_error=job.on_error,
        runtime=job.runtime,
    )
    inputs = prompt_inputs(job)
    plan = plan_fragments(
        job.data, schema_needs(job, inputs), raise_faults=context.raises, digests=digests
    )
    # Checked now, because a publication that fails halfway leaves files of two runs.
    Folder(job.data.output).check_places(fragment.output_name for fragment in plan.fragments)
    manifest = Ledger(job.data.output).manifest()
    if manifest is not None:
        _check_published(job.data, plan, manifest)
    if digests:
        plan = _fit_times(job.data, plan, manifest, raise_faults=context.raises)
        log_plan(plan)
    plan = _fit_format(job.data, plan, manifest)
    return Run(context=context, plan=plan, inputs=inputs)


def _check_published(data: DataConfig, plan: Plan, manifest: Manifest) -> None:
    if manifest.limit is None and data.limit is not None:
        raise InputError(
            f"{data.output}: holds the answers of all rows; a run with data.limit would replace "
            "them. Set data.output to another folder."
        )
    # Compared with links resolved too: earlier versions resolved them in the manifest.
    before = {manifest.root, str(real_path(manifest.root))}
    # A repaired manifest may not know its root.
    if manifest.root and before.isdisjoint({plan.root, str(real_path(plan.root))}):
        raise InputError(
            f"{data.output}: holds the answers for {manifest.root}; the root of this input is "
            f"{plan.root}. Set data.output to another folder."
        )


def _fit_times(
    data: DataConfig, plan: Plan, manifest: Manifest | None, *, raise_faults: bool
) -> Plan:
    """The plan with one unit for each INT96 column, without files whose times the unit cannot hold.

    A column needs one unit: a folder with two types for a column cannot be read as one table.
    """
    times, reasons = _times_of_sources(plan)
    if not times and not reasons:
        return plan
    plan = _without(plan, reasons, raise_faults)
    stay = staying(manifest, plan, drop_missing=data.missing_sources == "drop").files
    kept = [Folder(data.output) / file.output_name for file in stay]
    files = manifest.files if manifest is not None else ()
    published = [Folder(data.output) / file.output_name for file in files]
    units: dict[str, TimeUnit] = {}
    misfits = {}
    for group in with_common_columns(times):
        # Delta Lake's only timestamp unit is the microsecond.
        unit = "us" if data.format == "delta" else one_unit(group.values(), kept, published)
        units.update(dict.fromkeys(group, unit))
        for source, its_times in group.items():
            if problem := its_times.misfit(unit):
                misfits[source] = f"{Folder(plan.root) / source}: {problem}"
    plan = _without(plan, misfits, raise_faults)
    fragments = []
    for fragment in plan.fragments:
        fragments.append(fragment.model_copy(update={"int96": units.get(fragment.source, "")}))
    return plan.model_copy(update={"fragments": tuple(fragments)})


def _times_of_sources(plan: Plan) -> tuple[dict[str, Times], dict[str, str]]:
    """The INT96 times of each source that has any, and why other sources cannot be used."""
    # Fragments of one large row group share one scan.
    rows: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for fragment in plan.fragments:
        if fragment.int96:
            place = (fragment.source, fragment.path, fragment.row_groups)
            rows[place] = max(rows.get(place, 0), fragment.skip_rows + fragment.rows)

    def look(place: tuple[str, str, tuple[int, ...]]) -> Times | str:
        try:
            found = look_at_times(place[1], place[2], 0, rows[place])
        except UnusableFile as error:
            return str(error)
        return found

    times: dict[str, Times] = {}
    reasons: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:
        for (source, path, _), outcome in zip(rows, pool.map(look, rows), strict=True):
            if isinstance(outcome, str):
                reasons[source] = outcome
                continue
            times[source] = times.get(source, outcome).joined(outcome)
            if times[source].finer and times[source].far:
                reasons[source] = f"{path}: {times[source].misfit('us')}"
    for source in reasons:
        times.pop(source, None)
    return times, reasons


def _without(plan: Plan, reasons: Mapping[str, str], raise_faults: bool) -> Plan:
    """The plan without the sources in `reasons`. UnusableFile instead if `raise_faults`."""
    if raise_faults:
        for reason in reasons.values():
            raise UnusableFile(reason)
    rows: Counter[str] = Counter()
    fragments = []
    for fragment in plan.fragments:
        rows[fragment.source] += fragment.rows
        if fragment.source not in reasons:
            fragments.append(fragment)
    faults = list(plan.unusable)
    for source, reason in reasons.items():
        faults.append(FileFault(source=source, reason=shown(reason), rows=rows[source]))
    if not fragments:
        raise none_usable(plan.root, faults)
    return plan.model_copy(update={"fragments": tuple(fragments), "unusable": tuple(faults)})


def _fit_format(data: DataConfig, plan: Plan, manifest: Manifest | None) -> Plan:
    """The plan with the types that a Delta table gives to each fragment's columns.

    InputError if the output is a Delta table and the job writes plain Parquet.
    """
    if data.format == "parquet":
        if is_table(data.output):
            raise InputError(
                f"{data.output}: is a Delta table. Set data.format to delta, or data.output."
            )
        return plan
    sources = {fragment.source: fragment.path for fragment in plan.fragments}
    stay = staying(manifest, plan, drop_missing=data.missing_sources == "drop").files
    typed = check_sources(data.output, sources, [file.output_name for file in stay])
    fragments = []
    for fragment in plan.fragments:
        fragments.append(fragment.model_copy(update={"typed": typed.get(fragment.source, "")}))
    return plan.model_copy(update={"fragments": tuple(fragments)})


def assign(job: JobConfig, run: Run, models: Sequence[Model]) -> Work:
    """A question for each step, and an assignment for each question and fragment.

    `models` are the prepared models of `job_models`, in that order. InputError when a model cannot
    answer its step, or when answers made with other settings would stay beside the run's own.
    """
    questions = resolve_questions(job, run.inputs, models)
    step_keys = {question.name: question.key for question in questions}
    _refuse_mixing(job.data, run.plan, step_keys)
    fragments = []
    # In the order of the plan; an audit compares it with the order of the outputs.
    for fragment in run.plan.fragments:
        fragments.append(_fragment_work(run.context, fragment, questions))
    return Work(
        questions=questions,
        fragments=tuple(fragments),
        passes=plan_passes(questions, together=questions[0].models_at_once >= len(models)),
    )


def resolve_questions(
    job: JobConfig, inputs: dict[str, PromptInputs], models: Sequence[Model]
) -> tuple[Question, ...]:
    """The question of each step, in step order; `models` as for `assign`.

    InputError when a model cannot answer its step.
    """
    prepared = dict(zip(job_models(job), models, strict=True))
    at_once = fitting_models(models, job.runtime)
    questions = []
    for step in job.steps:
        model = prepared[job.model_of(step)]
        # All steps are checked before any inference.
        check_step(step, model)
        questions.append(
            Question(
                step=step,
                key=step_key(step, model.identity),
                inputs=inputs[step.name],
                chat=uses_chat(step, has_head=model.has_head, chats=model.chats),
                max_prompt_tokens=longest_prompt(
                    step, model.max_positions, _answer_tokens(step, model)
                ),
                model=model,
                models_at_once=at_once,
            )
        )
    return tuple(questions)


def _answer_tokens(step: AnyStep, model: Model) -> int:
    """Positions that an answer takes after its prompt."""
    if isinstance(step, GenerateStep):
        return step.max_tokens
    if model.has_head:
        return 0
    label_ids = encode_labels(step.labels or [], tokenizer_of(model))
    return len(max(label_ids, key=len))


def _fragment_work(
    context: RunContext, fragment: Fragment, questions: Sequence[Question]
) -> FragmentWork:
    answers: dict[str, str] = {}
    assignments = []
    for question in questions:
        # The key includes those of the earlier steps, whose answers are part of the prompts.
        earlier = {name: answers[name] for name in question.inputs.earlier}
        key = answers_key(fragment, question.name, question.key, question.inputs.columns, earlier)
        answers[question.name] = key
        assignments.append(
            Assignment(run=context, fragment=fragment, question=question, key=key, earlier=earlier)
        )
    return FragmentWork(
        run=context,
        fragment=fragment,
        key=output_key(fragment, answers, context.format),
        assignments=tuple(assignments),
    )


def _refuse_mixing(data: DataConfig, plan: Plan, keys: dict[str, str]) -> None:
    # Damage within a file is not known yet; run/publish.py checks again once the rows are read.
    drop_missing = data.missing_sources == "drop"
    stay = staying(Ledger(data.output).manifest(), plan, drop_missing=drop_missing).files
    damaged = {fault.source for fault in plan.unusable}
    problem = mixture(stay, keys, plan, damaged, drop_missing=drop_missing)
    if problem is not None:
        raise InputError(f"{data.output}: {problem}")
