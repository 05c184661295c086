"""What a team has without a language model: TF-IDF and logistic regression over the same split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmbatch.tuning.examples import Example, Part
from glmbatch.tuning.scores import Scores, score

MOST_ROWS = 100_000  # to train on: a minute and three GiB; more changes such a baseline little
WAYS: Mapping[str, dict[str, Any]] = {
    "words": {"analyzer": "word", "ngram_range": (1, 2)},
    "characters": {
        "analyzer": "char",
        "ngram_range": (1, 3),
    },  # for texts that are written without spaces
}


def score_baseline(
    parts: Mapping[Part, Sequence[Example]], labels: Sequence[str]
) -> tuple[str, Scores]:
    """Which of the two ways was better on the validation rows, and its scores on the test rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    parts = {**parts, "train": parts["train"][:MOST_ROWS]}
    texts = {part: [each.text for each in rows] for part, rows in parts.items()}
    truth = {part: [each.label for each in rows] for part, rows in parts.items()}
    best: tuple[float, str, Scores] | None = None
    for name, way in WAYS.items():
        vectorizer = TfidfVectorizer(
            sublinear_tf=True, min_df=1 if name == "words" else 2, max_features=200_000, **way
        )
        classifier = LogisticRegression(C=10.0, max_iter=1000)
        try:
            classifier.fit(vectorizer.fit_transform(texts["train"]), truth["train"])
        except ValueError:  # no word or no character stands in two texts
            continue
        valid = float(classifier.score(vectorizer.transform(texts["valid"]), truth["valid"]))
        if best is None or valid > best[0]:
            probabilities = classifier.predict_proba(vectorizer.transform(texts["test"]))
            predicted = [str(classifier.classes_[at]) for at in probabilities.argmax(axis=1)]
            found = score(truth["test"], predicted, labels, probabilities.max(axis=1).tolist())
            best = (valid, name, found)
    if best is None:
        return "the most frequent label", _most_frequent(truth, labels)
    return f"TF-IDF of {best[1]} and logistic regression", best[2]


def _most_frequent(truth: Mapping[Part, Sequence[str]], labels: Sequence[str]) -> Scores:
    guess = max(labels, key=list(truth["train"]).count)
    return score(truth["test"], [guess] * len(truth["test"]), labels)
