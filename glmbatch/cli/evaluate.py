"""`glmbatch evaluate`: what its arguments ask for."""

from __future__ import annotations

import argparse
import os
from typing import Any

from pydantic import BaseModel, RootModel

from glmbatch.cli.parser import job_overrides, truth_columns
from glmbatch.errors import InputError
from glmbatch.evaluation.checkpoint import job_of_checkpoint
from glmbatch.evaluation.evaluate import PRECISIONS, evaluate
from glmbatch.evaluation.results import Evaluation
from glmbatch.settings.job import JobConfig
from glmbatch.settings.jobfile import load_job


def evaluate_parsed(parsed: argparse.Namespace) -> tuple[Evaluation, BaseModel]:
    """The evaluation, and what to print of it as JSON."""
    is_checkpoint = os.path.isdir(os.path.expanduser(parsed.job))
    job, truth = _checkpoint(parsed) if is_checkpoint else _job(parsed)
    found = evaluate(
        job,
        parsed.rows,
        truth=truth,
        keep=parsed.keep,
        precisions=parsed.precision or PRECISIONS,
        calibrate=parsed.calibrate,
    )
    if not is_checkpoint:
        return found, found
    # The numbers alone: the one step of a checkpoint has a name that means nothing to anyone.
    (step,) = found.steps
    for result in step.results.values():
        return found, RootModel({**result.model_dump(), "learned": step.learned})
    return found, found


def _job(parsed: argparse.Namespace) -> tuple[JobConfig, dict[str, str]]:
    for flag in ("label_column", "prompt_template"):
        if getattr(parsed, flag) is not None:
            raise InputError(
                f"--{flag.replace('_', '-')}: is for a checkpoint. Use --truth or --set for a job."
            )
    if not os.path.exists(parsed.job):
        raise InputError(
            f"{parsed.job}: there is no job file or checkpoint. Check the path; a training that "
            "promoted none leaves none in `current`, but one in the folder of its run."
        )
    return load_job(parsed.job, job_overrides(parsed)), truth_columns(parsed.truth)


def _checkpoint(parsed: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    if parsed.calibrate is not None:
        raise InputError("--calibrate: is for a job. Name the checkpoint in one, as its model.")
    for flag in ("truth", "set"):
        if getattr(parsed, flag):
            raise InputError(f"--{flag}: is for a job. Use --label-column for a checkpoint.")
    return job_of_checkpoint(
        parsed.job,
        text_column=getattr(parsed, "data.text_column"),
        truth_column=parsed.label_column,
        prompt_template=parsed.prompt_template,
        device=getattr(parsed, "runtime.device") or "auto",
    )
