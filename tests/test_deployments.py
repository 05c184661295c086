"""Every deployment's parameters fit its flow."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate

from flows.annotate import annotate
from glmbatch.config import JobConfig
from tests.conftest import ROOT

DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: each["name"])
def test_the_parameters_fit_the_flow(deployment: dict[str, Any]) -> None:
    assert deployment["entrypoint"] == "flows/annotate.py:annotate"
    assert list(deployment["parameters"]) == ["job"]
    JobConfig.model_validate(deployment["parameters"]["job"])
    validate(
        deployment["parameters"], parameter_schema(annotate).model_dump(), raise_on_error=True
    )  # what a server holds it to
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def test_the_nightly_job_asks_what_the_sample_job_asks() -> None:
    sample = yaml.safe_load((ROOT / "sample_data/reviews.yaml").read_text())
    nightly = next(each for each in DEPLOYMENTS if each["name"] == "nightly")["parameters"]["job"]
    steps = [JobConfig.model_validate(job).steps for job in (sample, nightly)]
    assert steps[0] == steps[1]
    assert sample["data"]["output"] != nightly["data"]["output"]
