"""What `glmbatch verify` shows: the findings as text for people."""

from __future__ import annotations

from collections import Counter

from glmbatch.errors import counted
from glmbatch.ledger.verification import Verification, verify

__all__ = ["describe", "verify"]


def describe(verification: Verification) -> str:
    """The findings as text for people, in lines without a final newline."""
    counts = Counter(finding.kind for finding in verification.findings)
    end = "sound" if verification.sound else f"not sound ({counts['wrong']} wrong)"
    if counts["unchecked"]:
        files = counted(counts["unchecked"], "file")
        end += f"; {files} not compared, because the source is gone or changed"
    if verification.earlier:
        end += f"; {counted(verification.earlier, 'file')} of earlier versions kept for readers"
    size = f"{counted(verification.files, 'file')}, {counted(verification.rows, 'row')}"
    head = f"{verification.output}: {size}: {end}"
    return "\n".join([*(str(finding) for finding in verification.findings), head])
