"""Sets that are larger than what memory may hold: archives are mapped, pictures decoded in batches."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparse_export.formats.run import DataInfo
from sparse_export.signature import Signature, TensorInfo
from sparse_export.tasks import archives, data
from sparse_export.tasks.data import npz
from sparse_export.tasks.data.dataset import channel_statistics, test_sha256
from sparse_export.tasks.named_data import open_named
from sparse_export.tasks.samples import load_test_set
from sparse_export.tasks.shipped import task_named

MIB = 2**20
BOUND = 6 * MIB
N, SHAPE = 1024, (3, 96, 96)  # 27 MiB of uint8

SIGNATURE = Signature(
    inputs=(TensorInfo(name="x", dtype="float32", shape=("batch", *SHAPE)),),
    outputs=(TensorInfo(name="y", dtype="float32", shape=("batch", 10)),),
)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAPPED_BYTES", MIB)
    monkeypatch.setattr(archives, "PIECE_BYTES", MIB // 4)


@contextmanager
def peak_below(n_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < n_bytes, f"{peak / MIB:.1f} MiB"


def drawn(last: bool = False) -> np.ndarray[Any, Any]:
    shape = (N, *SHAPE[1:], SHAPE[0]) if last else (N, *SHAPE)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_to_score_on_is_never_held_whole(
    save: Callable[..., None], small_pieces: None, tmp_path: Path
) -> None:
    whole = drawn()
    save(tmp_path / "data.npz", x=whole, targets=np.arange(N) % 10)
    with peak_below(BOUND):
        found = open_named("npz:data.npz", SIGNATURE, tmp_path)
        digest = found.sha256()
        n = sum(len(feeds["x"]) for feeds in found.samples.batches(16))
    assert (n, len(found.targets)) == (N, N)
    first = next(iter(found.samples.batches(16)))["x"]
    assert first.dtype == np.float32 and np.array_equal(first, whole[:16])
    assert digest == open_named("npz:data.npz", SIGNATURE, tmp_path).sha256()


@pytest.mark.parametrize("last", [False, True])
def test_an_archive_to_train_on_is_never_held_whole(
    last: bool, small_pieces: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = drawn(last), np.arange(N) % 10
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with peak_below(BOUND):
        found = data.load("npz:data.npz", tmp_path)
        info = DataInfo(
            name="npz:data.npz",
            mean=found.mean,
            std=found.std,
            n_train=N,
            n_validation=0,
            n_test=N,
            test_sha256=test_sha256(found),
        )
        task = task_named("classification")
        test = load_test_set(info, SIGNATURE, tmp_path, task=task, network="it", do="")
        n = sum(len(feeds["x"]) for feeds in test.samples.batches(16))
    assert n == N
    monkeypatch.setattr(archives, "MAPPED_BYTES", 2**30)  # as small ones are read
    monkeypatch.setattr(archives, "PIECE_BYTES", 2**30)
    at_once = npz.load("npz:data.npz", tmp_path / "data.npz")
    assert (at_once.mean, at_once.std, test_sha256(at_once)) == (info.mean, info.std, info.test_sha256)


def test_statistics_of_floats_in_pieces_are_those_of_the_whole(
    small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn((40_000, 9), generator=generator) * torch.arange(9) + 100
    means, stds = channel_statistics(x)
    assert means == pytest.approx(x.double().mean(0).tolist(), rel=1e-12)
    assert stds[0] == 1.0  # of a channel that never changes
    assert stds[1:] == pytest.approx(x.double().std(0, correction=0)[1:].tolist(), rel=1e-9)


def test_a_damaged_byte_of_a_mapped_archive_is_noticed(small_pieces: None, tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    np.savez(file, x=drawn(), targets=np.arange(N) % 10)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(Exception, match="cannot be read as arrays of NumPy: Bad CRC-32"):
        open_named("npz:data.npz", SIGNATURE, tmp_path)


CHILD = """
import sys, threading, time
from pathlib import Path
from sparse_export.signature import Signature, TensorInfo
from sparse_export.tasks.named_data import open_named
from sparse_export.tasks.data.pictures import Inputs
from sparse_export.tasks.data.picture_settings import PictureSettings

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

name, shape = sys.argv[1], tuple(map(int, sys.argv[2].split(",")))
signature = Signature(
    inputs=(TensorInfo(name="x", dtype="float32", shape=("batch", *shape)),),
    outputs=(TensorInfo(name="y", dtype="float32", shape=("batch", 2)),),
)
before, most, running = anonymous(), 0.0, True

def watch():
    global most
    while running:
        most = max(most, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
found = open_named(name, signature, None)
found.sha256()
n = sum(len(feeds["x"]) for feeds in found.samples.batches(8))
running = False
watcher.join()
print(n, most - before)
"""


def grown(name: str, shape: tuple[int, ...]) -> tuple[int, float]:
    """Samples that a process read, and MiB of its own memory that it grew by."""
    call = [sys.executable, "-c", CHILD, name, ",".join(map(str, shape))]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=True)
    n, mib = done.stdout.split()
    return int(n), float(mib)


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_process_that_reads_400_mib_does_not_grow_by_them(
    save: Callable[..., None], tmp_path: Path
) -> None:
    x = np.zeros((2048, 3, 128, 134), np.float32)
    x[::7] = 1.0
    save(tmp_path / "data.npz", x=x, targets=np.arange(2048) % 2)
    n, mib = grown(f"npz:{tmp_path / 'data.npz'}", (3, 128, 134))
    assert n == 2048 and mib < 128


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_process_that_reads_600_mib_of_pictures_does_not_grow_by_them(tmp_path: Path) -> None:
    picture = Image.fromarray(np.full((8, 8, 3), 100, np.uint8))
    for part, n in (("train", 1), ("val", 400)):
        for kind in ("a", "b"):
            (tmp_path / part / kind).mkdir(parents=True)
            for at in range(n):
                picture.save(tmp_path / part / kind / f"{at}.png")
    n, mib = grown(f"imagefolder:{tmp_path}", (3, 256, 256))
    assert n == 800 and mib < 200
