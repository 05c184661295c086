"""The command line. Its settings are those of the job file, the Prefect form and Python.

    glmbatch run JOB              answer every row and publish the answers, under Prefect
    glmbatch plan JOB             show what would run and why
    glmbatch doctor MODEL         describe a checkpoint and its problems
    glmbatch verify OUTPUT        check that an output has every source row once, unchanged
    glmbatch repair OUTPUT        rebuild a damaged manifest and list of failed rows
    glmbatch canary OUTPUT FILE   save a few published answers for later runs to reproduce
    glmbatch train FILE           fine-tune on labelled rows and promote the result if better
    glmbatch evaluate JOB ROWS    score the answers of a job or a checkpoint on labelled rows
    glmbatch compare A [B] ROWS   compare two jobs, or a job with changes, row by row
    glmbatch view OUTPUT          look at published answers in a browser, and correct them
    glmbatch snapshot URL FILE    write a database's table or query to a Parquet file
    glmbatch settings             list every setting of a job and of a training

Exit codes: 0 done, 1 failed, 2 usage or bad input, 3 finished with quarantined rows, 4 done but the
result cannot be shown, 130/143 interrupted (run again to resume). Results go to stdout, progress
and errors to stderr. Each command imports what it needs when it runs, so that `--help` stays fast.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from pydantic import BaseModel

from glmbatch.cli.output import Unshown, accept_all_names, complain, show
from glmbatch.cli.parser import job_overrides, make_parser, set_values
from glmbatch.cli.snapshot import snapshot
from glmbatch.errors import GlmbatchError, InputError, TransientError, counted
from glmbatch.settings.job import JobConfig
from glmbatch.settings.jobfile import load_job, load_settings

DONE = 0
FAILED = 1
BAD_INPUT = 2
QUARANTINED = 3
UNSHOWN = 4
INTERRUPTED = 130
TERMINATED = 143

# Defaults that the user's environment overrides.
PREFECT_DEFAULTS = {
    # We report a failure ourselves, on one line.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    # A server that is stopped while it writes to its database prints tracebacks.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}


def program() -> int:
    """Run the command in this process's arguments, as the program `glmbatch`."""
    # Searching the half a million objects of imports for garbage takes a fifth of an idle run.
    gc.set_threshold(10_000)
    try:
        return main()
    finally:
        gc.freeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    accept_all_names()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        parsed = make_parser().parse_args(arguments)
        with _logging_to_stderr(logging.INFO if parsed.verbose else logging.WARNING):
            return COMMANDS[parsed.command](parsed)
    except GlmbatchError as error:
        complain(error)
        if isinstance(error, Unshown):
            return UNSHOWN
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    except (KeyboardInterrupt, _Terminated) as error:
        complain("interrupted; run the same command again to resume.")
        return TERMINATED if isinstance(error, _Terminated) else INTERRUPTED


@contextmanager
def _logging_to_stderr(level: int) -> Iterator[None]:
    """Print what glmbatch logs at `level` or above; a flow may log more, only for its page."""
    ours = logging.getLogger("glmbatch")
    handler = logging.StreamHandler()
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    before = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(level)
    ours.propagate = False  # otherwise Prefect prints it again
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[1]


def _show(result: BaseModel, text: Callable[[], str], as_json: bool) -> None:
    show(result.model_dump_json(indent=1) if as_json else text())


def _run(parsed: argparse.Namespace) -> int:
    if parsed.dry_run:
        return _plan(parsed)
    job = load_job(parsed.job, job_overrides(parsed)).from_today()
    _set_prefect_defaults()
    with _raising_on_sigterm(), _prefect_server() as wait_for_server:
        from glmbatch.report.display import showing_progress
        from glmbatch.report.text import describe
        from glmbatch.run.canary import check_canary_file
        from glmbatch.run.plan import check_job
        from glmbatch.run.session import newest_progress

        # Wrong settings are reported before the server has started, which takes seconds.
        check_canary_file(job)
        check_job(job)
        with showing_progress(newest_progress):
            # The only import from above: the command line runs the flow, which runs glmbatch.
            from flows.annotate import annotate

            wait_for_server()
            summary = annotate(job)
    _show(summary, lambda: describe(summary), parsed.json)
    return QUARANTINED if summary.quarantined else DONE


def _plan(parsed: argparse.Namespace) -> int:
    job = load_job(parsed.job, job_overrides(parsed))
    from glmbatch.cli.plan import describe_plan
    from glmbatch.run.preview import preview

    plan = preview(job)
    _show(plan, lambda: describe_plan(plan), parsed.json)
    return DONE


def _doctor(parsed: argparse.Namespace) -> int:
    from glmbatch.glm.checkpoint.doctor import describe, examine
    from glmbatch.run.models import local_adapter, local_checkpoint
    from glmbatch.settings.job import RuntimeConfig

    # A job's default folder, so that both use one download of a checkpoint.
    cache = RuntimeConfig().cache
    adapter = parsed.adapter and local_adapter(parsed.adapter, cache)
    diagnosis = examine(local_checkpoint(parsed.model, parsed.revision, cache), adapter=adapter)
    show(describe(diagnosis))
    return BAD_INPUT if diagnosis.problems else DONE


def _verify(parsed: argparse.Namespace) -> int:
    from glmbatch.cli.verify import describe, verify

    verification = verify(parsed.output)
    _show(verification, lambda: describe(verification), parsed.json)
    return DONE if verification.sound else FAILED


def _repair(parsed: argparse.Namespace) -> int:
    from glmbatch.ledger.repair import describe, repair

    repaired = repair(parsed.output)
    _show(repaired, lambda: describe(repaired), parsed.json)
    return DONE


def _canary(parsed: argparse.Namespace) -> int:
    from glmbatch.run.canary import freeze

    rows = freeze(parsed.output, parsed.file, parsed.rows)
    show(
        f"Saved {counted(rows, 'row')} of {parsed.output} with the answers in {parsed.file}. "
        f"Set `canary: {parsed.file}` in the job."
    )
    return DONE


def _train(parsed: argparse.Namespace) -> int:
    from glmbatch.settings.tuning import TuneConfig

    config = load_settings(parsed.file, TuneConfig, set_values(parsed.set, TuneConfig))
    if parsed.dry_run:
        from glmbatch.cli.train import shown_plan

        show(shown_plan(config, as_json=parsed.json))
        return DONE
    _set_prefect_defaults()
    with _raising_on_sigterm(), _prefect_server() as wait_for_server:
        from glmbatch.report.display import showing_progress
        from glmbatch.tuning.finetune import check, newest_progress
        from glmbatch.tuning.render import describe

        check(config)
        with showing_progress(newest_progress):
            from flows.finetune import finetune

            wait_for_server()
            report = finetune(config)
    _show(report, lambda: describe(report), parsed.json)
    return DONE


def _evaluate(parsed: argparse.Namespace) -> int:
    from glmbatch.cli.evaluate import evaluate_parsed
    from glmbatch.evaluation.render import describe

    found, shown = evaluate_parsed(parsed)
    _show(shown, lambda: describe(found), parsed.json)
    return DONE


def _compare(parsed: argparse.Namespace) -> int:
    from glmbatch.cli.compare import compare_parsed
    from glmbatch.evaluation.render import describe_comparison

    found = compare_parsed(parsed)
    _show(found, lambda: describe_comparison(found), parsed.json)
    return DONE


def _view(parsed: argparse.Namespace) -> int:
    try:
        from glmbatch.view.server import view
    except ImportError as error:
        raise InputError(
            f"view: {error.name} is not installed. Run pip install 'glmbatch[view]'."
        ) from error
    view(parsed.output, parsed.beside, parsed.corrections, parsed.cache, parsed.port)
    return DONE


def _settings(_: argparse.Namespace) -> int:
    from glmbatch.settings.reference import describe_settings
    from glmbatch.settings.tuning import TuneConfig

    show(describe_settings({"Job": JobConfig, "Training": TuneConfig}))
    return DONE


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "plan": _plan,
    "doctor": _doctor,
    "verify": _verify,
    "repair": _repair,
    "canary": _canary,
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "view": _view,
    "snapshot": snapshot,
    "settings": _settings,
}


def _set_prefect_defaults() -> None:
    # Prefect reads these when it is imported, so set them before.
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)


@contextmanager
def _prefect_server() -> Iterator[Callable[[], None]]:
    """Use the server in PREFECT_API_URL, or start one for this block, which may begin before it
    answers; yield a function that waits until it does.

    The function raises TransientError if the user's server does not answer or ours does not start;
    InputError if the user's server refuses this client.
    """
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    from glmbatch.cli.server import starting_server

    address = PREFECT_API_URL.value()
    if address is not None:
        yield lambda: _check_server(address)
        return
    with starting_server() as server:
        settings = {
            PREFECT_API_URL: server.client["PREFECT_API_URL"],
            PREFECT_API_AUTH_STRING: server.client["PREFECT_API_AUTH_STRING"],
        }
        with temporary_settings(settings):
            yield server.wait


def _check_server(address: str) -> None:
    """Send the user's Prefect server one request as a run would. Errors as in `_prefect_server`."""
    from httpx import HTTPError, HTTPStatusError, InvalidURL
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client({"timeout": 10}, sync_client=True) as client,
        ):
            client.read_flows(limit=1)
    # ValueError: the answer is not one of Prefect's.
    except (HTTPError, InvalidURL, ValueError) as error:
        if isinstance(error, HTTPStatusError) and error.response.status_code in {401, 403}:
            raise InputError(
                f"{address}: the Prefect server refuses this client. Set "
                "PREFECT_API_AUTH_STRING to its password, or PREFECT_API_KEY."
            ) from error
        raise TransientError(
            f"{address}: no Prefect server answers. Start it, or unset PREFECT_API_URL."
        ) from error


class _Terminated(BaseException):
    """Raised on SIGTERM, as KeyboardInterrupt is on SIGINT."""


@contextmanager
def _raising_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the run stops its own Prefect server as well."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(program())
