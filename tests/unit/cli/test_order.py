"""Options stand in any place of a command line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from glmbatch.cli.main import COMMANDS
from glmbatch.cli.parser import make_parser

# Words that belong together, the positional ones first.
LINES: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
    "run": (["JOB"], [["--limit", "5"], ["--dry-run"], ["--set", "a=1"]]),
    "plan": (["JOB"], [["--limit", "5"], ["--json"], ["--set", "a=1"]]),
    "doctor": (["MODEL"], [["--revision", "1"], ["--adapter", "x"]]),
    "verify": (["OUT"], [["--json"], ["-v"]]),
    "repair": (["OUT"], [["--json"], ["-v"]]),
    "canary": (["OUT", "FILE"], [["--rows", "3"], ["-v"]]),
    "train": (["FILE"], [["--set", "a=1"], ["--dry-run"], ["--json"]]),
    "evaluate": (["JOB", "ROWS"], [["--truth", "a=b"], ["--truth", "c=d"], ["--json"]]),
    "compare": (["A", "B", "ROWS"], [["--set", "a=1"], ["--json"]]),
    "view": (["OUT"], [["--port", "1"], ["--beside", "x"]]),
    "snapshot": (["URL", "FILE"], [["--key", "k"], ["--table", "t"], ["-v"]]),
    "settings": ([], [["-v"]]),
}


def test_every_command_is_tried() -> None:
    assert LINES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", LINES)
def test_options_stand_in_any_place(command: str) -> None:
    words, options = LINES[command]
    first = vars(make_parser().parse_args([command, *words, *itertools.chain(*options)]))
    for order in itertools.permutations([*([word] for word in words), *options]):
        chosen = [part for part in order if len(part) == 1 and part[0] in words]
        # What has no name is told by its order, and so are repeated options.
        if chosen == [[word] for word in words] and repeated(order) == repeated(options):
            line = [command, *itertools.chain(*order)]
            assert vars(make_parser().parse_args(line)) == first, line


def repeated(parts: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    return [part for part in parts if part[0] == "--truth"]


def test_a_comparison_with_changes_has_no_second_job() -> None:
    parsed = make_parser().parse_args(["compare", "A", "--set", "a=1", "ROWS"])
    assert (parsed.job, parsed.other, parsed.rows) == ("A", None, "ROWS")


def test_verbose_stands_on_either_side_of_the_command() -> None:
    for line in (["-v", "plan", "JOB"], ["plan", "-v", "JOB"], ["plan", "JOB", "-v"]):
        assert make_parser().parse_args(line).verbose is True
    assert make_parser().parse_args(["plan", "JOB"]).verbose is False


@pytest.mark.parametrize("line", [["plan"], ["plan", "JOB", "--wrong"], ["compare", "A"]])
def test_wrong_lines_are_refused_with_the_usage(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        make_parser().parse_args(line)
    shown = capsys.readouterr().err
    assert left.value.code == 2
    assert shown.startswith("usage: glmbatch") and "Traceback" not in shown
