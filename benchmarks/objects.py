"""Requests to a local S3 server: seconds, and CPU seconds of this process, for each kind.

    python benchmarks/objects.py [--rounds 3] [--other CHECKOUT]

Starts moto as the server. With --other, another checkout takes turns with this one, so that both
meet the same load of the machine. Prints a line for each kind of work and checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
SMALL, LISTED = 100, 3_000


def measure(name: str, times: dict[str, tuple[float, float]], work: Any) -> None:
    """Add the seconds and CPU seconds of `work` under `name`."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    times[name] = time.perf_counter() - began, time.process_time() - cpu


def one_round(folder: str) -> None:
    """Print the times of each kind of work in a new folder, as JSON."""
    from glmbatch.store.paths import ObjectPath

    root = ObjectPath(f"s3://bench/{folder}")
    content = os.urandom(4_000)
    times: dict[str, tuple[float, float]] = {}
    (root / "warm").write_bytes(content)
    (root / "warm").read_bytes()
    with ThreadPoolExecutor(16) as pool:

        def each(work: Any) -> None:
            list(pool.map(work, range(SMALL)))

        measure(f"put {SMALL}", times, lambda: each(lambda n: (root / f"{n}").write_bytes(content)))
        measure(f"get {SMALL}", times, lambda: each(lambda n: (root / f"{n}").read_bytes()))
        measure(f"look {SMALL}", times, lambda: each(lambda n: (root / f"{n}").stat()))
    measure(f"list {LISTED}", times, lambda: ObjectPath("s3://bench/listed").listed())
    print(json.dumps(times))


def main() -> None:
    """Measure this checkout, and the other one, in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    if arguments.folder:
        one_round(arguments.folder)
        return
    import boto3

    from tests.stores import ENVIRONMENT, s3_server

    log = Path(tempfile.mkdtemp()) / "log"
    with s3_server(log) as port:
        environment = {**os.environ, **ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        os.environ.update(environment)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bench")
        for number in range(LISTED):
            client.put_object(Bucket="bench", Key=f"listed/{number:05}", Body=b"x")
        found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
        for number in range(arguments.rounds):
            for root in filter(None, (arguments.other, ROOT)):
                python = root / ".venv/bin/python"
                command = [python, __file__, "--folder", f"{root.name}-{number}"]
                path = {**environment, "PYTHONPATH": str(root)}
                done = subprocess.run(command, env=path, cwd=root, capture_output=True, check=True)
                for name, values in json.loads(done.stdout).items():
                    found[str(root), name].append(values)
    for (checkout, name), values in found.items():
        wall, cpu = (median(column) for column in zip(*values, strict=True))
        print(f"{checkout}: {name}: {wall:.2f} s, CPU {cpu:.2f} s")


if __name__ == "__main__":
    sys.path.append(str(ROOT))
    main()
