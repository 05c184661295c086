"""The command line over the same settings as the job file, the Prefect form and Python.

    glmbatch run JOB      answer every row, under Prefect        glmbatch plan JOB      what would run and why
    glmbatch doctor MODEL     what a checkpoint is, and what is wrong with it
    glmbatch verify OUTPUT    whether every row is there once, with its own values, whole
    glmbatch canary OUTPUT FILE    freeze a few published rows, for later runs to be held to
    glmbatch train FILE       fine-tune a classifier on labelled rows, and promote it if it is better
    glmbatch evaluate MODEL ROWS    how good a checkpoint is on labelled rows
    glmbatch settings         every setting of a job and of a fine-tuning

Exit codes: 0 done, 1 failed, 2 usage or bad input, 3 finished with quarantined rows, 130/143 interrupted (run again to
go on). Results go to stdout, progress and errors to stderr. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from glmbatch import __version__
from glmbatch.errors import GlmbatchError, InputError, TransientError
from glmbatch.settings.job import JobConfig
from glmbatch.settings.jobfile import load_job, load_settings

DONE, FAILED, BAD_INPUT, QUARANTINED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

# Where the user has set nothing else.
PREFECT_DEFAULTS = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # failures are told once, by us, on one line
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",  # a server stopped in the midst of its records prints tracebacks
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("glmbatch").setLevel(logging.INFO if parsed.verbose else logging.WARNING)
    try:
        code: int = parsed.command(parsed)
        return code
    except InputError as error:
        return _complain(error, BAD_INPUT)
    except GlmbatchError as error:
        return _complain(error, FAILED)
    except BrokenPipeError:  # who reads the output has read enough; the work itself is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (KeyboardInterrupt, _Terminated) as error:
        print("glmbatch: interrupted; run the same command again to go on.", file=sys.stderr)
        return TERMINATED if isinstance(error, _Terminated) else INTERRUPTED


@contextmanager
def _prefect_server() -> Iterator[None]:
    """See that the server answers that the user has set; without one, start one for this run."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from glmbatch.cli.server import is_ready, own_server

    address = PREFECT_API_URL.value()
    if address is None:
        with own_server() as own, temporary_settings({PREFECT_API_URL: own}):
            yield
    elif is_ready(address):
        yield
    else:
        raise TransientError(
            f"{address}: no Prefect server answers. Start it, or unset PREFECT_API_URL."
        )


class _Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """Make SIGTERM an exception, as SIGINT is, so that the server of the run is stopped and not left behind."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(error: Exception, code: int) -> int:
    for line in str(error).splitlines():
        print(f"glmbatch: {line}", file=sys.stderr)
    return code


def _run(parsed: argparse.Namespace) -> int:
    if parsed.dry_run:
        return _plan(parsed)
    job = load_job(parsed.job, _overrides(parsed))
    from glmbatch.run.canary import check_file
    from glmbatch.run.planning import check_job

    check_file(job)
    check_job(job)
    _set_prefect_defaults()
    # The one place where glmbatch looks up: the command line runs the flow, the flow runs glmbatch.
    from glmbatch.cli.display import showing_progress
    from glmbatch.report.summary import describe

    with _raising_on_sigterm(), showing_progress(), _prefect_server():
        from flows.annotate import annotate

        summary = annotate(job)
    print(summary.model_dump_json(indent=1) if parsed.json else describe(summary))
    return QUARANTINED if summary.quarantined else DONE


def _set_prefect_defaults() -> None:
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)


def _train(parsed: argparse.Namespace) -> int:
    from glmbatch.settings.tuning import TuneConfig
    from glmbatch.tuning.finetune import check, describe

    config = load_settings(parsed.file, TuneConfig, _set_values(parsed))
    check(config)
    _set_prefect_defaults()
    with _raising_on_sigterm(), _prefect_server():
        from flows.finetune import finetune

        report = finetune(config)
    print(report.model_dump_json(indent=1) if parsed.json else describe(report))
    return DONE


def _evaluate(parsed: argparse.Namespace) -> int:
    from glmbatch.settings.job import RuntimeConfig
    from glmbatch.settings.tuning import LabelledData
    from glmbatch.tuning.finetune import evaluate_rows
    from glmbatch.tuning.report import describe_scores

    data = LabelledData(
        input=parsed.rows, text_column=parsed.text_column, label_column=parsed.label_column
    )
    scores = evaluate_rows(
        parsed.model, data, parsed.prompt_template, RuntimeConfig(device=parsed.device)
    )
    print(
        scores.model_dump_json(indent=1) if parsed.json else describe_scores(parsed.model, scores)
    )
    return DONE


def _plan(parsed: argparse.Namespace) -> int:
    job = load_job(parsed.job, _overrides(parsed))
    from glmbatch.run.preview import describe_plan, preview

    plan = preview(job)
    print(plan.model_dump_json(indent=1) if parsed.json else describe_plan(plan))
    return DONE


def _doctor(parsed: argparse.Namespace) -> int:
    from glmbatch.glm.checkpoint.doctor import describe, examine
    from glmbatch.run.fetching import local_adapter, local_checkpoint
    from glmbatch.settings.job import RuntimeConfig

    cache = RuntimeConfig().cache
    adapter = parsed.adapter and local_adapter(parsed.adapter, cache)
    diagnosis = examine(local_checkpoint(parsed.model, parsed.revision, cache), adapter=adapter)
    print(describe(diagnosis))
    return BAD_INPUT if diagnosis.problems else DONE


def _verify(parsed: argparse.Namespace) -> int:
    from glmbatch.ledger.verification import describe, verify

    verification = verify(parsed.output)
    print(verification.model_dump_json(indent=1) if parsed.json else describe(verification))
    return DONE if verification.sound else FAILED


def _settings(_: argparse.Namespace) -> int:
    from glmbatch.settings.reference import describe_settings
    from glmbatch.settings.tuning import TuneConfig

    print(describe_settings({"A job": JobConfig, "A fine-tuning": TuneConfig}))
    return DONE


def _canary(parsed: argparse.Namespace) -> int:
    from glmbatch.run.canary import freeze

    rows = freeze(parsed.output, parsed.file, parsed.rows)
    print(
        f"{rows} rows of {parsed.output} with their answers are frozen in {parsed.file}. Set canary to it in the job."
    )
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glmbatch",
        description="Classify and generate over Parquet with ChatGLM2-6B.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage or bad input, 3 finished with quarantined rows, "
        "130/143 interrupted (run again to go on).",
    )
    parser.add_argument("--version", action="version", version=f"glmbatch {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say on stderr what is being done"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="answer every row and publish the answers")
    run.add_argument(
        "--dry-run", action="store_true", help="only say what would run, as `glmbatch plan` does"
    )
    run.set_defaults(command=_run)
    plan = commands.add_parser(
        "plan", help="say what would run and why; loads no model, writes nothing"
    )
    plan.set_defaults(command=_plan)
    for command in (run, plan):
        _add_job(command)
        command.add_argument("--json", action="store_true", help="print it as JSON")
    doctor = commands.add_parser(
        "doctor", help="say what a checkpoint is and what is wrong with it"
    )
    doctor.add_argument("model", metavar="MODEL", help="directory of a checkpoint, or a hub id")
    doctor.add_argument("--revision", help="commit of the hub repository")
    doctor.add_argument(
        "--adapter", metavar="DIRECTORY", help="LoRA adapter to look at over the checkpoint"
    )
    doctor.set_defaults(command=_doctor)
    verify = commands.add_parser(
        "verify", help="prove that an output holds every row of its sources once, whole"
    )
    verify.add_argument("output", metavar="OUTPUT", help="the job's data.output")
    verify.add_argument("--json", action="store_true", help="print the findings as JSON")
    verify.set_defaults(command=_verify)
    canary = commands.add_parser("canary", help="freeze a few published rows with their answers")
    canary.add_argument(
        "output", metavar="OUTPUT", help="the data.output of a job whose answers are good"
    )
    canary.add_argument("file", metavar="FILE", help="Parquet file to write")
    canary.add_argument("--rows", type=int, default=16, help="how many (default 16)")
    canary.set_defaults(command=_canary)
    settings = commands.add_parser(
        "settings", help="print every setting of a job and of a fine-tuning"
    )
    settings.set_defaults(command=_settings)
    train = commands.add_parser(
        "train", help="fine-tune a classifier on labelled rows, and promote it if better"
    )
    train.add_argument(
        "file", metavar="FILE", help="settings, YAML or JSON: see `glmbatch settings`"
    )
    _add_set(train)
    train.add_argument("--json", action="store_true", help="print the report as JSON")
    train.set_defaults(command=_train)
    evaluate = commands.add_parser("evaluate", help="say how good a checkpoint is on labelled rows")
    evaluate.add_argument(
        "model", metavar="MODEL", help="directory of a checkpoint with a trained head"
    )
    evaluate.add_argument(
        "rows", metavar="ROWS", help="a Parquet file, a folder of them, or a glob"
    )
    evaluate.add_argument(
        "--text-column", default="text", help="column of the texts (default text)"
    )
    evaluate.add_argument(
        "--label-column", default="label", help="column of the labels (default label)"
    )
    evaluate.add_argument(
        "--prompt-template", help="default: the template it was trained with, where a report says"
    )
    evaluate.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:1 (default auto)"
    )
    evaluate.add_argument("--json", action="store_true", help="print the scores as JSON")
    evaluate.set_defaults(command=_evaluate)
    return parser


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any setting by its place, such as steps.0.max_tokens=32 (VALUE as in YAML)",
    )


def _add_job(command: argparse.ArgumentParser) -> None:
    """The job file, and a flag for each setting of the job outside its steps."""
    command.add_argument("job", metavar="JOB", help="job file, YAML or JSON")
    _add_set(command)
    flags = command.add_argument_group("settings", "Each overrides the job file.")
    for name, field in _leaves(JobConfig):
        last = name.rpartition(".")[2]
        short = "model" if name == "model.path" else last
        flags.add_argument(
            f"--{short.replace('_', '-')}",
            *([f"--{name.replace('_', '-')}"] if short != name else []),
            dest=name,
            metavar="VALUE",
            help=(field.description or "").replace("%", "%%"),
        )


def _leaves(settings: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The dotted name of each setting that is not a group or the list of steps."""
    for name, field in settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaves(kind, f"{prefix}{name}.")
        elif name != "steps":
            yield f"{prefix}{name}", field


def _overrides(parsed: argparse.Namespace) -> dict[str, object]:
    values = vars(parsed)
    flags: dict[str, object] = {
        name: values[name] for name, _ in _leaves(JobConfig) if values[name] is not None
    }
    return flags | _set_values(parsed)


def _set_values(parsed: argparse.Namespace) -> dict[str, object]:
    import yaml

    overrides: dict[str, object] = {}
    for pair in parsed.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair}: is not NAME=VALUE.")
        try:
            overrides[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(
                f"--set {pair}: the value is not YAML: {' '.join(str(error).split())}."
            ) from error
    return overrides


if __name__ == "__main__":
    sys.exit(main())
