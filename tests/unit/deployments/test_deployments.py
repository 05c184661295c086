"""The parameters of each deployment are valid for its flow, and its runs never overlap."""

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
from tests.support import ROOT

DEPLOYMENTS: dict[str, dict[str, Any]] = {
    deployment["name"]: deployment
    for deployment in yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]
}


def parameter_sets(name: str) -> list[dict[str, Any]]:
    """The parameters of a run by schedule or by hand, or of a run by each trigger.

    Templates in triggers are replaced by a string that is also valid as a run's id.
    """
    own = DEPLOYMENTS[name].get("parameters", {})
    sets = []
    for trigger in DEPLOYMENTS[name].get("triggers", []):
        filled = dict.fromkeys(trigger.get("parameters", {}), str(uuid4()))
        sets.append({**own, **filled})
    return sets or [own]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_parameters_are_valid_for_the_flow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    flow = load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"])
    schema = parameter_schema(flow).model_dump()
    for parameters in parameter_sets(name):
        validate(parameters, schema, raise_on_error=True)  # the server's own check
        flow.validate_parameters(parameters)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_prefect_accepts_the_schedules(name: str) -> None:
    for schedule in DEPLOYMENTS[name].get("schedules", []):
        CronSchedule.model_validate(schedule)
        assert schedule["timezone"], "01:30 is a night in one time zone only"


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_prefect_knows_every_key_of_the_triggers(name: str) -> None:
    for trigger in DEPLOYMENTS[name].get("triggers", []):
        known = DeploymentEventTrigger.model_validate(trigger)
        assert not trigger.keys() - known.model_dump().keys(), "Prefect ignores unknown keys"


@pytest.mark.parametrize(
    ("name", "strategy"),
    [("nightly", "CANCEL_NEW"), ("weekly", "CANCEL_NEW"), ("arrivals", "ENQUEUE")],
)
def test_runs_of_a_deployment_do_not_overlap(name: str, strategy: str) -> None:
    assert DEPLOYMENTS[name]["concurrency_limit"] == {"limit": 1, "collision_strategy": strategy}


def scheduled_jobs() -> list[JobConfig]:
    parameters = [DEPLOYMENTS[name]["parameters"] for name in ("nightly", "arrivals")]
    return [JobConfig.model_validate(values["job"]) for values in parameters]


def test_scheduled_jobs_have_the_steps_of_the_sample() -> None:
    sample = load_settings(str(ROOT / "sample_data/reviews.yaml"), JobConfig)
    assert [job.steps for job in scheduled_jobs()] == [sample.steps] * 2


def test_each_scheduled_job_has_its_own_output() -> None:
    sample = load_settings(str(ROOT / "sample_data/reviews.yaml"), JobConfig)
    assert len({job.data.output for job in (sample, *scheduled_jobs())}) == 3


def test_the_weekly_training_is_the_sample_training() -> None:
    sample = load_settings(str(ROOT / "sample_data/rating.yaml"), TuneConfig)
    assert TuneConfig.model_validate(DEPLOYMENTS["weekly"]["parameters"]["config"]) == sample
