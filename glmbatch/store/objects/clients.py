"""Open the clients of an object store. Knows no paths and no errors of ours but InputError.

obstore moves the bytes and writes under conditions. S3 has a second client, boto3: it finds
credentials, region and endpoint wherever AWS's own tools do (profiles, single sign-on, roles), and
lists keys as they are (see listing.py).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from glmbatch.errors import InputError
from glmbatch.store.objects.requests import Counting, count_all

if TYPE_CHECKING:
    from obstore.store import AzureStore, ClientConfig, GCSStore, RetryConfig, S3Store

# What to install for the scheme of an address.
EXTRAS = {"s3": "'glmbatch[s3]'", "gs": "'glmbatch[stores]'", "az": "'glmbatch[stores]'"}
CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0
RETRIES = 4  # of a request that only reads
AT_ONCE = 32  # connections of boto3's client
# A request has no limit as a whole, because a checkpoint may take an hour.
_WHOLE = timedelta(days=1)
_BUCKET = re.compile(r"[\w$][\w.-]*", re.ASCII)
# The fields of AZURE_STORAGE_CONNECTION_STRING, by the names that obstore has for them.
_AZURE = {
    "AccountName": "account_name",
    "AccountKey": "account_key",
    "SharedAccessSignature": "sas_key",
    "BlobEndpoint": "endpoint",
}


@dataclass(frozen=True, slots=True, eq=False)
class Client:
    """The clients of one bucket, shared by all threads.

    `reading` repeats a failed request itself. `writing` sends each request once, so that its caller
    decides whether to send it again. `s3` is boto3's client; None for other stores.
    """

    bucket: str
    reading: Any
    writing: Any
    s3: Any = None

    def options(self) -> dict[str, str]:
        """Options with which another library over the crate object_store reaches the bucket.

        They have the credentials of now, which may expire in an hour.
        """
        options = {name: str(value) for name, value in self.reading.config.items()}
        for own in ("bucket", "container_name", "disable_bulk_delete"):
            options.pop(own, None)
        if any(value.startswith("http://") for value in options.values()):
            options["allow_http"] = "true"
        provider = getattr(self.reading, "credential_provider", None)
        if provider is not None:
            now = provider()
            options["access_key_id"] = now["access_key_id"]
            options["secret_access_key"] = now["secret_access_key"]
            if now.get("token"):
                options["session_token"] = now["token"]
        if self.s3 is not None:
            options["conditional_put"] = "etag"
        limits = {"connect_timeout": CONNECT_SECONDS, "timeout": READ_SECONDS}
        options |= {name: f"{seconds:g}s" for name, seconds in limits.items()}
        return {**options, "max_retries": str(RETRIES), "retry_timeout": "2m"}


@lru_cache
def client(scheme: str, bucket: str) -> Client:
    """The clients of `bucket`. InputError for a name that no bucket has, or a missing package.

    Errors of boto3 pass, for example that there are no credentials.
    """
    if not _BUCKET.fullmatch(bucket):  # obstore would end the process
        raise InputError(f"{scheme}://{bucket}: no bucket can have this name.")
    try:
        return {"s3": _s3, "gs": _google, "az": _azure}[scheme](bucket)
    except ImportError as error:
        raise InputError(
            f"{scheme}://: the package for this store is not installed. Run pip install "
            f"{EXTRAS[scheme]}."
        ) from error


def _s3(bucket: str) -> Client:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import NoCredentialsError
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import S3Store

    session = boto3.Session()
    is_public = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
    credentials = None if is_public else session.get_credentials()
    if credentials is not None:
        credentials.get_frozen_credentials()  # fails here if a sign-on has expired
    elif not is_public:
        raise NoCredentialsError
    config = Config(
        signature_version=UNSIGNED if is_public else None,
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=AT_ONCE,
    )
    listing = count_all(session.client("s3", config=config))
    place = _place(listing, bucket)
    bundle = session._session.get_config_variable("ca_bundle")

    def store(retries: int) -> S3Store:
        return S3Store(
            bucket,
            client_options=_options(place.get("endpoint", ""), bundle),
            retry_config=_retry(retries),
            credential_provider=None if is_public else Boto3CredentialProvider(session),
            disable_bulk_delete=True,  # not every store with S3's API has it
            **place,
        )

    return Client(bucket, Counting(store(RETRIES)), Counting(store(0)), listing)


def _place(listing: Any, bucket: str) -> dict[str, Any]:
    """The region of `bucket`, and where to send requests."""
    endpoint, region = listing.meta.endpoint_url, listing.meta.region_name
    if not str(urlsplit(endpoint).hostname).endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return {"endpoint": endpoint, "region": _signing(region)}
    from botocore.exceptions import ClientError

    try:
        headers = listing.head_bucket(Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"]
    except ClientError as error:  # a refusal names the region too
        headers = error.response["ResponseMetadata"].get("HTTPHeaders", {})
    # A name with dots has no certificate of its own.
    return {
        "region": headers.get("x-amz-bucket-region") or _signing(region),
        "virtual_hosted_style_request": "." not in bucket,
    }


def _signing(region: str | None) -> str:
    """The region to sign for; boto3 calls a missing one `aws-global`."""
    return "us-east-1" if region in (None, "aws-global") else str(region)


def _google(bucket: str) -> Client:
    from obstore.store import GCSStore

    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if emulator and "://" not in emulator:
        emulator = f"http://{emulator}"
    place: dict[str, Any] = {"base_url": emulator, "skip_signature": True} if emulator else {}

    def store(retries: int) -> GCSStore:
        options = _options(emulator)
        return GCSStore(bucket, client_options=options, retry_config=_retry(retries), **place)

    return Client(bucket, Counting(store(RETRIES)), Counting(store(0)))


def _azure(container: str) -> Client:
    from obstore.store import AzureStore

    place: dict[str, Any] = {}
    for part in os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"):
        name, _, value = part.partition("=")
        if name in _AZURE and value:
            place[_AZURE[name]] = value
    if token := os.environ.get("AZURE_STORAGE_SAS_TOKEN"):
        place.setdefault("sas_key", token)

    def store(retries: int) -> AzureStore:
        options = _options(place.get("endpoint", ""))
        return AzureStore(container, client_options=options, retry_config=_retry(retries), **place)

    return Client(container, Counting(store(RETRIES)), Counting(store(0)))


def azure_account(container: str) -> str:
    """The storage account of an Azure `container`."""
    return str(client("az", container).reading.config["account_name"])


def _options(endpoint: str, bundle: str | None = None) -> ClientConfig:
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "read_timeout": timedelta(seconds=READ_SECONDS),
        "timeout": _WHOLE,
        "allow_http": endpoint.startswith("http://"),
    }
    if bundle:
        options["root_certificate"] = Path(bundle).read_bytes()
    return options


def _retry(retries: int) -> RetryConfig:
    return {"max_retries": retries, "retry_timeout": timedelta(minutes=2)}
