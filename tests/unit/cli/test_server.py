"""The check of the user's Prefect server accepts every kind of login."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prefect import settings
from prefect.settings import temporary_settings

from glmbatch.cli.main import _prefect_server
from glmbatch.cli.server import accepts, free_address
from glmbatch.errors import GlmbatchError, InputError, TransientError


class Guarded(BaseHTTPRequestHandler):
    """Accepts clients with the key, the password or a proxy's header; refuses /health to others.

    Prefect Cloud and proxies behave like this. `/broken` always fails; `/page` is not Prefect.
    """

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        login = self.headers.get("Authorization"), self.headers.get("X-Pass")
        allowed = login[0] in {"Bearer pnu_key", "Basic bWU6c2VjcmV0"} or login[1] == "proxy"
        status = 200 if allowed else 401
        if "csrf-token" in self.path:
            status = 404 if allowed else 401
        content = b"[]"
        if self.path.startswith("/broken"):
            status = 500
        if self.path.startswith("/page"):
            status, content = 200, b"<html></html>"
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


LOGINS = {
    "a password": {settings.PREFECT_API_AUTH_STRING: "me:secret"},
    "a key": {settings.PREFECT_API_KEY: "pnu_key"},
    "a header": {settings.PREFECT_CLIENT_CUSTOM_HEADERS: {"X-Pass": "proxy"}},
}


@pytest.mark.parametrize("login", LOGINS)
def test_a_server_accepts_a_run_with(guarded: str, login: str) -> None:
    named = {settings.PREFECT_API_URL: f"{guarded}/api"}
    with temporary_settings(named | LOGINS[login]), _prefect_server() as wait:
        wait()


@pytest.mark.parametrize(
    ("address", "kind", "seen"),
    [
        ("{guarded}/api", InputError, "refuses this client. Set PREFECT_API_AUTH_STRING"),
        ("{guarded}/broken", TransientError, "no Prefect server answers"),
        ("{guarded}/page", TransientError, "no Prefect server answers"),
        ("{free}", TransientError, "no Prefect server answers"),
        ("http://nobody.invalid/api", TransientError, "no Prefect server answers"),
    ],
)
def test_a_refusing_or_silent_server_is_one_line(
    guarded: str, address: str, kind: type[GlmbatchError], seen: str
) -> None:
    address = address.format(guarded=guarded, free=free_address()[0])
    named = {settings.PREFECT_API_URL: address, settings.PREFECT_API_AUTH_STRING: "me:other"}
    with temporary_settings(named), pytest.raises(kind) as refused, _prefect_server() as wait:
        wait()
    assert str(refused.value).startswith(f"{address}: ")
    assert seen in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_server_that_is_down_is_one_line() -> None:
    with pytest.raises(TransientError, match="the Prefect server does not answer"):
        accepts(free_address()[0], "me:secret")
