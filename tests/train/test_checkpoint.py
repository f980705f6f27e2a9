"""The state that an unfinished run leaves is put back whole."""

from __future__ import annotations

from pathlib import Path

import torch

from sparse_export.train.checkpoint import Position, load_state, save_state
from tests.models.test_weights import Versioned


def test_layers_that_ask_for_a_version_are_resumed(tmp_path: Path) -> None:
    (tmp_path / "resume").mkdir()
    layers = [Versioned(3, 4), Versioned(3, 4)]
    wanted, got = ((layer, torch.optim.SGD(layer.parameters(), lr=0.1)) for layer in layers)
    position = Position(epoch=1, step=2)
    save_state(tmp_path, position, *wanted, None)
    assert load_state(tmp_path, *got, None) == position
    assert torch.equal(got[0].weight, wanted[0].weight)
