"""The viewer's server answers only who knows its address, and never a page of another origin."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from glmbatch.cli import main as cli
from glmbatch.ledger.manifest import read_manifest, write_manifest
from glmbatch.view.server import make_app
from glmbatch.view.viewer import Viewer
from tests.support import ROOT

TOKEN = "a-token"
Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask(folder: Path) -> Iterator[Ask]:
    viewer = Viewer(str(folder / "out"))
    app = make_app(viewer, TOKEN, 8123)

    def request(method: str, path: str, **options: Any) -> httpx.Response:
        async def sent() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1:8123"
            ) as client:
                return await client.request(method, path, **options)

        return asyncio.run(sent())

    yield request
    viewer.close()


def correction(ask: Ask, **changes: Any) -> dict[str, Any]:
    version = ask("GET", f"/{TOKEN}/api/output").json()["version"]
    whole = {"version": version, "file": 0, "row": 1, "step": "mood", "truth": "bad"}
    return {**whole, **changes}


def test_the_page_asks_and_corrects(ask: Ask, folder: Path) -> None:
    for name, kind in {
        "": "text/html",
        "view.js": "text/javascript",
        "view.css": "text/css",
    }.items():
        page = ask("GET", f"/{TOKEN}/{name}")
        assert page.status_code == 200
        assert page.headers["content-type"] == f"{kind}; charset=utf-8"
    output = ask("GET", f"/{TOKEN}/api/output").json()
    assert [step["name"] for step in output["steps"]] == ["mood", "topics", "facts", "reply"]
    assert (output["rows"], output["files"]) == (23, 3)
    kept = ask("POST", f"/{TOKEN}/api/corrections", json=correction(ask))
    assert kept.json() == {"corrected": 1}
    query = {"step": "mood", "state": "corrected"}
    page = ask("GET", f"/{TOKEN}/api/rows/0/50", params=query)
    assert [(row["row"], row["truth"]) for row in page.json()["rows"]] == [(1, "bad")]
    assert ask("GET", f"/{TOKEN}/api/count", params=query).json() == {"rows": 1}
    row = ask("GET", f"/{TOKEN}/api/row/{output['version']}/0/1").json()
    assert row["columns"]["day"] == "1" and row["steps"][0]["truth"] == "bad"
    assert set(row["steps"][0]["scores"]) == {"good", "bad", "so so"}
    assert set(row["steps"][2]["fields"]) == {"tone", "what"}


@pytest.mark.parametrize("path", ["/", "/other/", "/other/api/output", f"/{TOKEN}x/", "/docs"])
def test_nothing_is_said_without_the_token(ask: Ask, path: str) -> None:
    answer = ask("GET", path)
    assert (answer.status_code, answer.text) == (404, "not found")


def test_another_host_name_is_refused(ask: Ask) -> None:
    # DNS rebinding: a page of evil.example, whose name now means this machine.
    answer = ask("GET", f"/{TOKEN}/", headers={"Host": "evil.example:8123"})
    assert (answer.status_code, answer.text) == (403, "unknown host")


def test_pages_of_other_origins_are_refused(ask: Ask, folder: Path) -> None:
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "null"):
        answer = ask(
            "POST",
            f"/{TOKEN}/api/corrections",
            json=correction(ask),
            headers={"Origin": origin},
        )
        assert (answer.status_code, answer.text) == (403, "unknown origin")
    assert not (folder / "out-corrections").exists()
    own = {"Origin": "http://127.0.0.1:8123"}
    assert ask("POST", f"/{TOKEN}/api/corrections", json=correction(ask), headers=own).is_success


def test_nothing_may_run_or_leave_the_machine(ask: Ask) -> None:
    for path in (f"/{TOKEN}/", f"/{TOKEN}/api/output", "/other"):
        headers = ask("GET", path).headers
        assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    assets = "".join(path.read_text() for path in ROOT.glob("glmbatch/view/page/*"))
    assert "http://" not in assets and "https://" not in assets
    assert "innerHTML" not in assets


def test_wrong_requests_say_what_is_wrong(ask: Ask) -> None:
    wrong = correction(ask, truth="great")
    answer = ask("POST", f"/{TOKEN}/api/corrections", json=wrong)
    assert (answer.status_code, answer.json()) == (400, {"detail": "'great' is no label of mood."})
    assert ask("GET", f"/{TOKEN}/api/rows/0/5", params={"step": "moon"}).status_code == 400
    unknown = {"step": "mood", "sql": "drop"}
    assert ask("GET", f"/{TOKEN}/api/rows/0/5", params=unknown).status_code == 422
    assert ask("GET", f"/{TOKEN}/api.py").status_code == 404


def test_another_version_is_shown_once_published(ask: Ask, folder: Path) -> None:
    old = correction(ask)
    manifest = read_manifest(folder / "out")
    assert manifest is not None
    # What a run does: other files, then the manifest.
    (first, *rest) = manifest.files
    published = manifest.model_copy(update={"run": "next", "files": tuple(rest)})
    write_manifest(folder / "out", published)
    (folder / "out" / first.output_name).unlink()
    assert ask("GET", f"/{TOKEN}/api/row/{old['version']}/0/1").status_code == 409
    assert ask("POST", f"/{TOKEN}/api/corrections", json=old).status_code == 409
    output = ask("GET", f"/{TOKEN}/api/output").json()
    assert (output["version"], output["rows"]) == ("next", 15)
    assert len(ask("GET", f"/{TOKEN}/api/rows/0/50?step=mood").json()["rows"]) == 15


def test_the_command_serves_until_ctrl_c(folder: Path) -> None:
    command = [sys.executable, "-m", "glmbatch.cli.main", "view", str(folder / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[1]
            assert "out-corrections" in process.stdout.readline()
            assert httpx.get(address).is_success
            assert address.startswith("http://127.0.0.1:")
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_wrong_arguments_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(folder / "out")
    assert cli.main(["view", str(folder / "in")]) == cli.BAD_INPUT
    assert cli.main(["view", output, "--corrections", f"{output}/right"]) == cli.BAD_INPUT
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["view", output, "--port", port]) == cli.BAD_INPUT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[2].endswith("Address already in use. Set --port to a free port.")


def test_a_missing_package_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.startswith("glmbatch.view"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert cli.main(["view", str(folder / "out")]) == cli.BAD_INPUT
    assert capsys.readouterr().err == (
        "glmbatch: view: duckdb is not installed. Run pip install 'glmbatch[view]'.\n"
    )
