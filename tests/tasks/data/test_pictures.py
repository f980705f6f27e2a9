"""Pictures that are decoded when they are needed: by workers for training, slice by slice for testing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_export.errors import ArtefactError, SparseExportError
from sparse_export.formats.run import DataInfo
from sparse_export.tasks import data
from sparse_export.tasks.data import imagefolder
from sparse_export.tasks.data.imagefolder import MEAN, STD, Pictures
from sparse_export.tasks.data.pictures import Inputs, PictureLoader, workers_watched

SIZE = (12, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, 9 + 5 pictures each, of several sizes."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for part, n in (("train", 9), ("val", 5)):
        for kind in ("dark", "light"):
            (root / part / kind).mkdir(parents=True)
            for index in range(n):
                shape = (20 + 7 * index, 40 - 2 * index, 3)
                low, high = (0, 100) if kind == "dark" else (150, 256)
                pixels = rng.integers(low, high, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / kind / f"{index}.png")
    return root


@pytest.fixture
def files(folder: Path) -> Pictures:
    return imagefolder.list_pictures("noise", folder).train


def loader(files: Pictures, *, n_workers: int = 1, random_crop: bool = True, seed: int = 0) -> PictureLoader:
    return PictureLoader(files, SIZE, n_workers=n_workers, random_crop=random_crop, seed=seed, pinned=False)


def all_of(loaded: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loaded)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def wanted(epoch: int, n: int = 18, size: int = 4) -> list[list[tuple[int, int]]]:
    places = list(range(n))
    return [[(place, epoch) for place in places[start : start + size]] for start in range(0, n, size)]


def test_a_sample_of_the_training_part_has_nothing_of_the_validation_part(folder: Path) -> None:
    found = imagefolder.list_pictures("noise", folder)
    fact = DataInfo(
        name=f"imagefolder:{folder}",
        mean=MEAN,
        std=STD,
        n_train=15,
        n_validation=3,
        n_test=10,
        test_sha256=found.test.sha256(),
    )
    sample = data.load_training_sample(fact, (3, *SIZE), 100)
    assert np.array_equal(sample, Inputs(found.train, SIZE, 1.0, MEAN, STD)[:15])


def test_without_random_crops_workers_give_what_decoding_into_memory_gives(
    folder: Path, files: Pictures
) -> None:
    x, y = all_of(loader(files, random_crop=False).batches(wanted(0)))
    whole = data.load(f"imagefolder:{folder}", image_size=SIZE)
    assert torch.equal(x, whole.x_train)
    assert torch.equal(y, whole.y_train)


def test_crops_hang_on_seed_epoch_and_place_and_not_on_who_makes_them(files: Pictures) -> None:
    one = loader(files, n_workers=1)
    first, labels = all_of(one.batches(wanted(epoch=3)))
    assert first.shape == (18, 3, *SIZE)
    assert first.dtype == torch.uint8
    assert torch.equal(labels, files.labels)
    again, _ = all_of(loader(files, n_workers=2).batches(wanted(epoch=3, size=5)))
    assert torch.equal(first, again)
    later, _ = all_of(one.batches(wanted(epoch=4)))  # the same workers, asked again
    other, _ = all_of(loader(files, seed=1).batches(wanted(epoch=3)))
    assert all(not torch.equal(a, b) for a, b in zip(first, later, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_random_crops_are_of_the_picture_mirrored_half_the_time(tmp_path: Path) -> None:
    """A picture that is dark on its left and light on its right tells whether it was mirrored."""
    ramp = np.repeat(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    files = Pictures(files=(tmp_path / "ramp.png",), labels=torch.tensor([0]))
    x, _ = all_of(loader(files).batches([[(0, epoch)] for epoch in range(200)]))
    rises = (x[:, 0, 0, -1].int() - x[:, 0, 0, 0].int()) > 0
    assert 70 < int(rises.sum()) < 130
    widths = (x[:, 0, 0].int().amax(1) - x[:, 0, 0].int().amin(1)).float()
    assert widths.min() < 120  # a small part of the picture, scaled up
    assert widths.max() > 220  # nearly all of it


def test_a_picture_that_cannot_be_decoded_is_named_by_the_worker_that_met_it(
    folder: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    good = imagefolder.list_pictures("noise", folder).train
    files = Pictures(files=(*good.files[:3], bad), labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ArtefactError, match=r"bad\.png cannot be decoded as a picture") as caught:
        all_of(loader(files).batches([[(0, 0), (1, 0)], [(2, 0), (3, 0)]]))
    assert caught.value.do == "Get the file again, or remove it."


# torch's signal may strike while something is finalised, where Python can only note it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_ends_in_an_error_that_says_so(files: Pictures) -> None:
    many = loader(files)
    batches = many.batches([[(place % 18, 0)] for place in range(4000)])
    next(batches)
    workers: Any = many._loader._iterator
    with pytest.raises(SparseExportError, match="A process that reads pictures ended"), workers_watched():
        os.kill(workers._workers[0].pid, signal.SIGKILL)
        all_of(batches)


def test_a_signal_that_comes_while_a_broken_connection_is_looked_at_is_told_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> Any:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("sparse_export.tasks.data.pictures.traceback.extract_tb", interrupted)
    with (
        pytest.raises(SparseExportError, match=r"ended: DataLoader worker .pid 7. is killed"),
        workers_watched(),
    ):
        raise ConnectionResetError


def test_the_signal_that_follows_a_broken_connection_is_waited_for() -> None:
    """Else it would end the program wherever that is by then."""

    def tell(*_: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGALRM, tell)
    try:
        with (
            pytest.raises(SparseExportError, match=r"ended: DataLoader worker .pid 7. is killed"),
            workers_watched(),
        ):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            raise ConnectionResetError
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_workers_do_not_draw_from_the_random_numbers_of_the_training(files: Pictures) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    all_of(loader(files).batches(wanted(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_test_set_of_a_folder_is_decoded_slice_by_slice_to_the_same_values(folder: Path) -> None:
    whole = data.load(f"imagefolder:{folder}", image_size=SIZE)
    fact = DataInfo(
        name=f"imagefolder:{folder}",
        mean=MEAN,
        std=STD,
        n_train=18,
        n_validation=0,
        n_test=10,
        test_sha256=data.test_sha256(whole),
    )
    inputs, labels = data.load_test_set(fact, (3, *SIZE))
    assert isinstance(inputs, Inputs)
    assert (inputs.shape, len(inputs)) == ((10, 3, *SIZE), 10)
    expected = data.normalise(whole.x_test, MEAN, STD).numpy()
    assert np.array_equal(np.concatenate([inputs[0:4], inputs[4:8], inputs[8:99]]), expected)
    assert np.array_equal(labels, whole.y_test.numpy())


def test_the_hash_of_pictures_is_that_of_their_files(folder: Path, tmp_path: Path) -> None:
    files = imagefolder.list_pictures("noise", folder).test
    digest = files.sha256()
    assert digest == data.test_sha256(data.load(f"imagefolder:{folder}", image_size=(8, 8)))
    assert digest == data.test_sha256(data.load(f"imagefolder:{folder}", image_size=(16, 16)))
    changed = tmp_path / files.files[0].parent.name / files.files[0].name
    changed.parent.mkdir()
    changed.write_bytes(files.files[0].read_bytes() + b"\0")
    assert Pictures(files=(changed, *files.files[1:]), labels=files.labels).sha256() != digest


def test_a_crop_ratio_cuts_the_middle_of_a_larger_picture(tmp_path: Path) -> None:
    """64x64 scaled to 16x16 / 0.5 = 32x32, of which the middle 16x16 is a quarter of the area."""
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[16:48, 16:48] = 255
    Image.fromarray(picture).save(tmp_path / "frame.png")
    inner = imagefolder.center_crop(tmp_path / "frame.png", (16, 16), 0.5).float()
    assert inner[:, 1:-1, 1:-1].mean() > 254
    assert imagefolder.center_crop(tmp_path / "frame.png", (16, 16)).float().mean() < 80


def test_a_connection_that_breaks_is_a_workers_end_only_where_a_batch_is_handed_over() -> None:
    def rebuild_storage_fd() -> None:  # the name of the function of torch that maps a batch's memory
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(SparseExportError, match="A process that reads pictures ended"), workers_watched():
        rebuild_storage_fd()
    with pytest.raises(ConnectionResetError), workers_watched():
        raise ConnectionResetError(104, "Connection reset by peer")
