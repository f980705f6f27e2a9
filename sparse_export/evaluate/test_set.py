"""The samples that a bundle is scored on: those on record, or those that a caller names."""

from __future__ import annotations

from pathlib import Path

from sparse_export import trust as trust_store
from sparse_export.errors import UsageError
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE, Bundle
from sparse_export.formats.run import AGREEMENT, DataInfo
from sparse_export.tasks.agreement import judge_named
from sparse_export.tasks.data import own, require_given
from sparse_export.tasks.data.picture_settings import PictureSettings
from sparse_export.tasks.labels import require_outputs
from sparse_export.tasks.named_data import open_named
from sparse_export.tasks.samples import LabelledSamples, labelled, load_test_set
from sparse_export.tasks.shipped import Classification, is_own, task_named
from sparse_export.tasks.task import Task
from sparse_export.trust import TrustedDigests

__all__ = ["is_scored", "judge_of", "require_possible_task", "task_of", "test_set_of"]

_OTHER_TASK = (
    "Name another task by --task, or leave the data out: outputs are then held against a dense bundle."
)


def is_scored(bundle: Bundle, data: str | None) -> bool:
    """Are there targets that the bundle can be scored on?"""
    return data is not None or (bundle.info.data is not None and bundle.info.data.n_test > 0)


def task_of(bundle: Bundle, task: str | None, trust: TrustedDigests) -> Task:
    """The task that a caller names, or that of the bundle.

    Args:
        bundle: which names one.
        task: a caller's, which is the caller's own code; None for that of the bundle.
        trust: SHA-256 of a manifest whose task may be imported.

    Raises:
        UsageError: the bundle has no task with a score, or the task cannot be imported.
        NotTrustedError: nobody vouches for the bundle's own task.
    """
    if task is not None:
        return task_named(task)
    name = bundle.info.task.name
    if name == AGREEMENT.name:
        raise UsageError(
            f"{bundle.path} names no task, so nothing tells how its outputs are scored.",
            do="Name one by --task, like classification, regression or package.module:task.",
        )
    if is_own(name):
        _require_trusted(bundle, f"The task {name}", trust)
    return task_named(name)


def judge_of(bundle: Bundle, task: str | None, data: str | None) -> Task | None:
    """A task of the caller's own by which a bundle without targets is held against the dense one.

    Args:
        bundle: that is to be scored.
        task: that the caller names.
        data: likewise.

    Raises:
        UsageError: its score does not say how far two networks agree.
    """
    return None if is_scored(bundle, data) else judge_named(task)


def require_possible_task(bundle: Bundle, task: Task) -> None:
    """Check, before anything runs, that a network gives what its task scores.

    Args:
        bundle: of the network.
        task: what it is for.

    Raises:
        UsageError: a classification of a network that gives no scores of classes.
    """
    if isinstance(task, Classification):
        require_outputs(bundle.info.signature.n_classes, f"The network of {bundle.path}", do=_OTHER_TASK)


def test_set_of(
    bundle: Bundle,
    *,
    task: str | None = None,
    data: str | None = None,
    data_dir: str | Path | None = None,
    trust: TrustedDigests = None,
    pictures: PictureSettings | None = None,
) -> LabelledSamples | None:
    """The samples that a bundle is scored on.

    Args:
        bundle: whose network takes them.
        task: what it is for; None for what the bundle says.
        data: `npz:FILE` with an array for each input and one `targets`, `package.module:data` with a part
            `test`, or `imagefolder:DIR`; None for the data on record.
        data_dir: where data sets lie, and where a relative FILE starts.
        trust: SHA-256 of a manifest whose own code may be imported.
        pictures: how those of `imagefolder:DIR` become inputs; of the data on record the number of workers
            alone, for the record has the rest.

    Returns:
        The samples; None where no data are named, and none with a test part are on record.

    Raises:
        UsageError: the network, the data or the targets do not fit the task.
        DataNotFound: the data on record are not there.
        ArtefactError: they are damaged, or not those on record.
        NotTrustedError: nobody vouches for code that the bundle names.
    """
    info, network = bundle.info, f"The network of {bundle.path}"
    if not is_scored(bundle, data):
        if task is not None and not is_own(task):
            raise UsageError(
                f"{bundle.path} names no data set with test samples to score the task {task} on.",
                do="Give --data npz:FILE or --data package.module:data.",
            )
        return None
    known = task_of(bundle, task, trust)
    if data is not None and not _is_recorded(info.data, data, pictures):
        require_given(data, None if data_dir is None else Path(data_dir))
        raw = info.folded if data.startswith("imagefolder:") else None
        signature = info.signature if raw is None else info.network_signature
        found = open_named(data, signature, data_dir, pictures, None if raw is None else raw.dtype)
        return labelled(
            found.samples, found.targets, known, info.signature, of=data, network=network, do=_OTHER_TASK
        )
    assert info.data is not None
    if own.is_own(info.data.name):
        _require_trusted(bundle, f"The data {info.data.name}", trust)
    return load_test_set(
        info.data,
        info.network_signature,
        data_dir,
        task=known,
        network=network,
        do=_OTHER_TASK,
        workers=0 if pictures is None else pictures.workers,
        raw=None if info.folded is None else info.folded.dtype,
    )


test_set_of.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it where a test imports it


def _is_recorded(info: DataInfo | None, data: str, pictures: PictureSettings | None) -> bool:
    """Are these the pictures on record, whose settings the record has?"""
    if info is None or info.name != data or not data.startswith("imagefolder:"):
        return False
    return pictures is None or pictures == PictureSettings(workers=pictures.workers)


def _require_trusted(bundle: Bundle, what: str, trust: TrustedDigests) -> None:
    trust_store.require(sha256_file(bundle.path / BUNDLE_FILE), f"{what} in {bundle.path}", trusted=trust)
