"""What a gate is asked: the two bundles, read once, and what has to hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.layers import GraphLayer
from sparse_export.graph.dense_file import dense_from_file
from sparse_export.graph.layers import graph_layers
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.tasks.scores import MaxDrop
from sparse_export.trust import TrustedDigests

if TYPE_CHECKING:
    import onnx

__all__ = ["Case"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The bundle to deploy, the dense one that it is held against, and the bounds.

    What is read from the files is read when it is first asked for, and checked by hash before.

    Attributes:
        max_drop: how much worse the score may be, as `validate` takes it.
        task, data, pictures: what it is scored for and on, as `validate` takes them.
        require_speedup: what the lower end of the interval of dense / sparse has to reach at every one of
            `batches`, None where nothing was promised.
        run: where the run of the bundle is now.
        runtimes: that have to run the bundle besides onnxruntime on the CPU, None for those of its engines
            that work here.
        trust: SHA-256 of manifests and a `run.json`, as `validate` takes it.
        rounds, n_threads, seed: of the timing.
    """

    bundle_path: Path
    against_path: Path
    max_drop: MaxDrop
    require_speedup: float | None
    batches: tuple[int, ...]
    rounds: int
    n_threads: int | None
    seed: int
    data_dir: Path | None
    inputs: Path | None
    run: Path | None
    runtimes: tuple[str, ...] | None
    trust: TrustedDigests
    task: str | None = None
    data: str | None = None
    pictures: PictureSettings | None = None

    @cached_property
    def bundle(self) -> Bundle:
        """The bundle to deploy. Raises as `open_bundle` does."""
        return open_bundle(self.bundle_path)

    @cached_property
    def dense(self) -> Bundle:
        """The dense bundle. Raises as `open_bundle` does."""
        return open_bundle(self.against_path)

    @cached_property
    def graph(self) -> onnx.ModelProto:
        """The graph of `model.onnx` with every weight as it is multiplied by. Raises ArtefactError."""
        return dense_from_file(self.bundle.onnx_path)

    def forget_graph(self) -> None:
        """Let go of the graph and its weights; who asks for it again has it read again."""
        self.__dict__.pop("graph", None)

    @cached_property
    def layers(self) -> tuple[GraphLayer, ...]:
        """The layers of the graph, from its nodes and tensors and nothing that is noted of them."""
        return graph_layers(self.graph)
