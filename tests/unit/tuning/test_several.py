"""Rows with several labels: read, split, learned, scored, and answered by a job."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import f1_score

from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.load import read_checkpoint
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from glmbatch.settings.tuning import LabelledData
from glmbatch.tuning.baseline import score_baseline
from glmbatch.tuning.encode import TrainingRow
from glmbatch.tuning.examples import PARTS, read_examples
from glmbatch.tuning.finetune import begin, finetune
from glmbatch.tuning.scores import fit_temperature, same_for_all, score_selections
from glmbatch.tuning.split import read_labelled
from glmbatch.tuning.trainer import RowDataset, _row_losses, pad
from tests.support import Tune, Write
from tests.unit.tuning.rows import FILLERS, WORDS

LABELS = ("bad", "good", "so so")


def several(rows: int, seed: int = 0) -> dict[str, list[Any]]:
    """Texts in which words decide the labels: each row has none, one or two."""
    dice = random.Random(seed)
    texts, lists = [], []
    for _ in range(rows):
        labels = dice.sample(list(WORDS), dice.choice([0, 1, 1, 2]))
        words = [dice.choice(FILLERS) for _ in range(dice.randint(2, 5))]
        for label in labels:
            words.insert(dice.randrange(len(words) + 1), dice.choice(WORDS[label]))
        texts.append(f"{' '.join(words)} {dice.randrange(10**6)}")
        lists.append(labels)
    return {"text": texts, "label": lists}


TEXTS = pa.string()
NAMED = pa.dictionary(pa.int32(), TEXTS)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(TEXTS),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string_view()),
        pa.list_view(TEXTS),
        pa.large_list_view(TEXTS),
        pa.list_(NAMED),
        pa.large_list(NAMED),
        pa.list_view(NAMED),
    ],
    ids=str,
)
def test_lists_of_labels_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    lists = [["b", "a", "b "], [], None, ["a", None], [" "], ["a"]]
    table = pa.table({"text": list("uvwxyz"), "label": pa.array(lists, kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_examples(LabelledData(input=str(tmp_path)))
    assert [row.several for row in rows.examples] == [("a", "b"), (), ("a",)]
    assert [row.label for row in rows.examples] == ["a, b", "", "a"]
    assert rows.skipped == {"label": 3}


@pytest.mark.parametrize("kind", [TEXTS, NAMED, pa.large_string()], ids=str)
def test_lists_of_one_size_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    lists = [["b", "a"], None, ["a", None], ["a", "a "]]
    table = pa.table({"text": list("uvwx"), "label": pa.array(lists, pa.list_(kind, 2))})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_examples(LabelledData(input=str(tmp_path)))
    assert [row.several for row in rows.examples] == [("a", "b"), ("a",)]
    assert rows.skipped == {"label": 2}


def test_lists_of_numbers_are_labels(tmp_path: Path) -> None:
    lists = pa.array([[1.0, 2.0], [3.0, 1.0], None], pa.list_(pa.float64(), 2))
    pq.write_table(pa.table({"text": list("abc"), "label": lists}), tmp_path / "a.parquet")
    rows = read_examples(LabelledData(input=str(tmp_path)))
    assert [row.several for row in rows.examples] == [("1", "2"), ("1", "3")]


def test_lists_beside_single_labels_are_refused(tmp_path: Path, write_source: Write) -> None:
    write_source("a.parquet", {"text": ["x"], "label": [["a"]]})
    write_source("b.parquet", {"text": ["y"], "label": ["a"]})
    with pytest.raises(InputError, match="has lists in some files and single labels in others"):
        read_examples(LabelledData(input=str(tmp_path / "in")))


def test_fractions_are_refused_as_numbers(tmp_path: Path, write_source: Write) -> None:
    write_source("a.parquet", {"text": ["x"], "label": [1.5]})
    with pytest.raises(InputError, match=r"learns labels, and no numbers \(regression\)"):
        read_examples(LabelledData(input=str(tmp_path / "in")))


def test_a_rare_label_is_in_every_part(tmp_path: Path, write_source: Write) -> None:
    rows = several(300)
    for at in range(0, 300, 60):
        rows["label"][at] = [*rows["label"][at], "rare"]
    rows["text"].append(rows["text"][0])
    rows["label"].append(["good", "bad", "so so"])
    write_source("a.parquet", rows)
    labelled = read_labelled(LabelledData(input=str(tmp_path / "in")))
    assert labelled.labels == ("bad", "good", "rare", "so so")
    assert (labelled.several, labelled.audit.conflicting) == (True, 2)
    for part in PARTS:
        names = [row.names for row in labelled.parts[part]]
        assert any("rare" in labels for labels in names)
        assert 0.15 < sum(not labels for labels in names) / len(names) < 0.35


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[], [], []], "all lists in column 'label' are empty"),
        ([["a"], ["a"], ["a", "b"]], "label 'b' has 1 different texts, but needs 3"),
    ],
)
def test_lists_that_teach_nothing_are_refused(
    tmp_path: Path, lists: list[list[str]], message: str
) -> None:
    column = pa.array(lists, pa.list_(pa.string()))
    pq.write_table(pa.table({"text": list("xyz"), "label": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        read_labelled(LabelledData(input=str(tmp_path)))


def test_selections_score_as_in_scikit_learn() -> None:
    dice = np.random.default_rng(0)
    truth = dice.random((200, 4)) < [0.5, 0.2, 0.1, 0]
    chances = np.clip(truth * 0.5 + dice.random((200, 4)) * 0.6, 0, 1)
    chances[:, 3] = 0
    names = ["a", "b", "c", "never"]
    rows = [[name for name, has in zip(names, row, strict=True) if has] for row in truth]
    guess = [[name for name, p in zip(names, row, strict=True) if p >= 0.5] for row in chances]
    probabilities = [dict(zip(names, row, strict=True)) for row in chances]
    scores = score_selections(rows, guess, names, probabilities)
    found = chances >= 0.5
    assert scores.micro_f1 == pytest.approx(f1_score(truth, found, average="micro"))
    used = f1_score(truth[:, :3], found[:, :3], average="macro")
    assert scores.macro_f1 == pytest.approx(used)
    assert scores.all_right == pytest.approx((truth == found).all(axis=1).mean())
    assert [scores.labels[name].rows for name in names] == truth.sum(axis=0).tolist()
    assert scores.ece is not None and 0.1 < scores.ece < 0.4


@pytest.mark.parametrize("temperature", [0.3, 4.0])
def test_a_temperature_of_sampled_labels_is_recovered(temperature: float) -> None:
    dice = np.random.default_rng(0)
    logits = dice.normal(size=(20_000, 3)) * 3
    truth = dice.random(logits.shape) < 1 / (1 + np.exp(-logits / temperature))
    assert fit_temperature(logits, truth.astype(int)) == pytest.approx(temperature, rel=0.05)


def test_each_label_has_a_loss_of_its_own() -> None:
    dataset = RowDataset([TrainingRow([5, 6], (1, 0, 1), "a"), TrainingRow([5], (0, 0, 0), "b")])
    labels = pad([dataset[0], dataset[1]])["labels"]
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    theirs = torch.nn.BCEWithLogitsLoss()(logits, torch.tensor([[1.0, 0, 1], [0, 0, 0]]))
    assert float(_row_losses(logits, labels).sum() / 6) == pytest.approx(float(theirs))


def test_the_best_answer_for_all_rows_is_found() -> None:
    truth = [["a", "b"], ["a", "b"], ["a"], []]
    scores = score_selections(truth, [["a", "b"]] * 4, ["a", "b", "c"])
    assert same_for_all(scores, "micro_f1") == ["a", "b"]
    assert scores.micro_f1 == pytest.approx(10 / 13)
    assert same_for_all(scores, "macro_f1") == ["a", "b"]


def test_the_baseline_learns_each_label(tmp_path: Path, write_source: Write) -> None:
    rows = several(300)
    rows["label"] = [[*labels, "always"] for labels in rows["label"]]
    write_source("a.parquet", rows)
    labelled = read_labelled(LabelledData(input=str(tmp_path / "in")))
    name, scores, answers, _ = score_baseline(labelled.parts, labelled.labels)
    assert all("always" in answer for answer in answers)
    assert name.startswith("TF-IDF")
    assert scores.micro_f1 > 0.9  # type: ignore[union-attr]
    assert scores.labels["always"].f1 == 1


def test_a_metric_that_cannot_score_the_rows_is_refused(tune: Tune, write_source: Write) -> None:
    with pytest.raises(InputError, match="has single labels, which have no micro_f1"):
        begin(tune(metric="micro_f1"))
    for day in range(2):
        write_source(f"day={day}/a.parquet", several(120, day))
    with pytest.raises(InputError, match="has lists, which have no accuracy"):
        begin(tune(metric="accuracy"))


def under_other_names(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns as `body` and `topics`."""
    return {"body": rows["text"], "topics": rows["label"]}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_several_labels_are_learned_and_answered(
    tune: Tune,
    tmp_path: Path,
    write_source: Write,
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    for day in range(2):
        write_source(f"day={day}/a.parquet", under_other_names(several(120, day)))
    epochs = 6 if method == "full" else 1
    columns = {"data__text_column": "body", "data__label_column": "topics"}
    report = finetune(tune(training__epochs=epochs, training__method=method, **columns))
    checkpoint = tmp_path / "tuned" / "runs" / report.run / "checkpoint"
    assert read_checkpoint(checkpoint).predicts == "labels"
    job: dict[str, Any] = {
        "data": {"input": str(tmp_path / "tonight.parquet"), "output": str(tmp_path / "out")},
        "model": str(checkpoint),
        "steps": [{"kind": "classify", "name": "said", "multiple": True}],
    }
    write_source("../tonight.parquet", {"text": ["great price and awful room 12", "the day was 3"]})
    run_job(JobConfig.model_validate(job))
    rows = pq.read_table(tmp_path / "out" / "tonight-0000000000.parquet").to_pylist()
    assert [tuple(row["said_scores"]) for row in rows] == [LABELS, LABELS]
    if method == "lora":  # one epoch of an adapter teaches so small a model nothing
        job["model"] = {"path": report.base, "adapter": str(checkpoint.parent / "adapter")}
        job["data"]["output"] = str(tmp_path / "adapted")
        run_job(JobConfig.model_validate(job))
        adapted = pq.read_table(tmp_path / "adapted" / "tonight-0000000000.parquet").to_pylist()
        for row, other in zip(rows, adapted, strict=True):
            assert other["said_scores"] == pytest.approx(row["said_scores"], abs=1e-2)
        return
    assert [row["said"] for row in rows] == [["bad", "good"], []]
    assert report.promoted
    assert report.scores.micro_f1 > 0.9  # type: ignore[union-attr]
    page = (checkpoint.parent / "report.html").read_text()
    assert "micro-F1 on validation rows" in page and "<td>so so</td>" in page
    # The command takes the columns of the training.
    file = write_source("../other.parquet", under_other_names(several(40, 9)))
    keep = ["--keep", str(tmp_path / "kept")]
    assert main(["evaluate", str(checkpoint), str(file), "--json", *keep]) == 0
    assert json.loads(capsys.readouterr().out)["micro_f1"] > 0.9
