"""Checks of addresses: a local path, or a name in an object store, without credentials.

Forms, logs and records show settings, so credentials must come from the environment, a profile or
the machine's role instead. Reads no files and no environment.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

# Schemes that other tools use for the same stores, and what to write instead.
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
TABLE_SCHEME = "iceberg:"  # before the name of a table in a catalogue
TABLE = re.compile(r"[^/\s:]+/[^/\s.]+(\.[^/\s.]+)+")  # CATALOG/namespace.name
# At least two letters, because C:/data is a Windows path.
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(/*)")
# Query keys of presigned URLs and common names of secrets: sig, X-Amz-Signature, token.
_SECRET = re.compile(
    r"[?&#;]([\w.-]*(signature|token|secret|passw|credential|accesskey|accountkey|apikey)[\w.-]*"
    r"|([\w.-]*[_-])?(sig|key|pwd|auth|sas)([_-]?id)?)=",
    re.IGNORECASE,
)
# Schemes in which the part before the @ is a container, not a user.
_ACCOUNTS = ("abfs", "abfss", "wasb", "wasbs")
# Enough for an encoded address inside another encoded address.
_MOST_ENCODED = 3


def has_credentials(text: str) -> bool:
    """Whether an address, or a text that contains one, has a user, a key or a signature."""
    for _ in range(_MOST_ENCODED):
        if _holds_secret(text):
            return True
        text = unquote(text)
    return False


def _holds_secret(text: str) -> bool:
    for match in _SCHEME.finditer(text):
        # Also with one slash: taken as a path, the "not found" message would show the secret.
        rest = text[match.end() :]
        bucket = rest.partition("/")[0]
        scheme = match[1].lower()
        if scheme not in (*STORES, *OTHER_NAMES) and len(match[2]) < 2:
            continue
        if scheme in _ACCOUNTS and ":" not in bucket:
            bucket = ""
        # A secret key may contain slashes; a bucket's name never contains a colon.
        if "@" in bucket or (":" in bucket and "@" in rest) or _SECRET.search(rest):
            return True
    return False


def misspelt(address: str) -> str | None:
    """The rest of the sentence "`address` ..." that says what is wrong; None if nothing is."""
    match = _SCHEME.match(address)
    if match is None:
        return None
    scheme, slashes = match[1], match[2]
    if scheme in STORES and slashes == "//" and not address[0].isspace():
        return None
    if scheme.lower() == "file" and slashes:
        return "is a local file; write its path without file:"
    form = f"{scheme.lower()}://bucket/name" if scheme.lower() in STORES else None
    form = form or OTHER_NAMES.get(scheme.lower())
    if form is not None and slashes:
        return f"is not written as an address here; write {form}"
    if slashes.startswith("//"):
        return (
            "is not an address that can be used here; write s3://bucket/name (or gs://, az://), "
            "or a local path"
        )
    return None


def names_a_table(address: str) -> bool:
    """Whether an address is meant to name an Iceberg table, however it is misspelt."""
    return address.strip().lower().startswith(TABLE_SCHEME)


def checked(address: str) -> str:
    """`address` unchanged. ValueError, which shows no secret, if it cannot be used."""
    if has_credentials(address):
        raise ValueError(
            "an address must not contain credentials; set them in the environment or a profile"
        )
    if reason := misspelt(address):
        raise ValueError(f"{address} {reason}")
    return address


def on_this_machine(address: str) -> str:
    """A local path unchanged. ValueError if it is an address in an object store."""
    if "://" in checked(address):
        raise ValueError(f"{address} is in an object store; set a local folder here")
    return address
