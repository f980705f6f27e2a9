"""Permuting a network for a pattern: what moves along, what is proved, what is reported."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sparse_export import models
from sparse_export.errors import GateFailed, UnknownNameError, UsageError
from sparse_export.graph.channels import proof, rules
from sparse_export.graph.channels.groups import find_channels
from sparse_export.graph.channels.orders import apply_record, orders_of, tensors_of
from sparse_export.graph.passes.permute import permute_network
from sparse_export.sparsity.pattern import NMPattern, groups_over, largest_per_group
from sparse_export.train.layers import maskable_parameters
from tests.graph import networks as nets
from tests.graph.test_channels import same, state

TWO_FOUR = NMPattern(n=2, m=4)


def by_swaps(matrix_RI: Tensor, pattern: NMPattern) -> Tensor:
    """Swap two columns as long as that keeps more of the magnitude: slow, obvious, good enough here."""
    order = list(range(matrix_RI.shape[1]))

    def kept(columns: list[int]) -> float:
        matrix = matrix_RI[:, columns]
        return float(matrix[largest_per_group(matrix, 1, pattern)].sum())

    best = kept(order)
    for i, j in itertools.combinations(range(len(order)), 2):
        if i // pattern.m == j // pattern.m:
            continue
        order[i], order[j] = order[j], order[i]
        found = kept(order)
        if found > best + 1e-9:
            best = found
        else:
            order[i], order[j] = order[j], order[i]
    return torch.tensor(order)


def backwards(matrix_RI: Tensor, pattern: NMPattern) -> Tensor:
    return torch.arange(matrix_RI.shape[1]).flip(0)


def by_columns(matrix_RI: Tensor, pattern: NMPattern) -> Tensor:
    """Deal the heaviest columns out to the groups."""
    n_groups = matrix_RI.shape[1] // pattern.m
    ranked = matrix_RI.sum(0).argsort(descending=True, stable=True)
    return ranked.reshape(pattern.m, n_groups).t().reshape(-1)


def wanting(module: nn.Module, pattern: NMPattern = TWO_FOUR) -> dict[str, NMPattern]:
    return dict.fromkeys(maskable_parameters(module), pattern)


def sorted_columns() -> nn.Sequential:
    """fc2's first two of 16 columns hold nearly everything: the cap bites only where they lie together."""
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        module.get_parameter("2.weight").mul_(0.01)
        module.get_parameter("2.weight")[:, :4] += 1
    return module


def test_the_permutation_keeps_more_and_the_function() -> None:
    module = sorted_columns()
    x = torch.randn(4, 6)
    expected, reference = module(x), copy.deepcopy(module)
    report = permute_network(module, x, wanting(module), by_swaps)
    change = next(layer for layer in report.layers if layer.name == "2.weight")
    assert change.kept_before is not None
    assert change.kept_after is not None
    assert change.kept_before < 0.6
    assert change.kept_after > 0.95
    # The same figures, counted on the networks themselves.
    for network, share in ((reference, change.kept_before), (module, change.kept_after)):
        weight = network.get_parameter("2.weight").detach().abs().double()
        kept = weight[largest_per_group(weight, 1, TWO_FOUR)].sum() / weight.sum()
        assert share == pytest.approx(float(kept), rel=1e-9)
    torch.testing.assert_close(module(x), expected)
    assert report.difference < 1e-13


def test_the_report_counts_groups_over_the_cap() -> None:
    module = sorted_columns()
    with torch.no_grad():
        module.get_parameter("2.weight")[:, 4:] = 0
    report = permute_network(module, torch.randn(4, 6), {"2.weight": TWO_FOUR}, by_columns)
    (change,) = report.layers
    assert (change.groups_over_before, change.groups_over_after, change.n_groups) == (8, 0, 32)
    assert int(groups_over(module.get_parameter("2.weight"), 1, TWO_FOUR)) == 0
    assert (change.n_weights, change.n_movable, change.axis, change.reason) == (128, 128, 1, "")


def test_masks_momentum_variance_and_gradients_move_alike() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten()
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        module(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    masks = {name: torch.rand(p.shape) < 0.4 for name, p in maskable_parameters(module).items()}
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)
    moments = [
        {name: optimizer.state[p][key] for name, p in module.named_parameters()}
        for key in ("exp_avg", "exp_avg_sq")
    ]
    before, identities = state(module), [id(p) for p in module.parameters()]
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    kept = [{name: tensor.clone() for name, tensor in m.items()} for m in (masks, *moments)]
    report = permute_network(
        module, torch.randn(2, 3, 8, 8), wanting(module), by_swaps, masks=masks, extra=moments
    )
    (entry,) = report.record["spaces"]
    order = torch.tensor(entry["permutation"])
    assert not torch.equal(order, torch.arange(16))
    axes = {"0.weight": 0, "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 1}
    for name, axis in axes.items():
        assert torch.equal(module.get_parameter(name), before[name].index_select(axis, order)), name
        gradient = module.get_parameter(name).grad
        assert gradient is not None
        assert torch.equal(gradient, gradients[name].index_select(axis, order)), name
        for now, then in zip((masks, *moments), kept, strict=True):
            if name in now:
                assert torch.equal(now[name], then[name].index_select(axis, order)), name
    for buffer in ("1.running_mean", "1.running_var"):
        assert torch.equal(module.get_buffer(buffer), before[buffer][order])
    assert torch.equal(module.get_parameter("3.bias"), before["3.bias"])
    assert [id(p) for p in module.parameters()] == identities


def test_training_goes_on_as_if_nothing_had_happened() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        plain = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        permuted = copy.deepcopy(plain)
        batches = torch.randn(6, 8, 6)
        losses: list[list[float]] = [[], []]
        for which, module in enumerate((plain, permuted)):
            optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
            for step, x in enumerate(batches):
                if which and step == 3:
                    moments = [
                        {name: optimizer.state[p][key] for name, p in module.named_parameters()}
                        for key in ("exp_avg", "exp_avg_sq")
                    ]
                    report = permute_network(module, x, wanting(module), by_swaps, extra=moments)
                    assert report.record["spaces"]
                    assert module.training
                optimizer.zero_grad()
                loss = module(x).square().mean()
                loss.backward()
                optimizer.step()
                losses[which].append(float(loss.detach()))
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_record_survives_json_and_undoes_the_permutation_bit_for_bit() -> None:
    module = nets.Transformer(nn.MultiheadAttention(16, 2, batch_first=True))
    before = state(module)
    report = permute_network(module, torch.randn(2, 5, 6), wanting(module), by_swaps)
    after, record = state(module), json.loads(json.dumps(report.record))
    json.dumps(report.as_json())
    assert not same(before, after)
    apply_record(module, record, inverse=True)
    assert same(state(module), before)
    apply_record(module, record)
    assert same(state(module), after)


def test_a_wrong_tie_is_caught_and_the_network_left_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rules.elementwise

    def untied(ledger: Any, operands: Any, shape: Any) -> Any:
        return real(ledger, operands[:1], shape)  # a sum ties its second operand to nothing

    module = nn.Sequential(
        nn.Conv2d(3, 16, 1), nets.Residual(nn.Conv2d(16, 16, 1)), nn.Conv2d(16, 4, 1), nn.Flatten()
    )
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in maskable_parameters(module).items()}
    kept = {name: mask.clone() for name, mask in masks.items()}
    before, x = state(module), torch.randn(2, 3, 2, 2)
    monkeypatch.setattr(rules, "elementwise", untied)
    with pytest.raises(GateFailed, match="outputs differ"):
        permute_network(module, x, wanting(module), by_swaps, masks=masks)
    assert same(state(module), before)
    assert all(torch.equal(mask, kept[name]) for name, mask in masks.items())
    monkeypatch.undo()
    assert permute_network(module, x, wanting(module), by_swaps, masks=masks).record["spaces"]


def test_a_fresh_norm_that_does_not_move_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With scale 1 and mean 0 everywhere, and a last layer of zeros, the network's own outputs tell
    nothing.
    """
    real = rules.per_channel

    def forgetful(ledger: Any, x: Any, axis: Any, names: Any, where: Any, **rest: Any) -> Any:
        return real(ledger, x, axis, (), where, **rest)

    module = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 2))
    nn.init.zeros_(module.get_parameter("4.weight"))
    nn.init.zeros_(module.get_parameter("4.bias"))
    monkeypatch.setattr(rules, "per_channel", forgetful)
    with pytest.raises(GateFailed, match="outputs differ"):
        permute_network(module, torch.randn(4, 6), wanting(module), by_swaps)


def test_a_network_that_does_not_run_in_float64_is_not_touched() -> None:
    class Single(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.float())

    module = nn.Sequential(Single(6, 16), nn.ReLU(), nn.Linear(16, 2))
    before = state(module)
    with pytest.raises(GateFailed, match="cannot be checked"):
        permute_network(module, torch.randn(4, 6), wanting(module), by_swaps)
    assert same(state(module), before)


def test_an_output_that_is_not_a_number_proves_nothing() -> None:
    module = sorted_columns()
    with torch.no_grad():
        module.get_parameter("4.bias")[0] = float("nan")
    with pytest.raises(GateFailed):
        permute_network(module, torch.randn(4, 6), wanting(module), by_swaps)


def test_a_search_that_finds_nothing_better_changes_nothing() -> None:
    module = sorted_columns()
    before = state(module)
    report = permute_network(
        module, torch.randn(4, 6), wanting(module), lambda m, _: torch.arange(m.shape[1])
    )
    assert same(state(module), before)
    assert {s.reason for s in report.spaces if s.free} == {"the search found nothing better"}


def test_layers_that_cannot_gain_say_why() -> None:
    module = models.create("lenet5")
    report = permute_network(module, torch.randn(2, 1, 28, 28), wanting(module), by_columns)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "1 columns; 2:4 needs a multiple of 4" in reasons["conv1.weight"]
    assert reasons["conv2.weight"] == ""
    assert "16 columns of fc1.weight, which only move together" in reasons["fc1.weight"]
    movable = {layer.name: layer.n_movable / layer.n_weights for layer in report.layers}
    assert movable == {"conv1.weight": 0, "conv2.weight": 1, "fc1.weight": 0, "fc2.weight": 1}


def test_a_network_that_cannot_be_exported_is_left_alone_with_the_reason() -> None:
    module = nets.Branching()
    before = state(module)
    report = permute_network(module, torch.randn(2, 6), wanting(module), by_swaps)
    assert "cannot be exported: GuardOnDataDependentSymNode" in report.untraced
    assert "cannot be exported" in report.layers[1].reason
    assert report.record["spaces"] == []
    assert same(state(module), before)


def test_groups_that_reach_into_another_space_stay_where_they_are() -> None:
    """10 channels beside 6: the group across the border, columns 8 to 11, belongs to neither."""
    module = nn.Sequential(nets.Branches(nn.Linear(6, 10), nn.Linear(6, 6)), nn.Linear(16, 4))
    seen: list[int] = []

    def search(matrix: Tensor, pattern: NMPattern) -> Tensor:
        seen.append(matrix.shape[1])
        return by_swaps(matrix, pattern)

    before = module.get_parameter("1.weight").detach().clone()
    permute_network(module, torch.randn(3, 6), wanting(module), search)
    assert seen == [8]  # of the other space one whole group is left, which cannot gain
    assert torch.equal(module.get_parameter("1.weight")[:, 8:], before[:, 8:])
    assert torch.equal(module.get_parameter("1.weight")[:, :8].sort(1).values, before[:, :8].sort(1).values)


def test_a_convolution_is_searched_by_kernel_position_and_a_transposed_one_along_its_inputs() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 2), nn.ConvTranspose2d(12, 5, 3))
    matrices: list[Tensor] = []

    def search(matrix: Tensor, pattern: NMPattern) -> Tensor:
        matrices.append(matrix)
        return torch.arange(matrix.shape[1])

    permute_network(module, torch.randn(2, 3, 4, 4), wanting(module), search)
    conv, transposed = (module.get_parameter(f"{i}.weight").detach().abs() for i in (1, 2))
    rows = [conv[o, :, i, j] for o in range(12) for i in range(2) for j in range(2)]
    assert torch.equal(matrices[0], torch.stack(rows))
    rows = [transposed[:, o, i, j] for o in range(5) for i in range(3) for j in range(3)]
    assert torch.equal(matrices[1], torch.stack(rows))


def test_a_grouped_convolution_is_searched_group_by_group() -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 6, 1, groups=2))
    matrices: list[Tensor] = []

    def search(matrix: Tensor, pattern: NMPattern) -> Tensor:
        matrices.append(matrix)
        return by_swaps(matrix, pattern)

    weight = module.get_parameter("1.weight").detach().abs()[:, :, 0, 0].clone()
    report = permute_network(module, torch.randn(2, 3, 2, 2), {"1.weight": TWO_FOUR}, search)
    assert torch.equal(torch.cat(matrices), weight)
    assert report.layers[0].n_movable == report.layers[0].n_weights
    assert report.layers[0].kept_after != report.layers[0].kept_before


def test_layers_that_read_one_space_are_searched_together() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nets.Branches(nn.Linear(8, 3), nn.Linear(8, 5)))
    shapes: list[tuple[int, ...]] = []

    def search(matrix: Tensor, pattern: NMPattern) -> Tensor:
        shapes.append(tuple(matrix.shape))
        return backwards(matrix, pattern)

    permute_network(module, torch.randn(2, 6), wanting(module), search)
    assert shapes == [(8, 8)]


def test_a_kept_weight_of_zero_takes_a_place() -> None:
    """A weight that has just grown is 0 and still counts under the cap."""
    module = sorted_columns()
    masks = {"2.weight": torch.zeros(8, 16, dtype=torch.bool)}
    masks["2.weight"][:, :4] = True
    with torch.no_grad():
        module.get_parameter("2.weight").zero_()
    report = permute_network(module, torch.randn(4, 6), {"2.weight": TWO_FOUR}, by_columns, masks=masks)
    assert (report.layers[0].groups_over_before, report.layers[0].groups_over_after) == (8, 0)


@pytest.mark.parametrize("found", [torch.zeros(16, dtype=torch.int64), torch.arange(15), torch.arange(1, 17)])
def test_what_is_no_permutation_is_refused(found: Tensor) -> None:
    module = sorted_columns()
    before = state(module)
    with pytest.raises(UsageError, match="no permutation"):
        permute_network(module, torch.randn(4, 6), {"2.weight": TWO_FOUR}, lambda *_: found)
    assert same(state(module), before)


def test_unknown_names_and_other_shapes_are_refused() -> None:
    module, x = sorted_columns(), torch.randn(4, 6)
    with pytest.raises(UnknownNameError, match=r"2\.weigth"):
        permute_network(module, x, {"2.weigth": TWO_FOUR}, by_swaps)
    with pytest.raises(UnknownNameError, match="momentum"):
        permute_network(module, x, wanting(module), by_swaps, extra=[{"momentum": torch.zeros(2)}])
    with pytest.raises(UsageError, match=r"shape \(\)"):
        permute_network(module, x, wanting(module), by_swaps, extra=[{"2.weight": torch.tensor(3.0)}])


def test_a_large_batch_is_not_run_as_a_whole() -> None:
    class Counting(nn.Linear):
        rows: ClassVar[list[int]] = []

        def forward(self, input: Tensor) -> Tensor:
            if isinstance(input, Tensor):  # not while it is traced
                self.rows.append(len(input))
            return super().forward(input)

    module = nn.Sequential(Counting(6, 16), nn.ReLU(), nn.Linear(16, 2))
    permute_network(module, torch.randn(500, 6), wanting(module), by_swaps)
    assert max(Counting.rows) == 8


def test_the_tolerance_is_far_above_rounding_and_far_below_a_mistake() -> None:
    module = sorted_columns()
    wrong = {"0.bias": torch.arange(16).roll(1)}
    assert proof.difference_by(module, torch.randn(4, 6), wrong) > 1e-3


def test_two_channels_that_change_places_in_one_member_alone_fail_the_proof() -> None:
    module, x = sorted_columns(), torch.randn(4, 6)
    space = find_channels(module, x).free[0]
    swapped = torch.arange(space.width)
    swapped[[0, 1]] = swapped[[1, 0]]
    assert len(space.members) == 3
    for member in space.members:
        alone = replace(space, members=(member,))
        assert proof.difference_by(module, x, orders_of(tensors_of(module), [(alone, swapped)])) > 1e-3
    assert proof.difference_by(module, x, orders_of(tensors_of(module), [(space, swapped)])) < 1e-12


def test_scores_decide_in_place_of_magnitude() -> None:
    module = sorted_columns()
    scores = {"2.weight": module.get_parameter("2.weight").detach().abs().flip(1)}
    report = permute_network(module, torch.randn(4, 6), wanting(module), by_swaps, scores=scores)
    change = next(layer for layer in report.layers if layer.name == "2.weight")
    assert change.kept_before is not None
    assert change.kept_after is not None
    assert (change.kept_before < 0.6, change.kept_after > 0.95) == (True, True)
    # The columns that the scores call heavy lie apart now.
    moved = [space.permutation for space in report.spaces if space.permutation is not None]
    assert max(Counter(moved[0].index(column) // 4 for column in range(12, 16)).values()) <= 2
    with pytest.raises(UsageError, match="was given to move with 2"):
        permute_network(
            module, torch.randn(4, 6), wanting(module), by_swaps, scores={"2.weight": torch.ones(2)}
        )


def test_a_fault_of_a_rule_is_no_finding_about_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, it was told as if the network could not be checked."""
    from sparse_export.graph.channels import proof

    def fault(*_: object) -> None:
        raise KeyError("fault")

    monkeypatch.setattr(proof, "apply_orders", fault)
    with pytest.raises(KeyError, match="fault"):
        proof.difference_by(torch.nn.Linear(4, 4), torch.zeros(2, 4), {})
    with pytest.raises(GateFailed, match="cannot be checked"):
        proof.difference_by(torch.nn.Linear(4, 4), torch.zeros(2, 5), {})
