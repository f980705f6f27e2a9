"""Logs and JSON that others kept of an engine's build are read, whatever wrote them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from sparse_export.engines.foreign_log import layers_from_file, log_from_file
from sparse_export.engines.tactics import read_sparsity
from sparse_export.errors import ArtefactError, UsageError

LOGS = Path(__file__).parent / "logs"
PREFIXES = {
    "trtexec": "[11/29/2026-18:00:00] [V] [TRT] ",
    "python": "[11/29/2026-18:00:00] [TRT] [V] ",
    "old python": "[TensorRT] VERBOSE: ",
    "torch-tensorrt c++": "DEBUG: [Torch-TensorRT TensorRT Conversion Context] - ",
    "torch-tensorrt": "DEBUG:torch_tensorrt [TensorRT Conversion Context]:",
    "onnxruntime": (
        "2026-11-29 18:00:00.123456789 [V:onnxruntime:Default, tensorrt_execution_provider.h:92 log] "
        "[2026-11-29 18:00:00 VERBOSE] "
    ),
    "colours": "\x1b[32m[11/29/2026-18:00:00] [V] [TRT] ",
}


def _file(tmp_path: Path, content: str | bytes) -> Path:
    file = tmp_path / "file"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_a_line_is_read_behind_every_prefix(prefix: str, end: str, tmp_path: Path) -> None:
    reset = "\x1b[0m" if "\x1b" in prefix else ""
    messages = (
        "(Sparsity) Layers eligible for sparse math: a + b, c",
        "(Sparsity) TRT inference plan picked sparse implementation for layers: c",
        "Engine Layer Information:",
        "Layer(CaskConvolution): c [profile 0], Tactic: 0x01, x[Half(1,8)] -> y[Half(1,8)]",
    )
    log = log_from_file(_file(tmp_path, "".join(f"{prefix}{text}{reset}{end}" for text in messages)))
    sparsity = read_sparsity(log.sparsity_lines)
    assert sparsity.eligible == frozenset({"a", "b", "c"})
    assert sparsity.picked == frozenset({"c"})
    assert [layer["Name"] for layer in log.layers] == ["c"]
    assert log.verbose


@pytest.mark.parametrize("name", ["wording-8-to-10.txt", "wording-found-chose.txt", "none-8-to-10.txt"])
def test_a_log_that_is_not_verbose_is_read(name: str) -> None:
    log = log_from_file(LOGS / name)
    assert (len(log.sparsity_lines), log.layers, log.option) == (2, (), None)


def test_options_layers_and_names_of_kernels_of_trtexec_are_read() -> None:
    log = log_from_file(LOGS / "trtexec-verbose.txt")
    assert (log.option, log.low_precision, log.verbose) == ("Enabled", True, True)
    kernels = {layer["Name"]: layer.get("TacticName") for layer in log.layers}
    assert kernels["wide + relu1"] == "sm80_xmma_fprop_sparse_conv_f16f16"
    assert kernels["FusedHead"] is None


def test_the_layers_of_dump_layer_info_are_read_and_what_a_loading_program_lists_is_not(
    tmp_path: Path,
) -> None:
    lines = (
        "[11/29/2026-18:00:00] [I] Sparsity: Disabled",
        "[11/29/2026-18:00:00] [I] Load engine: model.engine",
        "[11/29/2026-18:00:00] [V] [TRT] Total Activation Memory: 1024",
        "[11/29/2026-18:00:01] [I] Layers:",
        (
            "Name: fc, LayerType: gemm, Inputs: [ { Name: x, Format/Datatype: Row major linear FP16 format }], "
            "Outputs: [ { Name: y }], TacticName: sm90_xmma_sparse_gemm_f16f16, Metadata: [ONNX Layer: fc]"
        ),
    )
    log = log_from_file(_file(tmp_path, "\n".join(lines)))
    assert (log.option, log.verbose) == (None, False)
    assert [(one["Name"], one["TacticName"]) for one in log.layers] == [
        ("fc", "sm90_xmma_sparse_gemm_f16f16")
    ]


@pytest.mark.parametrize(
    ("line", "layer"),
    [
        ("[I] [TRT] [GpuLayer] CONVOLUTION: a + b", {"Name": "a + b", "LayerType": "CONVOLUTION"}),
        ("[I] [TRT] [GpuLayer] PLUGIN_V2: p", {"Name": "p", "LayerType": "PLUGIN_V2"}),
        ("[I] [TRT] [GpuLayer] Conv_0 + Relu_1", {"Name": "Conv_0 + Relu_1", "LayerType": ""}),
    ],
)
def test_layers_of_a_log_that_is_not_verbose_are_read_where_no_others_are(
    line: str, layer: dict[str, str], tmp_path: Path
) -> None:
    assert log_from_file(_file(tmp_path, line)).layers == (layer,)
    described = f"{line}\nLayer(Conv): other, Tactic: 0x0, x[Half(1)] -> y[Half(1)]"
    assert [one["Name"] for one in log_from_file(_file(tmp_path, described)).layers] == ["other"]


def test_a_layer_that_myelin_called_after_a_node_has_the_name_of_the_node(tmp_path: Path) -> None:
    text = json.dumps({"Layers": ["/fc/Gemm_myl9_4", "__myl_Fc_myl0_1"]})
    assert [one["Name"] for one in layers_from_file(_file(tmp_path, text))] == ["/fc/Gemm", "__myl_Fc_myl0_1"]


def test_the_command_line_of_trtexec_tells_the_flag(tmp_path: Path) -> None:
    text = (
        "&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec --onnx=a.onnx --sparsity=force --fp16\n"
        "[I] Engine built in 3 sec.\n"
    )
    assert log_from_file(_file(tmp_path, text)).option == "Forced"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_what_powershell_writes_is_read(encoding: str, tmp_path: Path) -> None:
    text = (LOGS / "wording-8-to-10.txt").read_text().encode(encoding)
    assert len(log_from_file(_file(tmp_path, text)).sparsity_lines) == 2


def test_bytes_that_are_no_text_cost_only_themselves(tmp_path: Path) -> None:
    log = log_from_file(
        _file(tmp_path, b"\xff\xc3 bad\n[TRT] (Sparsity) Layers eligible for sparse math: a\xff\n")
    )
    assert read_sparsity(log.sparsity_lines).n_eligible == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "none of its lines is known"),
        (b"hello\nworld\n", "none of its lines is known"),
        (b"\x08\x00\x01onnx", "none of its lines is known"),
        (b"[I] [TRT] Loaded engine size: 507 MiB\n", "none of its builder"),
        (b"[I] Load engine: a.engine\n[V] [TRT] Total Activation Memory: 1\n", "none of its builder"),
        (
            b"&&&& RUNNING TensorRT.trtexec # trtexec --loadEngine=a --verbose\n[V] [TRT] Tactic: 0x1\n",
            "none of its builder",
        ),
    ],
)
def test_a_file_without_lines_of_the_builder_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=words):
        log_from_file(_file(tmp_path, content))


@pytest.mark.parametrize("read", [log_from_file, layers_from_file])
def test_a_file_that_is_not_there_is_wrong_usage(read: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        read(tmp_path / "nothing")


def test_a_log_of_200_000_lines_takes_seconds(tmp_path: Path) -> None:
    line = "[11/29/2026-18:00:00] [V] [TRT] Tactic: 0x0000000000000{:03x} Time: 0.0{}\n"
    lines = [line.format(at % 4096, at) for at in range(200_000)]
    lines.append("[11/29/2026-18:00:00] [V] [TRT] (Sparsity) Chose 1 layer(s) using sparse tactics: a\n")
    file = _file(tmp_path, "".join(lines))
    start = time.process_time()
    assert len(log_from_file(file).sparsity_lines) == 1
    assert time.process_time() - start < 4


LAYER = {"Name": "a + b", "LayerType": "CaskConvolution", "TacticName": "k", "Weights": {"Count": 3}}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"Layers": [LAYER], "Bindings": ["x", "y"]}),
        json.dumps({"Layers": ["a + b [profile 0]"], "Bindings": ["x"]}),
        json.dumps([LAYER]),
        json.dumps([{"Layers": [LAYER]}]),
        json.dumps({"Layers": [LAYER | {"Name": "a + b [profile 1]"}]}),
    ],
)
def test_every_form_of_the_json_gives_layers(text: str, tmp_path: Path) -> None:
    (layer,) = layers_from_file(_file(tmp_path, text))
    assert layer["Name"] == "a + b"


def test_documents_one_after_the_other_and_profiles_add_up(tmp_path: Path) -> None:
    text = json.dumps({"Layers": [LAYER, LAYER | {"Name": "a + b [profile 1]"}]}) + "\n" + json.dumps([LAYER])
    assert [layer["Name"] for layer in layers_from_file(_file(tmp_path, text))] == ["a + b"] * 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[TRT] no", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ("3", "no layers"),
        ("{}", "no layers"),
        ('{"Layers": 3}', "no layers"),
        ('{"Layers": [null, 4, {"Name": 3}]}', "no layers"),
    ],
)
def test_json_of_something_else_is_refused(content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=words):
        layers_from_file(_file(tmp_path, content))
