"""What can be asked of an engine, checked before anything is built."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sparse_export.engines.tensorrt_import import TARGETS, Target
from sparse_export.errors import UnknownNameError, UsageError

__all__ = [
    "DEFAULT_PROFILE",
    "HARDWARE_LEVELS",
    "PRECISIONS",
    "EngineOptions",
    "HardwareLevel",
    "Precision",
    "Profile",
    "engine_file",
    "engine_options",
    "parse_architectures",
    "parse_profile",
    "require_buildable",
]

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
HardwareLevel = Literal["none", "ampere-plus", "same-compute-capability"]
HARDWARE_LEVELS: tuple[HardwareLevel, ...] = get_args(HardwareLevel)
_HIGHEST_LEVEL = 5  # builder_optimization_level, TensorRT 10 and 11
_ARCHITECTURE = re.compile(r"sm([1-9][0-9]{1,2})")
# First compute capability whose tensor cores have the type.
_FIRST_ARCHITECTURE: dict[str, int] = {"bf16": 80, "fp8": 89}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Batch sizes that an engine is made for: the smallest, the one it is tuned for, the largest."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise UsageError(
                f"A profile has the batch sizes {self}.",
                expected="1 <= MIN <= OPT <= MAX was expected.",
                do="Write for instance --profile 1:8:32.",
            )

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


DEFAULT_PROFILE = Profile(minimum=1, optimum=8, maximum=32)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is built.

    profiles: one at least.  workspace_bytes: None leaves the limit to the library, which takes all of the GPU's
    memory.  optimization_level: 0 to 5, None for the library's own (3).  hardware: GPUs besides the one it is
    built on, at a cost in speed.  version_compatible: loadable by later TensorRT releases too.  architectures:
    as in `sm89`, for TensorRT for RTX; empty for the library's own choice.  sparse: let the builder look for
    2:4 weights; it never changes what is computed.
    """

    target: Target
    profiles: tuple[Profile, ...] = (DEFAULT_PROFILE,)
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
            raise UsageError("There is no profile.", expected="One was expected at least.")
        level = self.optimization_level
        if level is not None and not 0 <= level <= _HIGHEST_LEVEL:
            raise UsageError(
                f"The optimization level is {level}.", expected=f"0 to {_HIGHEST_LEVEL} was expected."
            )
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise UsageError(
                f"The workspace is {self.workspace_bytes} bytes.", expected="At least 1 byte was expected."
            )
        parse_architectures(",".join(self.architectures))
        self._require_of_target()

    def _require_of_target(self) -> None:
        if self.target == "tensorrt" and self.architectures:
            raise UsageError(
                f"The target 'tensorrt' cannot be built for {', '.join(self.architectures)}.",
                expected="It builds for the GPU that it runs on, whose kernels it times.",
                do="Leave --gpu-arch out, or build for tensorrt-rtx.",
            )
        if self.target == "tensorrt-rtx" and (self.hardware != "none" or self.version_compatible):
            raise UsageError(
                "TensorRT for RTX has no hardware or version compatibility to choose.",
                expected="Its engines are compiled on the machine that loads them.",
                do="Leave --hardware-compatible and --version-compatible out; --gpu-arch names the GPUs.",
            )


def parse_profile(text: str) -> Profile:
    """`MIN:OPT:MAX`, or one number for all three. Raises UsageError."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise UsageError(
            f"{text!r} is no profile.",
            expected="Batch sizes MIN:OPT:MAX, or one for all three, were expected.",
            do="Write for instance --profile 1:8:32.",
        )
    sizes = [int(part) for part in parts] * (3 if len(parts) == 1 else 1)
    return Profile(minimum=sizes[0], optimum=sizes[1], maximum=sizes[2])


def parse_architectures(text: str) -> tuple[str, ...]:
    """`sm80,sm86` as names, each once, in order of their numbers; empty for an empty text. Raises UsageError."""
    names = [part.strip().lower() for part in text.split(",") if part.strip()]
    for name in names:
        if not _ARCHITECTURE.fullmatch(name):
            raise UsageError(
                f"{name!r} is no GPU architecture.",
                expected="Names like sm80, sm86, sm89 and sm120 were expected.",
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
    """The options of each target of a list that is an engine, from words of a command line.

    What is for one target only goes to that one. Raises UsageError for a word that is wrong, or that no target of
    the list takes, and UnknownNameError.
    """
    for_one = {
        "tensorrt-rtx": {"--gpu-arch": bool(architectures)},
        "tensorrt": {
            "--hardware-compatible": hardware != "none",
            "--version-compatible": version_compatible,
        },
    }
    wanted = [target for target in TARGETS if target in targets]
    for target, given in for_one.items():
        for option, is_given in given.items():
            if is_given and target not in wanted:
                raise UsageError(
                    f"{option} was given, and {target} is not among the targets {', '.join(targets)}.",
                    expected=f"It was expected to go with --target {target}.",
                    do=f"Add that target, or leave {option} out.",
                )
    shared = {"--profile": profiles, "--workspace": workspace_mib, "--opt-level": optimization_level}
    for option, value in shared.items():
        if value not in ((), None) and not wanted:
            raise UsageError(
                f"{option} was given, and no engine is built for {', '.join(targets)}.",
                expected=f"It was expected to go with --target {' or '.join(TARGETS)}.",
                do=f"Add a target, or leave {option} out.",
            )
    if hardware not in HARDWARE_LEVELS:
        raise UnknownNameError("hardware compatibility", hardware, HARDWARE_LEVELS)
    sizes = tuple(parse_profile(text) for text in profiles) or (DEFAULT_PROFILE,)
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
    """Raise UsageError when a GPU of the list has no arithmetic for the precision."""
    first = _FIRST_ARCHITECTURE.get(precision, 0)
    for name in architectures:
        if int(name[2:]) < first:
            raise UsageError(
                f"{name} has no {precision} arithmetic.",
                expected=f"sm{first} or later was expected.",
                do="Leave that GPU out, or choose another precision.",
            )


def engine_file(target: str, precision: str, architectures: Sequence[str]) -> str:
    """The name of an engine within a bundle."""
    where = "+".join(architectures) or "default"
    return f"engines/{target}-{precision}-{where}.engine"
