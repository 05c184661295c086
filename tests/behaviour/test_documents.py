"""The modules, files and folders that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT

DOCUMENTS = (
    "README.md",
    "GUIDE.md",
    "DESIGN.md",
    "deployments/README.md",
    "benchmarks/README.md",
    "sample_data/README.md",
)


def named_files(document: str) -> list[str]:
    """File names in backticks, without glob patterns."""
    names = re.findall(r"`([\w./-]+\.(?:py|yaml|sh|md|json))`", (ROOT / document).read_text())
    return sorted(set(names))


def is_in_the_repository(name: str, document: str) -> bool:
    tops = (ROOT, ROOT / "glmbatch", (ROOT / document).parent)
    return any((top / name).exists() for top in tops)


# Files of an output, of a checkpoint, or of an adapter.
OTHERS = {"_manifest.json", "config.json", "glmbatch.json", "publishing.json", "manifest.json"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    names = [name for name in named_files(document) if Path(name).name not in OTHERS]
    assert not [name for name in names if not is_in_the_repository(name, document)]


def test_the_design_names_every_module() -> None:
    house = (ROOT / "DESIGN.md").read_text().split("## The house", 1)[1].split("\n## ", 1)[0]
    words = set(re.findall(r"\w+", house))
    modules = {path.stem for path in (ROOT / "glmbatch").rglob("*.py")} - {"__init__"}
    assert not modules - words
