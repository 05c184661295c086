"""The sample can be rebuilt from seeds, is as messy as real data, and its checkpoint works well."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from glmbatch.glm.checkpoint.load import load_model
from glmbatch.glm.engine.loading import load_engine
from glmbatch.glm.form import RowForm
from glmbatch.glm.tokenizer import load_tokenizer
from glmbatch.settings.job import (
    ClassifyStep,
    ExtractStep,
    GenerateStep,
    JobConfig,
    ModelConfig,
    RuntimeConfig,
)
from glmbatch.settings.jobfile import load_job
from glmbatch.steps.extract import as_json, form_of
from glmbatch.steps.generate import request_of
from glmbatch.steps.prompt import Prompt, build_prompts

SAMPLE = Path(__file__).resolve().parents[3] / "sample_data"
sys.path.insert(0, str(SAMPLE))

from make_evaluation import evaluate, score_facts  # noqa: E402
from make_facts import answer_ids  # noqa: E402
from make_grammar import write_review  # noqa: E402
from make_reviews import PARTS, write_parquet  # noqa: E402

CHECKPOINT = SAMPLE / "tiny-chatglm2"
READABLE = [SAMPLE / "reviews" / part.path for part in PARTS if not part.truncated]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """All rows that a job can read, in order."""
    rows: list[dict[str, Any]] = []
    for path in READABLE:
        rows += read(path)
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.ParquetFile(path).read().to_pylist()
    return rows


@pytest.fixture(scope="module")
def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows if row["text"] is not None]


@pytest.fixture(scope="module")
def job() -> JobConfig:
    return load_job(str(SAMPLE / "reviews.yaml"))


def test_rebuilding_gives_the_committed_files(tmp_path: Path) -> None:
    rebuilt = write_parquet(tmp_path)
    committed = [
        *(SAMPLE / "reviews").rglob("*.parquet"),
        *(SAMPLE / "labelled").rglob("*.parquet"),
    ]
    committed.sort()
    names = [path.relative_to(SAMPLE) for path in committed]
    assert [path.relative_to(tmp_path) for path in rebuilt] == names
    same_writer = (
        pq.ParquetFile(READABLE[0]).metadata.created_by
        == f"parquet-cpp-arrow version {pa.__version__}"
    )
    for new, old in zip(rebuilt, committed, strict=True):
        if same_writer:
            assert new.read_bytes() == old.read_bytes(), old
        elif old in READABLE:  # another version of pyarrow writes other bytes for the same rows
            assert (
                pq.ParquetFile(new).read().equals(pq.ParquetFile(old).read(), check_metadata=True)
            ), old


def test_has_thousands_of_reviews_in_both_languages(texts: list[str]) -> None:
    assert len(set(texts)) > 3500
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", text)) for text in texts)
    assert 0.4 < chinese / len(texts) < 0.7


def test_reviews_have_no_columns_with_true_answers() -> None:
    for path in READABLE:
        schema = pq.ParquetFile(path).schema_arrow
        assert schema.names == ["id", "text", "product", "stars", "created", "tags", "attributes"]
        assert schema.field("created").type == pa.timestamp("us", tz="Asia/Shanghai")
        assert schema.metadata[b"exporter"] == b"shop-reviews 2.4"


def test_files_are_laid_out_like_a_real_export() -> None:
    files = [pq.ParquetFile(path) for path in READABLE]
    assert sum(file.metadata.num_rows for file in files) == 4000
    assert max(file.metadata.num_row_groups for file in files) > 2
    assert min(file.metadata.num_rows for file in files) == 0
    (broken,) = [SAMPLE / "reviews" / part.path for part in PARTS if part.truncated]
    with pytest.raises(pa.ArrowInvalid):
        pq.ParquetFile(broken)


def test_a_few_rows_cannot_be_answered(rows: list[dict[str, Any]], job: JobConfig) -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    positions = json.loads((CHECKPOINT / "config.json").read_text())["seq_length"]
    no_text = sum(row["text"] is None for row in rows)
    blank = sum(row["text"] is not None and not row["text"].strip() for row in rows)
    no_product = sum(row["product"] is None for row in rows)
    lengths = [len(ids) for ids in tokenizer.encode([row["text"] or "" for row in rows])]
    too_long = sum(length > positions for length in lengths)
    assert min(no_text, blank, no_product, too_long) > 0
    assert 3 <= sum(len(row["text"] or "") > 4000 for row in rows) <= too_long
    assert (no_text + blank + no_product + too_long) / len(rows) < 0.03 < job.max_error_rate
    assert any(250 < length < positions - 250 for length in lengths)


def test_ids_and_rows_repeat(rows: list[dict[str, Any]]) -> None:
    ids = Counter(row["id"] for row in rows)
    whole = Counter(repr(row) for row in rows)
    repeated_rows = sum(count - 1 for count in whole.values())
    repeated_ids = sum(count - 1 for count in ids.values())
    assert 0 < repeated_rows < repeated_ids


@pytest.mark.parametrize("column", ["stars", "created", "tags", "attributes"])
def test_every_column_except_id_has_nulls(rows: list[dict[str, Any]], column: str) -> None:
    assert 0 < sum(row[column] is None for row in rows) < len(rows) / 5


AWKWARD = (
    *("[gMASK]", "sop", "eop", "</s>", "<unk>", "<0x0A>", "\n\n[Round 2]\n\n问：", "{text}"),
    *("&amp;", "<br>", "ＯＫ", "還", "😡", "👏🏻", "！！！", "THE ", "\n", "\t", "  "),
)


@pytest.mark.parametrize("piece", AWKWARD)
def test_texts_contain_what_breaks_naive_code(texts: list[str], piece: str) -> None:
    assert any(piece in text for text in texts)


def test_held_out_rows_are_in_the_job_but_not_in_training(rows: list[dict[str, Any]]) -> None:
    held_out = read(SAMPLE / "labelled" / "held_out.parquet")
    train = {row["text"] for row in read(SAMPLE / "labelled" / "train.parquet")}
    by_id = {row["id"]: row["text"] for row in rows}
    assert len(held_out) == 1000
    assert all(by_id[row["id"]] == row["text"] for row in held_out)
    assert not train & {row["text"] for row in rows}


def test_both_parts_of_the_split_use_the_same_words() -> None:
    words: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    positive = Counter[bool]()
    for held_out in (False, True):
        for seed in range(3000):
            review = write_review(random.Random(seed), held_out=held_out)
            words[held_out].update(review.text.split())
            positive[held_out] += review.label == "positive"
    assert positive[False] / 3000 == pytest.approx(positive[True] / 3000, abs=0.03)
    common = {word for word, count in words[True].items() if count > 20}
    assert common <= words[False].keys()


def test_the_facts_of_a_review_agree_with_its_opinions() -> None:
    wishes = Counter[str]()
    for seed in range(2000):
        review = write_review(random.Random(seed), held_out=True)
        good, bad, facts = review.good, review.bad, review.facts
        # An aspect is named once, even if the review both praises and blames it.
        assert set(facts.aspects) == {*good, *bad, *review.middling}
        assert review.product.endswith(facts.product) and review.product != facts.product
        stars = {"positive": 4 if bad else 5, "neutral": 3, "negative": 2 if good else 1}
        assert facts.rating == stars[review.label]
        kind = "none" if facts.wish is None else "aspect" if facts.wish in bad else facts.wish
        assert not (kind == "none" and bad)
        wishes[kind] += 1
    assert wishes.keys() == {"none", "aspect", "refund", "退货"}


def test_facts_name_aspects_in_the_order_of_the_text() -> None:
    for seed in range(2000):
        review = write_review(random.Random(seed), held_out=False)
        places = [review.text.lower().find(name) for name in review.facts.aspects]
        # A typo, traditional characters or full-width letters may hide a name.
        if -1 not in places and review.language != "mixed":
            assert places == sorted(places), review.text


def test_the_job_asks_for_a_label_a_reply_and_facts(job: JobConfig) -> None:
    label, reply, facts = job.steps
    assert isinstance(label, ClassifyStep)
    assert isinstance(reply, GenerateStep)
    assert isinstance(facts, ExtractStep)
    truth = pq.ParquetFile(SAMPLE / "labelled" / "held_out.parquet").schema_arrow.field("facts")
    assert [field.name for field in facts.fields] == [field.name for field in truth.type]
    assert label.labels == ["positive", "neutral", "negative"]
    assert f"{{{label.name}}}" in reply.prompt_template
    assert (job.data.input, job.data.output) == ("sample_data/reviews", "sample_data/out")


def test_the_checkpoint_has_the_published_layout() -> None:
    files = {path.name for path in CHECKPOINT.iterdir()}
    assert files > {
        "config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "pytorch_model.bin.index.json",
    }
    assert "pytorch_model-00001-of-00002.bin" in files
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 6_000_000
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    # As in the published model, the padded vocabulary has unused ids.
    assert load_tokenizer(CHECKPOINT).vocab_size < config["padded_vocab_size"]


def test_the_checkpoint_classifies_held_out_reviews(job: JobConfig) -> None:
    label_step = job.steps[0]
    held_out = read(SAMPLE / "labelled" / "held_out.parquet")[:100]
    tokenizer = load_tokenizer(CHECKPOINT)
    model = load_model(CHECKPOINT)
    assert isinstance(label_step, ClassifyStep)
    assert label_step.labels is not None
    prompts = build_prompts(label_step, held_out, tokenizer, chat=True, max_input_tokens=1024)
    label_ids = [ids[0] for ids in tokenizer.encode_plain(label_step.labels)]
    right = 0
    for row, prompt in zip(held_out, prompts, strict=True):
        assert isinstance(prompt, Prompt)
        scores = model(torch.tensor([prompt.ids])).logits[0, -1, label_ids]
        right += label_step.labels[int(scores.argmax())] == row["label"]
    assert right / len(held_out) >= 0.9


def test_the_checkpoint_extracts_facts_as_it_was_trained(job: JobConfig) -> None:
    step = job.steps[2]
    assert isinstance(step, ExtractStep)
    held_out = read(SAMPLE / "labelled" / "held_out.parquet")[:100]
    form = form_of(step, load_tokenizer(CHECKPOINT))
    prompts = build_prompts(step, held_out, form.tokenizer, chat=True, max_input_tokens=900)
    requests = []
    for index, prompt in enumerate(prompts):
        assert isinstance(prompt, Prompt)
        request = request_of(step, index, bytes(16), prompt, form.longest)
        requests.append(replace(request, form=RowForm(form, {})))
    model = ModelConfig(path=str(CHECKPOINT), dtype="float32")
    engine = load_engine(model, RuntimeConfig(device="cpu"))
    try:
        answers = {result.index: list(result.ids) for result in engine.generate(requests)}
    finally:
        engine.close()
    # The same tokens, not only the same values: the engine asks as the training did.
    right = 0
    for index, row in enumerate(held_out):
        right += answers[index] == answer_ids(form, as_json(row["facts"]))
    assert right / len(held_out) >= 0.6


@pytest.mark.parametrize(
    ("answer", "score"),
    [(["a", "b"], 1.0), (["b"], 2 / 3), (["b", "c"], 0.5), ([], 0.0), (None, 0.0)],
)
def test_a_list_scores_the_items_that_it_shares(answer: list[str] | None, score: float) -> None:
    assert score_facts({"aspects": ["a", "b"]}, {"aspects": answer}) == {"aspects": score}
    assert score_facts({"aspects": []}, {"aspects": answer or []})["aspects"] == (not answer)


@pytest.mark.slow
def test_the_checkpoint_answers_held_out_reviews(job: JobConfig) -> None:
    scores = evaluate(CHECKPOINT, SAMPLE / "labelled" / "held_out.parquet", job, most_rows=300)
    assert scores.label_accuracy >= 0.9
    assert scores.sensible >= 0.9
    assert scores.facts >= 0.6
    assert min(scores.fields.values()) >= 0.8


@pytest.mark.slow
def test_training_twice_gives_the_same_bytes(tmp_path: Path, job: JobConfig) -> None:
    from make_checkpoint import build_checkpoint

    built = []
    for name in ("one", "two"):
        build_checkpoint(SAMPLE / "labelled" / "train.parquet", job, tmp_path / name, most_rows=100)
        built.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert built[0] == built[1]
    assert {file.name for file in CHECKPOINT.iterdir()} == set(built[0])
