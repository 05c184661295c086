"""One real Prefect server for the session, on loopback, with its own home folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from glmbatch.cli.server import own_server


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables for clients of the server: its home, address and password."""
    home = str(tmp_path_factory.mktemp("prefect"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PREFECT_HOME", home)
        with own_server() as client:
            yield {"PREFECT_HOME": home, **client}
