"""Runs a graph once over calibration data, segment by segment, keeping what later segments read.

A segment is a model of its own, cut out between the values that are kept, and run by one session of
onnxruntime. The other way was to run each node in a session of its own. With onnxruntime 1.31.1 on two cores
(2026-11-30, CPU seconds, and the most that was kept) MiniLM on 128 texts of 64 tokens took 3.5 s and 60 MB in
12 segments, and 5.0 s and 108 MB in 254 nodes, where one call of the whole graph takes 2.7 s; nudenet on 32
pictures of 320 x 320 took 3.3 s and 50 MB in 42 segments, 4.0 s and 100 MB in 365 nodes, 2.4 s as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import onnx
from onnx import TensorProto, helper

from sparse_export.errors import ArtefactError, MissingCapability, SparseExportError
from sparse_export.files import temporary_folder
from sparse_export.graph.nodes import node_name
from sparse_export.graph.passes.float16 import value_types
from sparse_export.graph.stored_tensors import Read, array_of
from sparse_export.oneshot.live_values import LiveValues, Value
from sparse_export.oneshot.parted import filled
from sparse_export.oneshot.segments import Segment
from sparse_export.oneshot.wiring import Wiring
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.runtimes.onnxruntime import provider_of, require_provider
from sparse_export.signature import Array, Feeds

__all__ = ["Walk"]

_HANDED_OVER = 1024  # bytes of a stored tensor from which on a session gets it beside the model, uncopied
_NO_MEMORY = ("bad_alloc", "failed to allocate", "out of memory")
_ONLY_FATAL = 4
_LEAST_IR = 4  # from which on stored tensors need not be inputs

Values = Mapping[str, Value]


class Walk:
    """Owns the values that are live, and the folder for those that do not fit into memory."""

    def __init__(
        self,
        model: onnx.ModelProto,
        wiring: Wiring,
        segments: Sequence[Segment],
        batches: Sequence[Feeds],
        *,
        memory_bytes: int,
        provider: str = "cpu",
        n_threads: int | None = None,
        read: Read = array_of,
    ) -> None:
        """Make ready to walk.

        Args:
            model: whose stored tensors are read when a segment is run; they may change between segments.
            wiring: of its graph.
            segments: in the order in which they will be run.
            batches: inputs by name.
            memory_bytes: bound of live values in memory.
            provider: of onnxruntime.
            n_threads: inside an operator; None for one for each core.
            read: gives the values of the stored tensors.
        """
        require_provider(provider)
        self._model, self._wiring, self._segments, self._batches = model, wiring, segments, batches
        self._provider, self._n_threads, self._read = provider, n_threads, read
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._sparse = {tensor.values.name: tensor for tensor in model.graph.sparse_initializer}
        self._optimizes = TensorProto.FLOAT8E4M3FN not in value_types(model)
        self._at = 0
        self._reads: dict[str, list[int]] = {}
        for index, segment in enumerate(segments):
            for name in (*segment.reads, *segment.drops):
                self._reads.setdefault(name, []).append(index)
        self._stack = ExitStack()
        folder = self._stack.enter_context(temporary_folder("calibration"))
        self.live = LiveValues(memory_bytes, folder, self._next_read)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def run(self, see: Callable[[int, Values], None] | None, wanted: Sequence[str] = ()) -> None:
        """Run the next segment over all batches.

        Args:
            see: gets the number of a batch and the values of `wanted`.
            wanted: values that the segment fetches, that are live, inputs or stored.

        Raises:
            SparseExportError: as `batches`.
        """
        for batch, seen in enumerate(self.batches(wanted if see is not None else ())):
            if see is not None:
                see(batch, seen)

    def batches(self, wanted: Sequence[str] = ()) -> Iterator[Values]:
        """Run the next segment, batch after batch as the caller asks for them; it has to ask for all.

        Args:
            wanted: values that the segment fetches, that are live, inputs or stored.

        Yields:
            These, by name.

        Raises:
            ArtefactError: onnxruntime cannot run a part of the graph, or not on these inputs.
            MissingCapability: there is not enough memory.
            OutputError: live values cannot be written to disk.
        """
        segment = self._segments[self._at]
        session, weights = None, None
        for batch, feeds in enumerate(self._batches):
            made: dict[str, Value] = {}
            if segment.nodes and segment.fetches:
                inputs = {name: self._value(name, batch, feeds) for name in segment.reads}
                if session is None:
                    session, weights = self._session(segment, inputs)
                made = dict(zip(segment.fetches, self._run(session, segment, inputs), strict=True))
                del inputs
            yield {name: made[name] if name in made else self._value(name, batch, feeds) for name in wanted}
            for name in segment.drops:
                self.live.drop(name, batch)
            for name in segment.keeps:
                self.live.put(name, batch, made[name])
        del session, weights  # which the session reads where they are
        self._at += 1

    def skip(self) -> None:
        """Leave out the next segment, which is a preview that nobody needs to see."""
        segment = self._segments[self._at]
        assert segment.preview
        for batch in range(len(self._batches)):
            for name in segment.drops:
                self.live.drop(name, batch)
        self._at += 1

    def _next_read(self, name: str) -> int:
        return next((at for at in self._reads.get(name, ()) if at > self._at), len(self._segments))

    def _value(self, name: str, batch: int, feeds: Feeds) -> Value:
        """A value from before the segment."""
        if name in self._wiring.inputs:
            return feeds[name]
        if name in self._wiring.stored:
            return self._read(self._stored[name] if name in self._stored else self._sparse[name])
        return self.live.get(name, batch)

    def _session(self, segment: Segment, inputs: Values) -> tuple[Any, list[Any]]:
        """A session for the segment, and the stored tensors that must not be gone before it.

        inputs: of the first batch, for types and sizes.
        """
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = _ONLY_FATAL
        options.intra_op_num_threads = self._n_threads or 0
        options.inter_op_num_threads = 1
        # An arena grows by doubling and is kept to the session's end: 0.4 GB more at the peak of a ResNet-50 on
        # 48 pictures of 224 x 224 in batches of 16, and 6.0 CPU s in place of 5.5 (onnxruntime 1.31.1, 2026-11-30).
        options.enable_cpu_mem_arena = False
        if not self._optimizes:  # its optimizations of fp8 are wrong, see runtimes/onnxruntime.py
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        model, beside = self._cut(segment, inputs)
        try:
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in beside.values()]
            options.add_external_initializers(list(beside), values)
            session = ort.InferenceSession(
                model.SerializeToString(),
                options,
                providers=[provider_of(self._provider)],
                enable_fallback=False,
            )
        except Exception as cause:  # onnxruntime's errors have no common base
            raise self._not_run(segment, cause) from cause
        return session, values

    def _run(self, session: Any, segment: Segment, inputs: Values) -> list[Value]:
        try:
            found: list[Value] = session.run(list(segment.fetches), inputs)
        except Exception as cause:  # as above
            raise self._not_run(segment, cause) from cause
        return found

    def _not_run(self, segment: Segment, cause: Exception) -> SparseExportError:
        nodes = [self._model.graph.node[index] for index in segment.nodes]
        part = f"{node_name(nodes[0])} to {node_name(nodes[-1])}" if len(nodes) > 1 else node_name(nodes[0])
        what = (
            f"onnxruntime {load_onnxruntime().__version__} cannot run the graph from {part} on the "
            f"calibration inputs: {str(cause).strip().rstrip('.')}."
        )
        if any(sign in str(cause).lower() for sign in _NO_MEMORY):
            return MissingCapability(
                what,
                expected="Enough memory for one batch was expected.",
                do="Give fewer samples a file, or take a machine with more memory.",
            )
        return ArtefactError(
            what,
            expected="A graph that onnxruntime runs on these inputs was expected.",
            do="Give inputs that the network was made for; or take --method magnitude without inputs, which "
            "runs nothing.",
        )

    def _cut(self, segment: Segment, inputs: Values) -> tuple[onnx.ModelProto, dict[str, Array]]:
        """The segment as a model, and the stored tensors that a session gets beside it."""
        cut = onnx.ModelProto(ir_version=max(self._model.ir_version, _LEAST_IR))
        cut.opset_import.extend(self._model.opset_import)
        cut.functions.extend(self._model.functions)
        graph = cut.graph
        graph.name = "segment"
        graph.node.extend(self._model.graph.node[index] for index in segment.nodes)
        beside = {}
        reads = {name for index in segment.nodes for name in self._wiring.reads[index]}
        for name in sorted(reads & self._stored.keys()):
            tensor = self._stored[name]
            array = self._read(tensor)
            if array.nbytes < _HANDED_OVER or array.dtype.kind not in "fiub":
                graph.initializer.append(filled(tensor, array))
                continue
            stand_in = graph.initializer.add(name=name, data_type=tensor.data_type, dims=tensor.dims)
            stand_in.data_location = TensorProto.EXTERNAL
            stand_in.external_data.add(key="location", value="in-memory")
            beside[name] = array
        graph.sparse_initializer.extend(one for name, one in self._sparse.items() if name in reads)
        for name, value in inputs.items():
            graph.input.append(self._declared(name, value))
        for name in segment.fetches:
            graph.output.add(name=name)
        return cut, beside

    def _declared(self, name: str, value: Value) -> onnx.ValueInfoProto:
        """The name with its type, and those sizes that are the same for all batches.

        value: of the first batch.
        """
        if isinstance(value, list):
            kind = _element_type(value[0]) if value else TensorProto.FLOAT
            return helper.make_tensor_sequence_value_info(name, kind, None)
        kind = _element_type(value)
        shapes = [
            feeds[name].shape if name in feeds else self.live.shape(name, batch)
            for batch, feeds in enumerate(self._batches)
        ]
        if any(len(shape) != value.ndim for shape in shapes):
            return helper.make_tensor_value_info(name, kind, None)
        sizes = [size[0] if len(set(size)) == 1 else None for size in zip(*shapes, strict=True)]
        return helper.make_tensor_value_info(name, kind, sizes)


def _element_type(array: Array) -> int:
    """ONNX's number of a type of NumPy."""
    return TensorProto.STRING if array.dtype.hasobject else int(helper.np_dtype_to_tensor_dtype(array.dtype))
