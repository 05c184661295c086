"""A person looks at answers in a real browser, corrects them by keyboard, and trains with them.

Screenshots are left in the folder GLMBATCH_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from glmbatch.settings.tuning import TuneConfig
from glmbatch.tuning.examples import read_examples
from glmbatch.tuning.finetune import finetune
from tests.support import ROOT, SAMPLE_MODEL, Settings, Write, rows_of, run
from tests.unit.tuning.rows import labelled

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror='document.title=\"ran\"'><script>document.title='ran'</script>"
Show = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    programs = [path for path in map(shutil.which, names) if path is not None]
    if not programs:
        pytest.skip("no Chromium on PATH; Debian has it as the package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=programs[0], chromium_sandbox=os.geteuid() != 0
        )
        yield browser
        browser.close()


@pytest.fixture
def answers(write_source: Write, job_settings: Settings, out: Path) -> Path:
    """Published answers to 60 rows, of which two are hostile."""
    texts = labelled(58, seed=1)["text"]
    write_source("a.parquet", {"text": [HOSTILE, *texts, f"{HOSTILE} again"], HOSTILE: ["x"] * 60})
    mood = {
        "kind": "classify",
        "name": "mood",
        "labels": ["good", "bad", "so so"],
        "prompt_template": "Review: {text}\n\nIs it positive, neutral or negative?",
    }
    run(job_settings(model__path=str(SAMPLE_MODEL), data__rows_per_fragment=25, steps=[mood]))
    return out


@pytest.fixture
def show(answers: Path, browser: Browser) -> Iterator[Show]:
    """Open the viewer in the browser, which may speak to it alone."""
    processes = []

    def open_page(*arguments: str, **options: Any) -> Page:
        command = [sys.executable, "-m", "glmbatch.cli.main", "view", str(answers), *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        address = process.stdout.readline().split()[1]
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 860}, **options})
        page.set_default_timeout(20_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.locator("#row .labels").wait_for()
        assert all(url.startswith(address) for url in asked)
        return page

    yield open_page
    for process in processes:
        process.kill()
        process.communicate()


def photograph(page: Page, name: str, *, full_page: bool = False) -> None:
    folder = os.environ.get("GLMBATCH_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=full_page)


def photograph_sizes(page: Page, name: str) -> None:
    """The whole page on a desktop, on a phone and in print; it never scrolls sideways."""
    for size, width in (("desktop", 1280), ("phone", 390)):
        page.set_viewport_size({"width": width, "height": 860})
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        photograph(page, f"{name}-{size}", full_page=True)
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 794, "height": 1123})
    photograph(page, f"{name}-print", full_page=True)


def test_three_rows_are_corrected_by_keyboard_and_trained_with(
    show: Show, answers: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labelled"
    folder.mkdir()
    rows = labelled(60)
    base = pa.table({"text": rows["text"], "mood": rows["label"]})
    pq.write_table(base, folder / "base.parquet")
    page = show("--corrections", str(folder))
    # Only keys from here on: Tab reaches the filters, a letter chooses in a list.
    choose_by_keyboard(page, "order", "least sure first")
    chosen = most_frequent(answers)
    choose_by_keyboard(page, "label", chosen)
    sure = sorted(
        (row["mood_margin"], row["text"]) for row in rows_of(answers) if row["mood"] == chosen
    )
    ten = [text for _, text in sure[:10]]
    expect(page.locator("#count")).to_have_text(f"{len(sure)} rows")
    expect(page.locator("#list .text").nth(9)).to_have_text(ten[9])
    assert page.locator("#list .text").all_inner_texts()[:10] == ten
    photograph(page, "view-keyboard")
    page.keyboard.press("Tab")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("1")  # and on to the next row
    expect(page.locator("#list li").nth(1)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("j")
    page.keyboard.press("3")
    page.keyboard.press("3")
    page.keyboard.press("u")
    page.keyboard.press("k")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("2")
    expect(page.locator("#list li").nth(1).locator(".truth")).to_contain_text("bad")
    expect(page.locator("#facts")).to_contain_text("3 looked at")
    photograph(page, "view-corrected")
    config = train_config(folder, tmp_path / "tuned")
    corrected = {
        example.text: example.label for example in read_examples(config.data).examples[60:]
    }
    assert corrected == {ten[0]: "good", ten[1]: "bad", ten[2]: "so so"}
    report = finetune(config)
    assert report.audit.rows == 63
    page.goto((Path(report.checkpoint).parent / "report.html").as_uri())
    expect(page.locator("body")).to_contain_text("corrections.parquet")
    for label in ("good", "bad", "so so"):
        rows_now = rows["label"].count(label) + 1
        line = page.get_by_role("row").filter(has_text=f"{label}{rows_now}")
        expect(line.first).to_be_visible()
    photograph_sizes(page, "report-of-corrections")


def most_frequent(answers: Path) -> str:
    labels = [row["mood"] for row in rows_of(answers)]
    return max(set(labels), key=labels.count)


def choose_by_keyboard(page: Page, field: str, option: str) -> None:
    """Go to a field by Tab, and choose from its list by the first letters."""
    for _ in range(20):
        if page.evaluate("document.activeElement.name") == field:
            break
        page.keyboard.press("Tab")
    page.keyboard.type(option)
    expect(page.locator(f"select[name={field}] option:checked")).to_contain_text(option)


def train_config(folder: Path, output: Path) -> TuneConfig:
    return TuneConfig.model_validate(
        {
            "data": {"input": str(folder), "label_column": "mood", "test_share": 0.2},
            "output": str(output),
            "model": {"path": str(SAMPLE_MODEL)},
            "training": {"method": "head", "epochs": 1, "batch_rows": 32},
            "runtime": {"device": "cpu"},
        }
    )


def test_a_refused_correction_can_be_mended_or_left(show: Show) -> None:
    page = show()
    area = page.locator("#row textarea")
    page.locator("#row .actions").first.wait_for()
    page.keyboard.press("e")
    area.fill("awful")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#problem")).to_contain_text("'awful' is no label of mood")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("e")
    expect(area).to_have_count(1)
    expect(area).to_be_focused()
    page.keyboard.press("Escape")
    expect(area).to_have_count(0)
    expect(page.locator("#problem")).to_be_hidden()
    page.keyboard.press("e")
    area.fill("bad")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#facts")).to_contain_text("1 looked at")


def test_no_text_of_a_row_runs(show: Show) -> None:
    page = show()
    page.get_by_label("State").select_option("all")
    page.get_by_role("searchbox", name="Text").fill("onerror")
    page.keyboard.press("Enter")
    expect(page.locator("#list li")).to_have_count(2)
    expect(page.locator("#row .body")).to_contain_text("<img src=x onerror=")
    page.keyboard.press("p")
    expect(page.locator("#row pre")).to_contain_text("<script>document.title='ran'</script>")
    expect(page.locator("#row dt").first).to_have_text(HOSTILE)
    page.wait_for_timeout(300)
    assert page.title() != "ran"
    assert page.locator("main img, main script").count() == 0
    # Even a text that were taken for HTML could not run.
    page.evaluate(f"document.querySelector('#row').innerHTML = {HOSTILE!r}")
    page.wait_for_timeout(300)
    assert page.title() != "ran"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("view-desktop", {}),
        ("view-dark", {"color_scheme": "dark"}),
        ("view-phone", {"viewport": {"width": 390, "height": 844}}),
    ],
)
def test_the_page_fits_the_screen(show: Show, name: str, options: dict[str, Any]) -> None:
    page = show(**options)
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
    page.get_by_role("button", name="good", exact=False).first.click()
    expect(page.locator("#facts")).to_contain_text("1 looked at")
    photograph(page, name)
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 794, "height": 1123})
    assert page.locator("#row .labels").is_visible() and not page.locator("#list").is_visible()
    photograph(page, f"{name}-print")
