"""A whole network timed dense, 2:4 wherever it can be, and as a plan has it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_export.errors import GateFailed, UsageError
from sparse_export.evaluate.verdict import floor_text, outcome_text, speedup_not_reached, times_text
from sparse_export.files import write_json
from sparse_export.formats.document import SCHEMA_VERSION
from sparse_export.instruments.card import CardLog, watched_cards
from sparse_export.instruments.conditions import clock_notes
from sparse_export.instruments.device import CudaStamps, replayed, stamps_for
from sparse_export.instruments.interleave import LatencyResult, measure_interleaved
from sparse_export.instruments.machine import machine_facts
from sparse_export.instruments.statistics import Ratio, location, paired_ratio, resolution
from sparse_export.plan.fold_norms import fold_batch_norm
from sparse_export.runtimes.torch24 import rewrite
from sparse_export.sparsity.compressed import TWO_FOUR
from sparse_export.sparsity.pattern import largest_per_group
from sparse_export.sparsity.product24 import Backend
from sparse_export.tables import Shown, ms_text
from sparse_export.version import command_line, library_versions, now

__all__ = [
    "NEVER_SLOWER",
    "WholeNetwork",
    "check_never_slower",
    "compile_blocks",
    "cut_to_pattern",
    "measure_whole",
    "prepare",
    "write_whole",
]

NEVER_SLOWER = 0.99
"""What the lower end of dense / planned has to reach."""
# Most that 2:4 products may change outputs by, by their norm: both sides round, in other orders.
_TOLERANCE = {torch.float16: 0.03, torch.bfloat16: 0.1}


@dataclass(frozen=True, kw_only=True)
class WholeNetwork:
    """One network at one batch size; `str()` gives the text for people.

    Attributes:
        n_possible: layers that can be 2:4.
        n_planned: those that the plan chose.
        everywhere, planned: dense / that, None where it has no 2:4 layer and is the dense network.
        control: dense / the dense network again.
        floor: the farthest end of its interval from 1, as a ratio above 1.
        expected: by times of single products.
        how: by kind, `cuda graph` or `eager`.
        compiled: its encoder blocks, by torch.compile.
        relative_difference: of outputs from the dense network with the same, cut weights, by their norm.
        samples_ms: by kind, a value a round; of a call with inputs and outputs on the device.
    """

    model: str | None
    batch: int
    dtype: str
    backend: str
    device: str
    n_possible: int
    n_planned: int
    everywhere: Ratio | None
    planned: Ratio | None
    control: Ratio
    floor: float
    expected: float
    dense_ms: float
    steady: bool
    how: dict[str, str]
    compiled: bool
    relative_difference: dict[str, float]
    samples_ms: dict[str, tuple[float, ...]]
    machine: dict[str, Any]
    cards: CardLog
    versions: dict[str, str]
    command: tuple[str, ...]
    created: str
    kind: Literal["whole-network"] = "whole-network"
    schema_version: int = SCHEMA_VERSION

    def shown(self) -> Shown:
        """What was measured, a sentence each."""
        dense = f"The whole network, measured through torch: dense takes {ms_text(self.dense_ms)} ms"
        texts = [f"{dense}; {floor_text(self.floor, 'two dense copies')}."]
        for what, n_layers, ratio in (
            ("2:4 wherever it can be", self.n_possible, self.everywhere),
            ("As planned", self.n_planned, self.planned),
        ):
            if ratio is None:
                texts.append(f"{what} it has no 2:4 layer, and is the dense network.")
            else:
                texts.append(f"{what} ({n_layers} layers): {outcome_text(ratio, self.floor, sparse='2:4')}.")
        if self.planned is not None:
            texts.append(f"Single products let expect {self.expected:.3f}.")
        eager = [kind for kind, how in self.how.items() if how == "eager"]
        if eager and self.device != "cpu":
            texts.append(f"Launched call by call, for want of a CUDA graph: {', '.join(eager)}.")
        texts += clock_notes(self.cards)
        if not self.steady:
            texts.append("Times had not become steady when warm-up ended.")
        return Shown(["\n".join(texts)])

    def __str__(self) -> str:
        return self.shown().draw()


@torch.no_grad()
def measure_whole(
    network: nn.Module,
    input_shape: tuple[int, ...],
    possible: Sequence[str],
    planned: Collection[str],
    *,
    name: str | None,
    batch: int,
    dtype: torch.dtype,
    backend: Backend,
    device: torch.device,
    expected: float = 1.0,
    compiled: bool = False,
    rounds: int = 24,
    block_s: float = 0.02,
    warmup_limit_s: float = 5.0,
    on_progress: Callable[[str], None] | None = None,
) -> WholeNetwork:
    """Time a network dense, dense again, with 2:4 products in all possible layers, and in the planned ones.

    Args:
        network: is changed, see `prepare`, then copied, cast and moved. On a card images lie channels last,
            each network is one CUDA graph where it can be captured, and times are the device's own.
        compiled: encoder blocks of vision transformers by torch.compile.

    Raises:
        UsageError: outputs that say nothing.
        GateFailed: 2:4 products give others than dense ones.
        MissingCapability: the device has no such product.
    """
    tell = on_progress or (lambda line: None)
    machine = machine_facts()
    prepare(network, possible, input_shape)
    dense = network.to(device, dtype)
    x = torch.randn((batch, *input_shape), device=device, dtype=dtype)
    if len(input_shape) == 3:
        dense = dense.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    networks = {"dense": dense, "dense again": copy.deepcopy(dense)}
    for kind, only in (("everywhere", possible), ("planned", planned)):
        if only:
            tell(f"{kind}: {len(only)} layers by 2:4 products")
            made = rewrite(copy.deepcopy(dense), dtype=dtype, backend=backend, only=only)
            made.tune(x)
            networks[kind] = made.model
    stamps = stamps_for(device.type)
    with watched_cards() as cards, torch.inference_mode():
        difference = _difference({kind: one(x).double() for kind, one in networks.items()}, dtype)
        is_compiled = compiled and {compile_blocks(one) for one in networks.values()} == {True}
        calls, how = _calls(networks, x)
        tell(f"{', '.join(calls)}: {rounds} rounds at batch {batch}")
        found = measure_interleaved(
            calls,
            batch=batch,
            rounds=rounds,
            block_s=block_s,
            warmup_limit_s=warmup_limit_s,
            time_calls=stamps.time_calls if isinstance(stamps, CudaStamps) else None,
        )
    control = _ratio(found, "dense again")
    assert control is not None
    return WholeNetwork(
        model=name,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        backend=backend,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        n_possible=len(possible),
        n_planned=len(planned),
        everywhere=_ratio(found, "everywhere"),
        planned=_ratio(found, "planned"),
        control=control,
        floor=resolution(control),
        expected=expected,
        dense_ms=location(found["dense"].samples_ms).estimate,
        steady=all(one.steady for one in found.values()),
        how=how,
        compiled=is_compiled,
        relative_difference=difference,
        samples_ms={kind: one.samples_ms for kind, one in found.items()},
        machine=machine,
        cards=cards,
        versions=library_versions(),
        command=command_line(),
        created=now(),
    )


def _difference(outputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Of each from the dense network's, by the norm of that. Raises as `measure_whole`."""
    size = float(outputs["dense"].norm())
    if size == 0 or not math.isfinite(size):
        raise UsageError(
            f"The norm of what the network answers to random inputs is {size:g}, which would agree with "
            "anything.",
            expected="Outputs other than zero, and within the range of the type, were expected.",
            do="Use another type, or a trained network.",
        )
    found = {kind: float((output - outputs["dense"]).norm()) / size for kind, output in outputs.items()}
    limit = _TOLERANCE.get(dtype, 1e-3)
    wrong = {kind: value for kind, value in found.items() if not value <= limit}
    if wrong:
        told = ", ".join(f"{kind} by {value:.3g}" for kind, value in wrong.items())
        raise GateFailed(
            f"The network with 2:4 products answers otherwise than the dense one: {told} of the outputs' "
            "norm.",
            expected=f"At most {limit:g} was expected, since the weights are the same.",
            do="Do not use these products; report the card and the versions of torch and cuSPARSELt.",
        )
    return found


def check_never_slower(found: WholeNetwork) -> None:
    """Check that the planned network is not slower than the dense one.

    Raises:
        SpeedupNotReached: the lower end of its interval is below NEVER_SLOWER.
    """
    if found.planned is not None and found.planned.low < NEVER_SLOWER:
        raise speedup_not_reached(
            f"The planned network is {times_text(found.planned)} as fast as the dense one.",
            NEVER_SLOWER,
            do="Serve the dense network at this batch, or plan for a larger one.",
        )


def write_whole(path: Path, found: WholeNetwork) -> None:
    """Write the measurement, every round included. Raises OutputError."""
    write_json(Path(path), asdict(found))


def _calls(
    networks: dict[str, nn.Module], x: Tensor
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """A call of each network on x, as a CUDA graph where there can be one, and which it is."""
    calls: dict[str, Callable[[], object]] = {}
    how = {}
    pool = torch.cuda.graph_pool_handle() if x.device.type == "cuda" else None
    for kind, network in networks.items():
        eager: Callable[[], object] = partial(network, x)
        calls[kind] = eager if pool is None else replayed(eager, pool)
        how[kind] = "eager" if calls[kind] is eager else "cuda graph"
    return calls, how


def _ratio(found: dict[str, LatencyResult], kind: str) -> Ratio | None:
    return paired_ratio(found["dense"].samples_ms, found[kind].samples_ms) if kind in found else None


@torch.no_grad()
def prepare(network: nn.Module, possible: Sequence[str], input_shape: tuple[int, ...]) -> None:
    """Make a network ready to be timed, in place, twice as well as once.

    In evaluation mode; batch norms folded, as every engine does it; heads of zeros drawn, for outputs of
    zeros would agree with anything; possible layers cut to 2:4, for times, not for accuracy.
    """
    network.eval()
    first = next(network.parameters())
    fold_batch_norm(network, torch.zeros((1, *input_shape), device=first.device, dtype=first.dtype))
    for layer in network.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)
    cut_to_pattern(network, possible)


@torch.no_grad()
def cut_to_pattern(network: nn.Module, names: Sequence[str]) -> None:
    """Cut weights to 2:4 along their inputs by magnitude, in place."""
    for name in names:
        value = network.get_parameter(name)
        flat = value.flatten(1)
        value.copy_((flat * largest_per_group(flat, 1, TWO_FOUR)).view(value.shape))


def compile_blocks(network: nn.Module) -> bool:
    """Compile a vision transformer's encoder blocks by one compilation; False for another network."""
    blocks = [module for module in network.modules() if type(module).__name__ == "EncoderBlock"]
    for block in blocks:
        block.compile()
    return bool(blocks)
