"""Imports what most runs import. The programs of tests/forked.py begin with all of it."""

from __future__ import annotations

import gc
from importlib import import_module

from glmbatch.cli.main import _set_prefect_defaults
from glmbatch.glm.engine.loading import import_engine

_set_prefect_defaults()
for name in (
    "flows.annotate",
    "glmbatch.glm.checkpoint.load",
    "glmbatch.glm.engine.worker",
    "glmbatch.glm.model.decode_kernel",
    "glmbatch.glm.tokenizer",
    "glmbatch.report.page",
    "glmbatch.run.job",
    "llguidance",
    "numba.core.typing.cffi_utils",
    "numba.np.arraymath",
    "pandas",
    "prefect.flow_engine",
    "prefect.task_engine",
    "pygal",
    "rich.live",
):
    import_module(name)
import_engine()
gc.freeze()  # a search for garbage would copy the pages that forks share
