"""Bundles of what is no run yet: an ONNX file, or a network by its name, through a dense run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sparse_export.building.dense_baseline import TimedEngines
from sparse_export.building.engines import Engines
from sparse_export.building.golden import write_golden
from sparse_export.building.graph import golden_of_graph, graph_as_it_is
from sparse_export.building.manifest import bundle_info, layers_document
from sparse_export.building.model_files import graph_files
from sparse_export.engines.precision import precision_of
from sparse_export.errors import UsageError
from sparse_export.files import temporary_folder, write_json
from sparse_export.formats.bundle import Bundle, save_bundle_info
from sparse_export.formats.layers import LAYERS_FILE
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import RUN_FILE
from sparse_export.oneshot.graph_source import Told, graph_source, is_graph_file, source_of_file
from sparse_export.oneshot.graph_steps import dense_run_of
from sparse_export.oneshot.steps import dense_torch_run
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.tasks.inputs import read_inputs, with_seen_ranges

__all__ = ["bundle_at", "require_file_for", "run_at"]


def run_at(
    model: str | Path,
    *,
    weights: str | None = None,
    told: Told | None = None,
    input_shape: Sequence[int] | None = None,
    data: str | None = None,
    data_dir: Path | None = None,
    run_folder: str | Path | None = None,
    trust: str | None = None,
    pictures: PictureSettings | None = None,
) -> Path:
    """Find the run to build, and write a dense one where an ONNX file or a network's name was given.

    Args:
        model: folder of a run, an ONNX file, a known network, `timm:NAME` or `package.module:factory`.
        weights: as `sparsify` takes it, for a network by name.
        told: of the inputs of a graph.
        input_shape: of one sample, of a torch network with one input of floats.
        data: a data set that the network by name is scored on, and that the run then names.
        data_dir: where the data sets lie.
        run_folder: of the dense run; `runs/NAME-dense` by default. One of the same network that stands there
            is taken.
        trust: digest of a run's `run.json`.
        pictures: how those of a folder become inputs.

    Returns:
        The folder of the run.

    Raises:
        SparseExportError: as `sparsify` raises of its source.
    """
    path = Path(model)
    if (path / RUN_FILE).is_file() or (path.is_dir() and not is_graph_file(path)):
        if weights is not None:
            raise UsageError(
                f"--weights {weights} was given for the run {path}, which holds its weights.",
                do="Leave it out.",
            )
        return path
    if not path.exists() and len(path.parts) > 1 and not is_graph_file(path) and ":" not in str(model):
        raise UsageError(
            f"{path} does not exist.",
            do="Give a run, which `sparse-export train` and `sparsify` make; an .onnx file; or the name of a "
            "network with --weights.",
        )
    name = path.name.removesuffix(".onnx").replace(":", "-")
    folder = Path(run_folder) if run_folder is not None else Path("runs") / f"{name}-dense"
    told = told or Told()
    source = graph_source(
        str(model),
        told,
        weights=weights,
        input_shape=input_shape,
        seed=0,
        trust=trust,
        in_torch=data is not None,
    )
    if source is None:
        return dense_torch_run(
            *(str(model), folder),
            weights=weights,
            input_shape=input_shape,
            data=data,
            data_dir=data_dir,
            pictures=pictures,
        ).path
    if data is not None:
        raise UsageError(
            f"--data {data} was given, and {source.name} is taken as a graph.",
            do="Leave it out: without labels its outputs are the score.",
        )
    if told.inputs is not None:
        found = read_inputs(told.inputs, told.of_inputs(source.signature))
        source = replace(source, signature=with_seen_ranges(source.signature, found))
    return dense_run_of(source, folder).path


def require_file_for(told: Told, paths: Sequence[str | Path]) -> None:
    """Check that what is told of inputs is told of an ONNX file: a bundle has it on record.

    Args:
        told: of the inputs.
        paths: bundles and ONNX files.

    Raises:
        UsageError: axes or sizes are told, and none of these is a file.
    """
    if (told.axes or told.sizes) and not any(is_graph_file(one) and Path(one).is_file() for one in paths):
        option = "--axes" if told.axes else "--size"
        raise UsageError(
            f"{option} was given, and {' and '.join(map(str, paths))} "
            f"{'are bundles' if len(paths) > 1 else 'is a bundle'}.",
            expected=f"{option} is for ONNX files: a bundle has its own sizes on record.",
            do=f"Leave {option} out, or build the bundle with it.",
        )


@contextmanager
def bundle_at(path: str | Path, told: Told | None = None) -> Iterator[Path]:
    """A bundle's folder as it is, or an ONNX file as a bundle in a temporary folder, for the time of a block.

    The file itself is the bundle's `model.onnx`: nothing is rewritten.

    Args:
        path: of a bundle, or of an ONNX file.
        told: of the inputs of the file.

    Raises:
        UsageError: the file's inputs cannot be told.
        ArtefactError: it is no ONNX file that onnxruntime runs.
    """
    if not (is_graph_file(path) and Path(path).is_file()):
        yield Path(path)
        return
    with temporary_folder() as folder:
        yield _bundle_of_file(Path(path), folder / Path(path).name, told or Told()).path


def _bundle_of_file(path: Path, folder: Path, told: Told) -> Bundle:
    source, samples = source_of_file(path, told), None
    if told.inputs is not None:
        found = read_inputs(told.inputs, source.signature)
        source = replace(source, signature=with_seen_ranges(source.signature, found))
        samples = found.batches[0]
    run = dense_run_of(source, folder.with_name(f"{folder.name}-run"))
    golden = golden_of_graph(path, source.model, source.signature, samples)
    graph = graph_as_it_is(run.info.layers, source.model, source.signature, golden)
    folder.mkdir(parents=True)
    files = graph_files(path, folder)
    written = write_golden(folder, golden)
    nothing = Engines(infos=(), files=(), layers={}, failures={})
    untimed = TimedEngines(times={}, files=(), failures={})
    write_json(folder / LAYERS_FILE, layers_document(graph.layers, nothing, untimed))
    info = bundle_info(
        run,
        graph,
        golden=written,
        precision=precision_of(source.model),
        built=nothing,
        pattern=None,
        files=file_infos(folder, (*files, *written.files, LAYERS_FILE)),
    )
    save_bundle_info(folder, info)
    return Bundle(path=folder, info=info)
