"""The options of an engine, checked before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from sparse_export.engines.tensorrt_import import TARGETS, Target
from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.signature import BATCH, Signature

__all__ = [
    "DEFAULT_BATCH",
    "HARDWARE_LEVELS",
    "PRECISIONS",
    "Bounds",
    "EngineOptions",
    "HardwareLevel",
    "Precision",
    "Profile",
    "engine_file",
    "engine_options",
    "parse_architectures",
    "parse_profile",
    "profile_text",
    "require_buildable",
    "require_types",
]

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HardwareLevel = Literal["none", "ampere-plus", "same-compute-capability"]
HARDWARE_LEVELS: tuple[HardwareLevel, ...] = get_args(HardwareLevel)
Bounds = tuple[int, int, int]
"""The smallest that a free size may be, the one that kernels are chosen for, and the largest."""
DEFAULT_BATCH: Bounds = (1, 8, 32)
# Its parser makes float32 of float64 without a word (TensorRT for RTX 1.7.1).
_TYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")
_HIGHEST_LEVEL = 5  # builder_optimization_level, TensorRT 10 and 11
_ARCHITECTURE = re.compile(r"sm([1-9][0-9]{1,2})")
# The first compute capability whose tensor cores have the type.
_FIRST_ARCHITECTURE: dict[str, int] = {"bf16": 80, "fp8": 89}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Bounds of the free sizes of an engine's inputs. str() writes them as `batch=1:8:32,sequence=16:64:512`.

    Attributes:
        sizes: by name, the smallest, at least 1, the one that kernels are chosen for, and the largest.
            `batch` is the size that counts samples, whatever the network calls it; `DEFAULT_BATCH` without.

    Raises:
        UsageError: they are not in this order.
    """

    sizes: Mapping[str, Bounds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, bounds in self.sizes.items():
            smallest, usual, largest = bounds
            if not 1 <= smallest <= usual <= largest:
                raise UsageError(
                    f"A profile has the sizes {_bounds_text(bounds)} for {name}, not 1 <= MIN <= OPT <= MAX.",
                    do=f"Write for instance --profile {name}=1:8:32.",
                )

    def __str__(self) -> str:
        return profile_text(self.sizes)

    def bounds(self, signature: Signature) -> dict[str, Bounds]:
        """Look up the bounds of every free size of a network's inputs.

        Args:
            signature: of the network.

        Returns:
            They, by name, in the signature's order.

        Raises:
            UsageError: a free size other than the batch has no bounds, or the profile names another size.
        """
        free, batch = signature.free, signature.batch
        named = dict(self.sizes)
        if batch is not None and batch in free:
            if BATCH in named and BATCH not in free:
                named[batch] = named.pop(BATCH)
            named.setdefault(batch, DEFAULT_BATCH)
        unknown = [name for name in named if name not in free]
        if unknown:
            raise UsageError(
                f"--profile {profile_text(self.sizes)} bounds {unknown[0]}, which is no free size of "
                f"{', '.join(map(str, signature.inputs))}.",
                do=f"The free sizes are {', '.join(free)}." if free else "Leave --profile out: none is free.",
            )
        missing = [name for name in free if name not in named]
        if missing:
            whole = named | {one: (signature.sizes.get(one, 1),) * 3 for one in missing}
            raise UsageError(
                f"No profile bounds {' and '.join(missing)} of {', '.join(map(str, signature.inputs))}.",
                do="An engine takes sizes between bounds: give MIN:OPT:MAX, or one number for all three, as "
                f"in --profile {profile_text({one: whole[one] for one in free})}.",
            )
        return {name: named[name] for name in free}


def profile_text(sizes: Mapping[str, Bounds]) -> str:
    """Write bounds as `--profile` takes them.

    Args:
        sizes: the bounds, by name.
    """
    return ",".join(f"{name}={_bounds_text(bounds)}" for name, bounds in sizes.items())


def _bounds_text(bounds: Bounds) -> str:
    return str(bounds[0]) if len(set(bounds)) == 1 else ":".join(map(str, bounds))


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        target: `tensorrt` or `tensorrt-rtx`.
        profiles: one at least.
        workspace_bytes: at least 1; None leaves the limit to the library, which takes all of the GPU's
            memory.
        optimization_level: 0 to 5; None for the library's own (3).
        hardware: GPUs besides the one it is built on, at a cost in speed; TensorRT only.
        version_compatible: later TensorRT releases can load it too; TensorRT only.
        architectures: as in `sm89`, for TensorRT for RTX only; empty for the library's own choice.
        sparse: the builder may choose sparse kernels for 2:4 weights; this never changes what is computed.

    Raises:
        UsageError: an option is out of range, or is not for this target.
        UnknownNameError: no such target or hardware level.
    """

    target: Target
    profiles: tuple[Profile, ...] = (Profile(),)
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    hardware: HardwareLevel = "none"
    version_compatible: bool = False
    architectures: tuple[str, ...] = ()
    sparse: bool = True

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnknownNameError("engine target", self.target, TARGETS)
        if self.hardware not in HARDWARE_LEVELS:
            raise UnknownNameError("hardware compatibility", self.hardware, HARDWARE_LEVELS)
        if not self.profiles:
            raise UsageError("There is no profile.", do="Give one at least, such as 1:8:32.")
        level = self.optimization_level
        if level is not None and not 0 <= level <= _HIGHEST_LEVEL:
            raise UsageError(
                f"The optimization level is {level}, not 0 to {_HIGHEST_LEVEL}.", do="Change --opt-level."
            )
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise UsageError(
                f"The workspace of {self.workspace_bytes} bytes is too small.", do="Give 1 byte at least."
            )
        parse_architectures(",".join(self.architectures))
        self._require_of_target()

    def bounds(self, signature: Signature) -> tuple[dict[str, Bounds], ...]:
        """Look up the bounds of every free size, in each profile.

        Args:
            signature: of the network.

        Raises:
            UsageError: as `Profile.bounds`.
        """
        return tuple(one.bounds(signature) for one in self.profiles)

    def _require_of_target(self) -> None:
        """Raise UsageError for an option of the other target."""
        if self.target == "tensorrt" and self.architectures:
            raise UsageError(
                f"The target 'tensorrt' cannot be built for {', '.join(self.architectures)}.",
                expected="TensorRT builds for the GPU that it runs on, whose kernels it times.",
                do="Leave --gpu-arch out, or build for tensorrt-rtx.",
            )
        if self.target == "tensorrt-rtx" and (self.hardware != "none" or self.version_compatible):
            raise UsageError(
                "TensorRT for RTX has no hardware or version compatibility to choose.",
                expected="Its engines are compiled on the machine that loads them.",
                do="Leave --hardware-compatible and --version-compatible out; --gpu-arch names the GPUs.",
            )


def parse_profile(text: str) -> Profile:
    """Parse a profile.

    Args:
        text: `NAME=MIN:OPT:MAX` for each free size, with commas between. One number stands for all three, and
            bounds without a name are those of the batch.

    Raises:
        UsageError: anything else, a size that comes twice, or bounds that are not in order.
    """
    sizes: dict[str, Bounds] = {}
    for part in text.split(","):
        before, equals, after = part.rpartition("=")
        name = before.strip() if equals else BATCH
        numbers = after.strip().split(":")
        are_sizes = len(numbers) in (1, 3) and all(re.fullmatch(r"[0-9]{1,9}", one) for one in numbers)
        if not name or name in sizes or not are_sizes:
            raise UsageError(
                f"{text!r} is no profile: {part!r} is not NAME=MIN:OPT:MAX or NAME=SIZE, each name once.",
                do="Write for instance --profile 1:8:32 or --profile batch=1:8:32,sequence=16:128:512.",
            )
        found = [int(one) for one in numbers] * (3 if len(numbers) == 1 else 1)
        sizes[name] = (found[0], found[1], found[2])
    return Profile(sizes=sizes)


def parse_architectures(text: str) -> tuple[str, ...]:
    """Parse the names of GPU architectures.

    Args:
        text: such as `sm80,sm86`; may be empty.

    Returns:
        Each name once, in the order of their numbers.

    Raises:
        UsageError: a name is not `sm` and a compute capability.
    """
    names = [part.strip().lower() for part in text.split(",") if part.strip()]
    for name in names:
        if not _ARCHITECTURE.fullmatch(name):
            raise UsageError(
                f"{name!r} is no GPU architecture, such as sm80, sm86, sm89 or sm120.",
                do="See NVIDIA's list of CUDA GPUs for the compute capability of yours.",
            )
    return tuple(sorted(set(names), key=lambda name: int(name[2:])))


def engine_options(
    targets: Sequence[str],
    *,
    profiles: Sequence[str] = (),
    architectures: str = "",
    workspace_mib: int | None = None,
    optimization_level: int | None = None,
    hardware: str = "none",
    version_compatible: bool = False,
) -> tuple[EngineOptions, ...]:
    """Parse the engine options of a command line.

    Args:
        targets: what to build for; those that are engines get options.
        profiles: texts as of `parse_profile`; none for the default.
        architectures: text as of `parse_architectures`, for `tensorrt-rtx` only.
        workspace_mib: limit of the workspace in MiB.
        optimization_level: 0 to 5.
        hardware: one of `HARDWARE_LEVELS`, for `tensorrt` only.
        version_compatible: for `tensorrt` only.

    Returns:
        One value for each target that is an engine, in the order of `TARGETS`.

    Raises:
        UsageError: an option is invalid, or is for none of the targets.
        UnknownNameError: no such hardware level.
    """
    for_one = {
        "tensorrt-rtx": {"--gpu-arch": bool(architectures)},
        "tensorrt": {
            "--hardware-compatible": hardware != "none",
            "--version-compatible": version_compatible,
        },
    }
    wanted = [target for target in TARGETS if target in targets]
    for target, options in for_one.items():
        for option, is_given in options.items():
            if is_given and target not in wanted:
                raise UsageError(
                    f"{option} was given, and {target} is not among the targets {', '.join(targets)}.",
                    do=f"Add --target {target}, or leave {option} out.",
                )
    shared = {"--profile": profiles, "--workspace": workspace_mib, "--opt-level": optimization_level}
    for option, value in shared.items():
        if value not in ((), None) and not wanted:
            raise UsageError(
                f"{option} was given, and no engine is built for {', '.join(targets)}.",
                do=f"Add --target {' or '.join(TARGETS)}, or leave {option} out.",
            )
    if hardware not in HARDWARE_LEVELS:
        raise UnknownNameError("hardware compatibility", hardware, HARDWARE_LEVELS)
    sizes = tuple(parse_profile(text) for text in profiles) or (Profile(),)
    level: HardwareLevel = next(one for one in HARDWARE_LEVELS if one == hardware)
    return tuple(
        EngineOptions(
            target=target,
            profiles=sizes,
            workspace_bytes=None if workspace_mib is None else workspace_mib << 20,
            optimization_level=optimization_level,
            hardware=level if target == "tensorrt" else "none",
            version_compatible=version_compatible and target == "tensorrt",
            architectures=parse_architectures(architectures) if target == "tensorrt-rtx" else (),
        )
        for target in wanted
    )


def require_buildable(precision: Precision, architectures: Iterable[str]) -> None:
    """Check that GPUs have arithmetic for a precision.

    Args:
        precision: of the engine.
        architectures: as in `sm89`.

    Raises:
        UsageError: one of them has none.
    """
    first = _FIRST_ARCHITECTURE.get(precision, 0)
    for name in architectures:
        if int(name[2:]) < first:
            raise UsageError(
                f"{name} has no {precision} arithmetic; sm{first} is the first that has.",
                do="Leave that GPU out, or choose another precision.",
            )


def require_types(signature: Signature) -> None:
    """Check that engines can take and give what a network does.

    Args:
        signature: of the network.

    Raises:
        UsageError: an input or output is of a type that TensorRT does not have.
    """
    for one in (*signature.inputs, *signature.outputs):
        if one.dtype not in _TYPES:
            raise UsageError(
                f"An engine cannot take or give {one}: TensorRT has no {one.dtype}.",
                expected=f"It has {', '.join(_TYPES)}.",
                do="Cast it inside the network, or build for onnx alone.",
            )


def engine_file(target: str, precision: str, architectures: Sequence[str]) -> str:
    """Name the file of an engine within a bundle.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.
        precision: of the engine.
        architectures: as in `sm89`; empty for the library's own choice.
    """
    where = "+".join(architectures) or "default"
    return f"engines/{target}-{precision}-{where}.engine"
