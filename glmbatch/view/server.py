"""The viewer's web server: on loopback, for one user, and only for pages that it has served itself.

The address has a random token, which other users of this machine do not know. Nothing here reads
Parquet or writes files; see rows.py and corrections.py.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from glmbatch.cli.output import show
from glmbatch.errors import GlmbatchError, InputError
from glmbatch.view.published import CACHE, RowsChanged
from glmbatch.view.query import Filters
from glmbatch.view.viewer import Viewer

LOOPBACK = "127.0.0.1"
PAGE = Path(__file__).with_name("page")
TYPES = {"": "text/html", "view.css": "text/css", "view.js": "text/javascript"}
MOST_ROWS = 200  # of one request
HEADERS = {
    # Only our own script and style, and no address but ours: even if a text were taken for HTML, it
    # could neither run nor send anything.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address has the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Correction(BaseModel, frozen=True, extra="forbid"):
    """What is right for one row; `truth` is null to withdraw it."""

    version: str
    file: int
    row: int
    step: str
    truth: Any = None


Next = Callable[[Request], Awaitable[Response]]


def make_app(viewer: Viewer, token: str, port: int) -> FastAPI:
    """The application for `viewer`; every address below /`token`/."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    hosts = {f"{LOOPBACK}:{port}", f"localhost:{port}"}

    @app.middleware("http")
    async def guard(request: Request, answer: Next) -> Response:
        """Refuse whoever does not know the token, and pages of other origins."""
        response = _refusal(request, token, hosts) or await answer(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(GlmbatchError)
    async def complain(_: Request, error: GlmbatchError) -> Response:
        status = 400 if isinstance(error, InputError) else 500
        status = 409 if isinstance(error, RowsChanged) else status
        return JSONResponse({"detail": str(error)}, status)

    app.include_router(_routes(viewer), prefix=f"/{token}")
    return app


def _refusal(request: Request, token: str, hosts: set[str]) -> Response | None:
    # Another name for this address is DNS rebinding, a page elsewhere that wants to read ours.
    if request.headers.get("host") not in hosts:
        return PlainTextResponse("unknown host", 403)
    given = request.url.path.split("/")[1]
    if not secrets.compare_digest(given.encode(), token.encode()):
        return PlainTextResponse("not found", 404)
    origin = request.headers.get("origin")
    if origin is not None and origin not in {f"http://{host}" for host in hosts}:
        return PlainTextResponse("unknown origin", 403)
    return None


def _routes(viewer: Viewer) -> APIRouter:
    routes = APIRouter()

    @routes.get("/")
    def page() -> Response:
        return _asset("")

    @routes.get("/{name}.{kind}")
    def asset(name: str, kind: str) -> Response:
        return _asset(f"{name}.{kind}")

    @routes.get("/api/output")
    def output() -> dict[str, Any]:
        return viewer.output()

    @routes.get("/api/facets")
    def facets(step: str) -> dict[str, Any]:
        return viewer.facets(step)

    @routes.get("/api/rows/{offset}/{limit}")
    def rows(offset: int, limit: int, filters: Annotated[Filters, Query()]) -> dict[str, Any]:
        return viewer.page(filters, max(0, offset), min(max(0, limit), MOST_ROWS))

    @routes.get("/api/count")
    def count(filters: Annotated[Filters, Query()]) -> dict[str, int]:
        return {"rows": viewer.count(filters)}

    @routes.get("/api/row/{version}/{file}/{row}")
    def row(version: str, file: int, row: int) -> dict[str, Any]:
        return viewer.row(version, file, row)

    @routes.post("/api/corrections")
    def correct(correction: Correction) -> dict[str, int]:
        return viewer.correct(**correction.model_dump())

    return routes


def _asset(name: str) -> Response:
    if name not in TYPES:
        return PlainTextResponse("not found", 404)
    content = (PAGE / (name or "view.html")).read_bytes()
    return Response(content, media_type=f"{TYPES[name]}; charset=utf-8")


def view(
    output: str, beside: str | None, corrections: str | None, cache: str | None, port: int
) -> None:
    """Show `output` on `port` of loopback, any free one if 0, until Ctrl-C.

    Prints the page's address. InputError when there is nothing to show, or the port cannot be used.
    """
    viewer = Viewer(output, beside, corrections, cache or CACHE)
    token = secrets.token_urlsafe(24)
    try:
        with _listening(port) as listening:
            port = listening.getsockname()[1]
            show(f"Open http://{LOOPBACK}:{port}/{token}/ in a browser on this machine.")
            show(f"Corrections are kept in {viewer.corrections.file.parent}. Ctrl-C ends this.")
            # Without the log of accesses, which would have the token.
            config = uvicorn.Config(
                make_app(viewer, token, port),
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
            )
            uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # the way to end it
        pass
    finally:
        viewer.close()


def _listening(port: int) -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
        listening.listen()  # whoever is faster than the server waits
    except (OSError, OverflowError) as error:
        listening.close()
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise InputError(
            f"{LOOPBACK}:{port}: cannot be used: {reason}. Set --port to a free port."
        ) from error
    return listening
