"""Small files of JSON that prove themselves: they hold a digest of all the rest of them.

Knows nothing of what they say.
"""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from pydantic_core import from_json

DIGEST = "digest"


def sealed(content: dict[str, Any]) -> str:
    """`content` as JSON, with its digest in it."""
    return json.dumps({**content, DIGEST: digest_of(content)}, indent=1, ensure_ascii=False)


def unsealed(text: bytes | str) -> Any:
    """What the JSON `text` says, without its digest; ValueError when it is not what was sealed.

    What was never sealed, as files of earlier versions, is taken as it is.
    """
    content = from_json(text)  # unlike json.loads, one error for all that is wrong, deep lists too
    if isinstance(content, dict) and DIGEST in content:
        seal = content.pop(DIGEST)
        if seal != digest_of(content):
            raise ValueError("its digest is not that of its content")
    return content


def digest_of(content: Any) -> str:
    """SHA-256 of a value of JSON, however it is laid out."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode()).hexdigest()
