"""Every deployment's parameters fit its flow, and no two runs of one overlap."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.schedules import CronSchedule
from prefect.events import DeploymentEventTrigger
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate

from glmbatch.settings.job import JobConfig
from glmbatch.settings.jobfile import load_settings
from glmbatch.settings.tuning import TuneConfig
from tests.conftest import ROOT

DEPLOYMENTS: dict[str, dict[str, Any]] = {
    each["name"]: each
    for each in yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]
}


def parameter_sets(name: str) -> list[dict[str, Any]]:
    """The parameters of a run by schedule or by hand, and those of a run by each trigger, its templates filled in."""
    own = DEPLOYMENTS[name].get("parameters", {})
    triggers = DEPLOYMENTS[name].get("triggers", [])
    filled = [dict.fromkeys(trigger.get("parameters", {}), str(uuid4())) for trigger in triggers]
    return [{**own, **values} for values in filled] or [own]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_parameters_fit_the_flow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    flow = load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"])
    schema = parameter_schema(flow).model_dump()
    for parameters in parameter_sets(name):
        validate(parameters, schema, raise_on_error=True)  # what a server holds it to
        flow.validate_parameters(parameters)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_schedules_and_triggers_are_ones_that_prefect_takes(name: str) -> None:
    for schedule in DEPLOYMENTS[name].get("schedules", []):
        CronSchedule.model_validate(schedule)
        assert schedule["timezone"], "a night is a night somewhere"
    for trigger in DEPLOYMENTS[name].get("triggers", []):
        known = DeploymentEventTrigger.model_validate(trigger)
        assert not trigger.keys() - known.model_dump().keys(), (
            "Prefect ignores keys that it does not know"
        )


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("nightly", "CANCEL_NEW"), ("weekly", "CANCEL_NEW"), ("arrivals", "ENQUEUE")],
)
def test_no_two_runs_of_a_deployment_overlap(name: str, strategy: str) -> None:
    assert DEPLOYMENTS[name]["concurrency_limit"] == {"limit": 1, "collision_strategy": strategy}


def test_scheduled_jobs_ask_what_the_sample_jobs_ask_into_outputs_of_their_own() -> None:
    sample = load_settings(str(ROOT / "sample_data/reviews.yaml"), JobConfig)
    jobs = [
        JobConfig.model_validate(DEPLOYMENTS[name]["parameters"]["job"])
        for name in ("nightly", "arrivals")
    ]
    assert [job.steps for job in jobs] == [sample.steps] * 2
    assert len({job.data.output for job in (sample, *jobs)}) == 3
    tuned = load_settings(str(ROOT / "sample_data/sentiment.yaml"), TuneConfig)
    assert TuneConfig.model_validate(DEPLOYMENTS["weekly"]["parameters"]["config"]) == tuned
