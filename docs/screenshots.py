"""Take the pictures in docs/img: the sample job's page of a run, and the same run in Prefect's UI.

    .venv/bin/python docs/screenshots.py          some minutes; needs Chromium on PATH

Everything is real: a Prefect server on loopback, the sample job over one of its days, a browser.
Names of runs, times and rates differ from one call to the next.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's packages, from wherever this is started

from deployments.local import Local  # noqa: E402

PICTURES = ROOT / "docs" / "img"
JOB = "sample_data/reviews.yaml"
# Few enough tasks for their names to be legible.
DAYS = "day = '2026-11-03'"
ROWS_PER_FRAGMENT = 512
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Inside the checkout, so that the pictures show no folder of this machine. Git ignores it.
OUTPUT = Path("build") / "answers"
WIDTH = 1000  # pixels
HEIGHT = 1100
DRAWN_MS = 10_000  # the timeline draws itself in steps, on a busy machine slowly


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_sample(server: Local, where: str) -> None:
    """Run the sample job on `server` over the rows that meet `where`.

    Its exit code 3 says that bad rows were quarantined.
    """
    shutil.rmtree(ROOT / OUTPUT, ignore_errors=True)  # answers that are known take no time
    program = Path(sys.executable).parent / "glmbatch"
    command = [program, "run", JOB, "--output", OUTPUT, "--set", f"data.where={where}"]
    command += ["--set", f"data.rows_per_fragment={ROWS_PER_FRAGMENT}"]
    code = subprocess.run(command, cwd=ROOT, env=server.environment, check=False).returncode
    if code not in (0, 3):
        sys.exit(f"glmbatch run: exit code {code}")


def picture_of_report(browser: Browser) -> None:
    """The top of the page that a run leaves in its output: the verdict and the first plots."""
    (report,) = (ROOT / OUTPUT / "_glmbatch" / "reports").glob("*.html")
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(report.as_uri())
    page.screenshot(path=PICTURES / "report.png")


def picture_of_prefect(browser: Browser, server: Local) -> None:
    """The run's own page in Prefect's UI."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.goto(f"{server.ui}/login")
    page.locator("input").fill(server.password_file.read_text(encoding="utf-8").strip())
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: "/login" not in url)
    page.goto(f"{server.ui}/runs")
    page.locator("a[href*='/runs/flow-run/']").first.click()
    page.get_by_text("Completed").first.wait_for()
    page.wait_for_timeout(DRAWN_MS)
    # Arrows between all tasks would cover their names.
    page.get_by_label("Run Graph Options").click()
    page.get_by_text("Hide dependency arrows").click()
    page.keyboard.press("Escape")
    page.mouse.click(WIDTH // 2, HEIGHT - 10)
    page.keyboard.press("c")  # centres the timeline
    page.wait_for_timeout(DRAWN_MS)
    page.screenshot(path=PICTURES / "prefect.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the pictures in docs/img.")
    parser.add_argument("--where", default=DAYS, help="the rows of the sample that are answered")
    options = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        sys.exit("no Chromium on PATH; Debian has it as the package chromium")
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright:
        server = Local(Path(home), free_port())
        sandbox = os.geteuid() != 0
        browser = playwright.chromium.launch(executable_path=program, chromium_sandbox=sandbox)
        try:
            server.up()
            run_sample(server, options.where)
            picture_of_report(browser)
            picture_of_prefect(browser, server)
        finally:
            server.down()


if __name__ == "__main__":
    main()
