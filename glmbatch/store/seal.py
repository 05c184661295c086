"""Small JSON files with a digest of their content, so that damage is detected on reading."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from pydantic_core import from_json

DIGEST = "digest"


def sealed(content: dict[str, Any]) -> str:
    """`content` as JSON text, with its digest added."""
    return json.dumps({**content, DIGEST: digest_of(content)}, indent=1, ensure_ascii=False)


def unsealed(text: bytes | str) -> Any:
    """The content of the JSON `text`, without its digest. ValueError when it was changed.

    Text without a digest, as in files of earlier versions, is accepted.
    """
    content = from_json(text)  # unlike json.loads, raises ValueError also for deep nesting
    if isinstance(content, dict) and DIGEST in content:
        seal = content.pop(DIGEST)
        if seal != digest_of(content):
            raise ValueError("its digest does not match its content")
    return content


def digest_of(content: Any) -> str:
    """The SHA-256 of a JSON value in hexadecimal, whatever its layout and order of keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode()).hexdigest()
