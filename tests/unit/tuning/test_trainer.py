"""Batches and their loss: padding, loss only on answers, and every row once per epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glmbatch.glm.checkpoint.load import load_model
from glmbatch.tuning.encode import TrainingRow, by_epoch, mixed_rows, mixtures
from glmbatch.tuning.examples import Example
from glmbatch.tuning.trainer import LengthGroupedSampler, RowDataset, _row_losses, pad
from tests.support import CAUSAL, Tune


def batch_of(*rows: TrainingRow) -> dict[str, torch.Tensor]:
    dataset = RowDataset(rows)
    return pad([dataset[at] for at in range(len(rows))])


def test_only_answer_tokens_have_labels() -> None:
    batch = batch_of(TrainingRow([5, 6, 7], 0, "a", [8, 9]), TrainingRow([5], 0, "b", [6, 7, 8]))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 8, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 9, -100], [6, 7, 8, -100, -100]]


def test_the_loss_of_answers_equals_transformers() -> None:
    batch = batch_of(TrainingRow([5, 6, 7], 0, "a", [8, 9]), TrainingRow([11], 0, "b", [6, 7, 8]))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = load_model(CAUSAL)
    theirs = model(**inputs, labels=torch.roll(batch["labels"], 1, dims=1)).loss
    ours = _row_losses(model(**inputs).logits, batch["labels"]).sum() / 5
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_each_epoch_has_every_row_once_reordered() -> None:
    lengths = [7 * at % 50 for at in range(103)]
    sampler = LengthGroupedSampler(lengths, [range(103)], batch=8, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(103))
    assert orders[0] == orders[2] != orders[1]


def test_each_epoch_has_mixed_texts_of_its_own() -> None:
    rows = [TrainingRow([1], 0, "row")] * 3
    rows += [TrainingRow([2], 0, "mixed", epoch=epoch) for epoch in (0, 0, 1, 1)]
    sampler = LengthGroupedSampler([1] * 7, by_epoch(rows), batch=2, seed=1)
    orders = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(sorted(sampler))
        assert len(sampler) == len(orders[-1])
    assert orders == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]] * 2


def test_rows_of_a_batch_have_similar_lengths() -> None:
    lengths = [7 * at % 50 for at in range(400)]
    order = list(LengthGroupedSampler(lengths, [range(400)], batch=8, seed=1))
    for first in range(0, 400, 8):
        of_batch = [lengths[row] for row in order[first : first + 8]]
        assert max(of_batch) - min(of_batch) <= 1


@pytest.mark.parametrize("label", [1, (0, 1, 0)], ids=["one", "several"])
def test_soft_labels_take_the_place_of_labels(label: int | tuple[int, ...]) -> None:
    soft = np.array([0.1, 0.7, 0.2], np.float32)
    batch = batch_of(TrainingRow([5, 6], label, "a", soft=soft))
    logits = torch.tensor([[0.3, -1.0, 0.5]])
    if label == 1:
        expected = -(torch.tensor(soft) * logits.log_softmax(1)).sum()
    else:
        yes, no = logits.sigmoid().log(), (-logits).sigmoid().log()
        expected = -(torch.tensor(soft) * yes + torch.tensor(1 - soft) * no).sum()
    (loss,) = _row_losses(logits, batch["labels"], batch["soft"])
    assert float(loss) == pytest.approx(float(expected))


def test_mixed_texts_are_pieces_of_rows() -> None:
    texts = [
        "one two three four five six",
        "服务很好房间干净",
        "x",
        "a   ",
        "seven eight nine ten 11 12",
    ]
    rows = [Example(f"row {number}", text, "good") for number, text in enumerate(texts)]
    mixed = mixtures(rows, 200, seed=3)
    assert mixed == mixtures(rows, 200, seed=3) != mixtures(rows, 200, seed=4)
    assert len({row.text for row in mixed}) > 100
    assert all(row.text.strip() for row in mixed)
    assert {letter for row in mixed for letter in row.text} <= {*"".join(texts)}
    assert any("three four" in row.text and "nine" in row.text for row in mixed)


def test_each_column_of_a_mixed_text_is_mixed() -> None:
    columns = {"text": "a         b", "product": "tea"}
    row = Example("row", "a         b\ntea", "good", columns=columns, asked="tea: a         b")
    for mixed in mixtures([row], 50, seed=0):
        assert mixed.text == "\n".join(mixed.columns.values())
        assert mixed.columns["text"].strip()  # its pieces often have only spaces
        assert {*mixed.columns["text"]} <= {*"ab "}
        assert {*mixed.columns["product"]} <= {*"tea"}


def test_only_over_random_weights_are_texts_mixed(tune: Tune) -> None:
    assert mixed_rows(tune(training__distill=0.5), 100) == 0
