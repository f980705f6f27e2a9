"""One session of a graph in which any of its layers may be 2:4: weights that may change are inputs of it.

The other way is a session for each set of layers, with the weights as constants, which onnxruntime packs when it
opens one. With onnxruntime 1.31.1 on one core (2026-11-30, CPU seconds on 64 samples, constants first) MiniLM
took 0.34 and 0.37 s, nudenet 0.54 and 0.81 s, open-nsfw 1.05 and 1.52 s, PP-OCRv6 rec 1.25 and 1.77 s; to open a
session of constants took 0.41, 0.08, 0.09 and 0.12 s. So weights as inputs cost up to a half more a sample, and
nothing to change, which is what many sets on few samples need; outputs differ as sums in another order do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from sparse_export.errors import ArtefactError, MissingCapability
from sparse_export.graph.passes.float16 import value_types, with_bfloat16_emulated
from sparse_export.oneshot.parted import Parted, filled, parted
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.runtimes.onnxruntime import provider_of
from sparse_export.runtimes.session import BaseSession
from sparse_export.signature import Array, Feeds, Signature

__all__ = ["SwitchableSession", "Weights"]

Weights = Mapping[str, Any]
"""Values of weights, by name, as `SwitchableSession.values` makes them."""

_MOST_AT_ONCE = 64  # samples of a call
_MOST_VALUES = 2**23  # input values of a call
_LEAST_IR = 4  # from which on stored tensors need not be inputs
_ONLY_FATAL = 4
_NO_MEMORY = ("bad_alloc", "failed to allocate", "out of memory")


class SwitchableSession(BaseSession):
    """Owns a session of onnxruntime on the CPU, and the weights that its graph does not hold."""

    def __init__(
        self,
        model: onnx.ModelProto | Parted,
        signature: Signature,
        switched: Mapping[str, Array],
        *,
        n_values: int = 1,
        n_threads: int | None = None,
    ) -> None:
        """Load a graph.

        Args:
            model: with its weights read or beside it; stays as it is.
            signature: of it.
            switched: stored tensors that may change, by name, with the values that they have unless `use`
                gives others. They are not copied.
            n_values: numbers in the inputs of a sample, which bounds how many go at once.
            n_threads: inside an operator; None for one for each core.

        Raises:
            ArtefactError: onnxruntime cannot load the graph.
        """
        super().__init__("onnxruntime-cpu", signature)
        graph = parted(model)
        types = value_types(graph.model)
        self._emulated = TensorProto.BFLOAT16 in types
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = _ONLY_FATAL
        options.intra_op_num_threads = n_threads or 0
        options.inter_op_num_threads = 1
        if TensorProto.FLOAT8E4M3FN in types:  # see runtimes/onnxruntime.py
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if self._emulated:
            graph = parted(with_bfloat16_emulated(graph.whole()))
        cut = _with_inputs(graph, switched)
        try:
            self._session: Any = ort.InferenceSession(
                cut.SerializeToString(), options, providers=[provider_of("cpu")], enable_fallback=False
            )
        except Exception as cause:  # onnxruntime's errors have no common base
            raise ArtefactError(
                f"onnxruntime {ort.__version__} cannot load the graph with weights as inputs: {cause}.",
                do="Sparsify it without --max-drop.",
            ) from cause
        self._at_once = max(1, min(_MOST_AT_ONCE, _MOST_VALUES // max(1, n_values)))
        self._own = self.values(switched)
        self._used: dict[str, Any] = dict(self._own)

    @property
    def max_batch(self) -> int | None:
        return self._at_once

    def values(self, arrays: Mapping[str, Array]) -> Weights:
        """Hand arrays to onnxruntime, without a copy where they are in its layout.

        Args:
            arrays: by the names of stored tensors.
        """
        ort = load_onnxruntime()
        given = {
            name: np.ascontiguousarray(array.astype(np.float32) if self._emulated else array)
            for name, array in arrays.items()
        }
        return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}

    def use(self, weights: Weights) -> None:
        """Choose what the next calls multiply by.

        Args:
            weights: of some of the stored tensors; the others have their own values again.
        """
        self._used = {**self._own, **weights}

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        names = list(self.signature.output_names)
        try:
            found = self._session.run(names, {**feeds, **self._used})
        except Exception as cause:  # as above
            what = f"onnxruntime {load_onnxruntime().__version__} cannot run the graph: {cause}."
            if any(sign in str(cause).lower() for sign in _NO_MEMORY):
                raise MissingCapability(what, do="Take a machine with more memory.") from cause
            raise ArtefactError(what, do="Give inputs that the network was made for.") from cause
        return dict(zip(names, found, strict=True))

    def _free(self) -> None:
        self._session, self._used, self._own = None, {}, {}


def _with_inputs(parts: Parted, names: Mapping[str, object]) -> onnx.ModelProto:
    """The model with some stored tensors as inputs, and its other values inside."""
    model = parts.model
    cut = onnx.ModelProto(ir_version=max(model.ir_version, _LEAST_IR))
    cut.opset_import.extend(model.opset_import)
    cut.functions.extend(model.functions)
    graph, whole = cut.graph, model.graph
    graph.name = whole.name or "graph"
    graph.node.extend(whole.node)
    graph.output.extend(whole.output)
    graph.value_info.extend(whole.value_info)
    graph.sparse_initializer.extend(whole.sparse_initializer)
    stored = {tensor.name: tensor for tensor in whole.initializer}
    graph.initializer.extend(
        filled(tensor, parts.read(tensor)) for name, tensor in stored.items() if name not in names
    )
    graph.input.extend(value for value in whole.input if value.name not in stored)
    for name in names:
        tensor = stored[name]
        graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    return cut
