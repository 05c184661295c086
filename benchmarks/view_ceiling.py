"""What 300 labels can teach TF-IDF if they are chosen by one who sees the accuracy on test rows.

    python benchmarks/view_ceiling.py ROWS TEST

For comparison with `view_order.py`: rounds of 25 rows, each the best of 40 rounds drawn by lot,
and then exchanges of 10 rows, which are kept if they help. No order can know this much. A longer
search finds more, so this is a guide and not a bound. The last line printed is one JSON object.

Shapes: R rows, F n-grams.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression

from glmbatch.tuning.baseline import REGULARISATION, WAYS

LABELS, ROUND, TRIES, EXCHANGED = 300, 25, 40, 10
WAY = WAYS["characters"]


class Learner:
    """The baseline of a training, over rows that are counted once."""

    def __init__(self, rows: Path, test: Path, label: str) -> None:
        self.counts, self.truth = [], []
        counter = CountVectorizer(**{**WAY, "min_df": 1})
        for path in (rows, test):
            table = pq.read_table(path, columns=["text", label])
            texts = table.column("text").to_pylist()
            count = counter.transform(texts) if self.counts else counter.fit_transform(texts)
            self.counts.append(count.tocsr())
            self.truth.append(np.array(table.column(label).cast("string").to_pylist()))

    def accuracy(self, chosen: Sequence[int]) -> float:
        """The share of right answers on the test rows after training on the `chosen` rows."""
        known_RF: sparse.csr_matrix = self.counts[0][list(chosen)]
        frequent_F = np.flatnonzero(known_RF.getnnz(axis=0) >= WAY["min_df"])
        weighted = TfidfTransformer(sublinear_tf=True).fit(known_RF[:, frequent_F])
        learner = LogisticRegression(C=REGULARISATION, max_iter=1000)
        learner.fit(weighted.transform(known_RF[:, frequent_F]), self.truth[0][list(chosen)])
        answers = learner.predict(weighted.transform(self.counts[1][:, frequent_F]))
        return float((answers == self.truth[1]).mean())


def main() -> None:
    options = _options()
    learner = Learner(options.rows, options.test, options.label)
    every = learner.counts[0].shape[0]
    dice = np.random.default_rng(0)
    by_lot = [learner.accuracy(dice.choice(every, 1000, replace=False)) for _ in range(5)]
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < LABELS:
        tries = [dice.choice(every, ROUND, replace=False).tolist() for _ in range(TRIES)]
        scores = [learner.accuracy([*chosen, *rows]) for rows in tries]
        best = max(scores)
        chosen += tries[scores.index(best)]
        print(f"{len(chosen)} rows: {best:.4f}", flush=True)
    in_rounds = best
    for _ in range(options.exchanges):
        out = set(dice.choice(LABELS, EXCHANGED, replace=False).tolist())
        kept = [row for place, row in enumerate(chosen) if place not in out]
        others = kept + dice.choice(every, EXCHANGED, replace=False).tolist()
        score = learner.accuracy(others)
        if score > best:
            chosen, best = others, score
    facts = {"by_lot_1000": round(float(np.mean(by_lot)), 4), "in_rounds": in_rounds}
    print(json.dumps({**facts, "exchanges": options.exchanges, "exchanged": best}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="Parquet with a column text and labels")
    parser.add_argument("test", type=Path, help="such rows that nobody labels")
    parser.add_argument("--label", default="label", help="the column of labels")
    parser.add_argument("--exchanges", type=int, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
