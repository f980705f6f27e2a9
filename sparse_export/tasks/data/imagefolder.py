"""Folders of pictures in ImageNet's layout: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_export.errors import ArtefactError, DataNotFound, UsageError
from sparse_export.files import require_plain
from sparse_export.formats.run import Interpolation
from sparse_export.tasks.data.dataset import UINT8_MAX, DataSet
from sparse_export.tasks.data.places import damaged

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
RESAMPLING: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
DEFAULT_SIZE = (64, 64)
MAX_BYTES = 8 * 2**30
LARGEST_SIZE = 2**14  # along an axis; a picture of that size takes 0.8 GB
_STEP = 257  # 65,535 / 255: from one value of 8 bits to the next in 16
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})


def load(name: str, folder: Path, *, image_size: tuple[int, int] | None = None) -> DataSet:
    """Decode both splits to uint8 (N, 3, H, W).

    The order mixes the classes and depends on file names alone. `val` becomes the test set. mean and std are
    ImageNet's.

    Args:
        name: of the data set.
        folder: with `train` and `val`.
        image_size: (H, W), 64x64 by default; each picture is scaled, with its proportions, to just cover
            that, and its centre is cropped.

    Raises:
        DataNotFound: there is no such folder.
        ArtefactError: a picture cannot be decoded, a class is empty, or the class lists differ.
        UsageError: the decoded set would exceed 8 GiB, or image_size is no size.
    """
    size = check_size(image_size)
    listing = list_pictures(name, folder)
    _refuse_too_much(folder, len(listing.train) + len(listing.test), size)
    return DataSet(
        name=name,
        x_train=decode_files(listing.train.files, size),
        y_train=listing.train.labels,
        x_test=decode_files(listing.test.files, size),
        y_test=listing.test.labels,
        mean=MEAN,
        std=STD,
        n_classes=listing.n_classes,
        class_names=listing.class_names,
        test_digest=listing.test.sha256(),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """The pictures of one split, in the order of the data set.

    Attributes:
        files: paths.
        labels: int64 (N,).
    """

    files: tuple[Path, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.files)

    def part(self, start: int, stop: int) -> Pictures:
        """Return those from `start` up to, not including, `stop`."""
        return Pictures(files=self.files[start:stop], labels=self.labels[start:stop])

    def take(self, rows: Sequence[int]) -> Pictures:
        """Return those of some places."""
        return Pictures(files=tuple(self.files[row] for row in rows), labels=self.labels[list(rows)])

    def sha256(self) -> str:
        """Compute the hex SHA-256 over the class, name and bytes of every file."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.parent.name}/{file.name}\n".encode())
            try:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
            except OSError as cause:
                raise _unreadable(file, cause) from cause
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """The pictures of a folder, not decoded.

    Attributes:
        train: pictures of `train`.
        test: pictures of `val`.
        class_names: names of the folders, in the order of the classes; empty where some class has no folder.
        n_classes: the largest class number, and one.
    """

    train: Pictures
    test: Pictures
    class_names: tuple[str, ...]
    n_classes: int


def check_size(image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Check a size for pictures.

    Args:
        image_size: (H, W), None for 64x64.

    Returns:
        (H, W).

    Raises:
        UsageError: it is no size.
    """
    size = image_size or DEFAULT_SIZE
    if len(size) != 2 or min(size) < 1:
        raise UsageError(
            f"Image size {size} is not a height and a width of 1 at least.", do="Give for instance 64,64."
        )
    if max(size) > LARGEST_SIZE:
        raise UsageError(
            f"Image size {tuple(size)} is beyond sense.",
            expected=f"At most {LARGEST_SIZE} along each axis were expected.",
            do="Give the size that the network takes.",
        )
    return size


def list_pictures(name: str, folder: Path, classes: Mapping[str, int] | None = None) -> Listing:
    """List the pictures of both splits, in an order that mixes the classes and depends on file names alone.

    Args:
        name: of the data set, for the message.
        folder: with `train` and `val`; files with another suffix than a picture's are ignored.
        classes: the number of each class folder; None to number them by their sorted names.

    Raises:
        DataNotFound: there is no such folder.
        ArtefactError: a class is empty, or the class lists differ.
        UsageError: a folder has no number.
    """
    train, test = (_files_by_class(name, folder, part) for part in ("train", "val"))
    if train.keys() != test.keys():
        only = sorted(train.keys() ^ test.keys())
        raise damaged(
            folder,
            f"has classes in one of train and val only: {', '.join(only[:5])}{' …' if len(only) > 5 else ''}",
            do="Add the missing class folders, or remove the others.",
        )
    numbers = {kind: number for number, kind in enumerate(train)} if classes is None else classes
    without = [kind for kind in train if kind not in numbers]
    if without:
        raise UsageError(
            f"{folder} has class folders without a number: {', '.join(without[:5])}"
            f"{' …' if len(without) > 5 else ''}.",
            expected=f"The map names {', '.join(list(numbers)[:5])}{' …' if len(numbers) > 5 else ''}.",
            do="Add them to the map of classes, or remove the folders.",
        )
    n_classes = max(numbers.values()) + 1
    by_number = {number: kind for kind, number in numbers.items()}
    return Listing(
        train=_mixed(train, numbers),
        test=_mixed(test, numbers),
        class_names=tuple(by_number[at] for at in range(n_classes)) if len(by_number) == n_classes else (),
        n_classes=n_classes,
    )


def _mixed(files_by_class: dict[str, list[Path]], numbers: Mapping[str, int]) -> Pictures:
    """The files ordered by a hash of their names."""
    labelled = [(file, numbers[kind]) for kind, group in files_by_class.items() for file in group]
    labelled.sort(key=lambda pair: hashlib.sha256(f"{pair[0].parent.name}/{pair[0].name}".encode()).digest())
    return Pictures(
        files=tuple(file for file, _ in labelled),
        labels=torch.tensor([label for _, label in labelled], dtype=torch.int64),
    )


def _files_by_class(name: str, folder: Path, part: str) -> dict[str, list[Path]]:
    """The pictures of each class folder, sorted."""
    root = folder / part
    if not root.is_dir():
        raise DataNotFound(
            f"Data set {name} is not there: {root.absolute()} is not a folder.",
            expected="The layout is ImageNet's: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg.",
            do="Correct the path; a relative one starts at --data-dir if given, else at the current folder.",
        )
    found = {}
    for kind in sorted(
        entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    ):
        pictures = sorted(file for file in kind.iterdir() if file.suffix.lower() in SUFFIXES)
        if not pictures:
            raise damaged(
                kind,
                "holds no picture",
                do=f"Put files ending in {', '.join(sorted(SUFFIXES))} there, or remove the folder.",
            )
        found[kind.name] = pictures
    if not found:
        raise damaged(root, "holds no class folders", do="Add one folder for each class.")
    return found


def _refuse_too_much(folder: Path, n_images: int, size: tuple[int, int]) -> None:
    """Raise UsageError for pictures that would not fit into memory."""
    n_bytes = n_images * 3 * size[0] * size[1]
    if n_bytes > MAX_BYTES:
        raise UsageError(
            f"The {n_images} pictures of {folder} at {size[0]}x{size[1]} would take "
            f"{n_bytes / 2**30:.1f} GiB.",
            expected=f"At most {MAX_BYTES // 2**30} GiB are held in memory.",
            do="Let worker processes read them while training runs (`workers` in the recipe, --workers), "
            "choose a smaller image size, or a folder with fewer pictures.",
        )


def decode_files(
    files: Sequence[Path],
    size: tuple[int, int],
    crop_ratio: float = 1.0,
    interpolation: Interpolation = "bilinear",
) -> Tensor:
    """Crop the centres of pictures, by one thread a core.

    Args:
        files: of the pictures.
        size: (H, W) of the crops.
        crop_ratio: as of `center_crop`.
        interpolation: likewise.

    Returns:
        uint8 (N, 3, H, W).

    Raises:
        ArtefactError: a picture cannot be decoded.
    """
    x = torch.empty((len(files), 3, *size), dtype=torch.uint8)

    def decode_into(index: int) -> None:
        x[index] = center_crop(files[index], size, crop_ratio, interpolation)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode_into, range(len(files))):  # which raises what a thread raised
            pass
    return x


def center_crop(
    file: Path, size: tuple[int, int], crop_ratio: float = 1.0, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Crop the centre of a picture.

    Args:
        file: the picture.
        size: (H, W) of the crop.
        crop_ratio: the picture is scaled, with its proportions, to just cover size / crop_ratio.
        interpolation: how it is scaled.

    Returns:
        uint8 (3, H, W).

    Raises:
        ArtefactError: it cannot be decoded.
    """
    height, width = size
    picture = open_picture(file)
    scale = max(height / picture.height, width / picture.width) / crop_ratio
    covering = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    picture = picture.resize(covering, RESAMPLING[interpolation])
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return pixels(picture.crop((left, top, left + width, top + height)))


def open_picture(file: Path) -> Image.Image:
    """Open a picture in RGB of 8 bits; grey ones of 16 bits are scaled.

    Args:
        file: the picture.

    Raises:
        ArtefactError: it cannot be decoded, or the range of its values is not known.
    """
    try:
        require_plain(file)
        with Image.open(file) as source:
            if source.mode in ("I", "F") or source.mode.startswith("I;"):
                return _grey(file, source).convert("RGB")
            return source.convert("RGB")
    except ArtefactError:
        raise
    except Exception as cause:  # decoders meet bad bytes with errors of any kind
        raise _unreadable(file, cause) from cause


def _grey(file: Path, source: Image.Image) -> Image.Image:
    """Scale a grey picture to 8 bits. Pillow's own conversion turns all values above 255 white."""
    # Pillow opens grey PNG (before release 11) and PGM files of 16 bits as integers of 32.
    if source.mode == "F" or (source.mode == "I" and source.format not in ("PNG", "PPM")):
        raise damaged(
            file,
            f"holds {'floats' if source.mode == 'F' else 'integers of 32 bits'} of unknown range",
            do="Scale its values to 8 or 16 bits and save it, or remove it.",
        )
    values = np.asarray(source).astype(np.int64)
    return Image.fromarray(((values + _STEP // 2) // _STEP).clip(0, UINT8_MAX).astype(np.uint8))


def _unreadable(file: Path, cause: Exception) -> ArtefactError:
    """The error for a file that cannot be decoded."""
    return damaged(
        file,
        f"cannot be decoded as a picture: {cause}",
        do="Get the file again, or remove it.",
    )


def pixels(picture: Image.Image) -> Tensor:
    """Convert a picture to a tensor.

    Args:
        picture: in RGB, of 8 bits.

    Returns:
        uint8 (3, H, W).
    """
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
