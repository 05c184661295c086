"""Outputs that live through nights of change, with runs killed at any moment.

SOAK sets the number of kills (200 for acceptance) and SOAK_SEED the first history.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tests.soak.history import described, soak

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SOAK", "8"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
logger = logging.getLogger(__name__)


@pytest.mark.timeout(120 + 10 * KILLS)
def test_nights_of_change_with_kills_equal_undisturbed_ones(tmp_path: Path) -> None:
    for tally in soak(tmp_path, SEED, KILLS):
        logger.info("%s", described(tally))
    assert tally.kills >= KILLS
