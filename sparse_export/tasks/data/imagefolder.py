"""Folders of pictures in ImageNet's layout: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_export.errors import ArtefactError, DataNotFound, UsageError
from sparse_export.tasks.data.dataset import UINT8_MAX, DataSet
from sparse_export.tasks.data.places import damaged

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
DEFAULT_SIZE = (64, 64)
MAX_BYTES = 8 * 2**30
_STEP = 257  # 65,535 / 255: from one value of 8 bits to the next in 16
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"})


def load(name: str, folder: Path, *, image_size: tuple[int, int] | None = None) -> DataSet:
    """Decode both splits to uint8 (N, 3, H, W), in an order that mixes the classes and hangs on file names only.

    image_size: (H, W), 64x64 by default; each picture is scaled, with its proportions, to just cover that, and
    its middle is cut out. `val` becomes the test set. mean and std are ImageNet's.

    Raises DataNotFound; ArtefactError for a picture that cannot be decoded, an empty class, or class lists that
    differ; UsageError when the decoded set would exceed 8 GiB.
    """
    size = checked_size(image_size)
    listing = listed(name, folder)
    _refuse_too_much(folder, len(listing.train) + len(listing.test), size)
    return DataSet(
        name=name,
        x_train=_decoded(listing.train.files, size),
        y_train=listing.train.labels,
        x_test=_decoded(listing.test.files, size),
        y_test=listing.test.labels,
        mean=MEAN,
        std=STD,
        n_classes=listing.n_classes,
        test_digest=listing.test.sha256(),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Files of one split and their labels, int64 (N,), in the order of the data set."""

    files: tuple[Path, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.files)

    def part(self, start: int, stop: int) -> Pictures:
        """Those from `start` up to, not including, `stop`."""
        return Pictures(files=self.files[start:stop], labels=self.labels[start:stop])

    def sha256(self) -> str:
        """Hex SHA-256 over the class, the name and the bytes of every file: of whatever size it is decoded to."""
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
    """What a folder holds, before anything is decoded. Classes are numbered by the sorted names of their folders."""

    train: Pictures
    test: Pictures
    n_classes: int


def checked_size(image_size: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W) that pictures are brought to, 64x64 by default. Raises UsageError for what is no size."""
    size = image_size or DEFAULT_SIZE
    if len(size) != 2 or min(size) < 1:
        raise UsageError(
            f"Image size {size} was asked for.", expected="A height and a width, 1 at least, were expected."
        )
    return size


def listed(name: str, folder: Path) -> Listing:
    """The pictures of both splits, in an order that mixes the classes and hangs on file names only.

    Files that do not look like pictures by their suffix are passed over. Raises DataNotFound; ArtefactError for an
    empty class, or class lists that differ.
    """
    train, test = (_files_by_class(name, folder, part) for part in ("train", "val"))
    if train.keys() != test.keys():
        only = sorted(train.keys() ^ test.keys())
        raise damaged(
            folder,
            f"has classes in one of train and val only: {', '.join(only[:5])}{' …' if len(only) > 5 else ''}",
            expected="The same class folders in both were expected.",
            do="Add what is missing, or remove what is left over.",
        )
    return Listing(train=_mixed(train), test=_mixed(test), n_classes=len(train))


def _mixed(files_by_class: dict[str, list[Path]]) -> Pictures:
    labelled = [(file, label) for label, group in enumerate(files_by_class.values()) for file in group]
    labelled.sort(key=lambda pair: hashlib.sha256(f"{pair[0].parent.name}/{pair[0].name}".encode()).digest())
    return Pictures(
        files=tuple(file for file, _ in labelled),
        labels=torch.tensor([label for _, label in labelled], dtype=torch.int64),
    )


def _files_by_class(name: str, folder: Path, part: str) -> dict[str, list[Path]]:
    root = folder / part
    if not root.is_dir():
        raise DataNotFound(
            f"Data set {name} is not there: {root.absolute()} is not a folder.",
            expected="ImageNet's layout was expected: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg.",
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
                expected=f"Files ending in {', '.join(sorted(SUFFIXES))} were expected.",
                do="Put pictures there, or remove the folder.",
            )
        found[kind.name] = pictures
    if not found:
        raise damaged(
            root, "holds no class folders", expected="One folder for each class was expected.", do="Add them."
        )
    return found


def _refuse_too_much(folder: Path, n_images: int, size: tuple[int, int]) -> None:
    n_bytes = n_images * 3 * size[0] * size[1]
    if n_bytes > MAX_BYTES:
        raise UsageError(
            f"The {n_images} pictures of {folder} at {size[0]}x{size[1]} would take {n_bytes / 2**30:.1f} GiB.",
            expected=f"At most {MAX_BYTES // 2**30} GiB in memory was expected.",
            do="Let worker processes read them while training runs (`workers` in the recipe, --workers), choose a "
            "smaller image size, or a folder with fewer pictures.",
        )


def _decoded(files: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """uint8 (N, 3, H, W)."""
    x = torch.empty((len(files), 3, *size), dtype=torch.uint8)

    def decode_into(index: int) -> None:
        x[index] = middle(files[index], size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(decode_into, range(len(files))):
            pass
    return x


def middle(file: Path, size: tuple[int, int], crop_ratio: float = 1.0) -> Tensor:
    """The middle of a picture, uint8 (3, H, W).

    It is scaled, with its proportions, to just cover size / crop_ratio. Raises ArtefactError.
    """
    height, width = size
    picture = opened(file)
    scale = max(height / picture.height, width / picture.width) / crop_ratio
    covering = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    picture = picture.resize(covering, Image.Resampling.BILINEAR)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return pixels(picture.crop((left, top, left + width, top + height)))


def opened(file: Path) -> Image.Image:
    """A picture in RGB, of 8 bits; grey ones of 16 are scaled to that.

    Raises ArtefactError when it cannot be decoded, or holds numbers that no range is known of.
    """
    try:
        with Image.open(file) as source:
            if source.mode in ("I", "F") or source.mode.startswith("I;"):
                return _grey(file, source).convert("RGB")
            return source.convert("RGB")
    except ArtefactError:
        raise
    except Exception as cause:  # decoders meet bad bytes with errors of any kind
        raise _unreadable(file, cause) from cause


def _grey(file: Path, source: Image.Image) -> Image.Image:
    """A grey picture of more than 8 bits in 8. Pillow's own conversion makes white of all that is above 255."""
    # Pillow has grey PNG (before its release 11) and PGM files of 16 bits as whole numbers of 32.
    if source.mode == "F" or (source.mode == "I" and source.format not in ("PNG", "PPM")):
        raise damaged(
            file,
            f"holds {'floats' if source.mode == 'F' else 'whole numbers of 32 bits'}, of which no range is known",
            expected="A picture of 8 or 16 bits was expected.",
            do="Scale its values and save it so, or remove it.",
        )
    values = np.asarray(source).astype(np.int64)
    return Image.fromarray(((values + _STEP // 2) // _STEP).clip(0, UINT8_MAX).astype(np.uint8))


def _unreadable(file: Path, cause: Exception) -> ArtefactError:
    return damaged(
        file,
        f"cannot be decoded as a picture: {cause}",
        expected="A whole picture file was expected.",
        do="Get the file again, or remove it.",
    )


def pixels(picture: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
