"""Dates in paths and conditions: which day they are, and what else braces may hold."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest
from pydantic import ValidationError

from glmbatch.settings.data import DataConfig, plain, with_dates

TODAY = date(2026, 3, 1)


@pytest.mark.parametrize(
    ("text", "dated"),
    [
        ("in/day={today}", "in/day=2026-03-01"),
        ("in/{yesterday}/{today}", "in/2026-02-28/2026-03-01"),
        ("in/{today:%Y/%m/%d}", "in/2026/03/01"),
        ("day >= '{today-7}' and day < '{today+1}'", "day >= '2026-02-22' and day < '2026-03-02'"),
        ("in/{{a}}", "in/{a}"),
        ("in/*", "in/*"),
    ],
)
def test_dates_stand_in_for_their_names(text: str, dated: str) -> None:
    assert with_dates(text, TODAY) == dated


@pytest.mark.parametrize(
    "text",
    ["{tody}", "{", "a}", "{today:%H}", "{today!r}", "{}", "{0}", "{today.year}", "{today:}}"],
)
def test_other_braces_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"\{today\}, \{yesterday\}, \{today-7\}") as caught:
        with_dates(text, TODAY)
    assert "\n" not in str(caught.value)


def data(**settings: object) -> DataConfig:
    return DataConfig.model_validate({"input": "in/{today}", "output": "out", **settings})


def test_the_date_is_that_of_the_time_zone() -> None:
    moment = datetime(2026, 11, 25, 23, 30, tzinfo=UTC)
    assert data().dated(moment).input == "in/2026-11-25"
    assert data(time_zone="Europe/Berlin").dated(moment).input == "in/2026-11-26"
    assert data(time_zone="America/Lima").dated(moment).input == "in/2026-11-25"


def test_a_date_that_is_set_decides() -> None:
    moment = datetime(2026, 11, 25, 23, 30, tzinfo=UTC)
    assert data(today="2026-11-20", time_zone="Asia/Tokyo").dated(moment).input == "in/2026-11-20"


def test_a_path_with_braces_can_be_a_setting() -> None:
    assert with_dates(plain("in/{today}"), TODAY) == "in/{today}"


@pytest.mark.parametrize(
    "settings", [{"time_zone": "Mars/Base"}, {"time_zone": "/etc/passwd"}, {"where": "a ="}]
)
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no time zone|is no condition"):
        data(**settings)


def test_an_output_is_no_name_of_a_table() -> None:
    for name in ("iceberg:lake/shop.answers", "Iceberg://lake/shop.answers"):
        with pytest.raises(ValidationError, match="for an Iceberg table set"):
            DataConfig(input="in", output=name)


@pytest.mark.parametrize(
    "name", ["lake.shop.t", "shop.t", "/lake/shop.t", "//lake/shop.t", " lake/shop.t", "lake/t", ""]
)
def test_a_misspelt_name_of_a_table_is_refused(name: str) -> None:
    for scheme in ("iceberg:", "Iceberg:"):
        with pytest.raises(ValidationError, match=r"must be iceberg:CATALOG/namespace\.name"):
            DataConfig(input=scheme + name, output="out")
    assert DataConfig(input="iceberg:lake/shop.eu.t", output="out").input.endswith("eu.t")
