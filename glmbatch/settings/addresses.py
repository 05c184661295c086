"""What an address may be: a path of this machine, or a name in an object store without secrets.

Settings are shown in forms, logs and records, so credentials come by the store's own ways: the
environment, a profile, the machine's role. Reads no files and no environment.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

# Names that other tools have for the same stores, and how they are written here.
OTHER_NAMES = {
    "s3a": "s3://bucket/name",
    "s3n": "s3://bucket/name",
    "gcs": "gs://bucket/name",
    "azure": "az://container/name",
    "abfs": "az://container/name",
    "abfss": "az://container/name",
    "wasb": "az://container/name",
    "wasbs": "az://container/name",
    "adl": "az://container/name",
}
STORES = ("s3", "gs", "az")
# Two letters at least: C:/data is a path of Windows.
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(/*)")
# As in presigned addresses of every store, and as people name keys: sig, X-Amz-Signature, token.
_SECRET = re.compile(
    r"[?&#;]([\w.-]*(signature|token|secret|passw|credential|accesskey|accountkey|apikey)[\w.-]*"
    r"|([\w.-]*[_-])?(sig|key|pwd|auth|sas)([_-]?id)?)=",
    re.IGNORECASE,
)
# Where the part before the @ is a container and no user.
_ACCOUNTS = ("abfs", "abfss", "wasb", "wasbs")
# Enough for an address that was encoded for another address.
_MOST_ENCODED = 3


def has_credentials(text: str) -> bool:
    """Whether an address, or a text with one in it, holds a user, a key or a signature."""
    for _ in range(_MOST_ENCODED):
        if _holds_secret(text):
            return True
        text = unquote(text)
    return False


def _holds_secret(text: str) -> bool:
    for match in _SCHEME.finditer(text):
        # One slash as well: as a path it would be shown in the message that it is not there.
        rest = text[match.end() :]
        bucket = rest.partition("/")[0]
        scheme = match[1].lower()
        if scheme not in (*STORES, *OTHER_NAMES) and len(match[2]) < 2:
            continue
        if scheme in _ACCOUNTS and ":" not in bucket:
            bucket = ""
        # A secret key may hold slashes; a bucket's name holds no colon.
        if "@" in bucket or (":" in bucket and "@" in rest) or _SECRET.search(rest):
            return True
    return False


def misspelt(address: str) -> str | None:
    """What is wrong with an address that is neither a path nor of a store; None when it is one."""
    match = _SCHEME.match(address)
    if match is None:
        return None
    scheme, slashes = match[1], match[2]
    if scheme in STORES and slashes == "//" and not address[0].isspace():
        return None
    if scheme.lower() == "file" and slashes:
        return "is a file of this machine; write its path alone, without file:"
    form = f"{scheme.lower()}://bucket/name" if scheme.lower() in STORES else None
    form = form or OTHER_NAMES.get(scheme.lower())
    if form is not None and slashes:
        return f"is no address of an object store as it is written here; write {form}"
    if slashes.startswith("//"):
        return (
            "is no address of an object store; write s3://bucket/name (or gs://, az://), or a path "
            "of this machine"
        )
    return None


def checked(address: str) -> str:
    """`address` as it is. ValueError, which shows no secret, when it cannot be one."""
    if has_credentials(address):
        raise ValueError(
            "an address holds no credentials; the store's package finds them in the environment"
        )
    if reason := misspelt(address):
        raise ValueError(f"{address} {reason}")
    return address


def on_this_machine(address: str) -> str:
    """A path of this machine as it is. ValueError when it leads to a store."""
    if "://" in checked(address):
        raise ValueError(
            f"{address} is in a store, and this is written on this machine; name a folder of it"
        )
    return address
