"""A session that takes raw samples: it normalizes them as training did, and runs the network on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sparse_export.runtimes import Session
from sparse_export.runtimes.session import BaseSession
from sparse_export.signature import Array, Feeds, Signature
from sparse_export.tasks.data import normalise

__all__ = ["PreparedSession"]

_LARGEST = 255


class PreparedSession(BaseSession):
    """A network behind the normalization of its training.

    Args:
        session: of the network, which takes normalized float32; it is closed with this one.
        signature: the network's, with raw samples in place of its only input.
        levels: raw samples are divided by 255 first.
        mean: of each channel.
        std: likewise.
    """

    def __init__(
        self,
        session: Session,
        signature: Signature,
        *,
        levels: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        outputs = session.signature.outputs  # with values inside the graph
        whole = Signature(
            inputs=signature.inputs, outputs=outputs, batch=signature.batch, sizes=signature.sizes
        )
        super().__init__(session.name, whole)
        self._session, self._levels = session, levels
        self._mean, self._std = mean, std

    @property
    def max_batch(self) -> int | None:
        return self._session.max_batch

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        return self._session.run({name: self._normalised(array) for name, array in feeds.items()})

    def _normalised(self, raw: Array) -> Array:
        samples = torch.from_numpy(raw.astype(np.float32))
        found: Array = normalise(
            samples / _LARGEST if self._levels else samples, self._mean, self._std
        ).numpy()
        return found

    def _free(self) -> None:
        self._session.close()
