"""Operations as a data team sees them: schedules, events, manual runs, crashes and alerts.

All tests share one `deployments.local` with a server and a worker.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from playwright.sync_api import Browser, Page, expect, sync_playwright

from deployments.local import DEFAULTS, Local
from glmbatch.ledger.verification import verify
from glmbatch.run.job import run_job
from glmbatch.settings.job import JobConfig
from tests.flows.commands import signed_in
from tests.postgresql import postgresql_server
from tests.stores import free_port
from tests.support import ROOT, committed, rows_of

pytestmark = [pytest.mark.prefect, pytest.mark.slow]
SILENT_SECONDS = 35  # slightly more than the heartbeat interval


class Api:
    """What a person does in the UI, by calls to the server's API."""

    def __init__(self, here: Local) -> None:
        self._environment = here.environment
        self.address = self._environment["PREFECT_API_URL"]

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """The response. A busy database (503) is retried, as in Prefect's own client."""

        def answered() -> httpx.Response | None:
            with signed_in(self._environment) as client:
                answer = client.request(method, path, json=body)
            return None if answer.status_code == 503 else answer

        answer: httpx.Response = wait(answered, f"{method} {path}").raise_for_status()
        return answer.json() if answer.content else None

    def deployment(self, name: str) -> str:
        return str(self.ask("GET", f"/deployments/name/{name}")["id"])

    def set_parameters(self, name: str, **parameters: object) -> None:
        self.ask("PATCH", f"/deployments/{self.deployment(name)}", {"parameters": parameters})

    def run(self, name: str) -> str:
        return str(
            self.ask("POST", f"/deployments/{self.deployment(name)}/create_flow_run", {})["id"]
        )

    def runs(self, name: str) -> list[dict[str, Any]]:
        """Runs of the deployment whose start time has come, in order."""
        body = {
            "deployments": {"id": {"any_": [self.deployment(name)]}},
            "sort": "EXPECTED_START_TIME_ASC",
        }
        now = datetime.now(UTC)
        runs = self.ask("POST", "/flow_runs/filter", body)
        return [run for run in runs if datetime.fromisoformat(run["expected_start_time"]) <= now]

    def state(self, run: str) -> str:
        return str(self.ask("GET", f"/flow_runs/{run}")["state_name"])


def wait(until: Callable[[], object], what: str, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := until():
            return result
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {what}")


def watch_closely(api: Api) -> None:
    """Shorten the time after which a run without heartbeats counts as crashed."""
    automations = {watch["name"]: watch for watch in api.ask("POST", "/automations/filter", {})}
    watch = automations["a run fell silent"]
    assert watch["trigger"]["within"] >= 3 * int(DEFAULTS["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    watch["trigger"]["within"] = SILENT_SECONDS
    api.ask(
        "PUT",
        f"/automations/{watch['id']}",
        {name: watch[name] for name in ("name", "trigger", "actions")},
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """Server and worker, up on PostgreSQL. The worker polls every second."""
    started = Local(tmp_path_factory.mktemp("operations"), free_port())
    with postgresql_server() as url, pytest.MonkeyPatch.context() as environment:
        environment.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", url)
        environment.setenv("PREFECT_WORKER_QUERY_SECONDS", "1")
        try:
            done = command(started, "deployments.local", "up")
            assert done.returncode == 0, done.stderr
            watch_closely(Api(started))
            yield started
        finally:
            started.down()
        assert not started.processes("server") + started.processes("worker")


@pytest.fixture(autouse=True)
def logs(here: Local) -> Iterator[None]:
    """Print what server and worker log during a test, so that pytest shows it on failure."""
    logs = [here.log("server"), here.log("worker")]
    before = [log.stat().st_size for log in logs]
    yield
    for log, size in zip(logs, before, strict=True):
        sys.stdout.write(f"--- {log.name}\n{log.read_bytes()[size:].decode(errors='replace')}\n")


@pytest.fixture
def api(here: Local) -> Api:
    return Api(here)


@pytest.fixture
def job(out: Path) -> Callable[..., dict[str, Any]]:
    """Make a nightly job over some sample reviews, into this test's output folder."""
    deployments = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]
    by_name = {deployment["name"]: deployment for deployment in deployments}
    nightly = by_name["nightly"]["parameters"]["job"]

    def made(**data: object) -> dict[str, Any]:
        inside = {"output": str(out), "limit": 40, "rows_per_fragment": 20, **data}
        return {**nightly, "data": {**nightly["data"], **inside}, "runtime": {"device": "cpu"}}

    return made


class Inbox:
    """A web hook on loopback, like that of a chat or mail gateway, and what it received."""

    def __init__(self) -> None:
        self.received: list[str] = []
        received = self.received

        class Hook(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.append(json.loads(body)["text"])
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def block(self, api: Api) -> str:
        """Create a notification block that posts to this hook, as in the UI; return its name."""
        block_type = api.ask("GET", "/block_types/slug/custom-webhook")["id"]
        schema = api.ask(
            "POST",
            "/block_schemas/filter",
            {"block_schemas": {"block_type_id": {"any_": [block_type]}}},
        )
        url = f"http://127.0.0.1:{self.server.server_port}/"
        document = {
            "name": "data-team",
            "data": {"name": "data team", "url": url, "json_data": {"text": "{{body}}"}},
            "block_schema_id": schema[0]["id"],
            "block_type_id": block_type,
        }
        api.ask("POST", "/block_documents/", document)
        return "custom-webhook/data-team"


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    made = Inbox()
    yield made
    made.server.shutdown()
    made.server.server_close()


def begun(api: Api, job: dict[str, Any], out: Path) -> str:
    """Start a nightly run of `job`; return its id when it has committed some answers."""
    api.set_parameters("annotate/nightly", job=job)
    run = api.run("annotate/nightly")
    wait(lambda: len(committed(out)) > 4, "it has committed answers")
    return run


def command(here: Local, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**here.environment, "PREFECT_SERVER_API_PORT": str(here.port), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def alerts(here: Local) -> str:
    log = here.home / "alerts.log"
    return log.read_text() if log.exists() else ""


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A real browser that resolves evil.example to this machine."""
    names = ("chromium", "chromium-browser", "google-chrome")
    programs = list(filter(None, map(shutil.which, names)))
    if not programs:
        pytest.skip("no Chromium on PATH; Debian has it as the package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=programs[0],
            chromium_sandbox=os.geteuid() != 0,
            args=["--host-resolver-rules=MAP evil.example 127.0.0.1"],
        )
        yield browser
        browser.close()


@pytest.fixture
def page(here: Local, browser: Browser) -> Iterator[Page]:
    """A page of the UI after signing in. It may contact only this machine."""
    spoken_to = set()
    page = browser.new_page(viewport={"width": 1300, "height": 1400})
    page.on("request", lambda request: spoken_to.add(request.url.split("/")[2]))
    page.goto(f"{here.ui}/login")
    page.locator("input").fill(here.password_file.read_text().strip())
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "/login" not in url)
    yield page
    # URLs of local resources have no host.
    assert spoken_to - {""} == {f"127.0.0.1:{here.port}"}


def test_a_port_in_use_gives_a_one_line_error(here: Local) -> None:
    other = command(here, "deployments.local", "up", PREFECT_HOME=str(here.home / "other"))
    assert other.returncode == 2
    assert other.stderr == (
        f"glmbatch: 127.0.0.1:{here.port}: cannot be used: Address already in use. "
        "Set PREFECT_SERVER_API_PORT to a free port.\n"
    )


# What a hostile page can try: requests with and without reading the response, and a web socket.
ATTACK = """async ([api, deployment]) => {
    const json = {method: "POST", headers: {"Content-Type": "application/json"}, body: "{}"};
    const plain = {method: "POST", mode: "no-cors", body: "{}"};
    const run = `${api}/deployments/${deployment}/create_flow_run`;
    const tried = [];
    for (const [url, how] of [
        [`${api}/deployments/filter`, json], [`${api}/csrf-token?client=evil`, {}],
        [`${api}/deployments/filter`, {...json, credentials: "include"}],
        [run, json], [run, plain], [run, {...plain, credentials: "include"}],
    ]) {
        try { tried.push((await fetch(url, how)).status); } catch { tried.push("refused"); }
    }
    const event = {
        event: "glmbatch.input.arrived", id: "5a4c1f6e-0d1c-4c43-8f0e-7d2f2c1b9a11",
        occurred: new Date().toISOString(), payload: {}, related: [],
        resource: {"prefect.resource.id": "glmbatch.input.reviews"},
    };
    for (const protocol of [[], ["prefect"]]) {
        tried.push(await new Promise(done => {
            const socket = new WebSocket(`${api.replace("http", "ws")}/events/in`, protocol);
            socket.onopen = () => {
                if (protocol.length) socket.send(JSON.stringify({type: "auth", token: null}));
                socket.send(JSON.stringify(event));
            };
            socket.onclose = close => done(close.code);
        }));
    }
    return tried;
}"""
# 0: the response is opaque. 1006 and 1008: closed before the event was accepted.
FAILED_TRIES = {"refused", 0, 401, 403, 1006, 1008}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "evil.example"])
def test_a_page_of_another_origin_can_do_nothing(
    here: Local, api: Api, browser: Browser, tmp_path: Path, host: str
) -> None:
    (tmp_path / "index.html").write_text("<title>a page like any other</title>")
    deployment = api.deployment("annotate/arrivals")
    before = api.runs("annotate/arrivals")
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.goto(f"http://{host}:{server.server_port}/")
    tried = page.evaluate(ATTACK, [api.address, deployment])
    server.shutdown()
    server.server_close()
    assert {*tried} <= FAILED_TRIES, tried
    # DNS rebinding: the page's own name now resolves to this machine.
    page.goto(f"http://evil.example:{here.port}/ui-settings")
    address = f"http://evil.example:{here.port}/api"
    tried = page.evaluate(ATTACK, [address, deployment])
    assert {*tried} <= FAILED_TRIES, tried
    time.sleep(2)  # longer than an event takes to start a run
    assert api.runs("annotate/arrivals") == before


def test_only_the_owner_can_read_the_password(here: Local) -> None:
    assert here.password_file.stat().st_mode & 0o777 == 0o600
    up = command(here, "deployments.local", "status")
    assert f"password: the line in {here.password_file}" in up.stdout
    for log in (here.log("server"), here.log("worker")):
        assert here.password_file.read_text().strip() not in log.read_text()


def test_all_deployments_are_ready_after_up(here: Local, api: Api) -> None:
    again = command(here, "deployments.local", "up")
    assert again.returncode == 0, again.stderr
    deployments = api.ask("POST", "/deployments/filter", {})
    assert {deployment["status"] for deployment in deployments} == {"READY"}
    assert len(deployments) == 5


def test_all_connections_stay_on_loopback(here: Local) -> None:
    processes = here.processes("server") + here.processes("worker")
    ports = set()
    addresses = set()
    for process in processes:
        for connection in process.net_connections("inet"):
            ports.add(connection.laddr.port)
            # A listening socket has no remote end.
            addresses |= {end.ip for end in (connection.laddr, connection.raddr) if end}
    assert here.port in ports
    assert addresses == {"127.0.0.1"}


def test_a_schedule_starts_runs_and_cancels_overlaps(
    api: Api, job: Callable[..., dict[str, Any]], out: Path
) -> None:
    api.set_parameters("annotate/nightly", job=job(limit=200))
    every_few_seconds = {"schedule": {"interval": 8}, "active": True}
    schedules = f"/deployments/{api.deployment('annotate/nightly')}/schedules"
    made = api.ask("POST", schedules, [every_few_seconds])[0]["id"]
    first = wait(lambda: api.runs("annotate/nightly"), "a run of the schedule")[0]
    assert first["auto_scheduled"]
    wait(
        lambda: "Cancelled" in [run["state_name"] for run in api.runs("annotate/nightly")],
        "a later run is cancelled while the first one works",
    )
    api.ask("DELETE", f"{schedules}/{made}")
    wait(lambda: api.state(first["id"]) == "Completed", "the first ends")
    assert verify(out).findings == ()


def test_a_delivery_starts_a_run_and_a_failed_audit_alerts(
    here: Local, api: Api, job: Callable[..., dict[str, Any]], inbox: Inbox, out: Path
) -> None:
    api.set_parameters("notify/alerts", block=inbox.block(api))
    # One of its 40 rows has no text.
    bad = job(input="sample_data/reviews/day=2026-11-04/part-0.parquet")
    api.set_parameters("annotate/arrivals", job={**bad, "max_error_rate": 0})
    emitted = command(
        here,
        "prefect",
        "event",
        "emit",
        "glmbatch.input.arrived",
        "--resource-id",
        "glmbatch.input.reviews",
    )
    assert emitted.returncode == 0, emitted.stderr
    run = wait(lambda: api.runs("annotate/arrivals"), "a run of the delivery")[0]
    wait(lambda: api.state(run["id"]) == "Failed", "it fails")
    reason = f"{out}: nothing published: "
    wait(lambda: " prefect.flow-run.Failed " in alerts(here), "an alert of the failed run")
    wait(lambda: " glmbatch.audit.failed " in alerts(here), "an alert of the failed audit")
    lines = alerts(here).splitlines()
    assert all(reason in line for line in lines), lines
    wait(lambda: {*inbox.received} >= {*lines}, "the block receives the alerts")


def test_a_run_whose_worker_is_killed_is_completed(
    here: Local, api: Api, job: Callable[..., dict[str, Any]], tmp_path: Path, out: Path
) -> None:
    run = begun(api, job(limit=200), out)
    for process in here.processes("worker"):  # and its runs
        os.kill(process.pid, signal.SIGKILL)
    assert api.state(run) == "Running", "no process is left to report the crash"
    before = committed(out)
    server = here.leader("server")
    again = command(here, "deployments.local", "up")
    assert f"UI: {here.ui}" in again.stdout, again.stderr
    assert here.leader("worker") and here.leader("server") == server, "the server was restarted"
    undisturbed = job(limit=200, output=str(tmp_path / "undisturbed"))
    run_job(JobConfig.model_validate(undisturbed))
    wait(lambda: api.state(run) == "Completed", "the run is restarted and completes")
    assert api.ask("GET", f"/flow_runs/{run}")["run_count"] == 2
    assert before <= committed(out), "committed inference was repeated"
    assert verify(out).findings == ()
    assert sorted(rows_of(out), key=str) == sorted(rows_of(tmp_path / "undisturbed"), key=str)
    wait(lambda: " prefect.flow-run.Crashed " in alerts(here), "an alert of the crash")


def test_a_cancelled_run_stops_and_the_next_resumes(
    here: Local, api: Api, job: Callable[..., dict[str, Any]], out: Path
) -> None:
    run = begun(api, job(limit=200), out)
    api.ask("POST", f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    wait(lambda: api.state(run) == "Cancelled", "it is cancelled")
    wait(lambda: here.processes("worker") == [here.leader("worker")], "its process has ended")
    assert not list(out.rglob("part-*.parquet")), "nothing is published"
    before = committed(out)
    again = api.run("annotate/nightly")
    wait(lambda: api.state(again) == "Completed", "the next run completes")
    assert before <= committed(out), "committed inference was repeated"
    assert verify(out).findings == ()
    assert len(rows_of(out)) == 200


def test_a_user_flow_can_run_a_deployment(
    here: Local, api: Api, job: Callable[..., dict[str, Any]], out: Path
) -> None:
    api.set_parameters("annotate/arrivals", job=job())
    example = "sample_data/examples/after_a_deployment.py"
    done = subprocess.run(
        [sys.executable, example, "annotate/arrivals"],
        env=here.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "40 rows"
    assert len(rows_of(out)) == 40


def test_the_local_server_also_runs_on_sqlite(
    tmp_path: Path, job: Callable[..., dict[str, Any]], out: Path
) -> None:
    plain = Local(tmp_path / "home", free_port())
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("PREFECT_SERVER_DATABASE_CONNECTION_URL")
        try:
            assert command(plain, "deployments.local", "up").returncode == 0
            api = Api(plain)
            api.set_parameters("annotate/arrivals", job=job())
            run = api.run("annotate/arrivals")
            wait(lambda: api.state(run) == "Completed", "a run completes")
        finally:
            plain.down()
    assert (tmp_path / "home" / "prefect.db").exists()
    assert len(rows_of(out)) == 40


def test_a_run_survives_a_server_restart(
    here: Local, api: Api, job: Callable[..., dict[str, Any]], out: Path
) -> None:
    run = begun(api, job(limit=200), out)
    worker = here.leader("worker")
    killed = here.processes("server")
    for process in killed:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(killed, timeout=60)
    assert not (out / "_manifest.json").exists(), "the run ended too early"
    again = command(here, "deployments.local", "up")
    assert again.returncode == 0, again.stderr
    assert here.leader("worker") == worker, "the worker was restarted"
    wait(lambda: api.state(run) == "Completed", "the run completes")
    assert api.ask("GET", f"/flow_runs/{run}")["run_count"] == 1
    assert verify(out).findings == ()
    assert len(rows_of(out)) == 200


def test_a_user_runs_the_job_from_the_browser_form(
    here: Local, api: Api, page: Page, job: Callable[..., dict[str, Any]], out: Path
) -> None:
    api.set_parameters("annotate/nightly", job=job())
    before = {run["id"] for run in api.runs("annotate/nightly")}
    page.goto(f"{here.ui}/deployments")
    page.get_by_role("link", name="nightly", exact=True).click()
    page.wait_for_url("**/deployments/deployment/*")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    rows_of_a_fragment = page.locator(".p-label", has_text="Rows Per Fragment").last.locator(
        "input"
    )
    rows_of_a_fragment.fill("0")
    picture(page, "1-form")
    page.get_by_role("button", name="Submit").click()
    refusal = (
        "Validation failed for field 'job.data.rows_per_fragment'. "
        "Failure reason: 0 is less than the minimum of 1"
    )
    expect(page.get_by_text(refusal).first).to_be_visible()
    page.wait_for_timeout(500)  # the message slides in
    picture(page, "2-refused")
    rows_of_a_fragment.fill("10")
    page.get_by_role("button", name="Submit").click()
    page.wait_for_url("**tab=Runs")
    run = wait(
        lambda: {run["id"] for run in api.runs("annotate/nightly")} - before, "a run of the form"
    ).pop()
    page.goto(f"{here.ui}/runs/flow-run/{run}")
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible(timeout=120_000)
    picture(page, "3-completed")
    files = list(out.rglob("part-*.parquet"))
    assert len(files) == 4, "40 rows in fragments of 10 as in the form, not of 20"


def picture(page: Page, name: str) -> None:
    """Save a screenshot for people who read the test's results."""
    page.screenshot(path=ROOT / "build" / "screenshots" / f"{name}.png", full_page=True)
