"""Folders of pictures in ImageNet's layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparse_export.errors import ArtefactError, DataNotFound, UsageError
from sparse_export.tasks import data
from sparse_export.tasks.data import imagefolder

COLOURS = {"apple": (200, 20, 30), "banana": (220, 210, 10), "cherry": (90, 0, 40)}


@pytest.fixture
def fruit(tmp_path: Path) -> Path:
    """Three classes of one colour each, 4 + 2 pictures a class, of various shapes and kinds."""
    root = tmp_path / "fruit"
    sizes = [(40, 30), (30, 40), (33, 33), (100, 20)]
    for part, n in (("train", 4), ("val", 2)):
        for kind, colour in COLOURS.items():
            folder = root / part / kind
            folder.mkdir(parents=True)
            for index in range(n):
                suffix = ("png", "jpg", "JPEG", "bmp")[index]
                Image.new("RGB", sizes[index], colour).save(folder / f"{index}.{suffix}")
    return root


def load(root: Path, size: tuple[int, int] | None = None) -> data.DataSet:
    return data.load(f"imagefolder:{root}", image_size=size)


def test_pictures_of_any_shape_come_in_the_default_size_with_imagenets_statistics(fruit: Path) -> None:
    got = load(fruit)
    assert got.x_train.shape == (12, 3, 64, 64) and got.x_test.shape == (6, 3, 64, 64)
    assert got.x_train.dtype == torch.uint8
    assert (got.n_classes, got.class_names) == (3, ("apple", "banana", "cherry"))
    assert (got.mean, got.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_labels_follow_the_sorted_class_folders(fruit: Path) -> None:
    got = load(fruit, (16, 16))
    for x, y in ((got.x_train, got.y_train), (got.x_test, got.y_test)):
        colours = torch.tensor(list(COLOURS.values()))[y]
        assert (x.float().mean((2, 3)) - colours).abs().max() < 4  # JPEG loses a little


def test_the_order_mixes_the_classes_and_is_the_same_for_a_copy_elsewhere(
    fruit: Path, tmp_path: Path
) -> None:
    got = load(fruit, (8, 8))
    assert got.y_train.bincount().tolist() == [4, 4, 4]
    assert got.y_train.tolist() != sorted(got.y_train.tolist())
    copy = shutil.copytree(fruit, tmp_path / "copy")
    assert torch.equal(load(copy, (8, 8)).x_train, got.x_train)


@pytest.mark.parametrize("size", [(20, 20), (16, 36), (50, 11), (60, 90)])
def test_the_middle_is_cut_out_without_distortion(size: tuple[int, int], tmp_path: Path) -> None:
    """A disc in the middle stays a disc in the middle, wherever the shorter side lies."""
    rows, columns = np.mgrid[:120, :180]
    disc = ((rows - 59.5) ** 2 + (columns - 89.5) ** 2 < 30**2).astype(np.uint8) * 255
    for part in ("train", "val"):
        (tmp_path / part / "disc").mkdir(parents=True)
        Image.fromarray(disc).save(tmp_path / part / "disc" / "0.png")
    got = load(tmp_path, size)
    assert got.input_shape == (3, *size)
    scale = max(size[0] / 120, size[1] / 180)
    image = got.x_train[0, 0].double() / 255
    assert image[size[0] // 2].sum() == pytest.approx(min(60 * scale, size[1]), abs=1.5)
    assert image[:, size[1] // 2].sum() == pytest.approx(min(60 * scale, size[0]), abs=1.5)
    assert (image - image.flip(0, 1)).abs().max() < 0.3


def test_grey_palette_and_transparent_pictures_become_rgb(fruit: Path) -> None:
    folder = fruit / "train" / "apple"
    Image.new("L", (20, 20), 77).save(folder / "grey.png")
    Image.new("P", (20, 20)).save(folder / "palette.gif")
    Image.new("RGBA", (20, 20), (1, 2, 3, 128)).save(folder / "transparent.png")
    got = load(fruit, (8, 8))
    means = {tuple(image.float().mean((1, 2)).round().int().tolist()) for image in got.x_train}
    assert {(77, 77, 77), (1, 2, 3)} <= means
    assert got.y_train.bincount().tolist() == [7, 4, 4]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_pictures_of_16_bits_keep_their_greys(suffix: str, tmp_path: Path) -> None:
    greys = np.arange(256).reshape(16, 16)
    file = tmp_path / f"deep.{suffix}"
    Image.fromarray((greys * 257).astype(np.uint16)).save(file)
    assert imagefolder.center_crop(file, (16, 16)).tolist() == [greys.tolist()] * 3


@pytest.mark.parametrize(("dtype", "told"), [(np.float32, "floats"), (np.int32, "integers of 32 bits")])
def test_a_picture_of_no_known_range_is_refused(dtype: type[np.generic], told: str, tmp_path: Path) -> None:
    file = tmp_path / "measured.tif"
    Image.fromarray(np.arange(256).reshape(16, 16).astype(dtype)).save(file)
    with pytest.raises(ArtefactError, match=f"measured.tif holds {told}.*8 or 16 bits"):
        imagefolder.center_crop(file, (16, 16))


def test_other_files_and_hidden_folders_are_passed_over(fruit: Path) -> None:
    (fruit / "train" / "apple" / "notes.txt").write_text("not a picture")
    (fruit / "train" / "README").write_text("not a class")
    (fruit / "val" / ".cache").mkdir()
    assert len(load(fruit, (8, 8)).y_train) == 12


@pytest.mark.parametrize("name", ["0.png", "1.jpg", "2.JPEG", "3.bmp"])
def test_a_truncated_picture_is_named(name: str, fruit: Path) -> None:
    path = fruit / "train" / "banana" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtefactError, match=rf"train/banana/{name} cannot be decoded as a picture"):
        load(fruit, (8, 8))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_a_file_that_is_no_picture_is_named(content: bytes, fruit: Path) -> None:
    (fruit / "val" / "cherry" / "9.png").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"val/cherry/9\.png cannot be decoded.*remove it"):
        load(fruit, (8, 8))


def test_a_class_without_pictures_is_named(fruit: Path) -> None:
    (fruit / "train" / "durian").mkdir()
    with pytest.raises(ArtefactError, match=r"train/durian holds no picture"):
        load(fruit)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_in_one_split_only_is_named(part: str, fruit: Path) -> None:
    shutil.copytree(fruit / part / "apple", fruit / part / "durian")
    with pytest.raises(ArtefactError, match=r"fruit has classes in one of train and val only: durian\."):
        load(fruit)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_split_is_not_found(part: str, fruit: Path) -> None:
    shutil.rmtree(fruit / part)
    with pytest.raises(DataNotFound, match=rf"{fruit / part} is not a folder.*DIR/train/CLASS.*--data-dir"):
        load(fruit)


def test_a_split_without_classes_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(ArtefactError, match=r"train holds no class folders"):
        load(tmp_path)


def test_more_than_8_gib_is_refused_before_anything_is_decoded(
    fruit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(imagefolder, "center_crop", decode)
    # 18 pictures: 18 x 3 x 12,700 x 12,700 bytes are 8.11 GiB.
    with pytest.raises(
        UsageError, match=r"18 pictures of .*fruit at 12700x12700 would take 8\.1 GiB.*smaller"
    ):
        load(fruit, (12_700, 12_700))


@pytest.mark.parametrize("size", [(0, 8), (8, -1)])
def test_a_size_without_pixels_is_refused(size: tuple[int, int], fruit: Path) -> None:
    with pytest.raises(UsageError, match=r"Image size .* is not a height"):
        load(fruit, size)


def test_real_photographs_load_with_their_classes_in_balance(shared_data: Path) -> None:
    got = data.load("imagefolder:imagenette-mini", shared_data, image_size=(64, 64))
    assert got.y_train.bincount().tolist() == [50] * 10
    assert got.y_test.bincount().tolist() == [25] * 10
    z = data.normalise(got.x_train, got.mean, got.std)
    assert z.mean((0, 2, 3)).abs().max() < 0.3
    assert 0.8 < z.std() < 1.4
    assert data.split(got)[1][1].bincount().count_nonzero() > 5
