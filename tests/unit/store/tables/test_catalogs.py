"""How pyiceberg reaches the store that has a table."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.io import load_file_io

from glmbatch.store.tables.catalogs import open_catalog, table_name
from tests.stores import ENVIRONMENT

PLACE = "s3://behind-a-proxy/out"


class Proxy(BaseHTTPRequestHandler):
    """Knows no object, and records what it was asked for."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[str]:
    """The address of a proxy, as the environment may have it."""
    Proxy.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a machine without a proxy."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_metadata_in_s3_go_through_the_proxy_of_the_environment(
    catalog: Catalog, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.invalid")
    monkeypatch.setenv("HTTP_PROXY", proxy)
    opened = open_catalog(table_name("lake/shop.reviews"), PLACE)
    assert not load_file_io(opened.properties).new_input(f"{PLACE}/x").exists()
    assert Proxy.asked[0] == "http://store.invalid/behind-a-proxy/out/x"
    monkeypatch.setenv("NO_PROXY", "store.invalid")
    assert "s3.proxy-uri" not in open_catalog(table_name("lake/shop.reviews"), PLACE).properties
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__S3__ENDPOINT", "http://other.invalid")
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__S3__PROXY_URI", "http://mine.invalid")
    own = open_catalog(table_name("lake/shop.reviews"), PLACE).properties
    assert own["s3.proxy-uri"] == "http://mine.invalid"


def test_a_bucket_of_aws_is_reached_as_the_environment_says(
    catalog: Catalog, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used() -> str:
        opened = open_catalog(table_name("lake/shop.reviews"), "s3://behind-an-endpoint/out")
        return opened.properties.get("s3.proxy-uri", "")

    # In clear text, so that the proxy can answer which region the bucket is in: it knows none.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.eu-west-1.amazonaws.com")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("HTTP_PROXY", proxy)
    assert used() == ""
    monkeypatch.setenv("ALL_PROXY", f"http://all.{proxy}")
    assert used() == f"http://all.{proxy}"
    monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy}")
    assert used() == f"http://{proxy}"
    for bypassed in (
        ".s3.eu-west-1.amazonaws.com",
        "behind-an-endpoint.s3.eu-west-1.amazonaws.com",
    ):
        monkeypatch.setenv("NO_PROXY", bypassed)
        assert used() == ""
    monkeypatch.setenv("PYICEBERG_CATALOG__LAKE__S3__REGION", "cn-north-1")
    assert used() == f"http://{proxy}"
    monkeypatch.setenv("NO_PROXY", "s3.cn-north-1.amazonaws.com.cn")
    assert used() == ""
