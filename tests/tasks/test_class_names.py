"""Names of classes: as many as the network has, and from a file that is a list of names."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_export.errors import UsageError
from sparse_export.formats.run import CLASSIFICATION, TaskInfo
from sparse_export.signature import Signature, TensorInfo, class_signature
from sparse_export.tasks.class_names import n_named_classes, read_class_names, with_class_names


def of_output(*shape: int | str) -> Signature:
    output = TensorInfo(name="y", dtype="float32", shape=("batch", *shape))
    return Signature(inputs=class_signature((3,), 2).inputs, outputs=(output,))


def test_a_task_has_names_where_there_is_one_for_each_output() -> None:
    names = ("cat", "dog")
    assert with_class_names(CLASSIFICATION, names, 2) == TaskInfo(name="classification", labels=names)
    for n_outputs in (1, 3, 1000, None):
        assert with_class_names(CLASSIFICATION, names, n_outputs) == CLASSIFICATION
    assert with_class_names(CLASSIFICATION, (), 2) == CLASSIFICATION


@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ((7,), 7),
        ((1,), 2),
        ((), 2),
        (("sequence", 9), 9),
        ((21, "h", "w"), 21),
        (("n",), None),
        ((2, 3, 4, 5), None),
    ],
)
def test_the_axis_of_classes_is_that_of_logits_tokens_or_pixels(
    shape: tuple[int | str, ...], n: int | None
) -> None:
    assert n_named_classes(of_output(*shape)) == n


def test_a_file_has_one_name_a_line(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffgarbage truck \r\ntench, Tinca tinca\r\nété\n".encode())
    assert read_class_names(file, of_output(3)) == ("garbage truck", "tench, Tinca tinca", "été")


@pytest.mark.parametrize(
    ("content", "shape", "what"),
    [
        (b"a\nb\n", (3,), "holds 2 names, and the network has 3 classes"),
        (b"a\n\nb\n", (3,), "Line 2 of .* is empty"),
        (b"", (3,), "holds 0 names"),
        (b"a\n\xff\nb", (3,), "cannot be read"),
        (None, (3,), "cannot be read"),
        (b"a\nb\n", ("boxes",), "no axis of classes"),
    ],
)
def test_another_file_is_refused(
    content: bytes | None, shape: tuple[int | str, ...], what: str, tmp_path: Path
) -> None:
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=what):
        read_class_names(file, of_output(*shape))
