"""The commands, their arguments, and the settings that these override. Runs nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from glmbatch import __version__
from glmbatch.cli.output import Parser
from glmbatch.cli.snapshot import add_snapshot
from glmbatch.errors import InputError
from glmbatch.settings.job import JobConfig
from glmbatch.settings.jobfile import read_value
from glmbatch.settings.reading import MOST_REASON

LOG = "log each stage to stderr"
# Settings with a flag of their own in `run` and `plan`, and the name of the value in the help; None
# shows the choices. `--set` takes all the others, so that the help fits on one screen.
EVERYDAY: dict[str, str | None] = {
    "data.input": "PATH",
    "data.output": "PATH",
    "model.path": "MODEL",
    "data.text_column": "NAME",
    "data.id_column": "NAME",
    "data.limit": "ROWS",
    "data.today": "DATE",
    "runtime.device": "DEVICE",
    "on_error": None,
}


class _Command(Parser):
    """The parser of one command, which takes its options in any place.

    argparse's own would take `compare A B --set x=1 ROWS` for a comparison of A over B.
    """

    _is_inside = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """As argparse's, which is what reads options apart from the rest."""
        if self._is_inside:
            return super().parse_known_args(args, namespace)
        self._is_inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inside = False


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the result names the command in `command`."""
    parser = Parser(
        prog="glmbatch",
        description="Classify and generate over Parquet files with ChatGLM2-6B.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage or bad input, 3 finished with quarantined "
        "rows, 4 done but the result cannot be shown, 130/143 interrupted (run again to resume).",
    )
    parser.add_argument("--version", action="version", version=f"glmbatch {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help=LOG)
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command", parser_class=_Command
    )

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        # Abbreviations would break scripts when a later version adds a similar flag.
        sentence = f"{summary[0].upper()}{summary[1:]}."
        added = commands.add_parser(name, help=summary, description=sentence, allow_abbrev=False)
        # Without a default, so that it does not undo the same flag in front of the command.
        added.add_argument(
            "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help=LOG
        )
        return added

    run = command("run", "answer every row and publish the answers")
    dry = "only show what would run, like `glmbatch plan`"
    run.add_argument("--dry-run", action="store_true", help=dry)
    _add_job(run)
    _add_job(command("plan", "show what would run and why; loads no model, writes nothing"))
    _add_doctor(command("doctor", "describe a checkpoint and its problems"))
    _add_verify(command("verify", "check that an output has every source row once, unchanged"))
    _add_repair(command("repair", "rebuild a damaged manifest and list of failed rows"))
    _add_canary(command("canary", "save a few published answers for later runs to reproduce"))
    _add_train(command("train", "fine-tune on labelled rows and promote the result if better"))
    _add_evaluate(
        command("evaluate", "score the answers of a job or a checkpoint on labelled rows")
    )
    _add_compare(command("compare", "compare two jobs, or a job with changes, row by row"))
    _add_view(command("view", "look at published answers in a browser, and correct them"))
    add_snapshot(command("snapshot", "write a database's table or query to a Parquet file"))
    command("settings", "list every setting of a job and of a training, as Markdown")
    return parser


def _add_job(command: argparse.ArgumentParser) -> None:
    command.add_argument("job", metavar="JOB", help="job file, YAML or JSON")
    _add_json(command)
    settings = command.add_argument_group(
        "settings",
        "Each overrides the job file. A default applies if neither sets it. "
        "`glmbatch settings` lists all settings.",
    )
    for name, value in EVERYDAY.items():
        field = _field(JobConfig, name)
        flag = "model" if name == "model.path" else name.rpartition(".")[2]
        settings.add_argument(
            f"--{flag.replace('_', '-')}",
            dest=name,  # the dotted name, as in --set
            metavar=value or f"{{{','.join(get_args(field.annotation))}}}",
            help=_help(field),
        )
    _add_set(settings)


def _help(field: FieldInfo) -> str:
    """The description of a setting, with its default if it has one."""
    # argparse formats the help with the % operator.
    text = (field.description or "").replace("%", "%%")
    if isinstance(field.default, str):
        text += f" Default: {field.default}."
    return text


def _field(settings: type[BaseModel], name: str) -> FieldInfo:
    """The field with the dotted `name`."""
    group, dot, rest = name.partition(".")
    field = settings.model_fields[group]
    if not dot:
        return field
    # Only a wrong name in EVERYDAY could fail here.
    kind = field.annotation
    assert isinstance(kind, type) and issubclass(kind, BaseModel), name
    return _field(kind, rest)


def _add_doctor(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="MODEL", help="directory or address of a checkpoint, or a hub id"
    )
    command.add_argument(
        "--revision", metavar="COMMIT", help="commit of the hub repository, required with a hub id"
    )
    command.add_argument(
        "--adapter", metavar="DIRECTORY", help="LoRA adapter to check against the checkpoint"
    )


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("output", metavar="OUTPUT", help="the job's data.output")
    _add_json(command)


def _add_repair(command: argparse.ArgumentParser) -> None:
    command.add_argument("output", metavar="OUTPUT", help="the job's data.output")
    _add_json(command)


def _add_canary(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "output", metavar="OUTPUT", help="the data.output of a job with correct answers"
    )
    command.add_argument("file", metavar="FILE", help="Parquet file to write")
    command.add_argument(
        "--rows", type=int, default=16, help="number of rows to save (default: 16)"
    )


def _add_view(command: argparse.ArgumentParser) -> None:
    command.add_argument("output", metavar="OUTPUT", help="the job's data.output")
    command.add_argument(
        "--beside",
        metavar="OTHER",
        help="output of another job over the same input: rows on which the two differ come first",
    )
    command.add_argument(
        "--corrections",
        metavar="FOLDER",
        help="where corrections are kept, as rows for train and evaluate "
        "(default: OUTPUT-corrections; in the current folder for an output in a store)",
    )
    command.add_argument(
        "--cache",
        metavar="FOLDER",
        help="where the files of an output in a store are fetched to (default: ~/.cache/glmbatch)",
    )
    command.add_argument(
        "--port", type=int, default=0, help="port on this machine (default: any free one)"
    )


def _add_train(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "file",
        metavar="FILE",
        help="file of training settings, YAML or JSON; `glmbatch settings` lists them",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="show the rows, the prompt, the steps and what must be beaten, and train nothing",
    )
    _add_set(command)
    _add_json(command)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "job",
        metavar="JOB",
        help="job file, YAML or JSON; or the directory of a checkpoint that `glmbatch train` made",
    )
    command.add_argument(
        "rows", metavar="ROWS", help="labelled rows: Parquet file, folder of them, or glob"
    )
    _add_rows_settings(command)
    command.add_argument(
        "--precision",
        action="append",
        default=[],
        type=_probability,
        metavar="P",
        help="also say how many rows have labels that are right in this share (default: 0.95). "
        "Can be repeated.",
    )
    command.add_argument(
        "--calibrate",
        metavar="FILE",
        help="also fit how often answers of each confidence are right, and write it to this file, "
        "for the setting `calibration`",
    )
    _add_checkpoint(command.add_argument_group("a checkpoint instead of a job"))
    _add_set(command)
    _add_json(command)


def _add_rows_settings(command: argparse.ArgumentParser) -> None:
    """What decides how labelled rows are asked and compared."""
    command.add_argument(
        "--truth",
        action="append",
        default=[],
        metavar="STEP=COLUMN",
        help="column with the correct answers of a step, or STEP.FIELD=COLUMN of a field (default: "
        "the column named as the answer column). Can be repeated.",
    )
    command.add_argument(
        "--keep",
        metavar="FOLDER",
        help="folder for the answers, so that the same rows are not asked again (default: "
        "evaluations in runtime.cache)",
    )
    command.add_argument(
        "--text-column", dest="data.text_column", metavar="NAME", help="column with the text"
    )
    command.add_argument(
        "--device", dest="runtime.device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N"
    )


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("job", metavar="A", help="job file, YAML or JSON")
    command.add_argument(
        "other", metavar="B", nargs="?", help="another job file (default: A, changed with --set)"
    )
    command.add_argument("rows", metavar="ROWS", help="rows: Parquet file, folder of them, or glob")
    _add_rows_settings(command)
    command.add_argument(
        "--differences", metavar="FILE", help="Parquet file to write: every answer that differs"
    )
    _add_set(command)
    _add_json(command)


def _add_checkpoint(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--label-column", metavar="NAME", help="column with the correct label (default: label)"
    )
    group.add_argument(
        "--prompt-template",
        metavar="TEMPLATE",
        help="prompt of a row; {text} inserts its text (default: that of the model's training, "
        "else {text})",
    )


def _probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0 and up to 1")
    return value


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_set(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Any setting by its dotted name, such as steps.0.max_tokens=32. VALUE is YAML, "
        "or the text itself where the setting is a text. Can be repeated.",
    )


def job_overrides(parsed: argparse.Namespace) -> dict[str, object]:
    """The settings to override, dotted name to value; `--set` wins over the other flags."""
    return flag_values(parsed) | set_values(parsed.set)


def flag_values(parsed: argparse.Namespace) -> dict[str, object]:
    """The settings given by flags of their own, if the command has them; dotted name to value."""
    values = {name: getattr(parsed, name, None) for name in EVERYDAY}
    return {name: value for name, value in values.items() if value is not None}


def truth_columns(pairs: Sequence[str]) -> dict[str, str]:
    """The NAME=COLUMN pairs of `--truth` as a mapping. InputError if one has no `=`."""
    columns = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise InputError(f"--truth {pair[:50]}: has no column. Write --truth STEP=COLUMN.")
        columns[name] = column
    return columns


def set_values(pairs: Sequence[str], kind: type[BaseModel] = JobConfig) -> dict[str, object]:
    """The NAME=VALUE pairs of `--set` as a mapping, for settings of class `kind`.

    InputError if one has no `=`, or its value is neither YAML nor that of a text.
    """
    values: dict[str, object] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {name[:50]}: has no `=`. Write --set NAME=VALUE.")
        try:
            values[name] = read_value(kind, name, value)
        except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:MOST_REASON]
            raise InputError(f"--set {name}: the value is not YAML: {reason}.") from error
    return values
