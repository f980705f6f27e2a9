"""The steps of sparsify: original, permuted, sparsified, fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.files import staged_folder, write_json
from sparse_export.formats.run import (
    AGREEMENT,
    CLASSIFICATION,
    RUN_FILE,
    WEIGHTS_FILE,
    DenseInfo,
    ModelInfo,
    Run,
    RunInfo,
    TaskInfo,
    open_run,
    read_run_info,
)
from sparse_export.oneshot.arguments import (
    data_name,
    require_distillation,
    require_numbers,
    require_plan_for,
)
from sparse_export.oneshot.bound import bound_of, require_scored, with_answers_of_dense
from sparse_export.oneshot.choosing import Progress
from sparse_export.oneshot.costs import Finished
from sparse_export.oneshot.fine_tuning import fine_tuned, require_patterns
from sparse_export.oneshot.graph_inputs import scoring_of
from sparse_export.oneshot.graph_pruning import CALIBRATION_MEMORY
from sparse_export.oneshot.graph_run import dense_folder, dense_folder_taken
from sparse_export.oneshot.graph_source import Told, graph_source
from sparse_export.oneshot.graph_state import remove_state, state_folder
from sparse_export.oneshot.graph_steps import sparsify_source
from sparse_export.oneshot.layers import require_method
from sparse_export.oneshot.pipeline import CALIBRATION_BATCH, Work
from sparse_export.oneshot.recovery import NONE, recovery_from_text
from sparse_export.oneshot.report import REPORT_FILE, SparsifyReport, method_name, promised, why_dense
from sparse_export.oneshot.source import require_weights, run_of
from sparse_export.oneshot.torch_choice import choose
from sparse_export.oneshot.torch_work import torch_work
from sparse_export.sparsity.pattern import pattern_from_text
from sparse_export.tasks.agreement import judge_named
from sparse_export.tasks.class_names import with_class_names
from sparse_export.tasks.data import own, require_given
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.tasks.scores import MaxDrop
from sparse_export.train.layers import layer_facts
from sparse_export.train.methods.dense import DENSE
from sparse_export.train.network import n_threads_for
from sparse_export.train.observer import Observer
from sparse_export.train.record import n_entries, new_run_info
from sparse_export.train.run_folder import (
    claimed_run,
    finish_run,
    require_empty,
    weights_sha256,
    write_run_info,
)
from sparse_export.train.stopping import cpu_settings
from sparse_export.train.teacher import OUTPUTS, weights_of
from sparse_export.train.user_run import tensors_in

__all__ = [
    "CALIBRATION_SAMPLES",
    "Sparsified",
    "data_and_task",
    "dense_torch_run",
    "is_fed_by_loader",
    "sparsify",
    "task_of",
]

CALIBRATION_SAMPLES = 512


@dataclass(frozen=True, kw_only=True)
class Sparsified:
    """The finished run, and what was done to get it."""

    run: Run
    report: SparsifyReport


def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    pattern: str = "2:4",
    weights: str | None = None,
    method: str = "magnitude",
    permute: bool = False,
    data: str | None = None,
    data_dir: Path | None = None,
    task: str | None = None,
    calibration_samples: int = CALIBRATION_SAMPLES,
    finetune: int = 0,
    moving: bool = False,
    keep_dense: Sequence[str] = (),
    planned_dense: Mapping[str, str] | None = None,
    norms: bool = False,
    errors: bool = False,
    input_shape: Sequence[int] | None = None,
    inputs: str | Path | None = None,
    axes: Sequence[str] = (),
    sizes: Sequence[str] = (),
    calibration_memory: int = CALIBRATION_MEMORY,
    seed: int = 0,
    device: str = "auto",
    trust: str | None = None,
    observer: Observer | None = None,
    finished: Finished | None = None,
    max_drop: MaxDrop | None = None,
    timings: str | Path | None = None,
    scored: Progress | None = None,
    pictures: PictureSettings | None = None,
    recover: str = NONE,
    distill: str | None = None,
) -> Sparsified:
    """Make a trained network N:M sparse and write it as a finished run, ready for `build`.

    model: folder of a finished run, a known network, `timm:NAME`, `package.module:factory`, or an ONNX file.
    weights: `pretrained`, `random`, or a file of them (safetensors, or torch's with nothing but tensors);
    needed for a known network, None for a run and for a factory that loads its own.  method: `magnitude`;
    `activation` (|w| times the norm of its input) and `reconstruction` (weights corrected so that outputs
    stay close) need data.  permute: look for an order of channels first that loses less.  data: a name as in
    a recipe, or `none`; a run's own by default; of a network that is pruned as a graph what its score is
    measured on, see `sparse_export.tasks.named_data.open_named`.  task: what it is for; that of the run, or
    classification, by default.  calibration_samples: of its training part.  finetune: epochs
    of training afterwards, masks fixed, or with `moving` following momentum under the pattern.  keep_dense:
    shell patterns of parameters or layers that stay as they are.  planned_dense: weights that a plan leaves
    dense, with its reasons (`sparse_export.plan.planning.dense_by_plan`); it decides about small layers too.
    norms: re-estimate batch norms in the walk, or correct bias and scale of channels where there are none; kept
    where that helps on samples that no weight was calibrated on.  errors: measure the error of each
    layer on the calibration data by `magnitude` too, which takes a walk over them.  input_shape: of one sample, where
    neither network nor data tell.  inputs: a file or folder of real inputs without labels, see
    `sparse_export.tasks.inputs.read_inputs`, in place of data; the network is then pruned as a graph, in one
    walk, and so is an ONNX file, one of a run that holds a graph, and a factory with an `example_inputs()`
    beside it. The dense network is left as a run too, in the folder's name with `-dense` behind it. A killed
    call goes on at the last finished layer.  axes, sizes: names for the axes of an ONNX file's inputs,
    and examples of its free sizes, as --axes and --size take them.  calibration_memory: bytes of the values
    that the walk keeps in memory.  finished: told of each layer as the walk
    finishes it, with the share of the work that is done.  pictures: how those of a folder become inputs.  seed: of everything that is drawn.  trust: SHA-256 of the run's
    `run.json`, needed once for a run that names a factory and was made elsewhere.  max_drop: what may be lost,
    in the unit of the score or as a share of it like `2%`: as many layers get the pattern as that allows on
    samples that are held back, and `report.choice` says which, at what cost, and why not the others.
    timings: file of `plan --keep-timings`, by which layers are chosen for the time that they save.  scored:
    told of each score of the choice.  recover: steps that bring the pruned layers back towards the dense
    network without labels, `none`, `auto` or their names with commas between them, see
    `sparse_export.oneshot.recovery.Recovery`; they are kept where they help on samples that no weight was
    calibrated on.  distill: `outputs` to fine-tune towards the dense network's outputs, `features` towards
    those of its sparse layers too; labels are not looked at then.

    A run that was trained sparse stays zero where it is zero. Interrupted fine-tuning goes on with
    `train(None, out, resume=True)`.
    Raises UsageError, FolderInUse, DataNotFound, MissingCapability (weights that cannot be fetched),
    ArtefactError, NotTrustedError, GateFailed (a permutation that changes the function, or no layer can be
    sparse within max_drop), OutputError, and what training raises.
    """
    out, model = Path(out), str(model)
    asked = pattern_from_text(pattern)
    chosen = require_method(method)
    require_plan_for(asked, planned_dense)
    recovery = recovery_from_text(recover)
    require_distillation(distill, finetune)
    require_numbers(calibration_samples, finetune, seed)
    data, task = data_and_task(model, data, task, data_dir)
    told = Told(
        axes=axes, sizes=sizes, inputs=None if inputs is None else Path(inputs), data=data, data_dir=data_dir
    )
    bound = bound_of(
        max_drop, timings, scored, pattern=asked, has_plan=planned_dense is not None, norms=norms
    )
    judge = judge_named(task) if data is None and inputs is not None else None
    if bound is not None and data is None and inputs is not None:
        bound, task = with_answers_of_dense(bound, task)
    task = None if judge is not None else task
    in_torch = finetune > 0 or moving or norms or is_fed_by_loader(model, data)
    graph = graph_source(
        model, told, weights=weights, input_shape=input_shape, seed=seed, trust=trust, in_torch=in_torch
    )
    if graph is not None:
        joint = recovery is not None and recovery.joint
        _require_no_training(graph.name, finetune=finetune, moving=moving, joint=joint)
        made, found = sparsify_source(
            graph,
            out,
            pattern=asked,
            method=chosen,
            inputs=told.inputs,
            calibration_samples=calibration_samples,
            keep_dense=keep_dense,
            planned_dense=planned_dense,
            memory_bytes=calibration_memory,
            seed=seed,
            observer=finished,
            scoring=scoring_of(
                graph,
                task,
                data,
                data_dir,
                pictures,
                calibration_samples=calibration_samples,
            ),
            errors=errors,
            bound=bound,
            recovery=recovery,
            permute=permute,
            norms=norms,
            judge=judge,
        )
        return Sparsified(run=made, report=found)
    run = run_of(model)
    require_weights(model, run, weights)
    task = task or task_of(run)
    data = data_name(
        data,
        run,
        chosen,
        finetune=finetune,
        moving=moving,
        norms=norms,
        errors=errors,
        recovers=recovery is not None,
    )
    if bound is not None:
        require_scored(data)
    with claimed_run(out), state_folder(out) as state:
        work, recipe = torch_work(
            *(model, run),
            weights=weights,
            data=data,
            data_dir=data_dir,
            task=task,
            input_shape=input_shape,
            seed=seed,
            device=device,
            pictures=pictures,
            trust=trust,
            epochs=finetune,
            calibration_samples=calibration_samples,
            calibration_memory=calibration_memory,
            recovery=recovery,
        )
        caps, reasons = work.caps(asked, keep_dense, planned_dense)
        if moving:
            require_patterns(work.masks, caps)
        n_threads = n_threads_for(work.network, CALIBRATION_BATCH if recipe is None else recipe.batch_size)
        with cpu_settings(n_threads):
            work.stage("original", 0.0)
            dense = _dense_of(work, run, out)
            permuted = work.permute(caps, chosen) if permute else None
            teacher = weights_of(work.network) if distill else None  # in the same order of channels
            if bound is not None:
                caps, left = choose(work, caps, chosen, bound, finished)
                reasons |= left
            layers = work.prune(
                caps, reasons, chosen, permuted, norms=norms, errors=errors, observer=finished, state=state
            )
        report = work.report(
            layers, permuted, pattern=asked, method=chosen, permute=permute, moving=moving, epochs=finetune
        )
        if recipe is None or not finetune:
            return Sparsified(run=_written(work, report, run, n_threads, out, dense), report=report)
        remove_state(state)
        trained, report = fine_tuned(
            *(work, report, recipe, out),
            moving=moving,
            data_dir=data_dir,
            device=device,
            observer=observer,
            teacher=teacher,
            distill=distill or OUTPUTS,
        )
        trained = replace(trained, info=replace(trained.info, dense=dense, task=_task_info(work, run)))
        write_run_info(trained.path, trained.info)
        return Sparsified(run=trained, report=report)


def dense_torch_run(
    model: str,
    out: Path,
    *,
    weights: str | None,
    input_shape: Sequence[int] | None = None,
    data: str | None = None,
    data_dir: Path | None = None,
    task: str | None = None,
    seed: int = 0,
    device: str = "auto",
    pictures: PictureSettings | None = None,
) -> Run:
    """Write a torch network by its name as a dense run, with its score where a data set is given.

    Args:
        model: a known network, `timm:NAME` or `package.module:factory`.
        out: folder of the run; one of the same weights that stands there is taken.
        weights: as of `sparsify`.
        input_shape: of one sample, where neither network nor data tell.
        data: a data set; None for none.
        data_dir: where it lies.
        task: what the network is for; None for classification.
        seed: of random weights.
        device: to score it on.
        pictures: how those of a folder become inputs.

    Raises:
        SparseExportError: as `sparsify` raises of its source.
    """
    if data is not None:
        require_given(data, data_dir)
    require_weights(model, None, weights)
    work, _ = torch_work(
        *(model, None),
        weights=weights,
        data=data,
        data_dir=data_dir,
        task=task or CLASSIFICATION.name,
        input_shape=input_shape,
        seed=seed,
        device=device,
        pictures=pictures,
    )
    work.stage("original", 0.0)
    return _dense_run(work, out)


def _dense_run(work: Work, out: Path) -> Run:
    """Write the network, as it is now, as a dense run; or take that of the same weights which is there."""
    digest = weights_sha256(work.network)
    if (out / RUN_FILE).is_file():
        run = open_run(out)
        if run.info.dense is not None and run.info.dense.sha256 == digest:
            return run
    stage = work.stages[0]
    with claimed_run(out):
        try:
            require_empty(out)
        except UsageError as cause:
            is_run = (out / RUN_FILE).is_file()
            what = "another network, or other weights of this one" if is_run else "something else"
            raise dense_folder_taken(out, what) from cause
        info = new_run_info(
            n_parameters=n_entries(work.network),
            method=DENSE.name,
            model=ModelInfo(name=work.source.name),
            signature=work.signature(),
            data=None if work.loader is None else work.loader.info,
            task=_task_info(work, None),
            layers=layer_facts(work.network, {}),
            validation=stage.validation,
            test=stage.test,
            seed=work.seed,
            n_threads=1,
            device=work.device.type,
            dense=DenseInfo(sha256=digest, path=None, test=stage.test),
        )
        with staged_folder(out) as staged:
            run = finish_run(staged, work.network, {}, info)
        return replace(run, path=out)


def _is_scored_run(model: str) -> bool:
    """Is MODEL a run of a torch network with data on record, whose score can be measured again?"""
    folder = Path(model)
    if not (folder / RUN_FILE).is_file():
        return False
    info = read_run_info(folder)
    return info.data is not None and info.model.form == "torch"


def is_fed_by_loader(model: str, data: str | None) -> bool:
    """Is MODEL pruned as a torch network because data are named, or on record, and it has one input?"""
    if data in (None, "none") and not _is_scored_run(model):
        return False
    return not _has_several_inputs(model) and not (own.is_own(data or "") and _is_told_several(model))


def _has_several_inputs(model: str) -> bool:
    """Is MODEL a run of a network with other inputs than one of floats, which is pruned as a graph?"""
    folder = Path(model)
    return (folder / RUN_FILE).is_file() and read_run_info(folder).signature.only_input is None


def _is_told_several(model: str) -> bool:
    """Is MODEL a factory whose `example_inputs` are others than one tensor of floats?"""
    beside = models.example_beside(model) if models.is_factory(model) else None
    if beside is None:
        return False
    tensors = list(tensors_in(beside[0]()))
    return len(tensors) != 1 or not tensors[0].is_floating_point()


def data_and_task(
    model: str, data: str | None, task: str | None, data_dir: Path | None
) -> tuple[str | None, str | None]:
    """The data and the task that are named, or those of a torch run with several inputs that has both on record.

    Raises:
        UsageError: a path among the data leads nowhere.
    """
    if _has_several_inputs(model) and data != "none":
        info = read_run_info(Path(model))
        if info.data is not None and info.model.form == "torch":
            data, task = data or info.data.name, task or info.task.name
    if data is not None:
        require_given(data, data_dir)
    return data, task


def task_of(run: Run | None) -> str:
    """The task of a run; classification where it names none."""
    known = CLASSIFICATION.name if run is None else run.info.task.name
    return CLASSIFICATION.name if known == AGREEMENT.name else known


def _require_no_training(name: str, *, finetune: int, moving: bool, joint: bool) -> None:
    """Raise UsageError for what is done to torch networks with a data set alone."""
    options = {
        "--finetune": finetune > 0,
        "--moving": moving,
        "--recover joint": joint,
    }
    for option, given in options.items():
        if given:
            raise UsageError(
                f"{option} was given, and {name} is pruned as a graph.",
                expected="It takes real inputs by --inputs, and is not trained.",
                do=f"Leave {option} out; give a torch network and a data set to train.",
            )


def _dense_of(work: Work, run: Run | None, out: Path) -> DenseInfo:
    """The dense network that a sparse one is made from: left as a run, unless it came from one."""
    test = work.stages[0].test
    if run is not None:
        return DenseInfo(sha256=run.info.files[WEIGHTS_FILE].sha256, path=str(run.path.resolve()), test=test)
    left = _dense_run(work, dense_folder(out))
    return DenseInfo(sha256=left.info.files[WEIGHTS_FILE].sha256, path=str(left.path.resolve()), test=test)


def _task_info(work: Work, run: Run | None) -> TaskInfo:
    """What the network is for, with the names of classes that its run has, else the data."""
    names = () if run is None else run.info.task.labels
    if not names and work.loader is not None:
        names = work.loader.class_names
    return with_class_names(TaskInfo(name=work.task.name), names, work.n_outputs)


def _written(
    work: Work, report: SparsifyReport, run: Run | None, n_threads: int, out: Path, dense: DenseInfo
) -> Run:
    """Write the network as a run that was not trained further, with the report."""
    info = replace(_run_info(work, report, run, n_threads), dense=dense)
    with staged_folder(out) as stage:
        finished = finish_run(stage, work.network, work.masks, info)
        write_json(stage / REPORT_FILE, asdict(report))
    return replace(finished, path=out)


def _run_info(work: Work, report: SparsifyReport, run: Run | None, n_threads: int) -> RunInfo:
    """Of a run that was not trained."""
    return new_run_info(
        n_parameters=n_entries(work.network),
        method=method_name(report),
        model=ModelInfo(name=report.model),
        signature=work.signature(),
        data=None if work.loader is None else work.loader.info,
        task=_task_info(work, run),
        layers=layer_facts(work.network, work.masks, promised(report), why_dense(report)),
        validation=report.stages[-1].validation,
        test=report.stages[-1].test,
        seed=report.seed,
        n_threads=n_threads,
        device=work.device.type,
        seconds=sum(stage.seconds for stage in report.stages),
        recipe=None if run is None else run.info.recipe,
    )
