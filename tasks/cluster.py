"""Where the tasks of a run do their work: in this process, or in engine processes on a Ray cluster.

    flow --submit--> RayTaskRunner, a light process --call--> ClusterProcess, with its own GPU

An engine process is a Ray actor, because an actor keeps its process and its GPU for its lifetime.
A Ray task may get another GPU than the one before it in the same process, which CUDA cannot handle.
Ray restarts a lost actor; the tasks that it was running are retried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

from prefect.context import FlowRunContext, TaskRunContext

from glmbatch.errors import InputError, TransientError
from glmbatch.ledger.ledger import LOCK
from glmbatch.run.work import RunContext
from glmbatch.settings.addresses import TABLE_SCHEME
from glmbatch.settings.job import JobConfig, ModelConfig, RuntimeConfig
from glmbatch.store.errors import one_line
from glmbatch.store.files import whole_address
from glmbatch.store.folder import Folder
from glmbatch.store.locks import read_sign
from tasks.engines import ClusterProcess, complaint_of

Result = TypeVar("Result")
# Size of Ray's object store. Only references are passed, and Ray's default is 30 % of the memory.
OBJECT_STORE_BYTES = 100_000_000


class Place(Protocol):
    """Where a call runs: this process, or an engine process of a cluster."""

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `function(*arguments)` there. TransientError if that process was lost."""


class ThisProcess:
    """The process of the flow."""

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(*arguments)` here."""
        return function(*arguments)


HERE = ThisProcess()


class EngineHandle:
    """A handle to an engine process, for use in other processes."""

    def __init__(self, actors: Sequence[Any], index: int) -> None:
        self._actors = actors
        self._index = index

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `function(*arguments)` in the engine process.

        TransientError if that process was lost. The next call waits until Ray has restarted it.
        Each retry of a task goes to the next engine process, because this one's GPU may be dead.
        Its task keeps its seat meanwhile, so a dead GPU attracts no more tasks than another one.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        # Prefect's task retries a lost call, because it looks in the ledger first.
        actor = self._actors[(self._index + _retries()) % len(self._actors)]
        call = actor.call.options(max_task_retries=0)
        try:
            result: Result = ray.get(call.remote(function, *arguments))
            return result
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise TransientError(
                f"an engine process of the cluster was lost: {one_line(error)}"
            ) from error


def _retries() -> int:
    """How often the task of this thread was tried before; 0 outside of any task."""
    context = TaskRunContext.get()
    return 0 if context is None else max(0, context.task_run.run_count - 1)


@contextmanager
def places_of(run: RunContext) -> Iterator[list[Place]]:
    """The engine processes of a run, which end with the block; without a cluster, this process.

    On a cluster, tasks submitted in the block wait for the engines in light processes on this
    machine. InputError if the cluster is too small or does not see the output; TransientError if
    it fails.
    """
    runtime = run.runtime
    if runtime.cluster is None:
        yield [HERE]
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if runtime.cluster_address is None:
        # Makes Ray's servers listen only on loopback, on every operating system.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
        from prefect_ray.context import remote_options
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError as error:
        raise InputError(
            "runtime.cluster is ray, but Ray is not installed. Run pip install 'glmbatch[ray]'."
        ) from error
    try:
        with _submitting_to_ray(runtime):
            actors = _start_engines(run)
            _refuse_apart(run.output, actors)
            node = ray.get_runtime_context().get_node_id()
            on_this_machine = NodeAffinitySchedulingStrategy(node, soft=False)
            with remote_options(
                num_cpus=0, max_retries=runtime.retries, scheduling_strategy=on_this_machine
            ):
                yield [EngineHandle(actors, index) for index in range(len(actors))]
    except RayError as error:
        raise TransientError(f"the Ray cluster failed: {one_line(error)}") from error


@contextmanager
def _submitting_to_ray(runtime: RuntimeConfig) -> Iterator[None]:
    """Connect to the cluster, or start one on loopback; the flow submits its tasks to it."""
    from prefect_ray.task_runners import RayTaskRunner

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if runtime.cluster_address is None:
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    # The flow's default runner uses threads; replace it for this run.
    flow = FlowRunContext.get()
    assert flow is not None
    with ExitStack() as entered:
        try:
            runner = entered.enter_context(
                RayTaskRunner(runtime.cluster_address or "local", options)
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = runtime.cluster_address or "this machine"
            raise TransientError(
                f"{where}: no Ray cluster answers: {one_line(error)}. "
                "Set RAY_AUTH_MODE if it requires a token."
            ) from error
        entered.enter_context(flow.model_copy(update={"task_runner": runner}))
        yield


def _start_engines(run: RunContext) -> list[Any]:
    import ray

    runtime = run.runtime
    gpus = 0
    cpus = []
    for node in ray.nodes():
        if node["Alive"]:
            cpus.append(int(node["Resources"].get("CPU", 0)))
            gpus += int(node["Resources"].get("GPU", 0))
    if runtime.device == "cpu":
        gpus = 0
    workers = runtime.cluster_workers or gpus or len(cpus)
    # Ray limits torch's threads to the CPUs of the process, unless OMP_NUM_THREADS is set.
    needs = {"num_gpus": 1} if gpus else {"num_cpus": share_of_cpus(cpus, workers)}
    if workers > (gpus or sum(cpus)):
        raise InputError(
            f"the cluster has {gpus} GPUs and {sum(cpus)} CPUs. Lower runtime.cluster_workers."
        )
    # Restart lost actors without limit; Prefect's tasks retry the calls that were lost.
    actor = ray.remote(ClusterProcess).options(
        **needs, max_restarts=-1, max_task_retries=-1, max_concurrency=runtime.fragments_in_flight
    )
    return [actor.remote(run) for _ in range(workers)]


def share_of_cpus(cpus: Sequence[int], workers: int) -> int:
    """The most CPUs that each of `workers` processes can have on machines with `cpus` CPUs each."""
    share = max(1, *cpus)
    while share > 1 and sum(machine // share for machine in cpus) < workers:
        share -= 1
    return share


def _refuse_apart(output: str, engines: Sequence[Any]) -> None:
    """InputError if an engine process does not start or does not see this process's output."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    # Every machine sees an object store, but the call also shows that the process has started.
    lock = str(Folder(output) / LOCK)
    sign = read_sign(lock)
    try:
        complaints = ray.get([engine.call.remote(complaint_of, lock, sign) for engine in engines])
    except (RayActorError, RayTaskError) as error:
        raise InputError(
            f"an engine process did not start: {one_line(error)}. "
            "Install the same glmbatch on every machine."
        ) from error
    for complaint in filter(None, complaints):
        raise InputError(complaint)


def with_whole_paths(job: JobConfig) -> JobConfig:
    """`job` with absolute paths if it uses a cluster, whose processes run in other folders."""
    if job.runtime.cluster is None:
        return job
    # The name of a table in a catalogue means the same in all folders.
    is_named = job.data.input.startswith(TABLE_SCHEME)
    source = job.data.input if is_named else whole_address(job.data.input)
    data = {"input": source, "output": whole_address(job.data.output)}
    steps = []
    for step in job.steps:
        model = step.model and _whole_model(step.model)
        examples = step.examples
        if examples is not None and examples.file is not None:
            examples = examples.model_copy(update={"file": whole_address(examples.file)})
        steps.append(step.model_copy(update={"model": model, "examples": examples}))
    calibration = job.calibration and whole_address(job.calibration)
    canary = job.canary and job.canary.model_copy(update={"file": whole_address(job.canary.file)})
    evaluate = job.evaluate and job.evaluate.model_copy(
        update={"rows": whole_address(job.evaluate.rows)}
    )
    return job.model_copy(
        update={
            "data": job.data.model_copy(update=data),
            "model": _whole_model(job.model),
            "steps": steps,
            "calibration": calibration,
            "canary": canary,
            "evaluate": evaluate,
        }
    )


def _whole_model(model: ModelConfig) -> ModelConfig:
    path = os.path.expanduser(model.path)
    if os.path.isdir(path):  # otherwise it is a hub id or an address
        model = model.model_copy(update={"path": os.path.abspath(path)})
    if model.adapter is not None:
        adapter = whole_address(os.path.expanduser(model.adapter))
        model = model.model_copy(update={"adapter": adapter})
    return model
