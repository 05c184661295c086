"""Rebuild the sample data: the reviews, and the tiny ChatGLM2 checkpoint trained on them.

    python sample_data/make.py               reviews, then checkpoint
    python sample_data/make.py reviews       the Parquet files, byte for byte
    python sample_data/make.py checkpoint    trains tiny-chatglm2/, about half an hour on one core
    python sample_data/make.py evaluate      scores the committed checkpoint on held-out reviews

With --check, reviews and checkpoint are rebuilt in a temporary folder and compared. The exit code
is 1 if any byte differs.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

from glmbatch.settings.job import JobConfig

FOLDER = Path(__file__).resolve().parent
CHECKPOINT = FOLDER / "tiny-chatglm2"
# The mathematics libraries read these variables when they load. Every x86 machine of the last ten
# years has AVX2, and a single thread adds in the same order everywhere.
NUMERICS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2,STRICT",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def main() -> int:
    arguments = _parser().parse_args()
    made = {"reviews": _reviews, "checkpoint": _checkpoint, "evaluate": _evaluate}
    wanted = [arguments.what] if arguments.what != "all" else ["reviews", "checkpoint"]
    if wanted != ["reviews"] and any(
        os.environ.get(name) != value for name, value in NUMERICS.items()
    ):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **NUMERICS})
    return max(made[what](arguments.check) for what in wanted)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", default="all", choices=("all", "reviews", "checkpoint", "evaluate")
    )
    parser.add_argument(
        "--check", action="store_true", help="write to a temporary folder and compare bytes"
    )
    return parser


def _reviews(check: bool) -> int:
    from make_reviews import write_parquet

    if not check:
        for path in write_parquet(FOLDER):
            print(f"wrote {path.relative_to(FOLDER)}: {path.stat().st_size:,} bytes")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        write_parquet(Path(temporary))
        return _compare(Path(temporary), ("reviews", "labelled"))


def _checkpoint(check: bool) -> int:
    from make_checkpoint import build_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary) / CHECKPOINT.name
        build_checkpoint(FOLDER / "labelled" / "train.parquet", _job(), built)
        if check:
            return _compare(Path(temporary), (CHECKPOINT.name,))
        shutil.rmtree(CHECKPOINT, ignore_errors=True)
        shutil.copytree(built, CHECKPOINT)
    for path in sorted(CHECKPOINT.iterdir()):
        print(f"wrote {path.relative_to(FOLDER)}: {path.stat().st_size:,} bytes")
    return _evaluate(check)


def _evaluate(_check: bool) -> int:
    """Print the scores; return 1 if the checkpoint is not good enough to be committed."""
    from make_evaluation import evaluate

    scores = evaluate(CHECKPOINT, FOLDER / "labelled" / "held_out.parquet", _job())
    print(f"{scores.rows} held-out reviews")
    print(f"label accuracy   {scores.label_accuracy:.3f}")
    for label, share in scores.recall.items():
        print(f"  of {label:12} {share:.3f}")
    print(f"sensible replies {scores.sensible:.3f}")
    for check, share in scores.checks.items():
        print(f"  {check:17} {share:.3f}")
    print(f"right facts      {scores.facts:.3f}")
    for name, score in scores.fields.items():
        print(f"  {name:17} {score:.3f}")
    good = min(scores.label_accuracy, scores.sensible) >= 0.9 and min(scores.fields.values()) >= 0.8
    return 0 if good else 1


def _job() -> JobConfig:
    return JobConfig.model_validate(
        yaml.safe_load((FOLDER / "reviews.yaml").read_text(encoding="utf-8"))
    )


def _compare(rebuilt: Path, names: tuple[str, ...]) -> int:
    """Print the files below `names` that differ; return 0 if none does, else 1."""
    files = sorted(_files_below(rebuilt, names) | _files_below(FOLDER, names))
    equal = 0
    for file in files:
        if _same_bytes(rebuilt / file, FOLDER / file):
            equal += 1
        else:
            print(f"differs: {file}")
    print(f"{equal} of {len(files)} files are equal, byte for byte")
    return 0 if equal == len(files) else 1


def _files_below(root: Path, names: tuple[str, ...]) -> set[Path]:
    files: set[Path] = set()
    for name in names:
        files.update(path.relative_to(root) for path in (root / name).rglob("*") if path.is_file())
    return files


def _same_bytes(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


if __name__ == "__main__":
    sys.exit(main())
