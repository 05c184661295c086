"""Settings refuse addresses with a secret, and no message shows it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from glmbatch.errors import InputError
from glmbatch.settings.addresses import has_credentials, misspelt
from glmbatch.settings.job import JobConfig
from glmbatch.settings.jobfile import parse_settings
from glmbatch.settings.tuning import TuneConfig
from glmbatch.store.paths import location

STEP = {"kind": "classify", "name": "mood", "labels": ["a", "b"]}
JOB = {"data": {"input": "in", "output": "out"}, "model": {"path": "m"}, "steps": [STEP]}
TUNE = {"data": {"input": "in"}, "output": "out", "model": {"path": "m"}}
SECRETS = [
    "s3://KEY:GEHEIM@bucket/x",
    "s3://GEHEIM@bucket/x",
    "s3:/KEY:GEHEIM@bucket/x",
    "s3:KEY:GEHEIM@bucket/x",
    "s3:///KEY:GEHEIM@bucket/x",
    "S3://KEY:GEHEIM@bucket/x",
    " s3://KEY:GEHEIM@bucket/x",
    "s3a://KEY:GEHEIM@bucket/x",
    "s3://KEY:GE/HEIM@bucket/x",
    "s3://KEY%3AGEHEIM%40bucket/x",
    "s3://KEY%253AGEHEIM%2540bucket/x",
    "https://user:GEHEIM@host/x",
    "az://c/x?sv=2024-01-01&se=2025&sig=GEHEIM",
    "az://c/x%3Fsig%3DGEHEIM",
    "az://c/x?SharedAccessSignature=GEHEIM",
    "s3://b/x?X-Amz-Algorithm=A&X-Amz-Signature=GEHEIM",
    "s3://b/x?x-amz-security-token=GEHEIM",
    "s3://b/x?AWSAccessKeyId=GEHEIM",
    "gs://b/x?X-Goog-Credential=GEHEIM",
    "gs://b/x?token=GEHEIM",
    "gs://b/x?access_key=GEHEIM",
    "gs://b/x#key=GEHEIM",
    "https://b.s3.amazonaws.com/x?Signature=GEHEIM",
    "abfss://c:GEHEIM@a.dfs.core.windows.net/x",
]
SETTINGS = ["data.input", "data.output", "model.path", "model.adapter", "model", "canary"]
SETTINGS += ["canary.file", "runtime.cache", "runtime.cluster_address", "steps.0.model"]


@pytest.mark.parametrize("address", SECRETS)
def test_no_setting_accepts_or_shows_a_secret(address: str) -> None:
    for setting in SETTINGS:
        for value in (address, [address], {"x": address}):  # also of a wrong type
            with pytest.raises(InputError) as refused:
                parse_settings("job.yaml", JOB, JobConfig, {setting: value})
            assert "HEIM" not in str(refused.value)
    for setting in ("data.input", "output", "model.path", "model.adapter"):
        with pytest.raises(InputError) as refused:
            parse_settings("tune.yaml", TUNE, TuneConfig, {setting: address})
        assert "HEIM" not in str(refused.value)
    with pytest.raises(ValidationError, match="must not contain credentials") as invalid:
        JobConfig.model_validate({**JOB, "model": address})
    assert "HEIM" not in str(invalid.value)
    with pytest.raises(InputError, match="must not contain credentials") as refused:
        location(address)
    assert "HEIM" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/a@b.parquet",
        "s3://bucket/year=202?/month=1/*.parquet",
        "s3://bucket/day?/key=1/x",
        "gs://bucket/monkey=1/x",
        "gs://bucket/x%20y",
        "az://container/a b.parquet",
        "in/day=*/user@host.parquet",
        "C:/data@home/x",
        "a:b@c",
        "THUDM/chatglm2-6b",
    ],
)
def test_other_names_are_not_secrets(address: str) -> None:
    assert not has_credentials(address)
    assert misspelt(address) is None


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("file:///data/in", "write its path without file:"),
        ("file:/data/in", "write its path without file:"),
        ("FILE://data/in", "write its path without file:"),
        ("s3:/bucket/in", "write s3://bucket/name"),
        ("S3://bucket/in", "write s3://bucket/name"),
        ("s3a://bucket/in", "write s3://bucket/name"),
        ("gcs://bucket/in", "write gs://bucket/name"),
        ("abfss://c@a.dfs.core.windows.net/in", "write az://container/name"),
        ("hdfs://host/in", r"write s3://bucket/name \(or gs://, az://\), or a local path"),
        ("https://host/in", "or a local path"),
    ],
)
@pytest.mark.parametrize("setting", ["data.input", "data.output", "model.path"])
def test_other_addresses_say_what_to_write(address: str, advice: str, setting: str) -> None:
    with pytest.raises(InputError, match=f"^job: {setting}: {address} is .*{advice}"):
        parse_settings("job", JOB, JobConfig, {setting: address})
    with pytest.raises(InputError, match=advice):
        location(address)


@pytest.mark.parametrize(
    "setting", ["model.path", "model.adapter", "canary.file", "evaluate.rows", "runtime.cache"]
)
def test_a_table_is_refused_where_none_is_read(setting: str) -> None:
    address = "iceberg://lake/shop.t"
    with pytest.raises(InputError, match=f"^job: {setting}: {address} is .*or a local path"):
        parse_settings("job", JOB, JobConfig, {setting: address})
    with pytest.raises(InputError, match=f"^tune: data.input: {address} is .*or a local path"):
        parse_settings("tune", TUNE, TuneConfig, {"data.input": address})


@pytest.mark.parametrize("settings", [{"runtime": {"cache": "s3://b/x"}}, {}], ids=["cache", "out"])
def test_a_local_setting_refuses_an_object_store(settings: dict[str, Any]) -> None:
    kind, base = (JobConfig, JOB) if settings else (TuneConfig, {**TUNE, "output": "s3://b/x"})
    with pytest.raises(InputError, match="is in an object store; set a local folder"):
        parse_settings("job", {**base, **settings}, kind)
