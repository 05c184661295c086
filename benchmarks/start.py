"""How long a run takes beside its rows: with few rows, without change, and with a Ray cluster.

    python benchmarks/start.py first --rounds 5    a first night of few rows; the server is up
    python benchmarks/start.py night --rounds 5    with a server that is up, and with one of its own
    python benchmarks/start.py ray                 the parts of the start of `runtime.cluster: ray`

`first` makes 13 files of 3 rows and runs over them as a process of its own, each time into a new
folder. `night` publishes them and repeats that run. CPU seconds are those of all processes of a
run. PYTHONPYCACHEPREFIX=/nowhere PYTHONDONTWRITEBYTECODE=1 shows
the same where no package is compiled.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from glmbatch.cli.server import own_server

MODEL = Path(__file__).resolve().parent.parent / "sample_data" / "tiny-chatglm2"
FILES = 13
# A source's stamp is recorded if the source is older than that.
SETTLED_SECONDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("first", "night", "ray"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["PREFECT_HOME"] = str(folder / "prefect")
        os.environ.pop("PREFECT_API_URL", None)
        if options.what == "first":
            measure_first_nights(folder, options.rounds)
        elif options.what == "night":
            measure_nights(folder, options.rounds)
        else:
            measure_ray(folder)


def measure_first_nights(folder: Path, rounds: int) -> None:
    job = write_job(folder)
    with own_server() as client:
        runs = []
        for _ in range(rounds):
            shutil.rmtree(folder / "out", ignore_errors=True)
            runs.append(run_once(job, client))
        report("first night", runs)


def measure_nights(folder: Path, rounds: int) -> None:
    job = write_job(folder)
    run_once(job, {})
    for name, environment in (("own server", {}), ("server up", None)):
        if environment is not None:
            report(name, [run_once(job, environment) for _ in range(rounds)])
            continue
        with own_server() as client:
            run_once(job, client)
            report(name, [run_once(job, client) for _ in range(rounds)])


def write_job(folder: Path) -> Path:
    (folder / "in").mkdir()
    for number in range(FILES):
        texts = [f"file {number}, text {text}" for text in range(3)]
        pq.write_table(pa.table({"text": texts}), folder / "in" / f"{number:02}.parquet")
    step = {"kind": "classify", "name": "mood", "labels": ["good", "bad"]}
    settings = {
        "data": {"input": str(folder / "in"), "output": str(folder / "out")},
        "model": {"path": str(MODEL)},
        "steps": [{**step, "prompt_template": "{text}"}],
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(settings))
    time.sleep(SETTLED_SECONDS)
    return path


def run_once(job: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of `glmbatch run`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "glmbatch.cli.main", "run", str(job)],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu


def report(name: str, runs: list[tuple[float, float]]) -> None:
    wall = min(run[0] for run in runs)
    cpu = min(run[1] for run in runs)
    print(f"{name:12} least of {len(runs)}: {wall:.1f} s, {cpu:.1f} s of CPU", flush=True)


def measure_ray(folder: Path) -> None:
    """The steps of `tasks/cluster.py` one after the other, with two engine processes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    clock = Clock()
    import ray

    from tasks.cluster import OBJECT_STORE_BYTES, ClusterProcess

    clock.tick("imports of the flow")
    ray.init(
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="ERROR",
    )
    clock.tick("ray.init: Ray's own processes")
    from glmbatch.run.work import RunContext
    from glmbatch.settings.job import RuntimeConfig

    run = RunContext(
        id="start",
        began=0.0,
        output=str(folder / "out"),
        format="parquet",
        on_error="null",
        runtime=RuntimeConfig(cluster="ray"),
    )
    actor = ray.remote(ClusterProcess).options(num_cpus=1, max_concurrency=2)
    engines = [actor.remote(run) for _ in range(2)]
    ray.get([engine.call.remote(os.getpid) for engine in engines])
    clock.tick("two engine processes answer")
    light = ray.remote(num_cpus=0)(import_tasks)
    ray.get([light.remote() for _ in range(4)])
    clock.tick("four light processes import Prefect")
    ray.get([engine.call.remote(load_model_there) for engine in engines])
    clock.tick("both engine processes have a model")
    ray.shutdown()


def import_tasks() -> None:

    import tasks.annotate  # noqa: F401


def load_model_there() -> None:
    from glmbatch.glm.checkpoint.load import load_weights

    load_weights(MODEL)


class Clock:
    """Prints the seconds since the last tick, and the CPU seconds of all living processes."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._cpu = 0.0

    def tick(self, what: str) -> None:
        now = time.perf_counter()
        cpu = time.process_time()
        for child in psutil.Process().children(recursive=True):
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue
            cpu += times.user + times.system
        print(f"{now - self._last:6.1f} s {cpu - self._cpu:6.1f} s of CPU  {what}", flush=True)
        self._last, self._cpu = now, cpu


if __name__ == "__main__":
    main()
