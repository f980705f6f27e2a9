"""Building a network takes three times the memory of its weights at most, libraries apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.building.large_network import WEIGHT_BYTES, built

MOST = 3.0  # times the weights: the network, its graph, masks of a quarter, and one layer's arrays


@pytest.mark.full
@pytest.mark.slow
def test_a_network_of_200_mb_is_built_in_three_times_the_memory_of_its_weights(tmp_path: Path) -> None:
    found = built(tmp_path)
    assert WEIGHT_BYTES < found["bytes"] < MOST * WEIGHT_BYTES
