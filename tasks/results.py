"""How Prefect stores the small results of tasks: as JSON after a line with its digest.

Prefect trusts every stored result that it can load, and runs the task again if loading fails. So
loading a damaged result must fail.
"""

from __future__ import annotations

from typing import Any

from prefect.serializers import JSONSerializer
from pydantic import Field

from glmbatch.store.seal import digest_of

SEALED = "glmbatch-sealed-json"  # the name by which Prefect finds this class


class SealedResult(JSONSerializer[Any]):
    """A serializer that writes a line with a digest, then the JSON."""

    type: str = Field(default=SEALED, frozen=True)

    def dumps(self, obj: Any) -> bytes:
        """`obj` as a digest line and JSON."""
        content = super().dumps(obj)
        return f"{digest_of(content.decode())}\n".encode() + content

    def loads(self, blob: bytes) -> Any:
        """The object in `blob`. ValueError if the digest does not match."""
        digest, _, content = blob.partition(b"\n")
        if digest.decode() != digest_of(content.decode()):
            raise ValueError("the stored result is damaged")
        return super().loads(content)
