"""Documents name what exists, quote what the code says, and link to what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

FOLDERS = (".", "docs", "docs/design", "deployments", "benchmarks", "sample_data")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
PAGES = [path for path in DOCUMENTS if "docs" in path.parts]
every_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)
# Files of an output, of a checkpoint, of an adapter, or of the reader's own.
OTHERS = {"_manifest.json", "manifest.json", "publishing.json", "report.json", "job.yaml"}
OTHERS |= {"config.json", "glmbatch.json", "modeling_chatglm.py"}


def named_files(text: str) -> set[str]:
    """Names in backticks that end as files of a repository do, without patterns."""
    return set(re.findall(r"`([\w./-]+\.(?:py|yaml|yml|sh|md|json))`", text))


def is_in_the_repository(name: str, document: Path) -> bool:
    tops = (ROOT, ROOT / "glmbatch", ROOT / "benchmarks/results", document.parent)
    return any((top / name).exists() for top in tops)


@every_document
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    names = {name for name in named_files(document.read_text()) if Path(name).name not in OTHERS}
    if document.name == "CHANGELOG.md":
        return  # it also names what is gone
    assert not [name for name in names if not is_in_the_repository(name, document)]


def anchors(document: Path) -> set[str]:
    """The anchors of its headings, as sites and code hosts make them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
    return {title.strip().replace(" ", "-") for title in words}


@every_document
def test_every_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])
def test_no_page_is_longer_than_200_lines(page: Path) -> None:
    if page.name != "settings.md":  # made from the classes, to look things up
        assert len(page.read_text().splitlines()) <= 200


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = {str(path.relative_to(ROOT / "docs")) for path in PAGES}
    assert pages == set(re.findall(r"[\w/-]+\.md", navigation))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "design/index.html").read_text()
    # Pages open without a network: nothing is loaded from elsewhere.
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', page)


def labels(source: str) -> set[str]:
    """The words of a drawing's labels."""
    texts = re.findall(r'label="([^"]*)"', source)
    return set(re.findall(r"\w{3,}", " ".join(texts).replace("\\n", " ")))


def test_every_drawing_is_the_one_of_its_source() -> None:
    sources = sorted((ROOT / "docs/diagrams").glob("*.dot"))
    assert sources
    for source in sources:
        drawn = (ROOT / "docs/img" / f"{source.stem}.svg").read_text()
        words = set(re.findall(r"\w{3,}", " ".join(re.findall(r">([^<]+)<", drawn))))
        assert labels(source.read_text()) <= words, f"run make diagrams: {source.name}"


def test_each_message_stands_in_the_code() -> None:
    text = (ROOT / "docs/messages.md").read_text()
    rows = re.findall(r"^\| (`[^|]+`) \|", text, flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    folders = ("glmbatch/**", "tasks", "deployments")
    paths = [path for folder in folders for path in sorted(ROOT.glob(f"{folder}/*.py"))]
    code = "\n".join(path.read_text() for path in paths)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings over several lines
    assert len(messages) > 40
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in code, part


def test_the_design_names_every_module() -> None:
    design = (ROOT / "docs/design/index.md").read_text()
    house = design.split("## The house", 1)[1].split("\n## ", 1)[0]
    words = set(re.findall(r"\w+", house))
    modules = {path.stem for path in (ROOT / "glmbatch").rglob("*.py")} - {"__init__"}
    assert not modules - words
