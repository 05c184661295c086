"""The OpenLineage events of a run, as a catalogue gets them over HTTP or in a file."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pytest
import yaml
from pydantic import ValidationError
from pyiceberg.catalog import Catalog

from glmbatch.errors import AuditError, BadRow, InputError
from glmbatch.ledger.ledger import Ledger
from glmbatch.run.canary import freeze
from glmbatch.run.lineage import sending
from glmbatch.settings.job import JobConfig
from tests.openlineage import Catalogue, catalogue, check
from tests.stores import BUCKET, Store
from tests.support import CLASSIFY, GENERATE, ROOT, Settings, Write, run, run_after_another

pytestmark = pytest.mark.slow

DIRECT, CONDITIONAL = "DIRECT TRANSFORMATION", "INDIRECT CONDITIONAL"
IDENTITY = "DIRECT IDENTITY"
PRIVATE = "my number is 0170 1234567"


@pytest.fixture
def collector() -> Iterator[Catalogue]:
    """A catalogue; every event that it got is checked at the end."""
    with catalogue() as server:
        yield server
    for event in server.events:
        check(event)


def traced(job_settings: Settings, server: Catalogue, **overrides: Any) -> dict[str, Any]:
    return job_settings(**{"lineage__url": server.url, "max_error_rate": 1.0, **overrides})


def names(datasets: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(dataset["namespace"], dataset["name"]) for dataset in datasets]


def facets(dataset: dict[str, Any]) -> dict[str, Any]:
    groups = ("facets", "inputFacets", "outputFacets")
    return {key: facet for group in groups for key, facet in dataset.get(group, {}).items()}


def columns(dataset: dict[str, Any]) -> dict[str, str]:
    return {field["name"]: field["type"] for field in facets(dataset)["schema"]["fields"]}


def made_from(fields: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Input columns, and how they are used."""
    found = {}
    for each in fields:
        uses = [f"{use['type']} {use['subtype']}" for use in each["transformations"]]
        found[each["field"]] = sorted(uses)
    return found


def test_a_run_sends_its_start_and_its_end(
    write_source: Write, job_settings: Settings, out: Path, collector: Catalogue
) -> None:
    path = write_source("a.parquet", {"id": [1, 2, 3], "text": ["x", "y", "z"]})
    summary = run(traced(job_settings, collector))
    start, end = collector.events
    assert collector.kinds == ["START", "COMPLETE"]
    assert start["run"]["runId"].replace("-", "") == end["run"]["runId"].replace("-", "")
    assert end["run"]["runId"].replace("-", "") == summary.run
    assert end["job"]["name"] == str(out)
    assert end["job"]["namespace"] == "glmbatch"
    assert end["run"]["facets"]["processing_engine"]["name"] == "glmbatch"
    assert {"nominalTime", "parent", "errorMessage"}.isdisjoint(end["run"]["facets"])
    for event in (start, end):
        assert names(event["inputs"]) == [("file", str(path.parent))]
        assert names(event["outputs"]) == [("file", str(out))]
    read, written = facets(end["inputs"][0]), facets(end["outputs"][0])
    assert columns(end["inputs"][0]) == {"id": "int64", "text": "string"}
    assert {"id", "text", "mood", "reply"} <= columns(end["outputs"][0]).keys()
    assert columns(end["outputs"][0])["mood_scores"] == "struct"
    assert written["version"]["datasetVersion"] == summary.run
    published = [file for file in out.glob("*.parquet") if not file.name.startswith("_")]
    assert written["outputStatistics"]["size"] == sum(file.stat().st_size for file in published)
    assert written["outputStatistics"]["rowCount"] == 3
    assert read["inputStatistics"]["size"] == path.stat().st_size
    assert read["version"] == facets(start["inputs"][0])["version"]


def test_an_unchanged_input_keeps_its_version_and_columns(
    write_source: Write, job_settings: Settings, collector: Catalogue
) -> None:
    write_source("a.parquet", {"id": [1, 2], "text": ["x", "y"]})
    settings = traced(job_settings, collector, data__recheck_share=0.0)
    for _ in range(2):
        time.sleep(2.1)  # until the stamp of the source is settled
        run(settings)
    first, second = (event["inputs"][0] for event in collector.events[1::2])
    assert facets(second)["version"] == facets(first)["version"]
    assert columns(second) == columns(first)
    assert facets(collector.events[-1]["outputs"][0])["outputStatistics"]["rowCount"] == 0
    write_source("b.parquet", {"id": [3], "text": ["z"]})
    run(settings)
    assert facets(collector.events[-1]["inputs"][0])["version"] != facets(first)["version"]
    assert facets(collector.events[-1]["outputs"][0])["outputStatistics"]["rowCount"] == 1


def test_each_answer_names_the_columns_that_it_is_made_from(
    write_source: Write, job_settings: Settings, collector: Catalogue
) -> None:
    rows = {"id": [1, 2], "text": ["x", "y"], "title": ["a", "b"], "lang": ["de", "de"]}
    write_source("day=1/a.parquet", {**rows, "size": [7, 8]})
    write_source("day=2/a.parquet", {**rows, "size": [7, 8]})
    other = {**GENERATE, "name": "note", "prompt_template": "{title}"}
    last = {**GENERATE, "when": "note_finish_reason = 'length' and lang = 'de'"}
    settings = traced(
        job_settings,
        collector,
        steps=[CLASSIFY, other, last],
        data__where="size > 7 and day = '2'",
        data__columns=["id"],
        data__id_column="id",
    )
    run(settings)
    output = collector.events[-1]["outputs"][0]
    lineage = facets(output)["columnLineage"]
    fields = {name: made_from(field["inputFields"]) for name, field in lineage["fields"].items()}
    assert fields["id"] == {"id": [IDENTITY]}
    assert fields["day"] == {"day": [IDENTITY]}
    assert fields["mood"] == fields["mood_score"] == {"text": [DIRECT]}
    assert fields["note"] == {"title": [DIRECT]}
    # Its prompt has the mood and the text, its condition the note.
    assert fields["reply"] == {"text": [DIRECT], "title": [CONDITIONAL], "lang": [CONDITIONAL]}
    assert {"text", "title", "lang", "size"}.isdisjoint(fields)
    assert made_from(lineage["dataset"]) == {
        "size": ["INDIRECT FILTER"],
        "day": ["INDIRECT FILTER"],
    }
    (key,) = lineage["fields"]["mood_key"]["inputFields"]
    assert key["transformations"][0]["masking"]
    (label,) = lineage["fields"]["mood"]["inputFields"]
    assert not label["transformations"][0]["masking"]


def test_a_refused_run_fails_with_the_audit_that_refused_it(
    write_source: Write, job_settings: Settings, collector: Catalogue, tmp_path: Path, out: Path
) -> None:
    write_source("a.parquet", {"text": [PRIVATE, "y"]})
    run(traced(job_settings, collector))
    freeze(str(out), str(tmp_path / "canary.parquet"), 2)
    before = Ledger(str(out)).manifest()
    step = {**CLASSIFY, "prompt_template": "{text} is it so? Say what it is in the other way"}
    settings = traced(
        job_settings, collector, steps=[step, {**GENERATE, "max_tokens": 3}], canary__max_change=0.0
    )
    settings["canary"]["file"] = str(tmp_path / "canary.parquet")
    settings["steps"][1]["audits"] = {"max_truncated_rate": 0.0}
    with pytest.raises(AuditError):
        run(settings)
    assert Ledger(str(out)).manifest() == before
    end = collector.events[-1]
    assert collector.kinds[-2:] == ["START", "FAIL"]
    output = facets(end["outputs"][0])
    results = {
        (each["assertion"], each.get("column")): each["success"]
        for each in output["dataQualityAssertions"]["assertions"]
    }
    assert results["published", None] is False
    assert results["share of truncated answers", "reply"] is False
    assert not {"version", "outputStatistics", "schema"} & output.keys()
    assert ("file", str(tmp_path / "canary.parquet")) in names(end["inputs"])
    assert end["run"]["facets"]["errorMessage"]["message"].startswith("AuditError: ")
    assert PRIVATE not in json.dumps(end)


def test_a_failure_says_its_kind_but_quotes_nothing(
    write_source: Write, job_settings: Settings, collector: Catalogue
) -> None:
    write_source("a.parquet", {"text": ["x", None]})
    with pytest.raises(BadRow):
        run(traced(job_settings, collector, on_error="raise"))
    write_source("a.parquet", {PRIVATE: ["x"]})
    with pytest.raises(InputError, match=PRIVATE):
        run(traced(job_settings, collector, on_error="raise"))
    assert collector.kinds == ["START", "FAIL"] * 2
    errors = [event["run"]["facets"]["errorMessage"] for event in collector.events[1::2]]
    assert [error["message"].split(":")[0] for error in errors] == ["BadRow", "UnusableFile"]
    assert PRIVATE not in json.dumps(collector.events)


def test_a_run_without_input_fails_in_the_catalogue_too(
    tmp_path: Path, job_settings: Settings, collector: Catalogue
) -> None:
    with pytest.raises(InputError):
        run(traced(job_settings, collector, data__input=str(tmp_path / "none/*.parquet")))
    start, end = collector.events
    assert (start["eventType"], end["eventType"]) == ("START", "FAIL")
    assert start["run"]["runId"] == end["run"]["runId"]
    assert names(end["inputs"]) == [("file", str(tmp_path / "none"))]


def test_a_table_has_its_name_before_it_is_planned(
    catalog: Catalog, tmp_path: Path, job_settings: Settings, collector: Catalogue
) -> None:
    rows = pa.table({"text": ["a text"]})
    catalog.create_table("shop.landing", rows.schema).append(rows)
    for name in ("landing", "landings"):
        with pytest.raises(InputError):
            settings = {"data__input": f"iceberg:lake/shop.{name}", "data__text_column": "txet"}
            run(traced(job_settings, collector, **settings))
    read, unknown = (names(event["inputs"]) for event in collector.events[1::2])
    assert read == [("file", str(tmp_path / "warehouse/shop/landing"))]
    assert unknown == [], "no catalogue says where that is"


def test_the_last_event_is_about_what_this_run_published(
    write_source: Write,
    job_settings: Settings,
    out: Path,
    collector: Catalogue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_source("a.parquet", {"text": ["one", "two"]})
    settings = traced(job_settings, collector, data__format="delta", steps=[CLASSIFY])
    monkeypatch.setattr(sending, "REQUEST_SECONDS", 60.0)
    monkeypatch.setattr(sending, "END_SECONDS", 60.0)
    collector.held.clear()  # so that the last event is made after another run has published
    first = threading.Thread(target=run, args=(settings,))
    first.start()
    run_after_another({**settings, "lineage": None}, write_source)
    assert first.is_alive()
    collector.held.set()
    first.join()
    assert deltalake.DeltaTable(out).version() == 1
    assert_of_the_first(collector)


def assert_of_the_first(collector: Catalogue) -> None:
    """The last event has the version, the rows and the columns of the first publication."""
    output = facets(collector.events[-1]["outputs"][0])
    assert output["version"]["datasetVersion"] == "0"
    assert output["outputStatistics"]["rowCount"] == 2
    assert "mood" in columns(collector.events[-1]["outputs"][0])


def test_a_run_that_failed_later_says_what_it_published(
    write_source: Write,
    job_settings: Settings,
    collector: Catalogue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    write_source("a.parquet", {"text": ["one", "two"]})
    settings = traced(job_settings, collector, data__format="delta", steps=[CLASSIFY])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("glmbatch.run.publish.write_report", interrupted)
        run(settings)
    assert collector.kinds == ["START", "ABORT"]
    assert_of_the_first(collector)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("glmbatch.run.job.write_outputs", interrupted)
        write_source("b.parquet", {"text": ["three"]})
        run(settings)
    assert collector.kinds[2:] == ["START", "ABORT"]
    assert "version" not in facets(collector.events[-1]["outputs"][0])


def test_an_interrupted_run_is_aborted(
    write_source: Write, job_settings: Settings, tmp_path: Path, collector: Catalogue
) -> None:
    write_source("a.parquet", {"text": [f"text {number}" for number in range(5_000)]})
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(traced(job_settings, collector)))
    code = (
        "import sys; from glmbatch.run.job import run_job\n"
        "from glmbatch.settings.jobfile import load_job; run_job(load_job(sys.argv[1]))"
    )
    with subprocess.Popen([sys.executable, "-c", code, job], cwd=ROOT, stderr=-1) as process:
        until = time.monotonic() + 120
        while not collector.events and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(2)
        process.communicate(timeout=60)
    assert process.returncode
    assert collector.kinds == ["START", "ABORT"]
    message = collector.events[-1]["run"]["facets"]["errorMessage"]["message"]
    assert message == "KeyboardInterrupt: The run was stopped."


@pytest.mark.parametrize("fault", ["down", "refuses", "hangs", "is slow"])
def test_a_run_goes_on_without_its_catalogue(
    fault: str,
    write_source: Write,
    job_settings: Settings,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_source("a.parquet", {"text": ["x", "y"]})
    monkeypatch.setattr(sending, "REQUEST_SECONDS", 60.0 if fault == "is slow" else 0.5)
    monkeypatch.setattr(sending, "END_SECONDS", 2.0)
    with catalogue() as server, caplog.at_level(logging.WARNING, "glmbatch"):
        settings = traced(job_settings, server)
        if fault == "down":
            settings["lineage"]["url"] = "http://127.0.0.1:9"
        server.status = 500 if fault == "refuses" else 201
        if fault in {"hangs", "is slow"}:
            server.held.clear()
        began = time.monotonic()
        summary = run(settings)
        assert time.monotonic() - began < 30
        server.held.set()
    assert summary.rows == 2
    assert Ledger(str(out)).manifest() is not None
    lines = [record.message for record in caplog.records if "lineage" in record.message]
    assert len(lines) == 1
    assert "is not complete there" in lines[0]


def test_a_file_gets_the_events_as_json_lines(
    write_source: Write, job_settings: Settings, tmp_path: Path
) -> None:
    write_source("a.parquet", {"text": ["x", "y"]})
    file = tmp_path / "events.jsonl"
    for _ in range(2):
        run(job_settings(lineage__file=str(file), lineage__namespace="nightly"))
    events = [json.loads(line) for line in file.read_text().splitlines()]
    for event in events:
        check(event)
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 2
    assert {event["job"]["namespace"] for event in events} == {"nightly"}


def test_nothing_is_sent_without_the_setting(
    write_source: Write,
    job_settings: Settings,
    collector: Catalogue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    monkeypatch.setenv("OPENLINEAGE_URL", collector.url)
    run(job_settings())
    assert not collector.events


def test_the_key_of_the_server_comes_from_the_environment(
    write_source: Write,
    job_settings: Settings,
    collector: Catalogue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_source("a.parquet", {"text": ["x"]})
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "key-of-nobody")
    run(traced(job_settings, collector))
    assert {each["Authorization"] for each in collector.headers} == {"Bearer key-of-nobody"}


def test_a_job_has_one_name_on_all_days(
    write_source: Write, job_settings: Settings, collector: Catalogue, tmp_path: Path
) -> None:
    write_source("day=2026-11-25/a.parquet", {"text": ["x"]})
    dated = {
        "data__input": f"{tmp_path}/in/day={{today}}",
        "data__output": f"{tmp_path}/out/{{today}}",
        "data__today": "2026-11-25",
    }
    run(traced(job_settings, collector, **dated))
    end = collector.events[-1]
    assert end["job"]["name"] == f"{tmp_path}/out/{{today}}"
    # A partition is not a dataset of its own.
    assert names(end["inputs"]) == [("file", f"{tmp_path}/in")]
    assert names(end["outputs"]) == [("file", f"{tmp_path}/out/2026-11-25")]


def test_datasets_in_a_store_have_its_names(
    store: Store, job_settings: Settings, collector: Catalogue
) -> None:
    store.put("in/day=1/a.parquet", pa.table({"text": ["x", "y"]}))
    places = {"data__input": store.url("in/day=*/*.parquet"), "data__output": store.url("out")}
    run(traced(job_settings, collector, **places))
    end = collector.events[-1]
    assert names(end["inputs"]) == [(f"s3://{BUCKET}", f"{store.folder}/in")]
    assert names(end["outputs"]) == [(f"s3://{BUCKET}", f"{store.folder}/out")]
    assert facets(end["outputs"][0])["outputStatistics"]["rowCount"] == 2


def test_a_delta_table_has_its_own_version(
    write_source: Write, job_settings: Settings, collector: Catalogue
) -> None:
    for number in range(2):
        write_source(f"{number}.parquet", {"text": [f"text {number}"]})
        run(traced(job_settings, collector, data__format="delta"))
    outputs = [facets(event["outputs"][0]) for event in collector.events[1::2]]
    assert [output["version"]["datasetVersion"] for output in outputs] == ["0", "1"]
    assert outputs[0]["storage"]["storageLayer"] == "delta"


def test_an_iceberg_table_has_its_snapshot(
    catalog: Catalog, write_source: Write, job_settings: Settings, collector: Catalogue
) -> None:
    write_source("0.parquet", {"text": ["a text"]})
    run(traced(job_settings, collector, data__format="iceberg", data__table="lake/shop.answers"))
    output = facets(collector.events[-1]["outputs"][0])
    snapshot = catalog.load_table("shop.answers").current_snapshot()
    assert snapshot is not None
    assert output["version"]["datasetVersion"] == str(snapshot.snapshot_id)
    assert output["storage"]["storageLayer"] == "iceberg"


def test_a_delta_table_is_read_at_its_version(
    tmp_path: Path, job_settings: Settings, collector: Catalogue
) -> None:
    for number in range(2):
        rows = pa.table({"text": [f"text {number}"]})
        deltalake.write_deltalake(tmp_path / "in", rows, mode="append")
    run(traced(job_settings, collector))
    read = facets(collector.events[-1]["inputs"][0])
    assert read["version"]["datasetVersion"] == "1"
    assert read["storage"]["storageLayer"] == "delta"
    assert read["inputStatistics"]["rowCount"] == 2


@pytest.mark.parametrize(
    "lineage",
    [
        {},
        {"url": "http://localhost:5000", "file": "events.jsonl"},
        {"url": "http://user:secret@localhost:5000"},
        {"url": "localhost:5000"},
        {"file": "s3://bucket/events.jsonl"},
    ],
)
def test_settings_that_name_no_place_are_refused(
    lineage: dict[str, str], job_settings: Settings
) -> None:
    with pytest.raises(ValidationError):
        JobConfig.model_validate(job_settings(lineage=lineage))
