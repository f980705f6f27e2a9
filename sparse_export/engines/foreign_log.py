"""Reads what others kept of an engine's build: the builder's log, and the inspector's JSON.

Sources. Prefixes: trtexec `[11/29/2026-18:00:00] [V] [TRT] `, TensorRT's own logger `[TRT] [V] ` and
`[TensorRT] VERBOSE: `, Torch-TensorRT `DEBUG: [Torch-TensorRT ...] - ` and `DEBUG:torch_tensorrt [TensorRT
Conversion Context]:`, onnxruntime `[V:onnxruntime:, tensorrt_execution_provider.h:92 log] [... VERBOSE] `.
The layers of a verbose log: "Layer(TYPE): NAME, Tactic: 0x..." below "Engine Layer Information:", with the
kernel's name before, in "NAME Set Tactic Name: KERNEL Tactic: 0x..."; those of `--dumpLayerInfo`:
"Name: NAME, LayerType: TYPE, ..."; those of any log: "[GpuLayer] TYPE: NAME", before kernels are chosen.
Myelin calls its layers after one of their nodes, "NAME_myl9_4". trtexec lists its options, among them
"Sparsity: Disabled" and "Precision: FP32+FP16", also where it loads an engine and builds none. JSON by
`--exportLayerInfo`: NVIDIA/TensorRT issues 4020, 4048.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparse_export.errors import ArtefactError, UsageError

__all__ = ["BuilderLog", "SparsityOption", "layers_from_file", "log_from_file"]

SparsityOption = Literal["Disabled", "Enabled", "Forced"]

_LONGEST_LINE = 1 << 23  # characters; a file of one endless line is read in pieces
_MOST_JSON_BYTES = 1 << 29
_BUILDER_LINES = re.compile(
    r"\(Sparsity\)|Engine Layer Information:|Engine generation completed|Engine built in|"
    r"input(?:s)? and \d+ output network tensors|Graph construction and optimization completed|"
    r"Tactic: |Local timing cache|Global timing cache|Compiler backend is used|Total Activation Memory|"
    r"Building CUDA engine|\[GpuLayer\]|Layer\(\w+\): "
)
_TENSORRT = re.compile(r"\[TRT\]|TensorRT|torch_tensorrt|tensorrt_execution_provider")
_VERBOSE = re.compile(r"\[V\] |VERBOSE|\[V:onnxruntime|^DEBUG: ?\[Torch|^DEBUG:torch_tensorrt|Layer\(\w+\): ")
_LAYER = re.compile(r"Layer\((?P<type>[^()]*)\): (?P<name>.*?), Tactic: (?P<tactic>\w*)(?P<rest>.*)")
_TACTIC = re.compile(r"Set Tactic Name: (?P<kernel>\S+) Tactic: (?P<tactic>0x[0-9a-fA-F]+)")
_DUMPED = re.compile(r"(?:^|\] |- )Name: (?P<name>.*?), LayerType: (?P<type>\w+), (?P<rest>.*)")
_DUMPED_TACTIC = re.compile(r"TacticName: (?P<tactic>[^,\s]+)")
_DUMPED_METADATA = re.compile(r"Metadata: (?P<metadata>.*)")
_OPTION = re.compile(r"\[I\] Sparsity: (Disabled|Enabled|Forced)")
_LOADED = re.compile(r"\[I\] Load engine: \S|RUNNING TensorRT\.trtexec .*--loadEngine=")
_PRECISION = re.compile(r"\[I\] Precision: (?P<types>\S+)")
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PROFILE = re.compile(r" \[profile \d+\]$")
_MYELIN = re.compile(r"^(?!__my)(.+)_myl\d+_\d+$")
_RUNNING = re.compile(r"\[(?:Gpu|Dla)Layer\] (?:(?P<type>[A-Z0-9_]+): )?(?P<name>.+)")
_COMMAND = re.compile(r"RUNNING TensorRT\.trtexec .*--sparsity=(disable|enable|force)\b")
_COMMANDS: dict[str, SparsityOption] = {"disable": "Disabled", "enable": "Enabled", "force": "Forced"}


@dataclass(frozen=True, kw_only=True)
class BuilderLog:
    """What the log of an engine's build reports.

    Attributes:
        sparsity_lines: those that contain "(Sparsity)".
        layers: of the engine, in the inspector's form.
        verbose: it has messages of the lowest level.
        option: `--sparsity` as trtexec lists its options or its command line has it, None without these.
        low_precision: trtexec allowed 16- or 8-bit kernels for a graph of float32.
    """

    sparsity_lines: tuple[str, ...]
    layers: tuple[dict[str, Any], ...]
    verbose: bool
    option: SparsityOption | None
    low_precision: bool


def log_from_file(path: str | Path) -> BuilderLog:
    """Read the log of TensorRT's builder, line by line, whatever its size, prefixes, colours and line ends.

    Bytes that are no text are replaced. UTF-16, which PowerShell writes, is read too.

    Args:
        path: what trtexec, Torch-TensorRT, onnxruntime or a program of one's own wrote.

    Returns:
        What it reports.

    Raises:
        UsageError: there is no such file.
        ArtefactError: the file cannot be read, or holds no lines of TensorRT's builder.
    """
    path = Path(path)
    sparsity: list[str] = []
    layers: list[dict[str, Any]] = []
    running: list[dict[str, Any]] = []
    verbose = tensorrt = built = loaded = low_precision = False
    option: SparsityOption | None = None
    kernels: dict[str, str] = {}
    for line in _lines(path):
        verbose = verbose or _VERBOSE.search(line) is not None
        tensorrt = tensorrt or _TENSORRT.search(line) is not None
        built = built or _BUILDER_LINES.search(line) is not None
        loaded = loaded or _LOADED.search(line) is not None
        if "(Sparsity)" in line:
            sparsity.append(line)
        elif "Set Tactic Name: " in line and (found := _TACTIC.search(line)):
            kernels[found["tactic"].lower()] = found["kernel"]
        elif "Layer] " in line and (found := _RUNNING.search(line)):
            running.append(_layer(found["name"], LayerType=found["type"] or ""))
        elif "Layer" in line:
            layers += _layer_of_line(line, kernels)
        elif "--sparsity=" in line and (found := _COMMAND.search(line)):
            option = _COMMANDS[found[1]]
        elif "[I] Sparsity: " in line and (found := _OPTION.search(line)):
            option = found[1]  # type: ignore[assignment]  # the expression has no other words
        elif "[I] Precision: " in line and (found := _PRECISION.search(line)):
            low_precision = "+" in found["types"]
    built = built and not loaded
    if not built and not (layers or sparsity):
        _refuse(path, tensorrt)
    return BuilderLog(
        sparsity_lines=tuple(sparsity),
        layers=tuple(layers or running),
        # What a program that only loaded the engine lists says nothing of how it was built.
        verbose=verbose and built,
        option=option if built else None,
        low_precision=low_precision and built,
    )


def _refuse(path: Path, tensorrt: bool) -> None:
    """Raise ArtefactError for a log in which nothing is built."""
    what = (
        f"{path} has messages of TensorRT, but none of its builder: it loaded an engine, or the log was cut."
        if tensorrt
        else f"{path} is no log of TensorRT's builder: none of its lines is known."
    )
    raise ArtefactError(
        what, do="Keep the log of the build: trtexec --onnx=FILE.onnx --sparsity=enable --verbose > LOG 2>&1"
    )


def _lines(path: Path) -> Iterator[str]:
    """The lines without colours and line ends."""
    _require_file(path, "A log of TensorRT's builder was expected.")
    try:
        with path.open("rb") as raw:
            start = raw.read(4096)
        encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        if encoding != "utf-16" and b"\0" in start:
            _refuse(path, tensorrt=False)
        with path.open(encoding=encoding, errors="replace") as file:
            while line := file.readline(_LONGEST_LINE):
                yield (_COLOURS.sub("", line) if "\x1b" in line else line).rstrip()
    except (OSError, UnicodeError) as cause:
        raise ArtefactError(f"{path} cannot be read: {cause}.", do="Copy the log again.") from cause


def _layer_of_line(line: str, kernels: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The layer of the engine that a line of the log describes, as the inspector would.

    kernels: their names by the numbers of tactics.
    """
    if found := _LAYER.search(line):
        kernel = kernels.get(found["tactic"].lower())
        inputs = found["rest"].partition(" -> ")[0]
        yield _layer(
            found["name"],
            LayerType=found["type"],
            Inputs=inputs,
            **({"TacticName": kernel} if kernel else {}),
        )
    elif found := _DUMPED.search(line):
        rest = found["rest"]
        tactic, metadata = _DUMPED_TACTIC.search(rest), _DUMPED_METADATA.search(rest)
        yield _layer(
            found["name"],
            LayerType=found["type"],
            Inputs=rest.partition("Outputs: ")[0],
            **({"TacticName": tactic["tactic"]} if tactic else {}),
            **({"Metadata": metadata["metadata"]} if metadata else {}),
        )


def _layer(name: str, **other: str) -> dict[str, Any]:
    return {"Name": _MYELIN.sub(r"\1", _PROFILE.sub("", name)), **other}


def layers_from_file(path: str | Path) -> tuple[dict[str, Any], ...]:
    """Read the layers of an engine from the JSON of trtexec's `--exportLayerInfo` or the engine inspector.

    Args:
        path: one document `{"Layers": [...]}`, a list of layers, or several documents, one after the other or
            in a list. A layer is an object, or only a name. Layers of several profiles are all returned.

    Returns:
        One object for each layer; a name becomes `{"Name": ...}`. Numbers of profiles, and those that Myelin
        puts behind the name of a node, are left out of names.

    Raises:
        UsageError: there is no such file.
        ArtefactError: the file is not JSON, or JSON of something else.
    """
    path = Path(path)
    _require_file(path, "JSON of an engine's layers was expected.")
    do = "Export it again: trtexec --exportLayerInfo=LAYERS.json --profilingVerbosity=detailed"
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise ArtefactError(f"{path} has {path.stat().st_size:,} bytes, too many for layers.", do=do)
        raw = path.read_bytes()
        encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        documents = _documents(raw.decode(encoding, errors="replace"))
    except OSError as cause:
        raise ArtefactError(
            f"{path} cannot be read: {cause.strerror or cause}.", do="Copy it again."
        ) from cause
    except (ValueError, RecursionError) as cause:
        raise ArtefactError(f"{path} is not JSON: {cause}.", do=do) from cause
    layers = [layer for document in documents for layer in _layers_of(document)]
    if not layers:
        raise ArtefactError(f"{path} is JSON, but holds no layers of an engine.", do=do)
    return tuple(layers)


def _documents(text: str) -> list[Any]:
    """The JSON documents in a text, one after the other. Raises ValueError."""
    decoder = json.JSONDecoder(strict=False)  # metadata may hold control characters
    found: list[Any] = []
    at = 0
    text = text.strip()
    while at < len(text) or not found:
        document, at = decoder.raw_decode(text, at)
        found.append(document)
        while at < len(text) and text[at].isspace():
            at += 1
    return found


def _layers_of(document: Any) -> Iterator[dict[str, Any]]:
    """The layers in a document of any of the forms."""
    listed = document.get("Layers") if isinstance(document, Mapping) else document
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, str):
            yield _layer(entry)
        elif isinstance(entry, Mapping) and isinstance(entry.get("Name"), str):
            yield {**dict(_used(entry)), **_layer(entry["Name"])}
        elif isinstance(entry, Mapping) and isinstance(entry.get("Layers"), list) and listed is document:
            yield from _layers_of(entry)


def _used(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is read of a layer: texts, lists of them, and the types of its inputs, however they are nested."""
    for key, value in entry.items():
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            yield key, value
    inputs = entry.get("Inputs")
    tensors = [one for one in inputs if isinstance(one, Mapping)] if isinstance(inputs, list) else []
    types = [one.get(key) for one in tensors for key in ("Format/Datatype", "Datatype", "DataType", "Format")]
    if tensors:
        yield "Inputs", ", ".join(one for one in types if isinstance(one, str))


def _require_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise UsageError(f"{path} is not a file.", expected=expected, do="Correct the path.")
