"""Bundles of the small graphs with several inputs and outputs, as `build` would have written them."""

from __future__ import annotations

from pathlib import Path

import onnx

from sparse_export.building.golden import golden_pair, write_golden
from sparse_export.files import sha256_file, write_json
from sparse_export.formats.bundle import BUNDLE_FILE, open_bundle, save_bundle_info
from sparse_export.formats.listed import file_infos
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Signature
from sparse_export.trust import remember
from tests.engines.making import bundle_info


def named_bundle(folder: Path, model: onnx.ModelProto, signature: Signature) -> Path:
    """Write a bundle of a graph, vouched for."""
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    with open_session(folder / "model.onnx", signature=signature, n_threads=1) as session:
        golden = write_golden(folder, golden_pair(session))
    write_json(folder / "layers.json", {})
    names = ["model.onnx", "layers.json", *golden.files]
    info = bundle_info(
        signature=signature, golden=golden, files=file_infos(folder, names), atol=1e-5, rtol=1e-4
    )
    save_bundle_info(folder, info)
    remember(sha256_file(folder / BUNDLE_FILE))
    return open_bundle(folder).path
