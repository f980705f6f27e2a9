"""A bundle from elsewhere that would end the server, and every other model with it, never reaches one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from sparse_export.errors import ArtefactError
from sparse_export.formats.bundle import read_bundle_info, save_bundle_info
from sparse_export.formats.listed import file_infos
from sparse_export.serving import supervise
from sparse_export.serving.serve_options import ServeOptions
from sparse_export.serving.server_files import ServerFiles
from sparse_export.serving.supervise import serve
from tests.graph.dividing import with_division
from tests.serving.conftest import Bundles


@pytest.mark.parametrize("runtime", ["python", "onnxruntime"])
def test_a_file_that_ends_its_process_is_refused_before_a_server_is_started(
    runtime: str, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "net"
    shutil.copytree(bundles.dense, folder)
    model = onnx.load(folder / "model.onnx")
    with_division(model, -1)
    onnx.save(model, folder / "model.onnx")
    info = read_bundle_info(folder)
    save_bundle_info(folder, replace(info, files=file_infos(folder, info.files)))
    nothing = ServerFiles(
        binary=tmp_path / "none",
        backends=frozenset({"python", "onnxruntime"}),
        backend_folder=tmp_path,
        libraries=(),
        is_wheel=False,
    )
    monkeypatch.setattr(supervise, "find_server", lambda: nothing)
    with pytest.raises(ArtefactError, match="ended by SIGFPE"):
        serve(
            [bundles.dense, folder],
            [None, None],
            ServeOptions(runtime=runtime),
            say=lambda line: None,
            on_ready=lambda *_: None,
        )
