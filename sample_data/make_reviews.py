"""Write the sample's Parquet files: four days of a shop's exported reviews, and labelled rows.

A job reads `reviews/`, which has the mess of real data and no true answers. The true answers are in
`labelled/`: `train.parquet` for training, `held_out.parquet` for some rows of `reviews/`. No
tensors here.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from make_grammar import Review, write_review

SEED = 20261101
TRAIN_ROWS = 22_000
HELD_OUT_ROWS = 1_000
ROW_GROUP_ROWS = 256
SHANGHAI = timezone(timedelta(hours=8))


@dataclass(frozen=True)
class Part:
    """One file of the export. A truncated one is cut off, like an interrupted copy."""

    path: str
    rows: int
    truncated: bool = False


PARTS = (
    Part("day=2026-11-01/part-0.parquet", 1200),
    Part("day=2026-11-02/part-0.parquet", 800),
    Part("day=2026-11-02/part-1.parquet", 500),
    Part("day=2026-11-03/part-0.parquet", 1000),
    Part("day=2026-11-03/part-1.parquet", 0),
    Part("day=2026-11-04/part-0.parquet", 500),
    Part("day=2026-11-04/part-1.parquet", 300, truncated=True),
)

# Rows per thousand with each fault. The first four kinds (22 in total) cannot be answered.
FAULTS = {
    "no text": 7,
    "blank text": 9,
    "no product": 2,
    "too long": 4,
    "long": 8,
    "repeated row": 6,
    "repeated id": 5,
    "repeated text": 12,
}
BLANKS = ("", "", " ", "   ", "\t\n", "\u3000\u3000", "\u00a0")
DEFAULT_PRAISE = ("此用户没有填写评价。", "系统默认好评！", "This customer left no comment.")

SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field(
            "text", pa.string(), metadata={"description": "what the customer wrote / 评价内容"}
        ),
        pa.field("product", pa.string()),
        pa.field("stars", pa.int8()),
        pa.field("created", pa.timestamp("us", tz="Asia/Shanghai")),
        pa.field("tags", pa.list_(pa.string())),
        pa.field(
            "attributes",
            pa.struct(
                [
                    pa.field("channel", pa.string()),
                    pa.field("verified", pa.bool_()),
                    pa.field("helpful_votes", pa.int32()),
                    pa.field(
                        "device",
                        pa.struct([pa.field("os", pa.string()), pa.field("version", pa.string())]),
                    ),
                ]
            ),
        ),
    ]
)
LABELLED_SCHEMA = pa.schema(
    [
        pa.field("text", pa.string()),
        pa.field("product", pa.string()),
        pa.field("label", pa.string()),
        pa.field("rating", pa.int8()),
        pa.field("reply", pa.string()),
        pa.field("language", pa.string()),
        pa.field("good", pa.list_(pa.string())),
        pa.field("bad", pa.list_(pa.string())),
        pa.field("middling", pa.list_(pa.string())),
        pa.field(
            "facts",
            pa.struct(
                [
                    pa.field("product", pa.string()),
                    pa.field("aspects", pa.list_(pa.string())),
                    pa.field("rating", pa.int8()),
                    pa.field("wish", pa.string()),
                ]
            ),
        ),
    ]
)


def write_parquet(folder: Path) -> list[Path]:
    """Write or replace `reviews/` and `labelled/` under `folder`; return the sorted files.

    The same version of pyarrow writes the same bytes each time.
    """
    for name in ("reviews", "labelled"):
        shutil.rmtree(folder / name, ignore_errors=True)
    files, truth, clean = [], {}, []
    for number, part in enumerate(PARTS):
        rng = random.Random(SEED + number)
        rows, reviews = _day_rows(rng, part, first_id=100_000 + 10_000 * number)
        files.append(folder / "reviews" / part.path)
        _write(files[-1], rows, SCHEMA.with_metadata(_export_note(part)))
        if part.truncated:
            files[-1].write_bytes(files[-1].read_bytes()[: files[-1].stat().st_size * 3 // 5])
        else:
            truth.update(reviews)
            clean += rows
    held_out = _held_out_rows(clean, truth)
    train = _training_rows(random.Random(SEED - 1))
    for name, rows in (("held_out", held_out), ("train", train)):
        files.append(folder / "labelled" / f"{name}.parquet")
        schema = (
            LABELLED_SCHEMA.insert(0, SCHEMA.field("id")) if name == "held_out" else LABELLED_SCHEMA
        )
        _write(files[-1], rows, schema)
    return sorted(files)


def _day_rows(
    rng: random.Random, part: Part, first_id: int
) -> tuple[list[dict[str, Any]], dict[str, Review]]:
    """The rows of one file, and the true answers for their texts."""
    rows: list[dict[str, Any]] = []
    truth: dict[str, Review] = {}
    start = datetime.fromisoformat(part.path[4:14]).replace(tzinfo=SHANGHAI)
    fault_of: dict[int, str] = {}
    for kind, share in FAULTS.items():
        for _ in range(part.rows * share // 1000):
            # Never the first row, because some faults repeat an earlier row.
            fault_of[rng.randrange(1, part.rows)] = kind
    for index in range(part.rows):
        fault = fault_of.get(index, "")
        if fault == "repeated row":
            rows.append(dict(rng.choice(rows)))
            continue
        clauses = {"too long": rng.randrange(480, 620), "long": rng.randrange(12, 50)}.get(fault, 0)
        review = write_review(rng, held_out=True, clauses=clauses)
        created = start + timedelta(seconds=86_400 * (index + rng.random()) / part.rows)
        row = _row(
            rng, review, first_id + index, created.replace(microsecond=rng.randrange(1000) * 1000)
        )
        changed = _changed_column(rng, fault, rows)
        if not changed:
            truth[review.text] = review
        rows.append(row | changed)
    return rows, truth


def _changed_column(rng: random.Random, fault: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The column that `fault` changes, with its new value; empty if the row is unchanged."""
    match fault:
        case "no text":
            return {"text": None}
        case "blank text":
            return {"text": rng.choice(BLANKS)}
        case "no product":
            return {"product": None}
        case "repeated id":
            return {"id": rng.choice(rows)["id"]}
        case "repeated text":
            return {"text": rng.choice(DEFAULT_PRAISE)}
        case _:
            return {}


def _row(rng: random.Random, review: Review, number: int, created: datetime) -> dict[str, Any]:
    """A row with the review and the shop's other columns. The stars usually match the opinion."""
    usual = {"positive": (4, 5, 5, 5), "neutral": (3, 3, 3, 4), "negative": (1, 1, 2, 2)}[
        review.label
    ]
    stars = rng.choice(usual) if rng.random() < 0.9 else rng.randint(1, 5)
    tags = rng.sample(
        (review.category, "新品", "促销", "gift", "repeat-buyer", "with photo"), rng.randrange(4)
    )
    device = {
        "os": rng.choice(("iOS", "Android", "HarmonyOS")),
        "version": f"{rng.randint(9, 18)}.{rng.randrange(6)}",
    }
    row: dict[str, Any] = {
        "id": number,
        "text": review.text,
        "product": review.product,
        "stars": _sometimes_null(rng, 0.08, stars),
        "created": _sometimes_null(rng, 0.005, created),
        "tags": None,
        "attributes": None,
    }
    if rng.random() >= 0.05:
        row["tags"] = [_sometimes_null(rng, 0.01, tag) for tag in tags]
    if rng.random() >= 0.04:
        row["attributes"] = {
            "channel": rng.choice(("app", "web", "mini-program", None)),
            "verified": rng.random() < 0.9,
            "helpful_votes": int(rng.expovariate(0.5)),
            "device": _sometimes_null(rng, 0.3, device),
        }
    return row


def _sometimes_null(rng: random.Random, share: float, value: Any) -> Any:
    """`value`, or None with probability `share`."""
    return None if rng.random() < share else value


def _export_note(part: Part) -> dict[str, str]:
    return {
        "exporter": "shop-reviews 2.4",
        "exported_at": f"{part.path[4:14]}T23:59:59+08:00",
        "rows": str(part.rows),
        "备注": "每日评价导出",
    }


def _held_out_rows(rows: list[dict[str, Any]], truth: dict[str, Review]) -> list[dict[str, Any]]:
    """Rows of `reviews/` with a unique id and a unique text that fits the model."""
    ids = Counter(row["id"] for row in rows)
    texts = Counter(row["text"] for row in rows)
    chosen = [
        {"id": row["id"], **_labelled_row(truth[row["text"]])}
        for row in rows
        if row["text"] in truth
        and row["product"] is not None
        and len(row["text"]) < 1000
        and ids[row["id"]] == texts[row["text"]] == 1
    ]
    # Every third row, to include all four days.
    return chosen[::3][:HELD_OUT_ROWS]


def _training_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Distinct reviews without any combination from held-out reviews."""
    reviews: dict[str, Review] = {}
    while len(reviews) < TRAIN_ROWS:
        clauses = rng.randrange(4, 16) if rng.random() < 0.02 else 0
        review = write_review(rng, held_out=False, clauses=clauses)
        reviews.setdefault(review.text, review)
    return [_labelled_row(review) for review in reviews.values()]


def _labelled_row(review: Review) -> dict[str, Any]:
    # The rating has a column of its own too, so that a training can take it as its label.
    return {**asdict(review), "rating": review.facts.rating}


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        compression_level=9,
        write_page_checksum=True,
    )
