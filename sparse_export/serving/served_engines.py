"""The TensorRT engines of a bundle that can be served, and the batches that they take."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_export.engines.options import Bounds, profile_text
from sparse_export.formats.bundle import Bundle
from sparse_export.serving.tensors import interface_of
from sparse_export.signature import Signature

__all__ = ["Engine", "largest_fitting", "largest_merged", "served_engines"]

_ENGINE = re.compile(r"tensorrt-(?P<precision>[a-z0-9]+)-sm(?P<major>\d{1,2})(?P<minor>\d)\.engine")
_OF_RTX = (
    "an engine of TensorRT for RTX, which Triton's TensorRT backend cannot load; without an engine of "
    "`--target tensorrt` the ONNX file is served, by onnxruntime"
)
_Profiles = Sequence[Mapping[str, Bounds]]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A TensorRT engine of a bundle.

    Attributes:
        file: as the manifest lists it.
        tensorrt: version that built it.
        precision: as in its file name.
        capability: compute capability of the GPU it was built for, as `9.0`.
        profiles: of each the bounds of every free size.
        version_compatible: whether it holds a runtime of its own, which is code for the host.
    """

    file: str
    tensorrt: str
    precision: str
    capability: str
    profiles: tuple[dict[str, Bounds], ...]
    version_compatible: bool

    @property
    def plan_name(self) -> str:
        """File name in a repository."""
        return f"model-sm{self.capability.replace('.', '')}.plan"

    @property
    def profiles_text(self) -> str:
        """Its profiles in words."""
        return " and ".join(map(profile_text, self.profiles))


def served_engines(bundle: Bundle, sizes: Mapping[str, int]) -> tuple[tuple[Engine, ...], tuple[str, ...]]:
    """Choose the engines of a bundle that can be served.

    Args:
        bundle: an opened bundle.
        sizes: the free sizes of its golden input.

    Returns:
        They, all of one precision, and the others, each with the reason.
    """
    found, left_out = [], []
    infos = {info.file: info for info in bundle.info.engines}
    for name in sorted(bundle.info.files):
        if not name.endswith(".engine"):
            continue
        if Path(name).name.startswith("tensorrt-rtx-"):
            left_out.append(f"{name}: {_OF_RTX}")
            continue
        match = _ENGINE.fullmatch(Path(name).name)
        if match is None:
            left_out.append(f"{name}: Triton runs engines that are named tensorrt-PRECISION-smXX.engine")
            continue
        if name not in infos:
            left_out.append(f"{name}: the manifest does not say which batches it takes")
            continue
        engine = Engine(
            file=name,
            tensorrt=infos[name].version,
            precision=match["precision"],
            capability=f"{match['major']}.{match['minor']}",
            profiles=infos[name].profiles,
            version_compatible=infos[name].version_compatible,
        )
        why = _why_not(engine, bundle.info.signature, sizes)
        if why is None:
            found.append(engine)
        else:
            left_out.append(f"{name}: {why}")
    precisions = {engine.precision for engine in found}
    if len(precisions) > 1:
        keep = _preferred(precisions)
        left_out += [f"{Path(e.file).name}: {keep} is served" for e in found if e.precision != keep]
        found = [engine for engine in found if engine.precision == keep]
    return tuple(found), tuple(left_out)


def _why_not(engine: Engine, signature: Signature, sizes: Mapping[str, int]) -> str | None:
    """Why an engine cannot be served; None where it can."""
    for one in signature.outputs:
        if any(isinstance(size, str) and size not in signature.free for size in one.shape):
            return f"how long its output {one.name} is depends on the values of the inputs"
    for bounds in engine.profiles:
        if set(bounds) != set(signature.free):
            return f"its profiles, {engine.profiles_text}, are not of the sizes that are free"
    if interface_of(signature).batched and not largest_merged(engine.profiles, str(signature.batch)):
        return f"its profiles, {engine.profiles_text}, take no batch of 1, which requests bring"
    if not largest_fitting(engine.profiles, signature.batch, sizes):
        golden = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return f"its profiles, {engine.profiles_text}, do not take the golden input, {golden}"
    return None


def _preferred(precisions: set[str]) -> str:
    """The precision to serve where a bundle has several: the widest, nearest to the golden output."""
    order = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
    return min(precisions, key=lambda name: (order.index(name) if name in order else len(order), name))


def largest_merged(profiles: _Profiles, batch: str) -> int:
    """Compute the largest M such that each batch of 1 to M fits a profile, whatever the other sizes are.

    A server merges requests of one size to any of them.

    Args:
        profiles: of an engine.
        batch: name of the size that counts samples.

    Returns:
        M; other sizes that no profile takes at all do not count.
    """
    others = [name for name in (profiles[0] if profiles else {}) if name != batch]
    # Which profiles take a size changes only where one begins, and after one ends.
    steps = [
        sorted({edge for one in profiles for edge in (one[name][0], one[name][2] + 1)}) for name in others
    ]
    found = []
    for sizes in itertools.product(*steps):
        taken = [
            one[batch]
            for one in profiles
            if all(one[name][0] <= size <= one[name][2] for name, size in zip(others, sizes, strict=True))
        ]
        if taken:
            found.append(_without_gap(taken))
    return min(found, default=0)


def _without_gap(bounds: Sequence[Bounds]) -> int:
    """The largest M such that each number of 1 to M is within some bounds."""
    most = 0
    for smallest, _, largest in sorted(bounds):
        if smallest > most + 1:
            break
        most = max(most, largest)
    return most


def largest_fitting(profiles: _Profiles, batch: str | None, sizes: Mapping[str, int]) -> int:
    """Compute the largest number of samples that an engine takes at once, in equal parts of some inputs.

    Args:
        profiles: of an engine.
        batch: name of the size that counts samples; None where none does.
        sizes: of the inputs.

    Returns:
        At most their own number; 0 where the engine does not take their other sizes. 1 without a batch.
    """
    n_samples = sizes.get(str(batch), 1)
    fitting = [
        one
        for one in profiles
        if all(least <= sizes[name] <= most for name, (least, _, most) in one.items() if name != batch)
    ]
    within = [one.get(str(batch), (1, 1, 1)) for one in fitting]
    parts = [n for n in range(1, n_samples + 1) if n_samples % n == 0]
    return max((n for n in parts if any(least <= n <= most for least, _, most in within)), default=0)
