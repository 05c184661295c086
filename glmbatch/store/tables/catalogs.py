"""Open Iceberg tables by the name of a catalogue. Knows no jobs.

pyiceberg finds a catalogue, and the credentials for it, by its name in .pyiceberg.yaml or in
variables such as PYICEBERG_CATALOG__SHOP__URI. Credentials for S3 that are not there come from
where AWS's own tools have them, and a proxy from the environment.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from glmbatch.errors import MACHINE_ERRNOS, GlmbatchError, InputError, TransientError
from glmbatch.settings.addresses import has_credentials
from glmbatch.store.errors import may_pass, one_line
from glmbatch.store.folder import Folder
from glmbatch.store.objects.access import storage_options
from glmbatch.store.paths import Address

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table

# pyiceberg's names for the options of a bucket.
_S3 = {
    "s3.endpoint": "endpoint",
    "s3.region": "region",
    "s3.access-key-id": "access_key_id",
    "s3.secret-access-key": "secret_access_key",
    "s3.session-token": "session_token",
    "s3.anonymous": "skip_signature",
}
_IDENTITY = ("s3.access-key-id", "s3.secret-access-key", "s3.session-token", "s3.anonymous")
_SQLITE_PASSING = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)


class TableName(NamedTuple):
    """The name of a table, `catalog`/`identifier`, where the identifier is namespace.name."""

    catalog: str
    identifier: str

    @property
    def namespace(self) -> str:
        """The part of the identifier before the last dot."""
        return self.identifier.rpartition(".")[0]

    def __str__(self) -> str:
        return f"{self.catalog}/{self.identifier}"


def table_name(text: str) -> TableName:
    """The parts of CATALOG/namespace.name."""
    catalog, _, identifier = text.partition("/")
    return TableName(catalog, identifier)


def open_catalog(name: TableName, place: Address = "") -> Catalog:
    """The catalogue of a table whose files are in `place`, or else in its warehouse.

    InputError when it is not described anywhere, or when pyiceberg cannot reach such a place.
    """
    try:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.utils.config import Config
    except ImportError as error:
        raise InputError(
            f"{name}: pyiceberg is not installed. Run pip install 'glmbatch[iceberg]'."
        ) from error
    with catalog_errors(name):
        described = Config()
        settings = cast(dict[str, str] | None, described.get_catalog_config(name.catalog))
        if settings is None:
            names = ", ".join(sorted(described.get_known_catalogs())) or "none"
            raise InputError(
                f"{name}: no catalogue {name.catalog!r} is described (there are: {names}). "
                f"Describe it in .pyiceberg.yaml, or set {_variable(name.catalog)} to its address."
            )
        return load_catalog(
            name.catalog,
            **{**_credentials(str(place) or settings.get("warehouse", ""), settings), **settings},
        )


def _credentials(place: str, settings: Mapping[str, str]) -> dict[str, str]:
    """pyiceberg's settings for the store that has `place`; none for other places than S3.

    Credentials in the catalogue's own `settings` stand alone: a token of ours would not fit them.
    """
    if place.startswith("az:"):
        raise InputError(
            f"{place}: an Iceberg table can be on a disk, in s3:// or in gs://. Set data.output or "
            "data.input."
        )
    if not place.startswith("s3:"):
        return {}
    options = storage_options(Folder(place).path) or {}
    ours = {name: options[theirs] for name, theirs in _S3.items() if theirs in options}
    # pyarrow, with which pyiceberg reads, does not look for a proxy itself.
    all_settings = {**ours, **settings}
    endpoint = all_settings.get("s3.endpoint") or _of_aws(place, all_settings["s3.region"])
    if proxy := _proxy(endpoint):
        ours["s3.proxy-uri"] = proxy
    own = any(name in settings for name in _IDENTITY)
    return {name: value for name, value in ours.items() if not own or name not in _IDENTITY}


def _of_aws(place: str, region: str) -> str:
    """The address at which AWS has the bucket of `place`, as pyarrow calls it."""
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"https://{urlsplit(place).netloc}.s3.{region}.{domain}"


def _proxy(endpoint: str) -> str:
    """The address of the proxy for requests to `endpoint`, by the environment; empty if none."""
    parts = urlsplit(endpoint)
    if proxy_bypass(parts.hostname or ""):
        return ""
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all", "")
    return proxy if "://" in proxy or not proxy else f"http://{proxy}"


def _variable(catalog: str) -> str:
    return f"PYICEBERG_CATALOG__{catalog.upper().replace('-', '_')}__URI"


def load_table(catalog: Catalog, name: TableName) -> Table | None:
    """The table; None if the catalogue has none of this name."""
    from pyiceberg.exceptions import NoSuchTableError

    with catalog_errors(name):
        try:
            return catalog.load_table(name.identifier)
        except NoSuchTableError:
            return None
        except FileNotFoundError as error:
            raise InputError(
                f"{name}: the catalogue has the table, but its metadata are gone: "
                f"{one_line(error)}. Restore them; or remove the table (pyiceberg --catalog "
                f"{name.catalog} drop table {name.identifier}), or name another."
            ) from error


def tables_beside(catalog: Catalog, name: TableName) -> list[str] | None:
    """The names of the tables in the namespace of a table; None if there is no namespace."""
    with catalog_errors(name):
        if not catalog.namespace_exists(name.namespace):
            return None
        return [str(identifier[-1]) for identifier in catalog.list_tables(name.namespace)]


@contextmanager
def catalog_errors(name: TableName) -> Iterator[None]:
    """Turn errors of pyiceberg, and of what it stands on, into ours."""
    try:
        yield
    except GlmbatchError:
        raise
    except Exception as error:  # it has no class of its own that all its errors have
        # The database's own words, without the statement.
        reason = one_line(getattr(error, "orig", None) or error, limit=300)
        if has_credentials(reason):  # some quote the address of the catalogue
            reason = type(error).__name__
        if isinstance(error, _conflicts()):
            raise TransientError(f"{name}: another commit came between: {reason}.") from error
        if _passes(error):
            raise TransientError(f"{name}: cannot be reached now: {reason}.") from error
        raise InputError(
            f"{name}: the Iceberg table cannot be used: {reason}. Check its catalogue and the "
            "credentials, or name another table."
        ) from error


@lru_cache
def _conflicts() -> tuple[type[Exception], ...]:
    from pyiceberg import exceptions

    return (
        exceptions.CommitFailedException,
        exceptions.CommitStateUnknownException,
        exceptions.TableAlreadyExistsError,
        exceptions.ValidationException,
        exceptions.WaitingForLockException,
    )


def _passes(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, OSError):
        # pyarrow's errors of a store have no number.
        return error.errno is None or error.errno in MACHINE_ERRNOS or may_pass(error)
    cause = getattr(error, "orig", None)
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", None) in _SQLITE_PASSING
    return isinstance(error, _passing()) or may_pass(error)


@lru_cache
def _passing() -> tuple[type[Exception], ...]:
    from pyiceberg import exceptions

    kinds: list[type[Exception]] = [
        exceptions.ServerError,
        exceptions.ServiceUnavailableError,
        exceptions.TooManyRequestsError,
    ]
    with suppress(ImportError):
        from sqlalchemy.exc import OperationalError

        kinds.append(OperationalError)
    return tuple(kinds)
