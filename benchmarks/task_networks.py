"""Tasks on published networks: embeddings of sentences, and a detector by docs/examples/detection.py.

Each network is made 2:4 by both methods and goes through validate, compare, gate and a server. The texts
come out of a wheel (benchmarks/texts.py). The photographs are a folder of classes as `imagefolder:` takes it;
their boxes are what the dense network finds, as nobody drew any.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.asking_triton import answer
from benchmarks.bench_serving import serving
from benchmarks.public_networks import NETWORKS, cache_folder, fetch
from benchmarks.texts import requirements, scored_pairs, sentences, tokens
from sparse_export.building.bundle import build
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.comparison import Comparison
from sparse_export.evaluate.gate import gate
from sparse_export.evaluate.test_set import test_set_of
from sparse_export.evaluate.validate import validate
from sparse_export.formats.bundle import MODEL_FILE, Bundle
from sparse_export.formats.score import Score
from sparse_export.oneshot import sparsify
from sparse_export.report import write_report
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.tolerance import differences
from sparse_export.signature import Array, Feeds
from sparse_export.tasks.scores import difference_text, value_text

__all__ = ["ROWS", "measure", "photographs"]

METHODS = ("magnitude", "reconstruction")
SIZE = 256
"""Height and width of a photograph with its margin."""

_EMBEDDING = "461"
"""The output of MiniLM that is the embedding of the whole text."""

_DETECTION = Path(__file__).resolve().parents[1] / "docs" / "examples" / "detection.py"
_N_CALIBRATION = 64
_N_SENTENCES = 200
_N_PAIRS = 150
_LIKELY = 0.25
_ASKED = 3  # samples of a request


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `sparsify` gets.

    Attributes:
        task: its name.
        data: name of the samples to score on.
        inputs: file of calibration inputs.
        asked: inputs of a request.
        about: what the samples are, for the row.
    """

    task: str
    data: str
    inputs: Path
    asked: Feeds
    about: dict[str, Any]


def photographs() -> dict[str, list[tuple[Array, Array]]]:
    """The photographs in the current folder, with boxes, as data of one's own."""
    with np.load("photographs.npz") as stored:
        pictures, boxes, counts = (stored[name] for name in ("pictures", "boxes", "counts"))
    of_each = np.split(boxes, counts.cumsum()[:-1])
    return {"test": _Photographs(pictures, of_each)}  # type: ignore[dict-item]


class _Photographs:
    """Kept as bytes; each is made floats when it is asked for."""

    def __init__(self, pictures: Array, targets: list[Array]) -> None:
        self.pictures, self.targets = pictures, targets

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, at: int) -> tuple[Array, Array]:
        return _floats(self.pictures[at]), self.targets[at]


def _floats(picture: Array) -> Array:
    found: Array = picture.transpose(2, 0, 1).astype(np.float32) / 255
    return found


def _sentences(network: Path, work: Path, _: Path) -> Prepared:
    """Sentences with the dense network's own embeddings."""
    texts = sentences(cache_folder())
    calibration, test = texts[:_N_CALIBRATION], texts[-_N_SENTENCES:]
    feeds = tokens(test, cache_folder())
    np.savez(work / "calibration.npz", **tokens(calibration, cache_folder()))  # type: ignore[arg-type]
    targets = _outputs(network, feeds, _EMBEDDING)
    np.savez(work / "test.npz", targets=targets, **feeds)  # type: ignore[arg-type]
    about = {"n_test": len(test), "texts": requirements(), "targets": "the dense network's embeddings"}
    return Prepared(
        task="embedding",
        data=f"npz:{work / 'test.npz'}",
        inputs=work / "calibration.npz",
        asked={name: one[:_ASKED] for name, one in feeds.items()},
        about=about,
    )


def _pairs(network: Path, work: Path, _: Path) -> Prepared:
    """Every two of fifty news, with how alike people found them."""
    texts, targets = scored_pairs(cache_folder(), _N_PAIRS)
    feeds = tokens(texts, cache_folder())
    np.savez(
        work / "calibration.npz",
        **tokens(sentences(cache_folder())[:_N_CALIBRATION], cache_folder()),  # type: ignore[arg-type]
    )
    np.savez(work / "test.npz", targets=targets, **feeds)  # type: ignore[arg-type]
    return Prepared(
        task="embedding:spearman",
        data=f"npz:{work / 'test.npz'}",
        inputs=work / "calibration.npz",
        asked={name: one[:_ASKED] for name, one in feeds.items()},
        about={"n_pairs": len(texts) // 2, "texts": requirements(), "targets": "similarity as people saw it"},
    )


def _boxes(network: Path, work: Path, folder: Path) -> Prepared:
    """Photographs with the boxes that the dense network finds."""
    files = sorted(folder.glob("val/*/*")) + sorted(folder.glob("train/*/*"))
    pictures = np.stack([_with_margin(Image.open(file).convert("RGB")) for file in files])
    calibration, pictures = pictures[-_N_CALIBRATION:], pictures[:-_N_CALIBRATION]
    shutil.copy(_DETECTION, work)
    detection = importlib.import_module("detection")
    targets = []
    with open_session(network, n_threads=1) as session:
        for one in pictures:
            output = session.run({"images": _floats(one)[np.newaxis]})["output0"][0]
            corners, _, classes = detection.boxes_of(output, _LIKELY)
            targets.append(np.concatenate([classes[:, np.newaxis], corners.numpy()], axis=1))
    with_boxes = [at for at, one in enumerate(targets) if len(one)]
    without = [at for at, one in enumerate(targets) if not len(one)][: len(with_boxes)]
    chosen = sorted(with_boxes + without)
    test, targets = pictures[chosen], [targets[at] for at in chosen]
    counts = np.array([len(one) for one in targets])
    np.savez(work / "photographs.npz", pictures=test, boxes=np.concatenate(targets), counts=counts)
    floats = np.stack([_floats(one) for one in calibration])
    np.savez(work / "calibration.npz", images=floats)
    return Prepared(
        task="detection:task",
        data="benchmarks.task_networks:photographs",
        inputs=work / "calibration.npz",
        asked={"images": np.stack([_floats(one) for one in test[:_ASKED]])},
        about={
            "n_test": len(test),
            "n_boxes": int(counts.sum()),
            "n_without": len(without),
            "targets": f"boxes that the dense network scores above {_LIKELY}",
        },
    )


def _with_margin(picture: Image.Image) -> Array:
    """A picture in the upper left corner of a black square, uint8 (SIZE, SIZE, 3)."""
    scale = SIZE / max(picture.size)
    small = picture.resize((round(picture.width * scale), round(picture.height * scale)))
    found = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    found[: small.height, : small.width] = np.asarray(small)
    return found


def _outputs(network: Path, feeds: Feeds, name: str) -> Array:
    """One output for all samples, in small batches."""
    n = len(next(iter(feeds.values())))
    with open_session(network, n_threads=1) as session:
        parts = [
            session.run({key: one[start : start + 50] for key, one in feeds.items()})[name]
            for start in range(0, n, 50)
        ]
    return np.concatenate(parts)


ROWS: dict[str, tuple[str, Callable[[Path, Path, Path], Prepared], str]] = {
    "embedding": ("minilm", _sentences, "10%"),
    "embedding:spearman": ("minilm", _pairs, "10%"),
    "detection": ("nudenet", _boxes, "90%"),
}
"""Network, what it is scored on, and a loss that the gate has to let pass."""


def measure(row: str, work: Path, pictures: Path, *, serve: bool) -> dict[str, Any]:
    """Take a published network through every stage by a task.

    Args:
        row: a key of `ROWS`.
        work: an empty folder.
        pictures: folder of photographs.
        serve: let Triton answer for the sparse bundle too.
    """
    name, prepare, allowed = ROWS[row]
    network = fetch(NETWORKS[name], cache_folder())
    with _inside(work):
        given = prepare(network, work, pictures)
        scores: dict[str, Any] = {}
        for method in METHODS:
            sparsify(
                str(network),
                work / method,
                method=method,
                inputs=given.inputs,
                calibration_samples=_N_CALIBRATION,
                task=given.task,
                data=given.data,
            )
        dense = build(work / f"{METHODS[0]}-dense", work / "b-dense")
        bundles = {method: build(work / method, work / f"b-{method}") for method in METHODS}
        codes, validations = {}, {METHODS[0]: validate(bundles[METHODS[0]], against=dense.path, n_threads=1)}
        best = bundles[METHODS[-1]]
        for bound in (allowed, "0"):
            passed = gate(best.path, dense.path, max_drop=bound, n_threads=1)
            assert passed.validation is not None, passed.verdict
            codes[bound], validations[METHODS[-1]] = passed.exit_code, passed.validation
        for method, found in validations.items():
            assert found.parity_ok and found.score is not None and found.against is not None
            scores[method] = {"score": found.score, "difference": found.against.difference}
        compared = compare(
            dense, best, samples=test_set_of(best), batches=(1,), rounds=20, block_s=0.01, n_threads=1
        )
        assert compared.difference is not None  # a slow bootstrap ends with its time, so intervals may differ
        assert compared.difference.amount == scores[METHODS[-1]]["difference"].amount
        page = write_report(work / "report.html", compared, dense, best).read_text()
        assert compared.dense.score is not None and compared.dense.score.name in page
        served = _served(best, given.asked) if serve else None
    stages = {"compared": _of_compare(compared), "report_bytes": len(page.encode()), "served": served}
    return _row(row, given, compared.dense.score, scores, codes, stages)


def _row(
    row: str,
    given: Prepared,
    dense: Score,
    scores: dict[str, Any],
    codes: dict[str, int],
    stages: dict[str, Any],
) -> dict[str, Any]:
    for method, found in scores.items():
        score, apart = found["score"], found["difference"]
        print(
            f"{row:18} {method:14} {dense.name}: dense {value_text(dense)}, sparse {value_text(score)}, "
            f"{difference_text(apart, is_share=score.is_share, p_value=True)}; gates {codes}; served {stages['served']}",
            file=sys.stderr,
        )
    return {
        "task": row,
        "network": NETWORKS[ROWS[row][0]].requirement,
        **given.about,
        "n_calibration": _N_CALIBRATION,
        "dense": asdict(dense),
        "sparse": {method: asdict(found["score"]) for method, found in scores.items()},
        "difference": {method: asdict(found["difference"]) for method, found in scores.items()},
        "exit_codes": codes,
        **stages,
    }


def _of_compare(found: Comparison) -> dict[str, Any]:
    """The score by `compare` with its paired difference, and the times at batch 1."""
    assert found.dense.score is not None and found.sparse.score is not None and found.difference is not None
    (times,) = found.latency
    return {
        "dense": asdict(found.dense.score),
        "sparse": asdict(found.sparse.score),
        "difference": asdict(found.difference),
        "dense_by_sparse": asdict(times.ratio),
        "control": asdict(times.control),
        "outcome": times.outcome,
        "verdict": times.verdict,
    }


def _served(bundle: Bundle, asked: Feeds) -> dict[str, float]:
    """How far Triton's answer is from onnxruntime's, by output: relative to the spread, or the share that
    differs.
    """
    signature = bundle.info.signature
    with serving((bundle.path,), ("--name", "sparse")) as document:
        found = answer(document["ports"]["http"], "sparse", signature, asked)
    with open_session(bundle.path / MODEL_FILE, signature=signature) as session:
        wanted = session.run(asked)
    apart = differences(found, wanted, atol=1e-6, rtol=1e-3)
    assert all(one.ok for one in apart), apart
    return {
        one.name: 1 - one.equal_share
        if one.equal_share is not None
        else float(one.max_relative_difference or 0.0)
        for one in apart
    }


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In a folder, whose modules can be imported."""
    with contextlib.chdir(folder):
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path.remove(str(folder))
