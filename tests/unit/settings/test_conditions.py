"""Conditions are parsed into a few forms, and everything else is refused in one line."""

from __future__ import annotations

import pytest

from glmbatch.settings.conditions import (
    Both,
    Compares,
    Has,
    IsNull,
    IsOneOf,
    IsTrue,
    Not,
    columns_of,
    parse_condition,
    text_of,
)


def test_every_form_of_a_condition_is_read() -> None:
    assert parse_condition("stars < 3") == Compares("stars", "<", 3)
    assert parse_condition("3 > stars") == Compares("stars", "<", 3)
    assert parse_condition("-1.5 <= change") == Compares("change", ">=", -1.5)
    assert parse_condition("language in ['de', 'en']") == IsOneOf("language", ("de", "en"))
    assert parse_condition("'price' in topics") == Has("topics", "price")
    assert parse_condition("'price' not in topics") == Not(Has("topics", "price"))
    assert parse_condition("reply is not null") == Not(IsNull("reply"))
    assert parse_condition("verified") == IsTrue("verified")
    assert parse_condition("verified == true") == Compares("verified", "==", True)
    assert parse_condition("column('star rating') == 'x'") == Compares("star rating", "==", "x")
    assert parse_condition("a <> 'it''s' AND `star rating` = 1") == Both(
        Compares("a", "!=", "it's"), Compares("star rating", "==", 1)
    )
    assert parse_condition("stars between 1 and 4") == parse_condition("1 <= stars <= 4")
    # Every word that is not of a condition is a column, whatever SQL makes of it.
    assert parse_condition('select = "x"') == Compares("select", "==", "x")
    between = Both(Compares("stars", ">", 1), Compares("stars", "<", 4))
    assert parse_condition("1 < stars\n  < 4") == between
    assert columns_of(parse_condition("a or b and not (c is None or a)")) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("stars <", "is no condition: compare with = or <"),
        ("", "is no condition: compare with = or <"),
        ("a = 1; drop table b", "is no condition: compare with = or <"),
        ("a = 1 and (select 1)", "is no condition: compare with = or <"),
        ("name LIKE 'x%'", "compare a column with a value"),
        ("name LIKE 'x%' && ok", "LIKE, && and so on are not known"),
        ("day >= 2026-01-01", "text and dates in quotes"),
        ("day >= 2026-11-12", "is no value: write text and dates in quotes"),
        ("__import__('os').system('true')", "compare a column with a value"),
        ("[x for x in stars]", "is no condition: compare with = or <"),
        ("stars + 1 < 3", "stars + 1 is no column"),
        ("scores.good < 3", "scores.good is no column"),
        ("stars < limit", "compares two columns"),
        ("stars < 9 ** 9", "is no condition"),
        ("stars < f'{stars}'", "is no condition"),
        ("stars == null", "write `is null`"),
        ("stars is 3", "only null comes after `is`"),
        ("language in 'de'", "a list of values comes after `in`"),
        ("null in topics", "NULL compares with nothing"),
        ("'a' in 'abc'", "'a' is no column"),
        ("language in ()", "a list of values comes after `in`"),
        ("stars < 1e999", "too large a number"),
        ("stars == 99999999999999999999", "too large a number"),
        ("product == '\ud800'", "is no text: it has half of a character"),
        ("column('\ud800') == 3", "is no text: it has half of a character"),
        ("not " * 100_000 + "ok", "nested too deeply"),
        ("(" * 999, "nested too deeply"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_condition(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_many_values_joined_by_or_are_not_deep() -> None:
    condition = parse_condition(" or ".join(f"a = {number}" for number in range(3000)))
    assert columns_of(condition) == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "a = 'it''s' and not (b < -1.5 or c is null) and d in (1, 'x', true)",
        "'x' in column('a b') or verified",
        "column('select') >= 1e300",
    ],
)
def test_a_condition_is_written_as_it_is_read(text: str) -> None:
    condition = parse_condition(text)
    assert parse_condition(text_of(condition)) == condition
