"""Kill runs again and again, over outputs of every format and place, while other programs read.

    python benchmarks/soak.py --kills 50                           50 kills in every cell
    python benchmarks/soak.py --kills 10 --flows                   of `glmbatch run` under Prefect
    python benchmarks/soak.py --cells delta,s3 --kills 5 --seed 9  in one cell

Without --flows a run is `run_job`, whose process costs a second rather than ten; its process group
is killed with SIGKILL in either case. A history of nights has its own seed and is one line of the
file --out; the same command goes on behind the last line. tests/soak/nights.py says what is drawn
and compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.soak.nights import CELLS, Cell, Nights, catalogue_variable
from tests.soak.reading import Readers
from tests.soak.runs import Forks
from tests.stores import Store, s3_store

KILLS_OF_A_HISTORY = 10


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"{cell.table},{cell.place},{cell.source}" for cell in CELLS]
    parser.add_argument("--cells", nargs="*", default=names)
    parser.add_argument("--kills", type=int, default=50, help="in each cell")
    parser.add_argument("--seed", type=int, default=1, help="of the first history")
    parser.add_argument("--flows", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("soak.jsonl"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        os.environ.update([catalogue_variable(folder)])
        environment = None
        if options.flows:
            from glmbatch.cli.server import own_server

            os.environ["PREFECT_HOME"] = str(folder / "prefect")
            environment = stack.enter_context(own_server())
        store = stack.enter_context(s3_store(folder / "s3.log"))
        forks, readers = Forks(folder, environment), Readers(folder, pause_seconds=0.5)
        stack.callback(forks.close)
        stack.callback(readers.close)
        for name in options.cells:
            soak(Cell(*name.split(",")), options, folder, forks, readers, store)
    print(table(lines_of(options.out)))


def soak(
    cell: Cell,
    options: argparse.Namespace,
    folder: Path,
    forks: Forks,
    readers: Readers,
    store: Store,
) -> None:
    """Live through histories of `cell` until the file has enough kills of its runs."""
    while True:
        ours = [
            line
            for line in lines_of(options.out)
            if (line["cell"], line["flows"]) == (str(cell), options.flows)
        ]
        kills = options.kills - sum(line["kills"] for line in ours)
        if kills <= 0:
            return
        seed = options.seed + len(ours)
        home = folder / f"{cell.table}-{cell.place}-{cell.source}-{seed}"
        home.mkdir()
        nights = Nights(cell, home, seed, forks, readers, store)
        began = time.monotonic()
        tally = nights.live(min(kills, KILLS_OF_A_HISTORY), seconds=300)
        nights.clean()
        line = {"cell": str(cell), "flows": options.flows, "seed": seed, **vars(tally)}
        line["seconds"] = round(time.monotonic() - began)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """The sums of each cell, as a table of Markdown."""
    rows = ["| output | runs | kills | nights | rows compared | asked (undisturbed) | reads |"]
    rows.append("|---|---|---|---|---|---|---|")
    for cell, flows in dict.fromkeys((line["cell"], line["flows"]) for line in lines):
        ours = [line for line in lines if (line["cell"], line["flows"]) == (cell, flows)]
        sums = {
            name: f"{sum(line[name] for line in ours):,}"
            for name in ("kills", "nights", "rows", "asked", "undisturbed")
        }
        reads: Counter[str] = Counter()
        for line in ours:
            reads.update(line["reads"])
        counted = ", ".join(f"{name} {number:,}" for name, number in sorted(reads.items()))
        how = "`glmbatch run`" if flows else "`run_job`"
        rows.append(
            f"| {cell} | {how} | {sums['kills']} | {sums['nights']} | {sums['rows']} "
            f"| {sums['asked']} ({sums['undisturbed']}) | {counted} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
