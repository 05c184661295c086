"""A model setting names a directory, or a repository of a hub, which runs in the test."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.load import load_model, locate_checkpoint
from tests.unit.glm.checkpoints import GOLDENS, make_variant

COMMIT = "1" * 40
LOCATE = """
import sys
from glmbatch.errors import GlmbatchError
from glmbatch.glm.checkpoint.hub import locate_checkpoint
try:
    print(locate_checkpoint(sys.argv[1], sys.argv[2]))
except GlmbatchError as error:
    print(f"{type(error).__name__}: {error}")
"""


class Hub(BaseHTTPRequestHandler):
    """Answers a download like a model hub; owner/model at COMMIT is a local directory."""

    directory: Path
    asked: list[str]
    broken: bool

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if self.broken:
            return self._send(503, b"", with_body)
        if path.startswith(f"/api/models/owner/model/tree/{COMMIT}"):
            files = [self._entry(file) for file in sorted(self.directory.iterdir())]
            return self._send(200, json.dumps(files).encode(), with_body)
        file = self.directory / path.rpartition("/")[2]
        if path.startswith(f"/owner/model/resolve/{COMMIT}/") and file.exists():
            return self._send(200, file.read_bytes(), with_body)
        code = "RevisionNotFound" if "owner/model" in path else "RepoNotFound"
        return self._send(404, b"{}", with_body, {"X-Error-Code": code})

    def _entry(self, file: Path) -> dict[str, object]:
        return {
            "type": "file",
            "path": file.name,
            "size": file.stat().st_size,
            "oid": self._etag(file.read_bytes()),
        }

    def _etag(self, content: bytes) -> str:
        return hashlib.sha1(content).hexdigest()

    def _send(
        self, status: int, content: bytes, with_body: bool, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self._etag(content)}"'} | (headers or {})
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """A running hub and the environment that points a process to it."""

    class Here(Hub):
        directory = tmp_path / "repository"
        asked: list[str] = []  # noqa: RUF012 - one for each test
        broken = False

    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    Thread(target=server.serve_forever, daemon=True).start()
    variables = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
    }
    yield (
        Here,
        os.environ | variables | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
    )
    server.shutdown()
    server.server_close()


def locate(environment: dict[str, str], path: str = "owner/model", revision: str = COMMIT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LOCATE, path, revision],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sharded", "plain", "safetensors"])
def test_a_hub_id_is_downloaded_once_and_without_code(
    hub: tuple[type[Hub], dict[str, str]], variant: str
) -> None:
    server, environment = hub
    make_variant(server.directory, variant)
    for unused in ("modeling_chatglm.py", "pytorch_model-unused.bin", "README.md"):
        (server.directory / unused).write_text("raise SystemExit")
    directory = Path(locate(environment))
    used = {file.name for file in server.directory.iterdir()} - {"modeling_chatglm.py", "README.md"}
    assert {file.name for file in directory.iterdir()} == used - {"pytorch_model-unused.bin"}
    load_model(directory)
    server.broken = True
    assert locate(environment) == str(directory), "what is in the cache needs no network"


@pytest.mark.slow
def test_hub_failures_differ_from_users_mistakes(hub: tuple[type[Hub], dict[str, str]]) -> None:
    server, environment = hub
    make_variant(server.directory, "plain")
    assert locate(environment, revision="2" * 40).startswith("InputError: owner/model at 2222")
    assert locate(environment, path="owner/other").startswith("InputError: owner/other at 1111")
    assert locate(environment | {"HF_HUB_OFFLINE": "1"}).startswith(
        "InputError: owner/model at 1111"
    )
    (server.directory / "pytorch_model.bin").unlink()
    assert "no weights" in locate(environment)
    unreachable = environment | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": environment["HF_HOME"] + "2",
    }
    assert locate(unreachable).startswith("TransientError: owner/model at 1111")


def test_a_directory_is_used_as_it_is() -> None:
    directory = GOLDENS / "base-sharded"
    assert locate_checkpoint(str(directory)) == directory
    with pytest.raises(InputError, match=r"no revision 'main'.*model\.revision"):
        locate_checkpoint(str(directory), "main")


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"a file, not a directory\. Set model\.path"):
        locate_checkpoint(str(tmp_path / "file"))
    for path in (str(tmp_path / "nothing"), "./owner/model", "a/b/c", "../model", "nothing"):
        with pytest.raises(InputError, match=r"no such directory, and not a hub id.*model\.path"):
            locate_checkpoint(path, "main")
    with pytest.raises(InputError, match=r"needs its revision.*Set model\.revision"):
        locate_checkpoint("THUDM/chatglm2-6b")
