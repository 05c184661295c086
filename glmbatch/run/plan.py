"""Plan a run: its fragments, then a question and a key for each step and fragment.

Reads footers, digests files and looks at INT96 times. Loads no weights, reads no other rows and
writes nothing to the output but its lock.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Collection, Iterator, Sequence

from glmbatch.errors import InputError
from glmbatch.ledger.fragments import Fragment, Plan
from glmbatch.ledger.input.cutting import plan_fragments
from glmbatch.ledger.input.fitting import fit_format, fit_times
from glmbatch.ledger.input.unchanged import published_sources
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import Manifest
from glmbatch.ledger.rowkeys import answers_key, bundle_key, output_key, step_key
from glmbatch.ledger.staying import mixture, staying
from glmbatch.report.log import log_plan
from glmbatch.run.checks.steps import as_trained, check_step
from glmbatch.run.models import (
    check_headers,
    fitting_models,
    job_models,
    locate_model,
    needs_network,
    tokenizer_of,
)
from glmbatch.run.promotion.labelled import read_labelled
from glmbatch.run.prompts import inputs_of
from glmbatch.run.session import session
from glmbatch.run.work import (
    AnswersKeys,
    Assignment,
    Bundle,
    Model,
    Question,
    Run,
    RunContext,
    Work,
    basis_of_run,
    confidence_keys,
    made_with,
    now,
    plan_beside,
    plan_passes,
    with_beside,
)
from glmbatch.settings.job import AnyStep, DataConfig, ExtractStep, GenerateStep, JobConfig
from glmbatch.steps.calibration import maps_of, read_calibration
from glmbatch.steps.classify import encode_labels, scored_texts
from glmbatch.steps.examples import with_examples
from glmbatch.steps.extract import form_of
from glmbatch.steps.inputs import PromptInputs, check_conditions, schema_needs
from glmbatch.steps.prompt import longest_prompt, uses_chat
from glmbatch.store.files import real_path
from glmbatch.store.inputs.found import Version
from glmbatch.store.inputs.needs import SchemaNeeds

# Small fragments share tasks where each engine process would have more than this many. A task costs
# Prefect some 20 ms, and too few of them would leave engines without work.
BUNDLES = 64


def check_job(job: JobConfig) -> None:
    """Check a job without network, digests or server. InputError when a run could not start.

    Reads the headers of a checkpoint only if there are rows to answer, because that takes torch;
    without such rows the run itself reads those of a checkpoint that changed.
    """
    job = job.dated()
    run = plan_run(job, digests=False)
    with session(run):
        pass  # proves that the output can be written and that no other run holds it
    for model in job_models(job.model, job.steps):
        # The flow retries what needs the network, and only the cluster may have the device.
        elsewhere = needs_network(model.path, model.revision, model.adapter)
        if not elsewhere and job.runtime.cluster is None:
            located = locate_model(model, job.runtime)
            if run.plan.fragments:
                check_headers(located)


def plan_run(job: JobConfig, *, digests: bool = True, others: Sequence[str] = ()) -> Run:
    """Cut the input into fragments, after checking it against the job and the output.

    Sources that did not change since they were published make none. Without `digests` only footers
    are read: such a plan can be inspected but not run. Known answers are also taken from the
    outputs `others`. InputError when nothing can be run.
    """
    if job.calibration is not None:
        read_calibration(job.calibration)  # before any work, as all that a person may misspell
    inputs = inputs_of(job)
    needs = schema_needs(job, inputs)
    if job.evaluate is not None:
        read_labelled(job.evaluate, job.steps, job.data.text_column, needs)
    context = RunContext(
        id=uuid.uuid4().hex,
        began=now(),
        output=job.data.output,
        format=job.data.format,
        table=job.data.table or "",
        on_error=job.on_error,
        runtime=job.runtime,
        others=tuple(others),
    )
    plan = _plan_sources(job.data, needs, context, digests=digests)
    if digests:
        log_plan(plan)
    return Run(context=context, plan=plan, inputs=inputs, needs=needs)


def _plan_sources(  # noqa: PLR0913 - as for `plan_fragments`
    data: DataConfig,
    needs: SchemaNeeds,
    context: RunContext,
    *,
    again: Collection[str] = (),
    version: Version | None = None,
    digests: bool = True,
) -> Plan:
    """The plan of `plan_run`; `again` and `version` are as for `plan_fragments`."""
    ledger = Ledger(data.output)
    manifest = ledger.manifest()
    # A limited run answers the first rows, whoever has answered them before.
    known = {} if data.limit else published_sources(ledger.folder, manifest)
    plan = plan_fragments(
        data,
        needs,
        known,
        again=again,
        version=version,
        seed=context.id,
        raise_faults=context.raises,
        digests=digests,
        cache=context.runtime.cache,
    )
    # Checked now, because a publication that fails halfway leaves files of two runs.
    ledger.folder.check_places(fragment.output_name for fragment in plan.fragments)
    if manifest is not None:
        _check_published(data, plan, manifest)
    if digests:
        plan = fit_times(data, plan, manifest, raise_faults=context.raises)
    return fit_format(data, plan, manifest)


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


def assign(job: JobConfig, run: Run, models: Sequence[Model], engines: int = 1) -> Work:
    """A question for each step, and an assignment for each question and bundle.

    `models` are the prepared models of `job_models`, in that order. Small fragments are bundled so
    that each of `engines` engine processes has many bundles still. InputError when a model cannot
    answer its step, or when answers made with other settings would stay beside the run's own.
    """
    questions = resolve_questions(job, run.inputs, models)
    run = _with_changed_settings(job.data, run, questions)
    _refuse_mixing(job.data, run.plan, questions)
    return assign_questions(run, questions, job.data.rows_per_fragment, engines)


def assign_questions(
    run: Run, questions: Sequence[Question], rows_per_fragment: int, engines: int = 1
) -> Work:
    """An assignment for each question and bundle of the run's fragments."""
    models = {question.model.config for question in questions}
    passes = plan_passes(questions, together=questions[0].models_at_once >= len(models))
    beside = plan_beside(questions, passes)
    bundles = []
    # In the order of the plan; an audit compares it with the order of the outputs.
    for fragments in bundled(run.plan.fragments, rows_per_fragment, engines * BUNDLES):
        bundles.append(_bundle(run.context, fragments, questions, beside))
    return Work(run=run, questions=tuple(questions), bundles=tuple(bundles), passes=passes)


def _with_changed_settings(data: DataConfig, run: Run, questions: Sequence[Question]) -> Run:
    """The run with fragments for unchanged sources that were published under other settings.

    Also for those with failed rows under `on_error: raise`, which must name the first of them.
    """
    manifest = Ledger(data.output).manifest()
    basis = basis_of_run(data, run.plan.columns, questions)
    left = dict.fromkeys(run.plan.unchanged, False)
    again = set()
    for file in manifest.files if manifest is not None else ():
        if file.source in left:
            left[file.source] = True
            if file.basis != basis or (run.context.raises and file.faulty_rows):
                again.add(file.source)
    # Another run may have published since the plan was made.
    again |= {source for source, is_published in left.items() if not is_published}
    if not again:
        return run
    version = run.plan.version  # a table may have a newer one by now
    plan = _plan_sources(data, run.needs, run.context, again=again, version=version)
    log_plan(plan)
    return run.model_copy(update={"plan": plan})


def resolve_questions(
    job: JobConfig, inputs: dict[str, PromptInputs], models: Sequence[Model]
) -> tuple[Question, ...]:
    """The question of each step, in step order; `models` as for `assign`.

    InputError when a model cannot answer its step.
    """
    prepared = dict(zip(job_models(job.model, job.steps), models, strict=True))
    at_once = fitting_models(models, job.runtime)
    questions = []
    for setting in job.steps:
        model = prepared[job.model_of(setting)]
        step = with_examples(setting, job.data.text_column)
        step = as_trained(step, model, inputs[setting.name].columns)
        # All steps are checked before any inference.
        check_step(step, model)
        chat = uses_chat(step, has_head=model.has_head, chats=model.chats)
        answer_tokens = _answer_tokens(step, model)
        questions.append(
            Question(
                step=step,
                key=step_key(step, model.identity, chat=chat),
                inputs=inputs[step.name],
                chat=chat,
                max_prompt_tokens=longest_prompt(step, model.max_positions, answer_tokens),
                model=model,
                models_at_once=at_once,
            )
        )
    labels = {question.name: question.model.labels for question in questions}
    check_conditions(job.steps, inputs, labels)
    return _calibrated(job.calibration, questions)


def _calibrated(calibration: str | None, questions: Sequence[Question]) -> tuple[Question, ...]:
    """The questions with the maps in the file `calibration`, if any.

    InputError when it was not fitted for them.
    """
    if calibration is None:
        return tuple(questions)
    keys = confidence_keys(questions)
    maps = maps_of(calibration, read_calibration(calibration), keys)
    return tuple(each.model_copy(update={"maps": maps[each.name]}) for each in questions)


def _answer_tokens(step: AnyStep, model: Model) -> int:
    """Positions that an answer takes after its prompt."""
    if isinstance(step, GenerateStep):
        return step.max_tokens
    if isinstance(step, ExtractStep):
        return form_of(step, tokenizer_of(model)).longest
    if model.has_head:
        return 0
    return max(map(len, encode_labels(scored_texts(step), tokenizer_of(model))))


def bundled(
    fragments: Sequence[Fragment], most_rows: int, bundles: int
) -> Iterator[tuple[Fragment, ...]]:
    """The fragments in order, in bundles of at most `most_rows` rows.

    Fragments are bundled only where there would be more than some number of `bundles`.
    """
    # A fragment without rows costs its files all the same.
    weights = [max(fragment.rows, 1) for fragment in fragments]
    most = min(most_rows, math.ceil(sum(weights) / bundles))
    bundle: list[Fragment] = []
    room = most
    for fragment, weight in zip(fragments, weights, strict=True):
        if bundle and weight > room:
            yield tuple(bundle)
            bundle, room = [], most
        bundle.append(fragment)
        room -= weight
    if bundle:
        yield tuple(bundle)


def _bundle(
    context: RunContext,
    fragments: tuple[Fragment, ...],
    questions: Sequence[Question],
    beside: Sequence[Sequence[int]],
) -> Bundle:
    # By fragment: the answers keys of the steps so far.
    answers: list[dict[str, str]] = [{} for _ in fragments]
    keys: dict[str, AnswersKeys] = {}
    assignments = []
    for question in questions:
        for fragment, own in zip(fragments, answers, strict=True):
            # The key includes those of the earlier steps, whose answers are part of the prompts.
            earlier = {name: own[name] for name in question.inputs.earlier}
            columns = question.inputs.sources
            when = question.inputs.when
            own[question.name] = answers_key(
                fragment,
                question.name,
                question.key,
                columns,
                earlier,
                when=(when.text, when.columns) if when else None,
            )
        own_keys = tuple(own[question.name] for own in answers)
        keys[question.name] = AnswersKeys(file=bundle_key(own_keys), fragments=own_keys)
        assignments.append(
            Assignment(
                run=context,
                fragments=fragments,
                question=question,
                answers_keys=keys[question.name],
                earlier={name: keys[name] for name in question.inputs.earlier},
            )
        )
    output_keys = []
    calibration = made_with(questions)[1]
    for fragment, own in zip(fragments, answers, strict=True):
        output_keys.append(output_key(fragment, own, context.format, calibration))
    return Bundle(
        run=context,
        fragments=fragments,
        output_keys=tuple(output_keys),
        assignments=with_beside(assignments, beside),
    )


def _refuse_mixing(data: DataConfig, plan: Plan, questions: Sequence[Question]) -> None:
    # Damage within a file is not known yet; run/publish.py checks again once the rows are read.
    drop_missing = data.missing_sources == "drop"
    stay = staying(Ledger(data.output).manifest(), plan, drop_missing=drop_missing).files
    damaged = {fault.source for fault in plan.unusable}
    problem = mixture(stay, made_with(questions), plan, damaged, drop_missing=drop_missing)
    if problem is not None:
        raise InputError(f"{data.output}: {problem}")
