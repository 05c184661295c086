"""What a run is to do, before anything is done: fragments, models, one assignment for each step and fragment.

Reads footers and digests; loads no weights, reads no rows.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel

from glmbatch.errors import InputError
from glmbatch.glm.engine.pool import POOL
from glmbatch.glm.files import ADAPTER_FILES
from glmbatch.ledger.delta import check_sources, is_table
from glmbatch.ledger.fragments import Fragment, Plan, plan_fragments
from glmbatch.ledger.ledger import Ledger
from glmbatch.ledger.manifest import Manifest, PublishedFile
from glmbatch.ledger.rowkeys import answers_key, output_key, step_key
from glmbatch.report.progress import PROGRESS
from glmbatch.run.fetching import PROMPT_FILE, local_adapter, local_checkpoint
from glmbatch.settings.job import (
    ClassifyStep,
    GenerateStep,
    JobConfig,
    ModelConfig,
    RuntimeConfig,
    Step,
    placeholders,
)
from glmbatch.store.paths import is_remote, location

# Half as much again as the weights, for caches and activations.
ROOM = 1.5


class Model(BaseModel, frozen=True, extra="forbid"):
    """A checkpoint that was found sound, as the tasks pass it on; `identity` changes whenever its answers may.

    `config` names its directory and the numbers it computes in; `labels` are those of its trained head; `stamp` is
    that of its files when they were digested.
    """

    config: ModelConfig
    identity: str
    has_head: bool
    labels: tuple[str, ...]
    parameters: int
    size_bytes: int
    max_positions: int
    stamp: str


class Assignment(BaseModel, frozen=True, extra="forbid"):
    """One step over one fragment. `earlier` maps the steps that its prompt uses to their answers keys.

    `models_at_once` models of the run may stay loaded together.
    """

    run: str
    fragment: Fragment
    step_index: int
    step: str
    step_key: str
    key: str
    earlier: dict[str, str]
    model: Model
    models_at_once: int


class FragmentWork(BaseModel, frozen=True, extra="forbid"):
    """All there is to do for one fragment: an assignment for each step, then its output file under `key`."""

    run: str
    fragment: Fragment
    key: str
    assignments: tuple[Assignment, ...]


class Run(BaseModel, frozen=True, extra="forbid"):
    """One run of a job: its name, when it began (seconds since 1970), and its plan."""

    id: str
    began: float
    plan: Plan


def check_job(job: JobConfig) -> None:
    """Tell what is wrong with a job at once: what needs no network, no digests and no server. InputError says what."""
    from glmbatch.glm.checkpoint.load import read_checkpoint

    run = plan_run(job, digests=False)
    open_output(job, run)
    Ledger(job.data.output).close(run.id)
    for model in job_models(job):
        remote = [each for each in (model.path, model.adapter or "") if is_remote(each)]
        # These may need the network, which is the flow's to try again, or a device that only the cluster has.
        if model.revision is None and not remote and job.runtime.cluster is None:
            located = locate_model(model, job.runtime)
            read_checkpoint(located.path, located.adapter)


def plan_run(job: JobConfig, *, digests: bool = True) -> Run:
    """Check the input against the job and what the output holds, and plan the fragments; writes nothing.

    InputError when nothing can be run. Without `digests` only footers are read, and the plan can only be looked at.
    """
    began = time.time()
    plan = plan_fragments(job, digests=digests)
    manifest = Ledger(job.data.output).manifest()
    if manifest is not None and manifest.limit is None and job.data.limit is not None:
        raise InputError(
            f"{job.data.output}: holds all rows; a run with data.limit would replace them. "
            "Set data.output to another folder."
        )
    _check_format(job, plan, manifest)
    if manifest is not None and manifest.root != plan.root:
        raise InputError(
            f"{job.data.output}: holds the answers over {manifest.root}; this input is named from {plan.root}. "
            "Set data.output to another folder."
        )
    return Run(id=uuid.uuid4().hex, began=began, plan=plan)


def _check_format(job: JobConfig, plan: Plan, manifest: Manifest | None) -> None:
    output = location(job.data.output)
    if job.data.format == "parquet":
        if is_table(output):
            raise InputError(
                f"{output}: is a Delta table. Set data.format to delta, or data.output."
            )
        return
    sources = {fragment.source: location(fragment.path) for fragment in plan.fragments}
    check_sources(output, sources, [file.output_name for file in _staying(job, plan, manifest)])


def _staying(job: JobConfig, plan: Plan, manifest: Manifest | None) -> list[PublishedFile]:
    """The published files that this run leaves beside its own: of sources that it does not have and does not drop."""
    replaced, drops = (
        {fragment.source for fragment in plan.fragments},
        job.data.missing_sources == "drop",
    )
    return [
        file
        for file in (manifest.files if manifest and manifest.limit is None else ())
        if file.source not in replaced
        and not (drops and not (location(plan.root) / file.source).exists())
    ]


class Work(BaseModel, frozen=True, extra="forbid"):
    """All there is to do, and `passes`: which steps (by index) run together over all fragments, pass after pass."""

    fragments: tuple[FragmentWork, ...]
    passes: tuple[tuple[int, ...], ...]


def open_output(job: JobConfig, run: Run) -> None:
    """Make the output folder ready for `run` and hold it; InputError when it cannot be written or is held."""
    Ledger(job.data.output).open(run.id)
    POOL.resume()
    PROGRESS.start("annotate", run.plan.rows * len(job.steps))


def job_models(job: JobConfig) -> list[ModelConfig]:
    """The distinct models of the job's steps, in the order of their first use."""
    return list(dict.fromkeys(job.model_of(step) for step in job.steps))


def locate_model(model: ModelConfig, runtime: RuntimeConfig) -> ModelConfig:
    """The same model as a directory on this machine (fetched from the hub or a store), its numbers settled.

    InputError when there is no such checkpoint, adapter or device, TransientError when the hub cannot be reached.
    """
    from glmbatch.glm.device import resolve_device, resolve_dtype
    from glmbatch.glm.model.linear import choose_form

    adapter = (
        None if model.adapter is None else local_adapter(model.adapter, runtime.cache)
    )  # small, so first
    directory = local_checkpoint(model.path, model.revision, runtime.cache)
    device = resolve_device(runtime.device)
    dtype = resolve_dtype(model.dtype, device)
    choose_form(model.quantization, device, dtype)
    found = {"path": str(directory), "revision": None, "adapter": adapter, "dtype": dtype}
    return model.model_copy(update=found)


def prepare_model(located: ModelConfig) -> Model:
    """Check a located checkpoint and take its digests; loads no weights. InputError when it is not sound.

    Once in each process, unless its files are written to: a caller in memory asks again and again.
    """
    return _prepared(located, stamp_checkpoint(located))


@lru_cache(maxsize=16)
def _prepared(located: ModelConfig, stamp: str) -> Model:
    from glmbatch.glm.checkpoint.load import digest_tokenizer, digest_weights, read_checkpoint
    from glmbatch.glm.device import DTYPE_BYTES

    checkpoint = read_checkpoint(located.path, located.adapter)
    digests = [digest_weights(located.path, located.adapter), digest_tokenizer(located.path)]
    return Model(
        config=located,
        identity="/".join([*digests, _numerics(located), "default"]),
        has_head=checkpoint.has_head,
        labels=checkpoint.labels,
        parameters=checkpoint.parameters,
        size_bytes=checkpoint.parameters * DTYPE_BYTES[located.dtype],
        max_positions=checkpoint.architecture.max_positions,
        stamp=stamp,
    )


def _numerics(located: ModelConfig) -> str:
    return (
        located.dtype
        if located.quantization == "none"
        else f"{located.dtype} {located.quantization}"
    )


def stamp_checkpoint(model: ModelConfig) -> str:
    """Names, sizes and times of the files of a located model; changes whenever one of them was written to."""
    directory = Path(model.path)
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    if model.adapter is not None:  # beside these its training leaves much that is not read
        files += [
            Path(model.adapter) / name
            for name in ADAPTER_FILES
            if os.path.isfile(f"{model.adapter}/{name}")
        ]
    status = [(file.name, file.stat()) for file in files]
    return str([(name, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for name, each in status])


def describe_model(model: ModelConfig) -> str:
    """Where the weights of `model` are."""
    return model.path if model.adapter is None else f"{model.path} with the adapter {model.adapter}"


def check_step(step: Step, model: Model) -> None:
    """InputError when `model` cannot answer `step`."""
    where = f"step {step.name!r}: the checkpoint {describe_model(model.config)}"
    if isinstance(step, GenerateStep):
        if model.has_head:
            raise InputError(
                f"{where} has a classification head and cannot generate. Set the step's model."
            )
        if step.max_tokens >= model.max_positions:
            raise InputError(
                f"{where} has {model.max_positions} positions, none left for a prompt. Set max_tokens."
            )
    elif isinstance(step, ClassifyStep):
        if not model.has_head and step.labels is None:
            raise InputError(f"{where} has no trained head. Set the step's labels.")
        _check_prompt(where, step, model)
        if model.has_head and len(model.labels) < 2:
            raise InputError(
                f"{where} has a head of {len(model.labels)} label; a choice needs two. Set the step's model."
            )
        if (
            model.has_head
            and step.labels is not None
            and sorted(step.labels) != sorted(model.labels)
        ):
            named = (
                f", or name them by id2label in {model.config.adapter}/config.json"
                if model.config.adapter
                else ""
            )
            raise InputError(
                f"{where} was trained for {list(model.labels)}, not {step.labels}. Set the step's labels{named}."
            )


def _check_prompt(where: str, step: Step, model: Model) -> None:
    file = Path(model.config.path) / PROMPT_FILE
    if not model.has_head or not file.is_file():
        return
    trained = json.loads(file.read_text(encoding="utf-8"))
    names = placeholders(step.prompt_template)
    asked = (
        step.prompt_template.replace(f"{{{names[0]}}}", "{text}")
        if len(names) == 1
        else step.prompt_template
    )
    for setting, seen in (("prompt_template", asked), ("system_prompt", step.system_prompt)):
        if seen != trained[setting]:
            raise InputError(
                f"{where} was trained with the {setting} {trained[setting]!r}. Set the step's {setting}."
            )


def assign(job: JobConfig, run: Run, models: Sequence[Model]) -> Work:
    """What is to be done; `models` are those of `job_models`, prepared, in that order.

    InputError when a model cannot answer its step, or when the output holds answers of other settings that this run
    would leave beside its own.
    """
    step_models = _step_models(job, models)
    for step, model in zip(job.steps, step_models, strict=True):
        check_step(step, model)
    keys = step_keys(job, models)
    _refuse_mixing(job, run.plan, keys)
    at_once = models_at_once(job, models)

    def fragment_work(fragment: Fragment) -> FragmentWork:
        assignments: dict[str, Assignment] = {}
        for index, (step, model) in enumerate(zip(job.steps, step_models, strict=True)):
            earlier = {name: assignments[name].key for name in job.earlier_steps(step)}
            assignments[step.name] = Assignment(
                run=run.id,
                fragment=fragment,
                step_index=index,
                step=step.name,
                step_key=keys[step.name],
                key=answers_key(job, fragment, step, keys[step.name], earlier),
                earlier=earlier,
                model=model,
                models_at_once=at_once,
            )
        answers = {name: each.key for name, each in assignments.items()}
        return FragmentWork(
            run=run.id,
            fragment=fragment,
            key=output_key(fragment, answers, job.data.format),
            assignments=tuple(assignments.values()),
        )

    return Work(
        fragments=tuple(fragment_work(fragment) for fragment in run.plan.fragments),
        passes=passes(job, at_once),
    )


def step_keys(job: JobConfig, models: Sequence[Model]) -> dict[str, str]:
    """The step key of each step, by its name; `models` as `assign` takes them."""
    step_models = _step_models(job, models)
    return {
        step.name: step_key(step, model.identity)
        for step, model in zip(job.steps, step_models, strict=True)
    }


def _step_models(job: JobConfig, models: Sequence[Model]) -> list[Model]:
    prepared = dict(zip(job_models(job), models, strict=True))
    return [prepared[job.model_of(step)] for step in job.steps]


def _refuse_mixing(job: JobConfig, plan: Plan, keys: dict[str, str]) -> None:
    for file in _staying(job, plan, Ledger(job.data.output).manifest()):
        if file.step_keys != keys:
            raise InputError(
                f"{job.data.output}: {file.output_name} was answered with other settings or weights, and this run "
                f"cannot replace it: {file.source} is not in it, or not readable. Set data.output to another folder."
            )


def models_at_once(job: JobConfig, models: Sequence[Model]) -> int:
    """How many of the job's models stay loaded together: all where they fit in the memory that is free, else one."""
    if len(models) == 1:
        return 1
    from glmbatch.glm.device import free_memory_bytes, resolve_device

    device = resolve_device(job.runtime.device)
    # Without GPUs the engine processes of a cluster may all be on this machine.
    sharing = (job.runtime.cluster_workers or 1) if job.runtime.cluster and device == "cpu" else 1
    needed = ROOM * sharing * sum(model.size_bytes for model in models)
    return len(models) if needed <= free_memory_bytes(device) else 1


def passes(job: JobConfig, at_once: int) -> tuple[tuple[int, ...], ...]:
    """Indexes of the steps that run together over all fragments, pass after pass.

    One pass where all models stay loaded together. Otherwise one pass for each model, so that none is loaded twice,
    except where a step needs an answer of another model in between.
    """
    left = list(range(len(job.steps)))
    if at_once >= len(job_models(job)):
        return (tuple(left),)
    ordered: list[tuple[int, ...]] = []
    answered: set[str] = set()
    while left:
        together: list[int] = []
        for index in left:
            step = job.steps[index]
            if job.model_of(step) == job.model_of(job.steps[left[0]]) and answered.issuperset(
                job.earlier_steps(step)
            ):
                together.append(index)
                answered.add(step.name)
        ordered.append(tuple(together))
        left = [index for index in left if index not in together]
    return tuple(ordered)
