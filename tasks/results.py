"""How the small results of tasks are kept: as JSON behind its digest.

Prefect takes a stored result that can be read for what was stored. One that cannot be read it makes
again, so a damaged one has to be of that kind.
"""

from __future__ import annotations

from typing import Any

from prefect.serializers import JSONSerializer
from pydantic import Field

from glmbatch.store.seal import digest_of

SEALED = "glmbatch-sealed-json"  # the name under which Prefect finds this class


class SealedResult(JSONSerializer[Any]):
    """JSON behind a line with its digest."""

    type: str = Field(default=SEALED, frozen=True)

    def dumps(self, obj: Any) -> bytes:
        """`obj` as JSON, sealed."""
        content = super().dumps(obj)
        return f"{digest_of(content.decode())}\n".encode() + content

    def loads(self, blob: bytes) -> Any:
        """What was sealed; ValueError when it is damaged."""
        digest, _, content = blob.partition(b"\n")
        if digest.decode() != digest_of(content.decode()):
            raise ValueError("the stored result is damaged")
        return super().loads(content)
