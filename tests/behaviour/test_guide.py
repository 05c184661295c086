"""The guide's messages occur in the code, and its links lead to files."""

from __future__ import annotations

import re

from tests.support import ROOT

GUIDE = (ROOT / "GUIDE.md").read_text()


def messages() -> list[str]:
    table = GUIDE.split("## Messages", 1)[1].split("## Security", 1)[0]
    return re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)


def test_every_message_occurs_in_the_code() -> None:
    folders = ("glmbatch/**", "tasks", "deployments")
    paths = [path for folder in folders for path in sorted(ROOT.glob(f"{folder}/*.py"))]
    code = "\n".join(path.read_text() for path in paths)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings over several lines
    assert len(messages()) > 10
    for message in messages():
        for part in message.split("…"):
            assert part.strip() in code, part


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", GUIDE)
    assert links
    assert all((ROOT / link).exists() for link in links)
