"""Outputs that live through nights of change, with runs killed at any moment.

SOAK sets the number of kills (200 for acceptance) and SOAK_SEED the first history.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.history import described, soak
from tests.soak.nights import CELLS, Cell, Nights, catalogue_variable
from tests.soak.reading import READERS, Readers
from tests.soak.runs import Forks
from tests.stores import Store

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SOAK", "6"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
logger = logging.getLogger(__name__)


@pytest.mark.timeout(120 + 10 * KILLS)
def test_nights_of_change_with_kills_equal_undisturbed_ones(tmp_path: Path) -> None:
    for tally in soak(tmp_path, SEED, KILLS):
        logger.info("%s", described(tally))
    assert tally.kills >= KILLS


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A catalogue of Iceberg tables that all processes know."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(*catalogue_variable(tmp_path_factory.mktemp("catalogue")))
        yield


@pytest.fixture(scope="module")
def forks(s3: Store, catalogue: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts runs that know the address of the store."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def readers(
    s3: Store, catalogue: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Readers]:
    """Starts programs that read an output again and again."""
    readers = Readers(tmp_path_factory.mktemp("readers"), pause_seconds=0.5)
    yield readers
    readers.close()


# benchmarks/soak.py has hundreds of kills, in every cell and also of `glmbatch run`.
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.source != "jsonl"], ids=str)
def test_readers_see_whole_nights_while_runs_are_killed(
    cell: Cell, store: Store, forks: Forks, readers: Readers, tmp_path: Path
) -> None:
    tally = Nights(cell, tmp_path, SEED, forks, readers, store).live(kills=2, of_a_night=2)
    assert tally.kills >= 2
    assert tally.reads.keys() == READERS[cell.table].keys()
