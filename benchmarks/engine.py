"""Compare our engine with its peers on the same rows, and with the limits of the machine.

    python benchmarks/engine.py         all tasks on one core, with every peer that is installed
    python benchmarks/engine.py --task generate --peers transformers,vllm
    python benchmarks/engine.py --shape 6b --dtype bfloat16 --device cuda --peers transformers

Every contestant, including ours, runs in its own process. Weights are random, because only speed is
measured. On a GPU one contestant runs at a time, and its line is printed and written when it ends.
The last line printed is one JSON object. benchmarks/README.md explains how to install the
peers and how to read the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from card import Card
from environments import HERE, SCRIPTS, NotHere, environment, find_checkpoint, find_python
from report import (
    ceiling_table,
    decode_limit,
    judge,
    judge_one,
    table,
    table_head,
    table_line,
    write_line,
)
from roster import OURS, OURS_INT8, PEERS, REFERENCE, WAYS, Contestant, taking_part
from worker import Worker
from workload import (
    LABEL_TEMPLATE_TOKENS,
    SHAPES,
    TASKS,
    USUAL_TASKS,
    Lengths,
    Shape,
    Work,
    make_work,
    part_of,
)

# Options that are copied into the report.
KEPT = (
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
)
# Machine, ceiling before and after, limit of new tokens, and the judged contestants of each task.
Outcome = tuple[str, dict[str, float], dict[str, float], dict[str, float], dict[str, Any]]
CEILING = Contestant("ceiling", "classify")  # not in any task, but uses the same protocol


def main() -> None:
    options = _options()
    shape = _shape(options)
    options.cache.mkdir(parents=True, exist_ok=True)
    asked = {"config": shape.config()}
    # CPU seconds exclude other users of a shared machine. GPUs have no such clock.
    clock = "wall_seconds" if options.device.startswith("cuda") else "cpu_seconds"
    run = _one_at_a_time if options.alone else _in_turn
    machine, first, last, limit, tasks = run(shape, clock, asked, options)
    line = {"machine": machine, "shape": asdict(shape)}
    line |= {name: getattr(options, name) for name in KEPT}
    reached = {"first": first, "last": last, "decode_tokens_per_second": limit}
    print(json.dumps({**line, "clock": clock, "ceiling": reached, "tasks": tasks}))


def _in_turn(shape: Shape, clock: str, asked: Work, options: argparse.Namespace) -> Outcome:
    """All contestants of a task are loaded at once and take turns. Tables come at the end."""
    ceiling = _start(CEILING, sys.executable, SCRIPTS / "ceiling.py", None, asked, options)
    try:
        machine = ceiling.wait_until_ready()
        # Measured before and after. On a shared machine the better reading counts.
        first = measure_ceiling(ceiling)
        measured = {task: measure_task(task, shape, options) for task in options.task}
        last = measure_ceiling(ceiling)
    finally:
        ceiling.stop()
    best = {name: max(first[name], last[name]) for name in first}
    limit = decode_limit(shape, options.slots, options.dtype, best)
    print(machine)
    print(ceiling_table(first, last, limit, options.slots))
    tasks = {}
    for task, results in measured.items():
        tasks[task] = judge(results, shape, clock, best, limit)
        print(table(task, tasks[task]))
    return machine, first, last, limit, tasks


def _one_at_a_time(shape: Shape, clock: str, asked: Work, options: argparse.Namespace) -> Outcome:
    """Each contestant has the device to itself, and its line is printed and written at its end."""
    ends = time.monotonic() + options.seconds
    ceiling = _start(CEILING, sys.executable, SCRIPTS / "ceiling.py", None, asked, options)
    try:
        machine = ceiling.wait_until_ready()
        reached = measure_ceiling(ceiling)
    finally:
        ceiling.stop()
    limit = decode_limit(shape, options.slots, options.dtype, reached)
    print(machine)
    print(ceiling_table(reached, reached, limit, options.slots), flush=True)
    tasks: dict[str, dict[str, Any]] = {}
    for task in options.task:
        print(table_head(task), flush=True)
        results: dict[str, dict[str, Any]] = {}
        contestants = taking_part(task, options.peers, options.always)
        # The reference first, so that each line can say how many answers agree with it.
        for contestant in sorted(contestants, key=lambda each: each.name != REFERENCE):
            name = contestant.name
            results[name] = measure_alone(contestant, shape, ends, options)
            judged = judge_one(name, results, shape, clock, reached, limit)
            print(table_line(task, name, judged), flush=True)
            write_line(
                options.out, {"task": task, "contestant": name, "machine": machine, **judged}
            )
        tasks[task] = judge(results, shape, clock, reached, limit)
    return machine, reached, reached, limit, tasks


def measure_alone(
    contestant: Contestant, shape: Shape, ends: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One contestant's work and runs, or why there are none. It is killed at `ends`."""
    work = _work(contestant.task, shape, options)
    if contestant.slow:
        work = part_of(work, options.slow_rows)
    result: dict[str, Any] = {"work": work, "runs": []}
    left = ends - time.monotonic()
    if left <= 0:
        return {"not_here": "no time was left"}
    card = Card()
    worker = None
    try:
        worker = _enter(contestant, work, shape, options)
        worker.kill_after(left)
        result["version"] = worker.wait_until_ready()
        for _ in range(options.rounds + 1):
            start = time.perf_counter()
            run = worker.run()
            # The GPU's readings are of the run alone: no load, no transfer of the answers.
            run["card"] = card.between(start, start + run["wall_seconds"])
            result["runs"].append(run)
    except NotHere as reason:
        return {"not_here": str(reason)}
    finally:
        card.stop()
        if worker is not None:
            worker.stop()
    return result


def measure_ceiling(worker: Worker) -> dict[str, float]:
    """Operations and bytes per second that the machine reaches."""
    flops, bandwidth = worker.run()["answers"]
    return {"gemm_flops": flops, "bytes_per_second": bandwidth}


def measure_task(task: str, shape: Shape, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each contestant's work and runs (the first is a warm-up), or why it is not available."""
    work = _work(task, shape, options)
    some_work = part_of(work, options.slow_rows)
    workers: dict[str, Worker] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        for contestant in taking_part(task, options.peers, options.always):
            # All rows would take slow contestants hours. Rates are per token, so fewer rows do.
            result: dict[str, Any] = {"work": some_work if contestant.slow else work, "runs": []}
            results[contestant.name] = result
            try:
                worker = _enter(contestant, result["work"], shape, options)
                workers[contestant.name] = worker
            except NotHere as reason:
                result["not_here"] = str(reason)
        # All contestants load at the same time. Wait for each in turn.
        for name in list(workers):
            with_worker(workers, results, name, "version", Worker.wait_until_ready)
        for number in range(options.rounds + 1):
            for name in _rotated(list(workers), number):
                with_worker(workers, results, name, "runs", Worker.run)
            print(f"{task}: {f'round {number}' if number else 'warm-up'} done", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.stop()
    return results


def with_worker(
    workers: dict[str, Worker],
    results: dict[str, dict[str, Any]],
    name: str,
    key: str,
    ask: Callable[[Worker], Any],
) -> None:
    """Store the result of `ask` under `key`, and drop the worker if it fails.

    A failure of our own worker or of the reference ends the benchmark.
    """
    try:
        answer = ask(workers[name])
    except NotHere as reason:
        if name in {OURS, REFERENCE}:
            raise SystemExit(f"{name}: {reason}") from reason
        results[name]["not_here"] = str(reason)
        workers.pop(name).stop()
        return
    if key == "runs":
        results[name]["runs"].append(answer)
    else:
        results[name][key] = answer


def _rotated(names: list[str], turn: int) -> list[str]:
    """`names`, starting with another one in each turn, so that no contestant is always first."""
    start = turn % max(1, len(names))
    return [*names[start:], *names[:start]]


def _work(task: str, shape: Shape, options: argparse.Namespace) -> Work:
    prefix = options.prefix
    if prefix is None:
        prefix = LABEL_TEMPLATE_TOKENS if task == "labels" else 0
    work = make_work(
        task, shape, options.rows, options.prompts, options.answers, prefix, options.seed
    )
    if task == "fields":
        from typed import fields_work  # it needs pydantic, which a GPU machine may lack

        work |= fields_work(options.rows, options.more_tokens, 40, options.seed)
    return work | {
        "slots": options.slots,
        "batch": options.batch,
        "batch_tokens": options.batch_tokens,
    }


def _enter(contestant: Contestant, work: Work, shape: Shape, options: argparse.Namespace) -> Worker:
    """Start the contestant's process, or raise NotHere with the reason why it cannot run."""
    if not options.device.startswith(contestant.only):
        raise NotHere(f"set up for {contestant.only} only")
    python = find_python(contestant, options.peers_dir)
    checkpoint = None
    if options.build == "checkpoint":
        checkpoint = find_checkpoint(
            contestant, shape, options.seed, options.cache, options.peers_dir
        )
    elif contestant.program not in {OURS, "transformers"} and not _fills_weights(
        contestant, options
    ):
        raise NotHere("needs a checkpoint: set --build checkpoint")
    return _start(contestant, python, SCRIPTS / contestant.script, checkpoint, work, options)


def _fills_weights(contestant: Contestant, options: argparse.Namespace) -> bool:
    """Whether the contestant makes weights of its own, as vLLM does on a GPU."""
    return contestant.program == "vllm" and options.device.startswith("cuda")


def _start(
    contestant: Contestant,
    python: str,
    script: Path,
    checkpoint: Path | None,
    work: Work,
    options: argparse.Namespace,
) -> Worker:
    # Benchmarks that run at the same time share checkpoints, but not work files.
    folder = options.cache / f"run-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    name = f"{contestant.task}-{contestant.name.replace('/', '-')}"
    asked = folder / f"{name}.json"
    asked.write_text(json.dumps(work))
    command = [python, str(script), "--work", str(asked)]
    command += ["--task", contestant.task, "--way", contestant.way]
    command += ["--threads", str(options.threads)]
    command += ["--dtype", options.dtype, "--device", options.device]
    if checkpoint is not None:
        command += ["--checkpoint", str(checkpoint)]
    return Worker(command, environment(options.threads, python), folder / f"{name}.log")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_contest(parser)
    _add_model(parser)
    _add_rows(parser)
    parser.add_argument(
        "--peers-dir",
        type=Path,
        default=HERE / ".peers",
        help="folder with one environment for each peer",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=HERE / ".cache",
        help="folder for checkpoints, work files and logs",
    )
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.slots = options.slots or (16 if on_cpu else 512)
    options.alone = options.alone or not on_cpu
    # The reference reads one row at a time. On a GPU it takes part only where it is asked for.
    options.always = {OURS, REFERENCE} if on_cpu else {OURS}
    if options.no_ours:
        options.always = set()
    options.slow_rows = options.slow_rows or max(1, min(16, options.rows // 4))
    # Writing and reading 6B weights takes minutes, so on a GPU each worker makes its own.
    options.build = options.build or ("checkpoint" if on_cpu else "seed")
    return options


def _add_contest(parser: argparse.ArgumentParser) -> None:
    """Options for tasks, contestants and rounds."""
    parser.add_argument(
        "--task",
        type=_names(TASKS),
        default=list(USUAL_TASKS),
        help=f"any of {', '.join(TASKS)}; default: {', '.join(USUAL_TASKS)}",
    )
    parser.add_argument(
        "--peers",
        type=_names([*PEERS, *WAYS]),
        default=[*PEERS, OURS_INT8],
        help=f"any of {', '.join(PEERS)}, or one variant such as transformers/static",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="interleaved rounds after the warm-up"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of each contestant; 0: its own choice"
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="one contestant at a time, each reported when it ends; always so on a GPU",
    )
    parser.add_argument(
        "--seconds", type=float, default=3e6, help="with --alone: time limit for all contestants"
    )
    parser.add_argument(
        "--no-ours", action="store_true", help="with --alone: only the peers that are named"
    )
    parser.add_argument("--out", type=Path, help="with --alone: add each result as a JSON line")


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Options for the model's shape, dtype and device."""
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    for name in asdict(SHAPES["mid"]):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help="replaces the shape's value"
        )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--build",
        choices=("checkpoint", "seed"),
        help="source of the weights; default: checkpoint on CPU, seed on a GPU",
    )


def _add_rows(parser: argparse.ArgumentParser) -> None:
    """Options for the rows and the sizes of batches."""
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument(
        "--slow-rows",
        type=int,
        help="rows for slow contestants; default: a quarter of the rows, at most 16",
    )
    lengths: dict[str, Any] = {"type": _lengths, "metavar": "MEAN,LEAST,MOST", "help": "tokens"}
    parser.add_argument("--prompts", default=Lengths(127, 8, 512), **lengths)
    parser.add_argument("--answers", default=Lengths(50, 4, 256), **lengths)
    parser.add_argument(
        "--prefix",
        type=int,
        help=f"tokens shared by all rows; default: {LABEL_TEMPLATE_TOKENS} for labels, else 0",
    )
    parser.add_argument(
        "--slots", type=int, help="rows generated at once; default: 16 on CPU, 512 on a GPU"
    )
    parser.add_argument(
        "--more-tokens", type=int, default=24, help="in the task fields: tokens beyond the least"
    )
    parser.add_argument("--batch", type=int, default=32, help="rows in a padded batch")
    parser.add_argument(
        "--batch-tokens", type=int, help="tokens in a packed batch; default: each contestant's own"
    )


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        asked = text.split(",") if text else []
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return asked

    return names


def _lengths(text: str) -> Lengths:
    mean, least, most = map(int, text.split(","))
    return Lengths(mean, least, most)


def _shape(options: argparse.Namespace) -> Shape:
    """The named shape, with the values that options replace."""
    shape = SHAPES[options.shape]
    given = {name: getattr(options, name) for name in asdict(shape)}
    return replace(shape, **{name: number for name, number in given.items() if number is not None})


if __name__ == "__main__":
    main()
