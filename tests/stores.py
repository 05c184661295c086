"""A real S3 server in its own process, behind a proxy that records requests and injects faults."""

from __future__ import annotations

import http.client
import io
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glmbatch.store.objects import clients
from glmbatch.store.paths import ObjectPath

BUCKET = "shop"
# The server. It spares each request a line in a log and a listing of moto's own folder, which are a
# third of its time.
MOTO = """
import logging
from moto import backends, server

modules = [*backends.list_of_moto_modules()]
backends.list_of_moto_modules = lambda: modules
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server.main()
"""
WRONG_REGION = (
    b"<Error><Code>AuthorizationHeaderMalformed</Code>"
    b"<Message>expecting eu-west-1</Message></Error>"
)


@dataclass
class Request:
    """One request as the proxy sees it.

    `key` is the object's name below the test's folder, and empty for a listing. `listed` is the
    number of objects that a listing returned, and `answered` the bytes of the answer's body.
    """

    method: str
    key: str
    headers: dict[str, str]
    listed: int = 0
    answered: int = 0

    @property
    def changes(self) -> bool:
        return self.method in {"PUT", "POST", "DELETE"}


@dataclass
class Store:
    """Address of the proxy, its recorded requests, and the `harm` that it does to them.

    `harm` is called with each request before it is forwarded. It returns None to forward it, an
    HTTP status to answer with, or one of these words:

    - "reset": reset the connection before the server gets the request
    - "lost": reset it after the server has handled the request
    - "cut": send half the response
    - "slow": delay the request
    - "unconditional": drop the If-None-Match header
    """

    address: str
    folder: str = ""
    requests: list[Request] = field(default_factory=list)
    harm: Callable[[Request], str | int | None] = lambda request: None

    def url(self, name: str) -> str:
        return f"s3://{BUCKET}/{self.folder}/{name}"

    def path(self, name: str) -> ObjectPath:
        return ObjectPath(self.url(name))

    def mark(self, folder: str) -> None:
        """Create the empty object with which some tools mark a folder."""
        self.client.put_object(Bucket=BUCKET, Key=f"{self.folder}/{folder}/", Body=b"")

    @cached_property
    def client(self) -> Any:
        """A client of another package, for what paths cannot name or do."""
        return boto3.client("s3")

    def put(self, name: str, table: pa.Table, **options: Any) -> None:
        file = io.BytesIO()
        pq.write_table(table, file, **options)
        key = f"{self.folder}/{name}"
        self.client.put_object(Bucket=BUCKET, Key=key, Body=file.getvalue())

    def names(self, folder: str = "") -> list[str]:
        return [str(path.relative_to(self.path(""))) for path in self.path(folder).listed()]

    def copy(self, folder: str, other: str) -> None:
        """Copy all objects of a folder to an `other`, and forget the requests so far."""
        root = self.path(folder)
        for path in list(root.listed()):
            self.path(f"{other}/{path.relative_to(root)}").copy_from(path)
        self.calm()

    def calm(self) -> None:
        self.harm = lambda request: None
        self.requests.clear()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(log: Path) -> Iterator[int]:
    """Start a moto server in its own process; yield its port."""
    port = free_port()
    command = [sys.executable, "-c", MOTO, "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as server:
        try:
            for _ in range(1200):  # a busy machine takes half a minute
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(0.1)
            yield port
        finally:
            server.terminate()


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ProxyServer

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client was killed or disconnected
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def pass_on(self) -> None:
        key = (
            unquote(self.path.split("?")[0])
            .removeprefix(f"/{BUCKET}")
            .lstrip("/")
            .removeprefix(f"{self.server.store.folder}/")
        )
        headers = {name.title(): value for name, value in self.headers.items()}
        request = Request(self.command, key, headers)
        body = self.body()
        self.server.store.requests.append(request)
        harm = self.server.store.harm(request)
        if harm == "slow":
            time.sleep(4)
        if harm == "reset":
            self.reset()
        elif isinstance(harm, int):
            self.answer(harm, {}, WRONG_REGION if harm == 400 else b"")
        else:
            self.forward(request, body, harm)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(parts)

    def forward(self, request: Request, body: bytes, harm: str | int | None) -> None:
        server = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        dropped = {"expect", "transfer-encoding"}
        if harm == "unconditional":
            dropped.add("if-none-match")
        headers = {
            name: value for name, value in request.headers.items() if name.lower() not in dropped
        }
        server.request(self.command, self.path, body, headers)
        answer = server.getresponse()
        content = answer.read()
        request.answered = len(content)
        request.listed = content.count(b"<Key>") * (self.command == "GET")
        server.close()
        if harm == "lost":
            self.reset()
            return
        self.answer(answer.status, dict(answer.getheaders()), content, cut=harm == "cut")

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def answer(
        self, status: int, headers: dict[str, str], content: bytes, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        kept = {
            k: v for k, v in headers.items() if k.lower() not in {"content-length", "connection"}
        }
        for name, value in {**kept, "Content-Length": size}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection |= cut

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on


class ProxyServer(ThreadingHTTPServer):
    """Forwards requests to the server at `port`, each in its own thread."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.port = port
        self.store = Store(f"http://127.0.0.1:{self.server_port}")


@contextmanager
def proxied(port: int) -> Iterator[Store]:
    """A proxy in front of the server at `port`."""

    with ProxyServer(port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.store
        finally:
            server.shutdown()
            thread.join()


# Settings of the listing client: two attempts.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret-of-nobody",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "2",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@contextmanager
def s3_store(log: Path) -> Iterator[Store]:
    """A server behind a proxy, with an empty bucket and an environment that points to them."""
    with s3_server(log) as port, proxied(port) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": store.address}.items():
            patch.setenv(name, value)
        patch.setattr(clients, "READ_SECONDS", 3.0)
        patch.setattr(clients, "RETRIES", 1)
        patch.setattr("glmbatch.store.objects.access.PAUSES", (0.05,))
        clients.client.cache_clear()
        store.client.create_bucket(Bucket=BUCKET)
        yield store
