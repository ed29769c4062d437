"""Ranks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def two_ranks(_own_cache: None, _one_thread: None) -> Iterator[RankPool]:
    """Two processes with a process group; see ``RankPool``."""
    pool = RankPool(2)
    yield pool
    pool.close()
