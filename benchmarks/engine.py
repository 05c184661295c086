"""Our engine beside its peers, on the same rows, and beside what the machine can do.

    python benchmarks/engine.py         all tasks on one core, with every peer that is installed
    python benchmarks/engine.py --task generate --peers transformers,vllm
    python benchmarks/engine.py --shape 6b --dtype bfloat16 --device cuda --peers transformers

Every contestant, ours too, is a process of its own. Random weights: only speed is measured. The
last line is one JSON object. benchmarks/README.md says how peers are installed and how to read the
numbers.
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
from workload import LABEL_TEMPLATE_TOKENS, SHAPES, TASKS, Lengths, Shape, Work, make_work, part_of

# Options that the report repeats.
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
CEILING = Contestant("ceiling", "classify")  # takes part in no task, but speaks the same protocol


def main() -> None:
    options = _options()
    shape = _shape(options)
    options.cache.mkdir(parents=True, exist_ok=True)
    asked = {"config": shape.config()}
    ceiling = _start(CEILING, sys.executable, SCRIPTS / "ceiling.py", None, asked, options)
    try:
        machine = ceiling.wait_until_ready()
        # Before and after: a machine that others share is as fast as its better reading.
        first = measure_ceiling(ceiling)
        measured = {task: measure_task(task, shape, options) for task in options.task}
        last = measure_ceiling(ceiling)
    finally:
        ceiling.stop()
    best = {name: max(first[name], last[name]) for name in first}
    # CPU seconds do not count what others do on a shared machine; a GPU has no such clock.
    clock = "wall_seconds" if options.device.startswith("cuda") else "cpu_seconds"
    limit = decode_limit(shape, options.slots, options.dtype, best)
    print(machine)
    print(ceiling_table(first, last, limit, options.slots))
    tasks = {}
    for task, results in measured.items():
        tasks[task] = judge(results, shape, clock, best, limit)
        print(table(task, tasks[task]))
    line = {"machine": machine, "shape": asdict(shape)}
    line |= {name: getattr(options, name) for name in KEPT}
    reached = {"first": first, "last": last, "decode_tokens_per_second": limit}
    print(json.dumps({**line, "clock": clock, "ceiling": reached, "tasks": tasks}))


def measure_ceiling(worker: Worker) -> dict[str, float]:
    """Operations and bytes a second that the machine reaches."""
    flops, bandwidth = worker.run()["answers"]
    return {"gemm_flops": flops, "bytes_per_second": bandwidth}


def measure_task(task: str, shape: Shape, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each contestant its work and all its runs (the first warms up), or why it is not here."""
    work = _work(task, shape, options)
    some_work = part_of(work, options.slow_rows)
    workers: dict[str, Worker] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        for contestant in taking_part(task, options.peers):
            # Slow ones would take hours with all rows; rates are for each token.
            result: dict[str, Any] = {"work": some_work if contestant.slow else work, "runs": []}
            results[contestant.name] = result
            try:
                worker = _enter(contestant, result["work"], shape, options)
                workers[contestant.name] = worker
            except NotHere as reason:
                result["not_here"] = str(reason)
        # All load at the same time, then each is waited for.
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
    """Store what `ask` answers under `key`, appended to a list; a worker that fails is out.

    Ends the benchmark if the worker is ours or the reference: nothing could be compared.
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
    """`names` from another one on in each turn, so that nobody always runs after the same one."""
    start = turn % max(1, len(names))
    return [*names[start:], *names[:start]]


def _work(task: str, shape: Shape, options: argparse.Namespace) -> Work:
    prefix = options.prefix
    if prefix is None:
        prefix = LABEL_TEMPLATE_TOKENS if task == "labels" else 0
    work = make_work(
        task, shape, options.rows, options.prompts, options.answers, prefix, options.seed
    )
    return work | {
        "slots": options.slots,
        "batch": options.batch,
        "batch_tokens": options.batch_tokens,
    }


def _enter(contestant: Contestant, work: Work, shape: Shape, options: argparse.Namespace) -> Worker:
    """Start the contestant's process; NotHere says why it cannot take part."""
    if contestant.cpu_only and options.device != "cpu":
        raise NotHere("set up for CPU only")
    python = find_python(contestant, options.peers_dir)
    checkpoint = None
    if options.build == "checkpoint":
        checkpoint = find_checkpoint(
            contestant, shape, options.seed, options.cache, options.peers_dir
        )
    elif contestant.program not in {OURS, "transformers"}:
        raise NotHere("reads a checkpoint: --build checkpoint")
    return _start(contestant, python, SCRIPTS / contestant.script, checkpoint, work, options)


def _start(
    contestant: Contestant,
    python: str,
    script: Path,
    checkpoint: Path | None,
    work: Work,
    options: argparse.Namespace,
) -> Worker:
    # Two benchmarks at once share the checkpoints, but not their questions.
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
        "--peers-dir", type=Path, default=HERE / ".peers", help="an environment for each peer"
    )
    parser.add_argument(
        "--cache", type=Path, default=HERE / ".cache", help="checkpoints, questions and logs"
    )
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.slots = options.slots or (16 if on_cpu else 512)
    options.slow_rows = options.slow_rows or max(1, min(16, options.rows // 4))
    # Writing and reading the 6B shape takes minutes; on a GPU it is made in place.
    options.build = options.build or ("checkpoint" if on_cpu else "seed")
    return options


def _add_contest(parser: argparse.ArgumentParser) -> None:
    """Who takes part, in what, how often."""
    parser.add_argument(
        "--task",
        type=_names(TASKS),
        default=list(TASKS),
        help=f"of {', '.join(TASKS)}; default: all",
    )
    parser.add_argument(
        "--peers",
        type=_names([*PEERS, *WAYS]),
        default=[*PEERS, OURS_INT8],
        help=f"of {', '.join(PEERS)}, or one/way",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="after the warm-up, interleaved; medians are reported"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of each contestant; 0: its own choice"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The model's shape, numbers and place."""
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    for name in asdict(SHAPES["mid"]):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help="instead of the shape's own"
        )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--build",
        choices=("checkpoint", "seed"),
        help="how workers get the weights; default: seed on a GPU",
    )


def _add_rows(parser: argparse.ArgumentParser) -> None:
    """The rows, and how many of them go together."""
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument(
        "--slow-rows",
        type=int,
        help="rows of slow contestants; default: a quarter, 16 at most",
    )
    lengths: dict[str, Any] = {"type": _lengths, "metavar": "MEAN,LEAST,MOST", "help": "tokens"}
    parser.add_argument("--prompts", default=Lengths(127, 8, 512), **lengths)
    parser.add_argument("--answers", default=Lengths(50, 4, 256), **lengths)
    parser.add_argument(
        "--prefix",
        type=int,
        help=f"tokens that all rows share; default: {LABEL_TEMPLATE_TOKENS} for labels, else 0",
    )
    parser.add_argument(
        "--slots", type=int, help="rows generated at once; default: 16 on CPU, 512 on a GPU"
    )
    parser.add_argument("--batch", type=int, default=32, help="rows in a padded batch")
    parser.add_argument(
        "--batch-tokens", type=int, help="tokens in a packed batch; default: each contestant's own"
    )


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        asked = text.split(",")
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return asked

    return names


def _lengths(text: str) -> Lengths:
    mean, least, most = map(int, text.split(","))
    return Lengths(mean, least, most)


def _shape(options: argparse.Namespace) -> Shape:
    """The named shape, with the numbers that the options replace."""
    shape = SHAPES[options.shape]
    given = {name: getattr(options, name) for name in asdict(shape)}
    return replace(shape, **{name: number for name, number in given.items() if number is not None})


if __name__ == "__main__":
    main()
