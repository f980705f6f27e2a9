"""sparsify and build of torch networks that are no classifiers of one input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparse_export as se
from sparse_export.building.from_source import run_at
from sparse_export.errors import UsageError
from sparse_export.evaluate.gate import gate
from sparse_export.oneshot import sparsify
from sparse_export.runtimes.choice import open_runtime

NETS = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Found:
    scores: torch.Tensor
    pooled: torch.Tensor
    loss: torch.Tensor | None = None


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x, *, mask, scale=1.0):
        h = torch.relu(self.first(x)).masked_fill(~mask[..., None], 0.0)
        h = torch.relu(self.second(h))
        return Found(scores=self.last(h) * scale, pooled=h.mean(1))


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.out, self.aux = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        first = torch.relu(self.first(x))
        return {"out": self.out(torch.relu(self.second(first))), "aux": self.aux(first)}


def tagger() -> nn.Module:
    torch.manual_seed(0)
    return Tagger()


def segmenter() -> nn.Module:
    torch.manual_seed(0)
    return Segmenter()


def digits(n_classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, n_classes))
"""

BESIDE = """

def example_inputs():
    return (torch.randn(2, 7, 16),), {"mask": torch.ones(2, 7, dtype=torch.bool)}


free_sizes = {"x": ("batch", "length", None), "mask": ("batch", "length")}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("any_nets", "any_nets_beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "any_nets.py").write_text(NETS)
    (tmp_path / "any_nets_beside.py").write_text(NETS + BESIDE)
    return tmp_path


def test_keyword_inputs_a_bool_mask_and_a_dataclass_pass_every_link(here: Path) -> None:
    done = sparsify("any_nets_beside:tagger", here / "run")
    (stage,) = done.report.stages
    assert stage.agreement is not None and [one.name for one in stage.agreement.outputs] == [
        "scores",
        "pooled",
    ]
    dense, packed = (
        se.build(here / "run-dense", here / "dense"),
        se.build(here / "run", here / "b", onnx="packed"),
    )
    assert {layer.pattern for layer in packed.info.layers} == {"2:4", None}
    checked = se.validate(packed, against=dense.path)
    assert checked.agreement is not None and 50 < checked.agreement.percent < 100
    assert gate(packed.path, against=dense.path, max_drop=100.0).passed


def test_a_network_with_several_outputs_needs_a_shape_and_no_function_beside_it(here: Path) -> None:
    done = sparsify("any_nets:segmenter", here / "run", input_shape=(3, 8, 8))
    assert done.run.info.signature.output_names == ("out", "aux")
    assert done.run.info.model.form == "onnx"
    run = se.open_run(run_at("any_nets:segmenter", input_shape=(3, 8, 8), run_folder=here / "dense"))
    assert run.info.signature == done.run.info.signature


def test_the_data_of_a_classifier_count_although_its_module_says_how_it_is_called(here: Path) -> None:
    done = sparsify("any_nets_beside:digits", here / "run", data="digits", method="reconstruction")
    assert done.run.info.model.form == "torch"
    assert done.report.stages[-1].test is not None


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_dense_run_of_a_users_loop_is_pruned_as_a_graph_and_a_sparse_one_is_not(
    density: float, here: Path
) -> None:
    sys.path.insert(0, str(here))
    try:
        from any_nets_beside import example_inputs, tagger  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(here))
    model = tagger()
    trainer = se.SparseTraining(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), density=density
    )
    (x,), named = example_inputs()
    model(x, **named).scores.square().mean().backward()
    trainer.step()
    trainer.run(here / "trained", model="any_nets_beside:tagger")
    if density < 1:
        with pytest.raises(
            UsageError, match=r"trained sparse.*as a graph, which keeps no masks.*Build it as it is"
        ):
            sparsify(here / "trained", here / "run")
        return
    done = sparsify(here / "trained", here / "run")
    assert done.run.info.model.form == "onnx"
    assert sum(layer.pattern == "2:4" for layer in done.run.info.layers) == 2


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"tokens": (4, 7, 16)}, r"unexpected keyword argument 'tokens'|missing.*It takes x, mask, scale"),
        ({"x": (4, 7, 16)}, r"missing a required.*'mask'.*It takes x, mask, scale"),
    ],
)
def test_arrays_of_other_names_are_told_with_those_of_forward(
    arrays: dict[str, tuple[int, ...]], told: str, here: Path
) -> None:
    zeros: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in arrays.items()}
    np.savez(here / "x.npz", **zeros)
    with pytest.raises(UsageError, match=told):
        sparsify("any_nets:tagger", here / "run", inputs=here / "x.npz")


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_networks_of_transformers_pass_with_a_free_length(kind: str, here: Path) -> None:
    pytest.importorskip("transformers")
    made = {
        "encoder": "BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, "
        "num_attention_heads=2, intermediate_size=64))",
        "decoder": "GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2, n_positions=64, "
        "use_cache=False))",
    }[kind]
    (here / f"words_{kind}.py").write_text(
        f"""
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel


def net():
    torch.manual_seed(0)
    return {made}


def example_inputs():
    return dict(input_ids=torch.randint(99, (2, 9)), attention_mask=torch.ones(2, 9, dtype=torch.int64))


free_sizes = dict(input_ids=("batch", "sequence"), attention_mask=("batch", "sequence"))
"""
    )
    done = sparsify(f"words_{kind}:net", here / "run")
    assert done.run.info.signature.free == ("batch", "sequence")
    bundle = se.build(here / "run", here / "bundle", onnx="packed")
    assert sum(layer.pattern == "2:4" for layer in bundle.info.layers) >= 3
    ids = np.arange(3 * 17).reshape(3, 17)
    with open_runtime(bundle, "onnxruntime-cpu") as session:
        found = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert next(iter(found.values())).shape[:2] == (3, 17)
