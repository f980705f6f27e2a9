"""How pictures of a folder become the inputs of a network, where that is another's than the usual way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_export.errors import UsageError
from sparse_export.formats.run import DataInfo, Interpolation
from sparse_export.tasks.data.imagefolder import LARGEST_SIZE, MEAN, STD

__all__ = ["PictureSettings", "class_numbers", "settings_of"]

_MAX_BYTES = 64 * 2**20
_MOST_CLASSES = 2**31


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """What a network was trained with.

    Attributes:
        mean: of red, green and blue, subtracted after scaling to 0..1.
        std: likewise, divided by.
        interpolation: that pictures are scaled by.
        resize: pixels that the shorter side of a picture is scaled to, before the middle is cut out; None for
            just covering the cut.
        classes: number of each class folder; empty where they are numbered by their sorted names.
        workers: processes that decode pictures; 0 for threads.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    interpolation: Interpolation = "bilinear"
    resize: int | None = None
    classes: Mapping[str, int] | None = None
    workers: int = 0

    def crop_ratio(self, size: tuple[int, int], *, otherwise: float = 1.0) -> float:
        """The share of a scaled picture that the cut keeps along its shorter side.

        Args:
            size: (H, W) of the cut.
            otherwise: without `resize`.

        Raises:
            UsageError: the cut is larger than what it is cut from, or not square, or no picture is so large.
        """
        if self.resize is None:
            return otherwise
        if self.resize > LARGEST_SIZE:
            raise UsageError(
                f"Pictures are to be scaled to {self.resize} pixels along their shorter side.",
                expected=f"At most {LARGEST_SIZE} were expected.",
                do="Give the size that the network was trained with, often a little more than its own.",
            )
        if size[0] != size[1] or size[0] > self.resize:
            raise UsageError(
                f"Pictures are to be scaled to {self.resize} and cut to {size[0]}x{size[1]}.",
                expected="A square that is not larger than what it is cut from was expected.",
                do="Choose a larger resize, or leave it out: pictures then just cover the cut.",
            )
        return size[0] / self.resize

    def record(self) -> dict[str, Any]:
        """What `DataInfo` has of it beside the crop ratio."""
        return {
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "classes": dict(self.classes or {}),
        }


def settings_of(info: DataInfo, *, workers: int = 0) -> PictureSettings:
    """The settings that a record tells of; its crop ratio stands for `resize`.

    Args:
        info: of a folder of pictures.
        workers: processes that decode.
    """
    return PictureSettings(
        mean=info.mean,
        std=info.std,
        interpolation=info.interpolation,
        classes=info.classes or None,
        workers=workers,
    )


def class_numbers(file: Path) -> dict[str, int]:
    """Read which class number of a network each class folder has.

    Args:
        file: JSON, an object of numbers by folder, or a list of folders in the order of their numbers; or
            text, with a folder a line in the order of their numbers, or a folder and its number.

    Raises:
        UsageError: it cannot be read, or two folders or lines contradict each other.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{file} has more than {_MAX_BYTES >> 20} MiB.", do="Give a map of classes.")
        text = file.read_text(encoding="utf-8-sig")
        found = json.loads(text, object_pairs_hook=_once) if file.suffix == ".json" else _lines(text)
    except (OSError, ValueError, RecursionError) as cause:
        raise UsageError(
            f"The map of classes {file} cannot be read: {cause}.",
            do='Give JSON like {"cat": 281}, or a text file with a folder and its number a line.',
        ) from cause
    if isinstance(found, list):
        is_plain = all(isinstance(name, str) for name in found) and len(set(found)) == len(found)
        found = {name: at for at, name in enumerate(found)} if is_plain else None
    fits = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(n, int) and not isinstance(n, bool) and 0 <= n < _MOST_CLASSES
        for name, n in found.items()
    )
    if not fits or not found or len(set(found.values())) != len(found):
        raise UsageError(
            f"{file} is no map from class folders to class numbers.",
            expected="Every folder once was expected, each with a number of its own, 0 or above.",
            do='Give JSON like {"cat": 281}, or a text file with a folder and its number a line.',
        )
    return dict(found)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key that stands there twice."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a folder stands there twice")
    return dict(pairs)


def _lines(text: str) -> list[str] | dict[str, int]:
    """Of a text file. Raises ValueError."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    if all(len(pair) == 2 and pair[1].isdecimal() for pair in pairs):
        named = {name: int(number) for name, number in pairs}
        if len(named) != len(pairs):
            raise ValueError("a folder stands there twice")
        return named
    return lines
