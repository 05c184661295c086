"""The baseline without a language model: TF-IDF and logistic regression on the same split.

It is kept as a model that a job can use.

Shapes: R rows, F n-grams, L labels.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from glmbatch.glm.files import PROMPT_FILE
from glmbatch.glm.tfidf.model import TfidfModel, Units, save_tfidf
from glmbatch.store.files import writable
from glmbatch.tuning.examples import Example, Part
from glmbatch.tuning.scores import (
    Scores,
    SelectionScores,
    has_labels,
    score,
    score_arrays,
    score_selections,
)

# These take a minute and 3 GiB. More rows hardly improve such a baseline.
MOST_ROWS = 100_000
MOST_FEATURES = 200_000
FOLDS = 3  # each costs as much as the baseline
# C of 10 instead of 1: short texts with many features need less regularisation.
REGULARISATION = 10.0
EVEN = 0.5  # from this probability on, a label applies
# The logit of a label that all training rows have: its probability is 1, to 17 digits.
SURE = 40.0
WAYS: Mapping[Units, dict[str, Any]] = {
    "words": {"analyzer": "word", "ngram_range": (1, 2), "min_df": 1},
    # For languages without spaces. A character n-gram that occurs in only one text is noise.
    "characters": {"analyzer": "char", "ngram_range": (1, 3), "min_df": 2},
}
View = Units | Literal["tokens"]
VIEWS: tuple[View, ...] = (*WAYS, "tokens")

Guess = str | list[str]


class Baseline(NamedTuple):
    """The name of a baseline, its test scores, and its answer to each test row.

    `model` is None if it is the most frequent label.
    """

    name: str
    scores: Scores | SelectionScores
    answers: list[Guess]
    model: TfidfModel | None = None


def score_baseline(parts: Mapping[Part, Sequence[Example]], labels: Sequence[str]) -> Baseline:
    """The baseline that is better on the validation rows.

    Where a row may have several labels, each label has a classifier of its own. The most frequent
    label is the baseline if the texts share no features.
    """
    parts = {**parts, "train": parts["train"][:MOST_ROWS]}
    several = parts["train"][0].several is not None
    best_measured = -1.0
    best: Baseline | None = None
    for name in WAYS:
        fitted = _fitted(parts["train"], (parts["valid"], parts["test"]), labels, name)
        if fitted is None:
            continue
        model, (valid, test) = fitted
        scores = _score(parts["valid"], valid, labels)
        measured = scores.accuracy if isinstance(scores, Scores) else scores.micro_f1
        if measured > best_measured:
            best_measured = measured
            best = Baseline(
                f"TF-IDF of {name} and logistic regression",
                _score(parts["test"], test, labels),
                _guesses(test, labels, several=several),
                model,
            )
    if best is not None:
        return best
    # Neither variant found a feature, because the texts share nothing.
    counts = Counter[str]()
    for example in parts["train"]:
        counts.update(example.names)
    guess = max(labels, key=counts.__getitem__)
    truth = [example.names for example in parts["test"]]
    most_frequent = "the most frequent label"
    if several:
        selected = [[guess]] * len(truth)
        return Baseline(most_frequent, score_selections(truth, selected, labels), [*selected])
    guesses = [guess] * len(truth)
    return Baseline(most_frequent, score(_labels(parts["test"]), guesses, labels), [*guesses])


class Seen(NamedTuple):
    """Rows as TF-IDF may see them: their texts, and the token ids of their prompts."""

    rows: Sequence[Example]
    tokens: Sequence[Sequence[int]]

    def at(self, places: Sequence[int]) -> Seen:
        """The rows at these places."""
        return Seen([self.rows[row] for row in places], [self.tokens[row] for row in places])

    def by(self, units: View) -> tuple[Sequence[Example], Units]:
        """The rows, and the units to count in them; tokens are spelled as words."""
        if units != "tokens":
            return self.rows, units
        spelled = []
        for row, ids in zip(self.rows, self.tokens, strict=True):
            words = [f"token{number}" for number in ids]
            spelled.append(row._replace(text=" ".join(words)))
        return spelled, "words"


def judge(known: Seen, asked: Seen, labels: Sequence[str]) -> np.ndarray:
    """The probabilities RL of `labels` in the rows `asked`, by what TF-IDF learns from `known`.

    The mean over words, characters and tokens is better than words or characters alone: by 0.2 to
    2.7 points of accuracy on five sets. Words and tokens weighted by label add 1.2, 0.3 and -0.1
    on three of them (benchmarks/results/2026-11-27_cpu_random-weights.md).
    """
    known = known.at(range(min(MOST_ROWS, len(known.rows))))
    answers = []
    if len({row.names for row in known.rows}) > 1:  # there is something to tell apart
        for view in VIEWS:
            train, units = known.by(view)
            counted = _counted(train, [asked.by(view)[0]], units)
            if counted is None:
                continue
            _, features, others = counted
            answers += _fit(features, train, labels, others)[1]
            if units == "words":
                answers.append(_weighted(features, train, labels, others[0]))
    even_RL = np.full((len(asked.rows), len(labels)), 1 / len(labels))
    return np.mean(answers, axis=0) if answers else even_RL


def out_of_fold(seen: Seen, labels: Sequence[str]) -> np.ndarray:
    """The probabilities RL of `labels` in each row, by TF-IDF that has not learned its text."""
    probability_RL = np.zeros((len(seen.rows), len(labels)))
    fold_R = [zlib.crc32(row.same.encode()) % FOLDS for row in seen.rows]
    for fold in set(fold_R):
        held_out = [row for row, place in enumerate(fold_R) if place == fold]
        others = [row for row, place in enumerate(fold_R) if place != fold]
        probability_RL[held_out] = judge(seen.at(others), seen.at(held_out), labels)
    return probability_RL


def keep_baseline(baseline: Baseline | None, columns: Sequence[str], folder: Path) -> str | None:
    """Keep the model of `baseline` as `folder`, for jobs; returns its path, None without a model.

    It reads the texts of `columns`, on a line each.

    One that is there already stays: it learned the same rows, and a job may be reading it.
    """
    if baseline is None or baseline.model is None:
        return None
    partial = folder.with_name(f".{folder.name}")
    with writable(folder, "output"):
        if not folder.is_dir():
            shutil.rmtree(partial, ignore_errors=True)  # of a killed evaluation
            partial.mkdir(parents=True)
            save_tfidf(baseline.model, partial)
            # As a checkpoint records what its training asked: the texts alone.
            template = "\n".join(f"{{{name}}}" for name in columns)
            asked = {"prompt_template": template, "system_prompt": None, "chat": False}
            (partial / PROMPT_FILE).write_text(json.dumps(asked, indent=1), encoding="utf-8")
            partial.replace(folder)
    return str(folder)


class Regression(NamedTuple):
    """A logistic regression as numbers: a weight for each n-gram and label, and a bias."""

    weights_FL: np.ndarray
    bias_L: np.ndarray


def _fitted(
    train: Sequence[Example],
    others: Sequence[Sequence[Example]],
    labels: Sequence[str],
    units: Units,
) -> tuple[TfidfModel, list[np.ndarray]] | None:
    """The model, and its probabilities in each of the `others`; None without a feature."""
    counted = _counted(train, others, units)
    if counted is None:
        return None
    vectorizer, features, transformed = counted
    regression, answers = _fit(features, train, labels, transformed)
    model = TfidfModel(
        units=units,
        lengths=WAYS[units]["ngram_range"],
        vocabulary=vectorizer.get_feature_names_out().tolist(),
        labels=tuple(labels),
        predicts="label" if train[0].several is None else "labels",
        idf_F=vectorizer.idf_,
        weights_FL=regression.weights_FL,
        bias_L=regression.bias_L,
    )
    return model, answers


def _counted(
    train: Sequence[Example], others: Sequence[Sequence[Example]], units: Units
) -> tuple[Any, Any, list[Any]] | None:
    """The TF-IDF of `train`, its features, and those of `others`; None without a feature."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=MOST_FEATURES, **WAYS[units])
    try:
        features = vectorizer.fit_transform(_texts(train))
    except ValueError:  # an empty vocabulary: no word, or no character in two texts
        return None
    return vectorizer, features, [vectorizer.transform(_texts(other)) for other in others]


def _fit(
    features: Any, train: Sequence[Example], labels: Sequence[str], others: Sequence[Any]
) -> tuple[Regression, list[np.ndarray]]:
    fit = _fit_one if train[0].several is None else _fit_each
    return fit(features, train, labels, others)


def _weighted(
    features: Any, train: Sequence[Example], labels: Sequence[str], asked: Any
) -> np.ndarray:
    """The probabilities RL of `labels` in the features `asked`, by a regression for each label.

    Each n-gram is weighted first by how much more frequent it is in rows of the label than in the
    others, by naive Bayes (NBSVM: Wang and Manning, 2012).
    """
    applies_RL = has_labels([row.names for row in train], labels)
    several = train[0].several is not None
    answer_RL = applies_RL.all(axis=0) + np.zeros((asked.shape[0], len(labels)))
    for place, applies_R in enumerate(applies_RL.T):
        if applies_R.all() or not applies_R.any():  # nothing to tell apart
            continue
        if place == 1 and len(labels) == 2 and not several:
            answer_RL[:, 1] = 1 - answer_RL[:, 0]
            continue
        with_F, without_F = (features.sign().T @ rows_R + 1 for rows_R in (applies_R, ~applies_R))
        ratio_F = np.log(with_F / with_F.sum()) - np.log(without_F / without_F.sum())
        classifier = _regression().fit(features.multiply(ratio_F).tocsr(), applies_R)
        answer_RL[:, place] = classifier.predict_proba(asked.multiply(ratio_F).tocsr())[:, 1]
    return answer_RL if several else answer_RL / answer_RL.sum(axis=1, keepdims=True)


def _no_regression(features: Any, labels: Sequence[str]) -> Regression:
    """One in which no label ever applies."""
    return Regression(np.zeros((features.shape[1], len(labels))), np.full(len(labels), -SURE))


def _fit_one(
    features: Any, train: Sequence[Example], labels: Sequence[str], others: Sequence[Any]
) -> tuple[Regression, list[np.ndarray]]:
    classifier = _regression().fit(features, _labels(train))
    # Labels that training lacks have none.
    places = [labels.index(str(label)) for label in classifier.classes_]
    answers = []
    for other in others:
        probabilities_RL = np.zeros((other.shape[0], len(labels)))
        probabilities_RL[:, places] = classifier.predict_proba(other)
        answers.append(probabilities_RL)
    regression = _no_regression(features, labels)
    weights, bias = classifier.coef_.T, classifier.intercept_
    if len(places) == 2:  # scikit-learn keeps the logit of the second; the first has 0
        regression.weights_FL[:, places[0]] = 0
        regression.bias_L[places[0]] = 0
        places = places[1:]
    regression.weights_FL[:, places] = weights
    regression.bias_L[places] = bias
    return regression, answers


def _fit_each(
    features: Any, train: Sequence[Example], labels: Sequence[str], others: Sequence[Any]
) -> tuple[Regression, list[np.ndarray]]:
    answers = [np.zeros((other.shape[0], len(labels))) for other in others]
    regression = _no_regression(features, labels)
    for place, label in enumerate(labels):
        applies_R = np.array([label in example.names for example in train])
        if applies_R.all():  # nothing to tell apart
            regression.bias_L[place] = SURE
            for answer_RL in answers:
                answer_RL[:, place] = 1
        elif applies_R.any():
            classifier = _regression().fit(features, applies_R)
            regression.weights_FL[:, place] = classifier.coef_[0]
            regression.bias_L[place] = classifier.intercept_[0]
            for answer_RL, other in zip(answers, others, strict=True):
                answer_RL[:, place] = classifier.predict_proba(other)[:, 1]
    return regression, answers


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=REGULARISATION, max_iter=1000)


def _score(
    examples: Sequence[Example], probabilities_RL: np.ndarray, labels: Sequence[str]
) -> Scores | SelectionScores:
    if examples[0].several is not None:
        truth_RL = has_labels([row.names for row in examples], labels)
        return score_arrays(truth_RL, probabilities_RL >= EVEN, labels, probabilities_RL)
    predicted = [str(guess) for guess in _guesses(probabilities_RL, labels, several=False)]
    confidence = probabilities_RL.max(axis=1).tolist()
    return score(_labels(examples), predicted, labels, confidence)


def _guesses(probabilities_RL: np.ndarray, labels: Sequence[str], *, several: bool) -> list[Guess]:
    if not several:
        return [labels[number] for number in probabilities_RL.argmax(axis=1)]
    guesses: list[Guess] = []
    for applies_L in probabilities_RL >= EVEN:
        guesses.append([labels[int(number)] for number in np.flatnonzero(applies_L)])
    return guesses


def _texts(examples: Sequence[Example]) -> list[str]:
    return [example.text for example in examples]


def _labels(examples: Sequence[Example]) -> list[str]:
    return [example.label for example in examples]
