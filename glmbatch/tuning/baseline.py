"""The baseline without a language model: TF-IDF and logistic regression on the same split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmbatch.tuning.examples import Example, Part
from glmbatch.tuning.scores import Scores, score

# These take a minute and 3 GiB. More rows hardly improve such a baseline.
MOST_ROWS = 100_000
MOST_FEATURES = 200_000
# C of 10 instead of 1: short texts with many features need less regularisation.
REGULARISATION = 10.0
WAYS: Mapping[str, dict[str, Any]] = {
    "words": {"analyzer": "word", "ngram_range": (1, 2), "min_df": 1},
    # For languages without spaces. A character n-gram that occurs in only one text is noise.
    "characters": {"analyzer": "char", "ngram_range": (1, 3), "min_df": 2},
}


def score_baseline(
    parts: Mapping[Part, Sequence[Example]], labels: Sequence[str]
) -> tuple[str, Scores]:
    """Name and test scores of the baseline that is better on the validation rows.

    The most frequent label is the baseline if the texts share no features.
    """
    parts = {**parts, "train": parts["train"][:MOST_ROWS]}
    best_accuracy = -1.0
    best: tuple[str, Scores] | None = None
    for name, way in WAYS.items():
        classifier = _fitted(parts["train"], way)
        if classifier is None:
            continue
        valid = parts["valid"]
        accuracy = float(classifier.score(_texts(valid), _labels(valid)))
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            scores = _test_scores(classifier, parts["test"], labels)
            best = f"TF-IDF of {name} and logistic regression", scores
    if best is not None:
        return best
    # Neither variant found a feature, because the texts share nothing.
    trained = _labels(parts["train"])
    guess = max(labels, key=trained.count)
    test = _labels(parts["test"])
    return "the most frequent label", score(test, [guess] * len(test), labels)


def _fitted(examples: Sequence[Example], way: Mapping[str, Any]) -> Any:
    """A trained scikit-learn pipeline; None if the texts share no feature."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=MOST_FEATURES, **way)
    pipeline = make_pipeline(vectorizer, LogisticRegression(C=REGULARISATION, max_iter=1000))
    try:
        return pipeline.fit(_texts(examples), _labels(examples))
    except ValueError:  # an empty vocabulary: no word, or no character in two texts
        return None


def _test_scores(classifier: Any, test: Sequence[Example], labels: Sequence[str]) -> Scores:
    probabilities_RL = classifier.predict_proba(_texts(test))
    predicted = [str(classifier.classes_[number]) for number in probabilities_RL.argmax(axis=1)]
    confidence = probabilities_RL.max(axis=1).tolist()
    return score(_labels(test), predicted, labels, confidence)


def _texts(examples: Sequence[Example]) -> list[str]:
    return [example.text for example in examples]


def _labels(examples: Sequence[Example]) -> list[str]:
    return [example.label for example in examples]
