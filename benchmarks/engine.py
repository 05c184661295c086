"""Our engine beside its peers: the same rows, interleaved, answers checked, against the measured ceiling.

    python benchmarks/engine.py                              all tasks on one core, with every peer that is installed
    python benchmarks/engine.py --task generate --peers transformers,vllm
    python benchmarks/engine.py --shape 6b --dtype bfloat16 --device cuda --build seed --peers transformers

Every contestant, ours too, is a process of its own. Random weights: only speed is measured. The last line is one JSON
object. benchmarks/README.md says how peers are installed and how to read the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from environments import HERE, SCRIPTS, NotHere, environment, find_checkpoint, find_python
from report import ceiling_table, decode_limit, judge, table
from roster import OURS, OURS_INT8, PEERS, REFERENCE, WAYS, Contestant, taking_part
from worker import Worker
from workload import SHAPES, TASKS, Lengths, Shape, Work, make_work, part_of

# Settings that the report repeats.
KEPT = [
    "dtype",
    "device",
    "threads",
    "rows",
    "slow_rows",
    "rounds",
    "slots",
    "batch",
    "batch_tokens",
    "prefix",
    "seed",
]
CEILING = Contestant("ceiling", "classify")  # takes part in no task, but speaks the same protocol


def main() -> None:
    options = _options()
    shape = _shape(options)
    options.cache.mkdir(parents=True, exist_ok=True)
    ceiling = _start(
        CEILING, sys.executable, SCRIPTS / "ceiling.py", None, {"config": shape.config()}, options
    )
    try:
        machine = ceiling.wait_until_ready()
        first = measure_ceiling(ceiling)
        measured = {task: measure_task(task, shape, options) for task in options.task}
        last = measure_ceiling(ceiling)
    finally:
        ceiling.stop()
    best = {name: max(first[name], last[name]) for name in first}
    clock = "wall_seconds" if options.device.startswith("cuda") else "cpu_seconds"
    limit = decode_limit(shape, options.slots, options.dtype, best)
    tasks = {task: judge(results, shape, clock, best, limit) for task, results in measured.items()}
    print(machine)
    print(ceiling_table(first, last, limit, options.slots))
    for task, judged in tasks.items():
        print(table(task, judged))
    asked = {name: getattr(options, name) for name in KEPT}
    reached = {"first": first, "last": last, "decode_tokens_per_second": limit}
    facts = {"machine": machine, "shape": asdict(shape), **asked, "clock": clock}
    print(json.dumps({**facts, "ceiling": reached, "tasks": tasks}))


def measure_ceiling(worker: Worker) -> dict[str, float]:
    """Operations and bytes a second that the machine reaches."""
    flops, bandwidth = worker.run()["answers"]
    return {"gemm_flops": flops, "bytes_per_second": bandwidth}


def measure_task(task: str, shape: Shape, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each contestant its work and all its runs (the first is the warm-up), or why it is not here."""
    prefix = options.prefix if options.prefix is not None else 100 if task == "labels" else 0
    work = make_work(
        task, shape, options.rows, options.prompts, options.answers, prefix, options.seed
    )
    work |= {"slots": options.slots, "batch": options.batch, "batch_tokens": options.batch_tokens}
    some = part_of(work, options.slow_rows)
    workers: dict[str, Worker] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        for each in taking_part(task, options.peers):
            results[each.name] = {"work": some if each.slow else work, "runs": []}
            try:
                workers[each.name] = _enter(each, results[each.name]["work"], shape, options)
            except NotHere as reason:
                results[each.name]["not_here"] = str(reason)
        _try(
            workers,
            results,
            lambda name, worker: results[name].update(version=worker.wait_until_ready()),
        )
        for number in range(options.rounds + 1):
            turn = number % max(1, len(workers))
            names = [*list(workers)[turn:], *list(workers)[:turn]]
            _try(
                workers,
                results,
                lambda name, worker: results[name]["runs"].append(worker.run()),
                names,
            )
            print(f"{task}: {f'round {number}' if number else 'warm-up'} done", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.stop()
    return results


def _enter(each: Contestant, work: Work, shape: Shape, options: argparse.Namespace) -> Worker:
    if each.cpu_only and options.device != "cpu":
        raise NotHere("set up for CPU only")
    python = find_python(each, options.peers_dir)
    checkpoint = None
    if options.build == "checkpoint":
        checkpoint = find_checkpoint(each, shape, options.seed, options.cache, options.peers_dir)
    elif each.program not in {OURS, "transformers"}:
        raise NotHere("reads a checkpoint: --build checkpoint")
    return _start(each, python, SCRIPTS / each.script, checkpoint, work, options)


def _start(
    each: Contestant,
    python: str,
    script: Path,
    checkpoint: Path | None,
    work: Work,
    options: argparse.Namespace,
) -> Worker:
    folder = options.cache / f"run-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    name = f"{each.task}-{each.name.replace('/', '-')}"
    asked = folder / f"{name}.json"
    asked.write_text(json.dumps(work))
    command = [python, str(script), "--work", str(asked), "--task", each.task, "--way", each.way]
    command += [
        "--threads",
        str(options.threads),
        "--dtype",
        options.dtype,
        "--device",
        options.device,
    ]
    if checkpoint is not None:
        command += ["--checkpoint", str(checkpoint)]
    return Worker(command, environment(options.threads, python), folder / f"{name}.log")


def _try(
    workers: dict[str, Worker],
    results: dict[str, dict[str, Any]],
    act: Callable[[str, Worker], object],
    names: Iterable[str] | None = None,
) -> None:
    """`act` on each worker; one that fails leaves, with the reason kept."""
    for name in list(workers if names is None else names):
        try:
            act(name, workers[name])
        except NotHere as reason:
            if name in {OURS, REFERENCE}:
                raise SystemExit(f"{name}: {reason}") from reason
            results[name]["not_here"] = str(reason)
            workers.pop(name).stop()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--task",
        type=_names(TASKS),
        default=list(TASKS),
        help=f"of {', '.join(TASKS)}; default: all",
    )
    add(
        "--peers",
        type=_names([*PEERS, *WAYS]),
        default=[*PEERS, OURS_INT8],
        help=f"of {', '.join(PEERS)}, or one/way",
    )
    add("--shape", choices=SHAPES, default="mid")
    for name in asdict(SHAPES["mid"]):
        add(f"--{name.replace('_', '-')}", type=int, help="instead of the shape's own")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--device", default="cpu")
    add("--threads", type=int, default=1, help="of each contestant; 0: its own choice")
    add("--rows", type=int, default=48)
    add(
        "--slow-rows",
        type=int,
        help="rows of those who would take too long with all; default: a quarter, 16 at most",
    )
    add(
        "--rounds",
        type=int,
        default=3,
        help="interleaved rounds after the warm-up; medians are reported",
    )
    add(
        "--prompts",
        type=_lengths,
        default=Lengths(127, 8, 512),
        metavar="MEAN,LEAST,MOST",
        help="tokens",
    )
    add(
        "--answers",
        type=_lengths,
        default=Lengths(50, 4, 256),
        metavar="MEAN,LEAST,MOST",
        help="tokens",
    )
    add(
        "--prefix",
        type=int,
        help="tokens that all rows begin with; default: 100 for labels, else 0",
    )
    add("--slots", type=int, help="rows generated at once; default: 16 on CPU, 512 on a GPU")
    add("--batch", type=int, default=32, help="rows in a padded batch")
    add("--batch-tokens", type=int, help="tokens in a packed batch; default: each contestant's own")
    add("--seed", type=int, default=0)
    add(
        "--build",
        choices=("checkpoint", "seed"),
        help="how workers get the weights; default: seed on a GPU",
    )
    add(
        "--peers-dir", type=Path, default=HERE / ".peers", help="holds an environment for each peer"
    )
    add(
        "--cache",
        type=Path,
        default=HERE / ".cache",
        help="keeps checkpoints, and what was asked and logged",
    )
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.slots = options.slots or (16 if on_cpu else 512)
    options.slow_rows = options.slow_rows or max(1, min(16, options.rows // 4))
    options.build = options.build or ("checkpoint" if on_cpu else "seed")
    return options


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := set(asked) - set(known):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}"
            )
        return asked

    return names


def _lengths(text: str) -> Lengths:
    mean, least, most = map(int, text.split(","))
    return Lengths(mean, least, most)


def _shape(options: argparse.Namespace) -> Shape:
    shape = SHAPES[options.shape]
    given = {name: getattr(options, name) for name in asdict(shape)}
    return replace(shape, **{name: number for name, number in given.items() if number is not None})


if __name__ == "__main__":
    main()
