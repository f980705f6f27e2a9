"""Bundles with an engine of which only the header is true."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

from sparse_export import trust
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import (
    BUNDLE_FILE,
    Bundle,
    BundleInfo,
    GoldenInfo,
    RunReference,
    read_bundle_info,
    save_bundle_info,
)
from sparse_export.formats.engines import EngineInfo
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import ModelInfo
from sparse_export.signature import Signature, class_signature

VERSION = "1.7.1.116"
FILE = "engines/x.engine"
SIGNATURE = class_signature((16,), 8, names=("input", "output"))


def header(size: int = 64, version: str = VERSION) -> bytes:
    """The beginning of an engine for TensorRT for RTX, and nothing after it."""
    numbers = bytes(int(part) for part in version.split("."))
    return (b"vtrt" + bytes(12) + struct.pack("<Q", size) + numbers).ljust(size, b"\0")


def engine_fact(**changes: object) -> EngineInfo:
    fact = EngineInfo(
        file=FILE,
        target="tensorrt-rtx",
        precision="fp32",
        version=VERSION,
        gpu=None,
        architecture=None,
        architectures=("sm89",),
        hardware="none",
        version_compatible=False,
        profiles=({"batch": (1, 8, 32)},),
        sparse=True,
        parse_s=0.0,
        build_s=0.0,
        onnx_sha256="0" * 64,
    )
    return replace(fact, **changes)  # type: ignore[arg-type]


def bundle_info(**changes: object) -> BundleInfo:
    """The manifest of a bundle of nothing. changes: of its fields."""
    info = BundleInfo(
        method="dense",
        model=ModelInfo(name="small"),
        signature=SIGNATURE,
        golden=GoldenInfo(
            inputs={"input": "golden/input.npy"}, outputs={"output": "golden/output.npy"}, inner={}
        ),
        data=None,
        run=RunReference(path="", run_sha256="0" * 64),
        precision="fp32",
        targets=("onnx",),
        opset=20,
        ir_version=10,
        density=1.0,
        layers=(),
        n_parameters=1,
        n_nonzero=1,
        macs=1,
        nonzero_macs=1,
        score=None,
        atol=0.0,
        rtol=0.0,
        versions={},
        command=(),
        created="",
        files={},
        engines=(),
    )
    return replace(info, **changes)  # type: ignore[arg-type]


def bundle_with_engine(
    folder: Path,
    content: bytes | None = None,
    *,
    known: bool = True,
    signature: Signature = SIGNATURE,
    **changes: object,
) -> Bundle:
    """Write a bundle with one engine, vouched for unless `known` is false. changes: of the `EngineInfo`."""
    (folder / "engines").mkdir(exist_ok=True)
    (folder / FILE).write_bytes(header(100) if content is None else content)
    info = bundle_info(
        targets=("onnx", "tensorrt-rtx"),
        files=file_infos(folder, (FILE,)),
        engines=(engine_fact(**changes),),
        signature=signature,
    )
    save_bundle_info(folder, info)
    if known:
        trust.remember(sha256_file(folder / BUNDLE_FILE))
    return Bundle(path=folder, info=read_bundle_info(folder))
