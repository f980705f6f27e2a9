"""Narrowing: fewer live channels as the density falls, against loops that are slow and obvious."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import sparse_export as se
from sparse_export import models
from sparse_export.errors import Interrupted, RecipeError, UsageError
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.passes.compact import compact
from sparse_export.onnxruntime_import import load_onnxruntime
from sparse_export.sparsity.channels import (
    ChannelGroup,
    WeightSlots,
    channel_strengths,
    live_channels,
    live_positions,
    n_live,
)
from sparse_export.train.loop import train
from sparse_export.train.narrowing import channel_groups
from sparse_export.train.recipe import PRESETS, Recipe, load_recipe
from tests.sparsity import oracle
from tests.train.test_exploring import active_of, dropped_smallest, watched
from tests.train.test_loop import outcome
from tests.train.test_methods import Stopping, batch, network, take_steps

STEPS, EVERY = 40, 5
Place = tuple[str, int]


def trainer(model: nn.Module | None = None, method: str = "rigl-itop", **settings: Any) -> se.SparseTraining:
    model = network() if model is None else model
    every: dict[str, Any] = {"density": 0.1, "start_density": 0.6, "narrowing": 0.4}
    every |= {"total_steps": STEPS, "update_every": EVERY, "prune_rate": 0.5}
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return se.SparseTraining(model, optimizer, method=method, **(every | settings))


# The loop: Python numbers, one channel and one weight at a time, for network(): 20 -> 32 -> 12 -> 4.

HIDDEN = (("0.weight", "2.weight", 32), ("2.weight", "4.weight", 12))
COLUMNS = {"0.weight": 20, "2.weight": 32, "4.weight": 12}


def is_of(place: Place, makes: str, reads: str, channel: int) -> bool:
    """Does this weight compute the channel, or read it?"""
    name, at = place
    if name == makes:
        return at // COLUMNS[name] == channel
    return name == reads and at % COLUMNS[name] == channel


def live_by_loop(weights: dict[Place, float], active: set[Place], density: float) -> set[Place]:
    """The places that are left when the weakest channels have gone."""
    places = set(weights)
    for makes, reads, width in HIDDEN:
        strengths = []
        for channel in range(width):
            sums = dict.fromkeys((makes, reads), 0.0)
            for place in active:
                if is_of(place, makes, reads, channel):
                    sums[place[0]] += weights[place] ** 2
            strengths.append(math.sqrt(sums[makes]) * math.sqrt(sums[reads]))
        order = sorted(range(width), key=lambda channel: (-strengths[channel], channel))
        gone = order[math.ceil(width * density**0.4) :]
        places -= {place for place in places for channel in gone if is_of(place, makes, reads, channel)}
    return places


def updated_by_loop(
    weights: dict[Place, float],
    gradients: dict[Place, float],
    active: set[Place],
    density: float,
    n_wanted: int,
    rate: float,
) -> set[Place]:
    places = live_by_loop(weights, active, density)
    left = active & places
    dropped_smallest(weights, left, max(0, len(left) - n_wanted))
    kept: dict[str, set[Place]] = {}
    removed = []
    for name in COLUMNS:
        here = {place for place in left if place[0] == name}
        n = math.ceil(rate * len(here))
        dropped_smallest(weights, here, n)
        kept[name] = here
        removed.append(n)
    room = [len({place for place in places if place[0] == name} - kept[name]) for name in COLUMNS]
    budget = n_wanted - sum(map(len, kept.values()))
    share = [Fraction(n, sum(removed)) for n in removed]
    grown, is_tie = oracle.whole_budgets(oracle.ideal_budgets(share, budget, room), budget)
    assert not is_tie
    found: set[Place] = set()
    for (name, here), n in zip(kept.items(), grown, strict=True):
        free = sorted(
            (place for place in places if place[0] == name and place not in here),
            key=lambda place: -abs(gradients[place]),
        )
        found |= here | set(free[:n])
    return found


def test_an_update_does_what_the_loop_does() -> None:
    sparse = trainer()
    n_weights, n_last = sparse.n_masked, round(0.1 * sparse.n_masked)
    end = math.ceil(0.75 * STEPS)
    seen = watched(sparse)
    n_compared = 0
    for step in range(STEPS):
        n_before = sparse.n_updates
        take_steps(sparse, 1, step)
        if sparse.n_updates == n_before:
            continue
        was = seen[-1]
        progress = min(was["step"] / end, 1)
        density = n_last / n_weights + (0.6 - n_last / n_weights) * (1 - progress) ** 3
        n_wanted = max(round(density * n_weights), n_last)
        rate = 0.005 + 0.495 * (1 + math.cos(math.pi * was["step"] / STEPS)) / 2
        wanted = updated_by_loop(
            was["weights"], was["gradients"], active_of(was["masks"]), n_wanted / n_weights, n_wanted, rate
        )
        assert active_of(sparse.masks) == wanted
        n_compared += 1
    assert n_compared == 7
    assert n_live(32, n_last / n_weights, 0.4) == 13
    assert int(sparse.masks["0.weight"].any(1).sum()) <= 13


# Properties


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.2, 0.4, 0.5]),
    st.integers(0, 99),
)
def test_what_stays_open_has_room_for_the_density(
    n_in: int, n_out: int, density: float, narrowing: float, seed: int
) -> None:
    """Even for a layer whose inputs and outputs both become fewer."""
    generator = torch.Generator().manual_seed(seed)
    names = {"a": (n_in, 3), "b": (n_out, n_in), "c": (2, n_out)}
    magnitudes = {name: torch.rand(shape, generator=generator) for name, shape in names.items()}
    masks = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in names.items()}
    groups = [group_of("a", "b", n_in), group_of("b", "c", n_out)]
    live = [
        live_channels(channel_strengths(magnitudes, masks, group), n_live(group.width, density, narrowing))
        for group in groups
    ]
    places = live_positions(masks, groups, live)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(place.sum()) for place in places.values()) >= round(density * total)
    if narrowing == 0:
        assert all(place.all() for place in places.values())


def group_of(makes: str, reads: str, width: int) -> ChannelGroup:
    slots = torch.arange(width).reshape(-1, 1)
    return ChannelGroup(
        width=width,
        makes=(WeightSlots(name=makes, axis=0, slots=slots),),
        reads=(WeightSlots(name=reads, axis=1, slots=slots),),
    )


def test_a_channel_that_is_not_made_or_not_read_has_no_strength() -> None:
    magnitudes = {"a": torch.ones(3, 2), "b": torch.ones(2, 3)}
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in magnitudes.items()}
    masks["a"][0] = False
    masks["b"][:, 1] = False
    strengths = channel_strengths(magnitudes, masks, group_of("a", "b", 3))
    assert strengths.tolist() == pytest.approx([0, 0, 2])
    assert live_channels(strengths, 2).tolist() == [True, False, True]


@pytest.mark.parametrize("method", ["sparse-momentum", "set", "rigl", "granet", "dsr"])
@pytest.mark.parametrize("fall", [{}, {"start_density": None}])
def test_the_number_of_weights_is_exact_under_every_method(method: str, fall: dict[str, Any]) -> None:
    sparse = trainer(method=method, **fall)
    for step in range(STEPS):
        take_steps(sparse, 1, step)
        assert sum(int(mask.sum()) for mask in sparse.masks.values()) == round(
            sparse.density_now * sparse.n_masked
        )
        for name, mask in sparse.masks.items():
            assert not sparse.model.get_parameter(name)[~mask].any()
    assert sum(int(mask.sum()) for mask in sparse.masks.values()) == round(0.1 * sparse.n_masked)
    if sparse.is_frozen or sparse.n_updates:
        live = (sparse.masks["0.weight"].any(1) & sparse.masks["2.weight"].any(0)).sum()
        assert int(live) <= n_live(32, 0.1, 0.4) + 1  # + 1: round(0.1 * weights) / weights is a little more


def test_without_narrowing_nothing_is_another() -> None:
    masks = []
    given: tuple[dict[str, Any], ...] = ({}, {"narrowing": 0.0})
    for settings in given:
        model = network()
        sparse = se.SparseTraining(
            model,
            SGD(model.parameters(), lr=0.05, momentum=0.9),
            density=0.1,
            total_steps=STEPS,
            update_every=EVERY,
            **settings,
        )
        take_steps(sparse, STEPS)
        masks.append(sparse.masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


# Networks


class Residual(nn.Module):
    """A stem, two branches that are added to it, norms, a depthwise filter, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.wide = nn.Conv2d(12, 20, 1)
        self.deep = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.back = nn.Conv2d(20, 12, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.back(torch.relu(self.deep(torch.relu(self.wide(x)))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Blocks(nn.Module):
    """An attention block: a stream under layer norms, heads, and hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 24)
        self.out = nn.Linear(24, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.out(torch.relu(self.hidden(x)))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Heads(Blocks):
    """The same with attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Identity()  # type: ignore[assignment]
        self.mixed, self.back = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        n, length, width = x.shape
        query, key, value = self.mixed(x).reshape(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.back(y.transpose(1, 2).reshape(n, length, width))
        x = x + self.out(torch.relu(self.hidden(x)))
        logits: Tensor = self.head(x.mean(1))
        return logits


def names_of(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, value in model.named_parameters() if value.dim() > 1)


def test_groups_are_what_a_runtime_can_do_without() -> None:
    def found(model: nn.Module, *shape: int) -> list[tuple[int, list[str], list[str]]]:
        groups = channel_groups(model, ((torch.zeros(shape),), {}), names_of(model))
        return [
            (group.width, [part.name for part in group.makes], [part.name for part in group.reads])
            for group in groups
        ]

    assert found(models.create("lenet5"), 2, 1, 28, 28) == [
        (20, ["conv1.weight"], ["conv2.weight"]),
        (50, ["conv2.weight"], ["fc1.weight"]),
        (500, ["fc1.weight"], ["fc2.weight"]),
    ]
    assert found(Residual(), 2, 1, 8, 8) == [
        (12, ["stem.weight", "back.weight"], ["wide.weight", "head.weight"]),
        (20, ["wide.weight"], ["deep.weight", "back.weight"]),
    ]
    assert found(Blocks(), 2, 5, 6) == [(24, ["hidden.weight"], ["out.weight"])]
    assert found(Heads(), 2, 5, 6) == [(24, ["hidden.weight"], ["out.weight"])]


def exported(model: nn.Module, x: Tensor) -> onnx.ModelProto:
    masks = {name: value.detach() != 0 for name, value in model.named_parameters() if value.dim() > 1}
    return onnx_from_module(model.eval(), example_of_shape(tuple(x.shape[1:])), masks=masks)


@pytest.mark.parametrize("kind", ["lenet5", "residual"])
def test_convolutions_lose_whole_channels_and_compute_the_same(kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = models.create("lenet5") if kind == "lenet5" else Residual()
    size = 28 if kind == "lenet5" else 8
    sparse = trainer(model, "sparse-momentum", total_steps=20, update_every=2, density=0.15)
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 1, size, size, generator=generator)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8) % 4).backward()
        sparse.step()
    assert sum(int(mask.sum()) for mask in sparse.masks.values()) == round(0.15 * sparse.n_masked)
    for group in channel_groups(model, ((x,), {}), names_of(model)):
        strengths = channel_strengths(
            {name: value.detach().abs() for name, value in model.named_parameters()}, sparse.masks, group
        )
        assert 0 < int((strengths > 0).sum()) <= n_live(group.width, 0.15, 0.4) + 1
    before = exported(model, x)
    found = compact(before)
    assert found.n_weights_after < 0.5 * found.n_weights_before
    ort = load_onnxruntime()
    outputs = [
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {one.graph.input[0].name: x.numpy()}
        )[0]
        for one in (before, found.model)
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparsity": {"narrowing": 0.6}}, "From 0 to 0.5"),
        ({"sparsity": {"narrowing": -0.1}}, "From 0 to 0.5"),
        ({"sparsity": {"narrowing": "much"}}, "narrowing"),
        ({"sparsity": {"narrowing": 0.4, "pattern": "2:4"}}, "narrowing is 0.4, and the pattern is 2:4"),
        ({"sparsity": {"narrowing": 0.4, "method": "static"}}, "does not move weights between channels"),
        ({"sparsity": {"narrowing": 0.4, "method": "magnitude"}}, "does not move weights between channels"),
        ({"sparsity": {"narrowing": 0.4, "products": "csr"}}, "exclude each other"),
        ({"sparsity": {"narrowing": 0.4}, "compile": True}, "compile and narrowing exclude each other"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("digits", changes=changes)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if hidden.sum() > 0:
            hidden = -hidden
        logits: Tensor = self.second(hidden)
        return logits


def test_a_network_that_cannot_be_followed_is_refused_at_the_first_step() -> None:
    sparse = trainer(Branching())
    with pytest.raises(UsageError, match="narrowing needs to follow the network's channels"):
        take_steps(sparse, 1)
    one_layer = trainer(nn.Sequential(nn.Linear(20, 4)))
    with pytest.raises(UsageError, match="no channels that could become fewer"):
        take_steps(one_layer, 1)


def test_an_update_before_the_first_forward_is_refused() -> None:
    with pytest.raises(UsageError, match="before the network was called"):
        trainer(method="set").update()


def test_a_forward_with_keywords_is_followed() -> None:
    x, y = batch(0)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, pixels: Tensor) -> Tensor:
            logits: Tensor = self.inner(pixels)
            return logits

    model = Named()
    sparse = trainer(model)
    for _ in range(EVERY):
        model.zero_grad()
        nn.functional.cross_entropy(model(pixels=x), y).backward()
        sparse.step()
    assert sparse.n_updates == 1


# The preset, and resumed runs


def narrow(epochs: int = 3) -> Recipe:
    changes = {"epochs": epochs, "sparsity": {"density": 0.1, "update_every": 7}}
    return load_recipe("digits", preset="compact", changes=changes)


def test_the_preset_is_the_best_one_with_narrowing() -> None:
    best, compact_one = PRESETS["best"], PRESETS["compact"]
    assert compact_one == best | {"sparsity": best["sparsity"] | {"narrowing": 0.4}}


def test_a_run_that_was_stopped_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    whole = train(narrow(), tmp_path / "whole", device="cpu")
    with pytest.raises(Interrupted):
        train(narrow(), tmp_path / "halves", device="cpu", observer=Stopping(whole.info.n_steps // 2))
    train(None, tmp_path / "halves", device="cpu", resume=True)
    assert outcome(tmp_path / "halves") == outcome(tmp_path / "whole")
