"""Which changes of a prompt or of weights `evaluate:` refuses: 100 regressions, 100 harmless ones.

    python benchmarks/promotion.py
    python benchmarks/promotion.py --drawn      how many rows see a loss; asks no model

The tiny checkpoint answers labelled rows once for each change. Every trial then draws 1,000 of
these rows and compares the change with the job as it was, by the rule of a run. A regression
counts if it loses 3 points or more on the rows that were drawn. Shapes: R rows.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from glmbatch import annotate_table
from glmbatch.run.promotion.rule import is_loss, paired

LABELLED = Path("sample_data/labelled")
MODEL = Path("sample_data/tiny-chatglm2")
LABELS = ["positive", "neutral", "negative"]
PROMPT = "Review of {product}: {text}\n\nIs this review positive, neutral or negative?"
DRAWN, TRIALS, SEED = 1000, 100, 20_261_126

CUTS = ("How is this: {text}", "{text}", "Review of {product}: {text}\n\nIs this review positive")
NOISES = (0.25, 0.35, 0.5)
HARMLESS = (
    "Review of {product}: {text}\n\nIs the review positive, neutral or negative?",
    "Review of {product}: {text}\n\nIs this review positive, neutral, or negative?",
    "Review of {product}: {text}\nIs this review positive, neutral or negative?",
)
SLIGHT = (0.002, 0.01)


def answers(rows: pa.Table, prompt: str, model: Path) -> np.ndarray:
    """The label of each row."""
    step = {"kind": "classify", "name": "mood", "labels": LABELS, "prompt_template": prompt}
    job: dict[str, Any] = {"model": str(model), "steps": [step], "runtime": {"device": "cpu"}}
    return np.array(annotate_table(rows, job).column("mood").to_pylist())


def noised(share: float, folder: Path) -> Path:
    """The checkpoint with noise in every matrix, of so large a share of its deviation."""
    copy = folder / f"noise-{share}"
    shutil.copytree(MODEL, copy)
    dice = torch.Generator().manual_seed(1)
    for path in copy.glob("*.bin"):
        tensors = torch.load(path)
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=dice)
                tensors[name] = (tensor + share * tensor.float().std() * noise).to(tensor.dtype)
        torch.save(tensors, path)
    return copy


def swapped(before: np.ndarray, one: str, other: str) -> np.ndarray:
    """The answers of a job whose labels `one` and `other` were taken for one another."""
    return np.where(before == one, other, np.where(before == other, one, before))


def trials(
    truth: np.ndarray, before: np.ndarray, changes: dict[str, np.ndarray], *, planted: bool
) -> tuple[Counter[str], Counter[str], list[float]]:
    """How many trials of each change there were, how many were refused, and what each lost."""
    dice = np.random.default_rng(SEED)
    tried: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    losses = []
    names = list(changes)
    for number in range(100 * TRIALS):
        name = names[number % len(names)]
        drawn = dice.permutation(len(truth))[:DRAWN]
        right_R = (before == truth)[drawn].astype(float)
        changed_R = (changes[name] == truth)[drawn].astype(float)
        if planted:  # a smaller regression: only some of the rows are answered by the change
            is_changed_R = dice.random(DRAWN) < dice.uniform(0.2, 1)
            changed_R = np.where(is_changed_R, changed_R, right_R)
        found = paired(right_R, changed_R, np.arange(DRAWN))
        if planted and found["gain"] > -0.03:
            continue
        tried[name] += 1
        losses.append(-100 * found["gain"])
        refused[name] += is_loss(found["gain"], found["p"])
        if tried.total() == TRIALS:
            break
    return tried, refused, losses


def refused_shares(rows: int, draws: int = 200) -> dict[int, float]:
    """How often a loss of so many points on all texts is refused when measured on `rows` of them.

    90 % were right before, and one answer in ten is drawn anew besides.
    """
    dice = np.random.default_rng(SEED)
    shares = {}
    for points in (1, 2, 3, 4, 5, 6, 8, 10):
        refused = 0
        for _ in range(draws):
            before_R = dice.random(rows) < 0.9
            again_R = np.where(dice.random(rows) < 0.1, dice.random(rows) < 0.9, before_R)
            now_R = again_R & (dice.random(rows) >= points / 90)
            found = paired(before_R.astype(float), now_R.astype(float), np.arange(rows))
            refused += is_loss(found["gain"], found["p"])
        shares[points] = refused / draws
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--drawn", action="store_true")
    options = parser.parse_args()
    if options.drawn:
        for number in (100, 300, 1000):
            print(f"{number:,} rows, refused by points lost: {refused_shares(number)}", flush=True)
        return
    rows = options.rows
    files = ("held_out", "train")
    columns = ["text", "product", "label"]
    tables = [pq.read_table(LABELLED / f"{name}.parquet", columns=columns) for name in files]
    table = pa.concat_tables(tables).slice(0, rows)
    truth = np.array(table.column("label").to_pylist())
    asked = table.select(["text", "product"])
    with tempfile.TemporaryDirectory() as folder:
        before = answers(asked, PROMPT, MODEL)
        print(f"{len(truth):,} rows, {np.mean(before == truth):.4f} right", flush=True)
        worse = {f"cut: {prompt!r}": answers(asked, prompt, MODEL) for prompt in CUTS}
        for share in NOISES:
            worse[f"noise {share}"] = answers(asked, PROMPT, noised(share, Path(folder)))
        for one, other in (("positive", "neutral"), ("neutral", "negative")):
            worse[f"swapped {one}, {other}"] = swapped(before, one, other)
        harmless = {f"said: {prompt!r}": answers(asked, prompt, MODEL) for prompt in HARMLESS}
        for share in SLIGHT:
            harmless[f"noise {share}"] = answers(asked, PROMPT, noised(share, Path(folder)))
    for what, changes in (("regressions", worse), ("harmless", harmless)):
        for name, changed in changes.items():
            right, moved = np.mean(changed == truth), np.mean(changed != before)
            print(f"  {name}: {right:.4f} right, {moved:.1%} of the answers moved", flush=True)
        own = changes
        if what == "regressions":
            own = {
                name: changed
                for name, changed in changes.items()
                if np.mean(before == truth) - np.mean(changed == truth) > 0.02
            }
        else:  # a change of wording may be no harmless one for so small a model
            own = {
                name: changed
                for name, changed in changes.items()
                if abs(np.mean(before == truth) - np.mean(changed == truth)) < 0.005
            }
        tried, refused, losses = trials(truth, before, own, planted=what == "regressions")
        low, high = min(losses), max(losses)
        print(
            f"{what}: {refused.total()} of {tried.total()} refused, losses of {low:+.1f} to "
            f"{high:+.1f} points",
            flush=True,
        )


if __name__ == "__main__":
    main()
