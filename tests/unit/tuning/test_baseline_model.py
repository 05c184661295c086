"""The exported baseline answers a job as scikit-learn does, and refuses what it cannot do."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from glmbatch.cli.main import main
from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.doctor import describe, examine
from glmbatch.glm.engine.loading import load_engine
from glmbatch.glm.tfidf.engine import TfidfEngine
from glmbatch.glm.tfidf.model import Units, load_tfidf
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig, ModelConfig, RuntimeConfig
from glmbatch.tuning import baseline as module
from glmbatch.tuning.baseline import Seen, keep_baseline, out_of_fold, score_baseline
from glmbatch.tuning.examples import Example, Part
from glmbatch.tuning.finetune import finetune
from glmbatch.view.query import Filters
from glmbatch.view.viewer import Viewer
from tests.support import Tune
from tests.unit.tuning.rows import FILLERS, WORDS, labelled

UGLY = [
    "很好 的 服务\n\n[Round 2]\n\n问：糟糕？\n\n答：很好",
    "这家酒店的服务非常好，房间干净。下次还会来！",
    "GREAT great gReAt İstanbul ẞ ﬁne",
    "👩‍👩‍👧 love 😀😀 \u200b\ufeff e\u0301 ＡＷＦＵＬ",
    "a\tb  c\u3000\u3000d\r\n\n e\x0bf it's don't x_y 3.14",
    "\U0010ffff\x00nothing known here: ∑∏∫",
    "{text} [gMASK] sop </s> <0x0A>",
    "ok " * 50_000 + "awful",
    "糟糕" * 50_000,
    "z",
]


def parts_of(rows: dict[str, list[Any]]) -> dict[Part, list[Example]]:
    examples = []
    for text, label in zip(rows["text"], rows["label"], strict=True):
        several = tuple(label) if isinstance(label, list) else None
        name = ", ".join(label) if isinstance(label, list) else label
        examples.append(Example("row", text, name, several))
    return {"train": examples[:160], "valid": examples[160:200], "test": examples[200:]}


def exported(parts: dict[Part, list[Example]], labels: list[str], folder: Path) -> str:
    path = keep_baseline(score_baseline(parts, labels), ["text"], folder)
    assert path is not None
    return path


def answered(texts: list[str], model: str, folder: Path, **step: Any) -> list[dict[str, Any]]:
    """The rows that a job with this model publishes."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": texts}), folder / "rows.parquet")
    job = {
        "data": {"input": str(folder / "rows.parquet"), "output": str(folder / "out")},
        "model": model,
        "steps": [{"kind": "classify", "name": "found", **step}],
        "runtime": {"device": "cpu"},
    }
    run_job(JobConfig.model_validate(job))
    rows: list[dict[str, Any]] = pq.read_table(folder / "out").to_pylist()
    return rows


@pytest.mark.parametrize("units", ["words", "characters"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_job_answers_as_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: Units, count: int
) -> None:
    monkeypatch.setattr(module, "WAYS", {units: module.WAYS[units]})
    labels = sorted(WORDS)[:count]
    rows = labelled(400)
    chosen = [at for at, label in enumerate(rows["label"]) if label in labels][:240]
    parts = parts_of({name: [column[at] for at in chosen] for name, column in rows.items()})
    model = exported(parts, labels, tmp_path / "baseline")
    texts = [*UGLY, *(row.text for row in parts["test"])]
    vectors = TfidfVectorizer(sublinear_tf=True, **module.WAYS[units])
    features = vectors.fit_transform([row.text for row in parts["train"]])
    regression = LogisticRegression(C=module.REGULARISATION, max_iter=1000)
    regression.fit(features, [row.label for row in parts["train"]])
    expected_RL = regression.predict_proba(vectors.transform(texts))
    ours_RL = []
    for row in answered(texts, model, tmp_path / "job"):
        scores = dict(row["found_scores"])
        ours_RL.append([scores[label] for label in regression.classes_])
        assert row["found"] == max(scores, key=scores.__getitem__)
    np.testing.assert_allclose(ours_RL, expected_RL, rtol=0, atol=1e-6)


def test_a_model_of_several_labels_judges_each(tmp_path: Path) -> None:
    dice = random.Random(0)
    rows: dict[str, list[Any]] = {"text": [], "label": []}
    for _ in range(240):
        names = sorted(dice.sample(list(WORDS), dice.choice([0, 1, 2])))
        words = [*dice.sample(FILLERS, 3), *(dice.choice(WORDS[name]) for name in names)]
        rows["text"].append(" ".join(words))
        rows["label"].append(names)
    parts = parts_of(rows)
    labels = [*sorted(WORDS), "never"]
    baseline = score_baseline(parts, labels)
    model = keep_baseline(baseline, ["text"], tmp_path / "baseline")
    assert model is not None
    texts = [row.text for row in parts["test"]]
    found = answered(texts, model, tmp_path / "job", multiple=True)
    assert [row["found"] for row in found] == baseline.answers
    assert all(dict(row["found_scores"])["never"] < 1e-6 for row in found)


def judged(rows: list[Example], labels: list[str]) -> np.ndarray:
    return out_of_fold(Seen(rows, [list(row.text.encode()) for row in rows]), labels)


def test_no_row_is_judged_by_what_it_taught() -> None:
    dice = random.Random(0)
    # A word that only two equal texts have says nothing about them; other words do.
    unknown = [f"word{dice.randrange(10**9)}" for _ in range(150)]
    guessed = [(text, dice.choice(["good", "bad"])) for text in unknown]
    learned = [(f"{word} {word} {n}", word) for n, word in enumerate(["good", "bad"] * 50)]
    rows = [Example("row", *pair) for pair in [*guessed, *guessed, *learned]]
    right = []
    for row, probability_L in zip(rows, judged(rows, ["bad", "good"]), strict=True):
        assert probability_L.sum() == pytest.approx(1)
        right.append(["bad", "good"][probability_L.argmax()] == row.label)
    assert np.mean(right[:300]) < 0.65
    assert all(right[300:])


def test_without_features_all_labels_are_as_likely() -> None:
    rows = [Example("row", chr(0x4E00 + row), "ab"[row % 4 == 0]) for row in range(40)]
    assert (out_of_fold(Seen(rows, [[]] * 40), ["a", "b"]) == 0.5).all()


def test_each_of_several_labels_is_judged(tmp_path: Path) -> None:
    pairs = [(f"{a} {b}", (a, b)) for a in ("x1", "x2", "x3") for b in ("y1", "y2")] * 20
    rows = [Example("row", f"{text} {n}", "", names) for n, (text, names) in enumerate(pairs)]
    probability_RL = judged(rows, ["x1", "x2", "x3", "y1", "y2"])
    chosen = (probability_RL > 0.5).sum(axis=1)
    assert (chosen == 2).all()


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_n_grams_are_weighted_as_by_naive_bayes(several: bool) -> None:
    labels = sorted(WORDS)
    rows = parts_of(labelled(240))["train"]
    if several:
        rows = [row._replace(several=(row.label,)) for row in rows]
    features_RF = TfidfVectorizer().fit_transform([row.text for row in rows])
    expected = []
    for label in labels:
        applies_R = np.array([row.label == label for row in rows])
        bayes = MultinomialNB().fit(features_RF.sign(), applies_R)
        weighted_RF = features_RF.multiply(np.diff(bayes.feature_log_prob_, axis=0)).tocsr()
        regression = LogisticRegression(C=10, max_iter=1000).fit(weighted_RF, applies_R)
        expected.append(regression.predict_proba(weighted_RF)[:, 1])
    expected_RL = np.stack(expected, axis=1)
    if not several:
        expected_RL /= expected_RL.sum(axis=1, keepdims=True)
    found_RL = module._weighted(features_RF, rows, labels, features_RF)
    np.testing.assert_allclose(found_RL, expected_RL, atol=1e-6)


def test_texts_without_features_leave_no_model(tmp_path: Path) -> None:
    letters = [chr(0x4E00 + at) for at in range(240)]
    parts = parts_of({"text": letters, "label": ["a", "b"] * 120})
    baseline = score_baseline(parts, ["a", "b"])
    assert keep_baseline(baseline, ["text"], tmp_path / "baseline") is None
    assert not (tmp_path / "baseline").exists()


def test_a_kept_baseline_stays_as_it_is(model: str) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in Path(model).iterdir()}
    assert exported(parts_of(labelled(240)), sorted(WORDS), Path(model)) == model
    assert {file.name: file.stat().st_mtime_ns for file in Path(model).iterdir()} == before


@pytest.fixture
def model(tmp_path: Path) -> str:
    return exported(parts_of(labelled(240)), sorted(WORDS), tmp_path / "baseline")


@pytest.mark.parametrize(
    ("change", "step", "message"),
    [
        ({}, {"kind": "generate"}, "classification head and cannot generate"),
        ({}, {"labels": ["x", "y"]}, r"was trained for .*, not \['x', 'y'\]"),
        ({}, {"chat": True}, "was trained with the chat False"),
        ({}, {"prompt_template": "Is it? {text}"}, "was trained with the prompt_template '{text}'"),
        (
            {},
            {"prompt_template": "Is it? {text}"},
            "Leave the step's prompt_template out, or set it",
        ),
        ({}, {"labels": ["x", "y"]}, "Leave the step's labels out, or set them to those"),
        ({}, {"abstain_below": {"x": 0.5}}, r"abstain_below names \['x'\], which is no label; the"),
        ({}, {"max_input_tokens": 64}, "reads texts of any length. Leave max_input_tokens out"),
        ({"quantization": "int8"}, {}, "has no quantization. Leave it out"),
        ({"adapter": "."}, {}, "has no adapter. Leave it out"),
        ({"dtype": "float32"}, {}, "has no dtype. Leave it out"),
        ({"dtype": "bfloat16"}, {}, "has no dtype. Leave it out"),
    ],
)
def test_what_it_cannot_do_is_refused(
    model: str, tmp_path: Path, change: dict[str, Any], step: dict[str, Any], message: str
) -> None:
    setting: Any = {"path": model, **change}
    with pytest.raises(InputError, match=message) as refused:
        answered(["x"], setting, tmp_path / "job", **step)
    assert "\n" not in str(refused.value)


def test_a_changed_coefficient_makes_other_answers(model: str, tmp_path: Path) -> None:
    first = answered(["great food"], model, tmp_path / "job")
    config = Path(model) / "config.json"
    renamed = config.read_text(encoding="utf-8").replace("good", "fine")
    config.write_text(renamed, encoding="utf-8")
    again = answered(["great food"], model, tmp_path / "job")
    assert (first[0]["found"], again[0]["found"]) == ("good", "fine")
    assert first[0]["found_key"] != again[0]["found_key"]


@pytest.mark.parametrize("file", ["vocabulary.json", "model.safetensors"])
def test_a_damaged_model_is_refused_in_one_line(model: str, file: str) -> None:
    path = Path(model) / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=f"{file}: the TF-IDF model is incomplete or damaged"):
        load_tfidf(model)
    assert len(examine(model).problems) == 1


def test_the_doctor_says_what_it_is(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "logistic regression, no language model" in describe(examine(model))
    assert main(["doctor", model]) == 0
    assert "bad, good, so so" in capsys.readouterr().out


def test_the_plan_says_how_large_it_is(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(["great food"], model, tmp_path / "job")
    data = f"{{input: {tmp_path}/job/rows.parquet, output: {tmp_path}/planned}}"
    steps = "[{kind: classify, name: found}]"
    file = tmp_path / "job.yaml"
    file.write_text(f"data: {data}\nmodel: {model}\nsteps: {steps}\n", encoding="utf-8")
    assert main(["plan", str(file)]) == 0
    parameters = load_tfidf(model).parameters
    size = f"{parameters:,} parameters, {parameters * 4 / 1e6:.3f} MB as float32"
    assert f"model {model}: {size}" in capsys.readouterr().out


def test_people_correct_its_answers_in_the_viewer(model: str, tmp_path: Path) -> None:
    texts = ["great food", "awful food", "great and awful"]
    answered(texts, model, tmp_path / "job")
    viewer = Viewer(str(tmp_path / "job" / "out"))
    page = viewer.page(Filters(step="found", order="unsure"), 0, 10)
    assert {row["text"] for row in page["rows"]} == set(texts)
    version = viewer.output()["version"]
    viewer.correct(version, 0, 1, "found", "bad")
    (step,) = viewer.row(version, 0, 1)["steps"]
    assert (step["truth"], set(step["scores"])) == ("bad", set(WORDS))
    assert pq.read_table(viewer.corrections.file)["found"].to_pylist() == ["bad"]
    viewer.close()


def test_its_engine_needs_no_device(model: str) -> None:
    runtime = RuntimeConfig(device="cpu", engine_process=True)
    assert isinstance(load_engine(ModelConfig(path=model), runtime), TfidfEngine)


@pytest.mark.slow
def test_a_refused_run_points_to_its_baseline(
    tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = finetune(
        tune(must_beat=["baseline"], training__epochs=1, training__learning_rate=1e-6)
    )
    assert not report.promoted
    assert report.baseline_model is not None
    assert f"set model: {report.baseline_model}" in report.reason
    folder = tmp_path / "evaluated"
    folder.mkdir()
    pq.write_table(pa.table(labelled(100, seed=5)), folder / "rows.parquet")
    rows = str(folder / "rows.parquet")
    assert main(["evaluate", report.baseline_model, rows, "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert "accuracy" in json.dumps(evaluated)
    with pytest.raises(InputError, match="is TF-IDF, which cannot be trained further"):
        finetune(tune(model=report.baseline_model))
