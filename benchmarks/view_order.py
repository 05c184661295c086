"""How many labels `glmbatch view`'s order saves: rounds of labelling, beside rows drawn by lot.

    python benchmarks/view_order.py ROWS TEST                     TF-IDF and logistic regression
    python benchmarks/view_order.py ROWS TEST --learner full      `glmbatch train`, all weights
    python benchmarks/view_order.py ROWS TEST --learner states    the same over a frozen checkpoint

A person is simulated who knows every label: a first round of rows drawn by lot, then rounds of the
rows that the viewer shows first. After each round the learner is trained on all corrections and
answers all rows again. The other way trains once on as many rows drawn by lot as `--random` says.
Both are scored on the rows of TEST, which nobody labels. The outputs are published, the order is
read from them, and the corrections are kept as the viewer keeps them.

`glmbatch train` begins from the sample's checkpoint and asks its default question; with `--bare`,
the prompt is the text alone.

TF-IDF and the frozen checkpoint take seconds, but no job asks them here: their answers are written
over those of a published run. The second is logistic regression on the last hidden states, which is
what `training.method: head` trains, to its optimum.

Shapes: R rows, H numbers of a state, B rows of a batch, T tokens of its longest row, L labels.
The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from glmbatch.glm.checkpoint.load import load_model
from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.run.job import run_job
from glmbatch.settings.job import ClassifyStep, JobConfig
from glmbatch.settings.tuning import TuneConfig
from glmbatch.steps.prompt import Prompt, build_prompts
from glmbatch.tuning.baseline import REGULARISATION, WAYS
from glmbatch.tuning.encode import question_of
from glmbatch.tuning.finetune import begin, evaluate_run, train_run
from glmbatch.tuning.model import PAD_ID
from glmbatch.view.query import Filters
from glmbatch.view.viewer import Viewer

MODEL = Path(__file__).resolve().parent.parent / "sample_data" / "tiny-chatglm2"
STEP = "answer"
PROMPT = "{text}"
# The states are standardised, so this is far from the value for TF-IDF.
STATES_REGULARISATION = 0.1
BATCH = 64
# By text, for all seeds.
STATES: dict[str, np.ndarray] = {}


def main() -> None:
    options = _options()
    by_lot: list[float] = []
    by_order: dict[int, list[float]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(Path(folder), options, seed)
            by_lot.append(trial.by_lot())
            for labels, accuracy in trial.by_order().items():
                by_order.setdefault(labels, []).append(accuracy)
        curve = {labels: round(values[-1], 4) for labels, values in by_order.items()}
        print(
            f"seed {seed}: {options.random} by lot {by_lot[-1]:.4f}; in order {curve}", flush=True
        )
    means = {labels: round(statistics.mean(values), 4) for labels, values in by_order.items()}
    goal = statistics.mean(by_lot)
    reached = next((labels for labels, mean in means.items() if mean >= goal), None)
    facts = {"by_lot": round(goal, 4), "in_order": means, "reached_with": reached}
    print(json.dumps({**{name: str(value) for name, value in vars(options).items()}, **facts}))


class Trial:
    """One seed: the input's two files, and the folders of a job over them."""

    def __init__(self, folder: Path, options: argparse.Namespace, seed: int) -> None:
        self.folder, self.options = folder, options
        self.dice = random.Random(seed)
        self.files = {}
        source = folder / "in"
        source.mkdir()
        for name, path in (("pool", options.rows), ("test", options.test)):
            table = pq.read_table(path, columns=["text", options.label])
            truth = table.column(options.label).cast("string")
            table = table.set_column(1, "truth", truth)  # a name of no step
            if name == "pool":
                picked = self.dice.sample(range(len(table)), min(options.pool, len(table)))
                table = self._with_copies(table.take(sorted(picked)))
            pq.write_table(table, source / f"{name}.parquet")
            self.files[name] = table.to_pylist()
        self.labels = sorted({row["truth"] for row in self.files["pool"]})
        self.asks = options.learner != "tfidf" and not options.bare

    def _with_copies(self, table: pa.Table) -> pa.Table:
        """`table` and copies of every tenth row, as of a template: each with another number."""
        tenth = table.take(list(range(0, len(table), 10)))
        copies = []
        for _ in range(self.options.copies):
            texts = [f"{text} {self.dice.randrange(10**6)}" for text in tenth["text"].to_pylist()]
            copies.append(tenth.set_column(0, "text", pa.array(texts, table.schema.types[0])))
        return pa.concat_tables([table, *copies])

    def by_lot(self) -> float:
        """The accuracy on the test rows after training on rows drawn by lot."""
        folder = self.folder / "by-lot"
        folder.mkdir()
        rows = self.dice.sample(self.files["pool"], self.options.random)
        texts, truth = [row["text"] for row in rows], [row["truth"] for row in rows]
        pq.write_table(pa.table({"text": texts, STEP: truth}), folder / "rows.parquet")
        self._learn(folder)
        return self._accuracy()

    def by_order(self) -> dict[int, float]:
        """The accuracy by the number of labels, from the first round, drawn by lot, to the last."""
        folder = self.folder / "corrections"
        found = {}
        labels, order = 0, "random"
        while labels < self.options.most:
            self._label(folder, order, self.options.step)
            labels += self.options.step
            self._learn(folder)
            found[labels], order = self._accuracy(), self.options.order
        return found

    def _label(self, folder: Path, order: str, count: int) -> None:
        """Say what is right in the first `count` rows that the viewer shows in `order`."""
        viewer = Viewer(str(self.folder / "out"), corrections=str(folder))
        filters = Filters(step=STEP, order=order, file="pool-")
        page = viewer.page(filters, 0, count)
        for line in page["rows"]:
            place = (page["version"], line["file"], line["row"])
            truth = viewer.row(*place)["columns"]["truth"]
            viewer.correct(*place, STEP, truth)
        viewer.close()

    def _learn(self, folder: Path) -> None:
        """Train on the labelled rows in `folder`, and publish what the learner answers."""
        if self.options.learner in ("tfidf", "states"):
            if not (self.folder / "out").exists():
                self._publish({"labels": self.labels, "prompt_template": PROMPT})
            self._learn_features(pq.read_table(folder))
            return
        run = begin(self._training(folder))
        train_run(self._training(folder), run)
        evaluate_run(self._training(folder), run)
        self._publish({}, Path(run) / "checkpoint")

    def _publish(self, asked: Mapping[str, Any], model: Path = MODEL) -> None:
        """Replace the output by what `model` answers."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        step = {"kind": "classify", "name": STEP, "on_too_long": "truncate", **asked}
        job = {
            "data": {"input": str(self.folder / "in"), "output": str(self.folder / "out")},
            "model": str(model),
            "steps": [step],
            "max_error_rate": 1.0,
            "runtime": {"device": "cpu"},
        }
        run_job(JobConfig.model_validate(job))

    def _question(self) -> dict[str, Any]:
        """The prompt of a training that sets none."""
        template = question_of(PROMPT, self.labels, several=False)
        return {"prompt_template": template, "chat": True}

    def _states(self, texts: Sequence[str]) -> np.ndarray:
        """The checkpoint's last hidden state of each text with the question, RH."""
        missing = [text for text in dict.fromkeys(texts) if text not in STATES]
        if missing:
            step = ClassifyStep(name=STEP, on_too_long="truncate", **self._question())
            STATES.update(zip(missing, read_states(step, missing), strict=True))
        return np.stack([STATES[text] for text in texts])

    def _training(self, folder: Path) -> TuneConfig:
        epochs = self.options.epochs
        if self.options.even:
            labelled = len(pq.read_table(folder, columns=[STEP]))
            epochs = round(epochs * self.options.random / labelled)
        training = {"method": self.options.learner, "epochs": epochs, "batch_rows": 16}
        training |= {"learning_rate": self.options.rate, "gradient_checkpointing": False}
        return TuneConfig.model_validate(
            {
                "data": {"input": str(folder), "label_column": STEP},
                "output": str(self.folder / "tuned"),
                "model": str(MODEL),
                "prompt_template": None if self.asks else PROMPT,
                "training": training,
                "must_beat": [],
                "runtime": {"device": "cpu"},
            }
        )

    def _learn_features(self, labelled: pa.Table) -> None:
        """Fit a linear learner, and write its answers over the published ones."""
        if self.options.learner == "tfidf":
            features: Any = TfidfVectorizer(sublinear_tf=True, **WAYS["characters"])
            learner = LogisticRegression(C=REGULARISATION, max_iter=1000)
        else:
            features = make_pipeline(FunctionTransformer(self._states), StandardScaler())
            learner = LogisticRegression(C=STATES_REGULARISATION, max_iter=1000)
        known_RF = features.fit_transform(labelled.column("text").to_pylist())
        learner.fit(known_RF, labelled.column(STEP).to_pylist())
        for path in (self.folder / "out").glob("[!_]*.parquet"):
            table = pq.read_table(path, partitioning=None)
            texts = table.column("text").to_pylist()
            known_RL = learner.predict_proba(features.transform(texts))
            answered_RL = np.zeros((len(texts), len(self.labels)))
            answered_RL[:, [self.labels.index(label) for label in learner.classes_]] = known_RL
            pq.write_table(with_answers(table, answered_RL, self.labels), path)

    def _accuracy(self) -> float:
        table = pa.concat_tables(
            pq.read_table(path, columns=["truth", STEP], partitioning=None)
            for path in (self.folder / "out").glob("test-*.parquet")
        )
        right = pc.equal(table.column("truth"), table.column(STEP)).fill_null(False)
        return float(pc.mean(right.cast("int8")).as_py())


def read_states(step: ClassifyStep, texts: Sequence[str]) -> np.ndarray:
    """The last hidden state of the sample's checkpoint for each prompt, RH."""
    rows = [{"text": text} for text in texts]
    prompts = build_prompts(step, rows, load_tokenizer(MODEL), chat=True, max_input_tokens=512)
    ids = [prompt.ids if isinstance(prompt, Prompt) else [PAD_ID] for prompt in prompts]
    model = load_model(str(MODEL), "float32", "cpu").model
    states_RH = np.zeros((len(ids), model.config.hidden_size), np.float32)
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        lengths_B = torch.tensor([len(ids[row]) for row in batch])
        ids_BT = torch.full((len(batch), int(lengths_B.max())), PAD_ID)
        for at, row in enumerate(batch):
            ids_BT[at, : len(ids[row])] = torch.tensor(ids[row])
        # Causal attention never looks to the right, so padding there changes nothing.
        with torch.inference_mode():
            states_BTH = model(input_ids=ids_BT).last_hidden_state
        states_RH[batch] = states_BTH[torch.arange(len(batch)), lengths_B - 1].numpy()
    return states_RH


def with_answers(table: pa.Table, answered_RL: np.ndarray, labels: Sequence[str]) -> pa.Table:
    """`table` with these probabilities of `labels` for its rows."""
    best_RL = np.sort(answered_RL, axis=1)
    columns = {
        STEP: [labels[place] for place in answered_RL.argmax(axis=1)],
        f"{STEP}_score": best_RL[:, -1],
        f"{STEP}_margin": best_RL[:, -1] - best_RL[:, -2],
    }
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(place).type))
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, help="Parquet with a column text and labels")
    parser.add_argument("test", type=Path, help="such rows that nobody labels")
    parser.add_argument("--label", default="label", help="the column of labels")
    parser.add_argument("--bare", action="store_true", help="the prompt is the text alone")
    parser.add_argument(
        "--learner", choices=["tfidf", "states", "full", "lora", "head"], default="tfidf"
    )
    parser.add_argument("--order", choices=["worth", "unsure", "random"], default="worth")
    parser.add_argument("--pool", type=int, default=3500, help="most rows to choose from")
    parser.add_argument("--copies", type=int, default=0, help="copies of every tenth row to add")
    parser.add_argument("--random", type=int, default=1000)
    parser.add_argument("--most", type=int, default=300)
    parser.add_argument("--step", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--even", action="store_true", help="as many updates for few labels as for --random"
    )
    parser.add_argument("--rate", type=float, default=5e-4)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
