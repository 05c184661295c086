"""A file of settings is read strictly; each error is one short line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmbatch.errors import InputError
from glmbatch.settings.jobfile import load_job, load_settings
from glmbatch.settings.reading import read_settings
from glmbatch.settings.tuning import TuneConfig

JOB = (
    "data: {input: a, output: b}\nmodel: m\nsteps: [{kind: classify, name: s, labels: [LABELS]}]\n"
)
LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def load(tmp_path: Path, content: str | bytes, name: str = "job.yaml") -> object:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_job(str(path))


def test_a_missing_file_is_named_for_what_it_is(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(InputError, match=r"none\.yaml: there is no job file\. Check the path\."):
        load_job(str(missing))
    with pytest.raises(InputError, match="there is no file with a training's settings"):
        load_settings(str(missing), TuneConfig)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x: " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
        ("- " * 3000, "is nested too deeply"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deeply"),
        ("model: a\nmodel: b\n", "line 2: 'model' is set twice, first in line 1; keep one"),
        ("data:\n  input: a\n  input: b\n", "line 3: 'input' is set twice, first in line 2"),
        ("steps: [{name: a, name: b}]", "line 1: 'name' is set twice"),
        ('{"model": "a",\n "model": "b"}', "line 2: 'model' is set twice, first in line 1"),
        ('{\n\t"model": "a",\n\t"model": "b"}', "'model' is set twice"),
        (LAUGHS, "its aliases expand to more than 100,000 values"),
        ("a: &a [*a]\n", "line 1: an alias refers to a value that contains it"),
        ("a: &a {b: *a}\n", "line 1: an alias refers to a value that contains it"),
        (b"\xff\xfea\x00", "cannot be read: it is not UTF-8"),
        ("model: caf\u00e9".encode("latin-1"), "cannot be read: it is not UTF-8"),
        ("\tmodel: a", "neither YAML nor JSON: .*t' that cannot start any token"),
        ("model: a\n---\nmodel: b\n", "neither YAML nor JSON: expected a single document"),
        ("", "expected settings, but the file contains nothing"),
        ("# nothing\n", "expected settings, but the file contains nothing"),
        ("- a\n", "expected settings, but the file contains a list"),
        ("model", "expected settings, but the file contains a single value"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: 2024-13-45", "neither YAML nor JSON: month must be in"),
        ("a: !!int x", "neither YAML nor JSON: invalid literal"),
        ("a: " + "9" * 5000, "neither YAML nor JSON: Exceeds the limit"),
        ("? [a]\n: b", "unhashable key"),
        ("a: \x00", "special characters are not allowed"),
        ("a: " + "x" * 2_000_000, "is larger than 1 MB"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_a_file_that_is_not_a_job_is_one_line(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(InputError, match=rf"job\.yaml: .*{message}") as caught:
        load(tmp_path, content)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 + len(str(tmp_path))


def test_merged_groups_are_not_repeated_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\nd: *b\n")
    assert read_settings(path)["c"] == {"x": 3, "y": 4}
    assert read_settings(path)["d"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("name", ["job.json", "job.yaml", "job"])
def test_json_is_read_as_json(tmp_path: Path, name: str) -> None:
    settings = {"data": {"input": "a", "output": "b"}, "model": "m"}
    settings |= {"steps": [{"kind": "classify", "name": "s", "labels": ["yes", "\U0001f600"]}]}
    job = load_job_of(tmp_path / name, json.dumps(settings, indent="\t"))
    assert job.steps[0].labels == ["yes", "\U0001f600"]  # type: ignore[attr-defined]


def load_job_of(path: Path, text: str) -> object:
    path.write_text(f"\ufeff{text}", encoding="utf-8")  # as Windows writes it
    return load_job(str(path))


@pytest.mark.parametrize(
    ("label", "read"),
    [
        ("yes", "True"),
        ("NO", "False"),
        ("on", "True"),
        ("Off", "False"),
        ("1.0", "1.0"),
        ("012", "10"),
        ("1:30", "90"),
        ("~", "null"),
        ("null", "null"),
        ("2024-01-01", "datetime.date"),
        (".inf", "inf"),
    ],
)
def test_a_word_that_yaml_does_not_read_as_text(tmp_path: Path, label: str, read: str) -> None:
    match = rf"labels\[1\]: must be text, but YAML reads it as {read}.*\. Write it in quotes$"
    with pytest.raises(InputError, match=match):
        load(tmp_path, JOB.replace("LABELS", f"good, {label}"))
    load(tmp_path, JOB.replace("LABELS", f"good, '{label}'"))
