"""Which steps bring a pruned network back towards the dense one without labels, and whether they helped."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from sparse_export.errors import UsageError

__all__ = [
    "AUTO",
    "CHANNELS",
    "NONE",
    "JointResult",
    "NormsResult",
    "Recovery",
    "RecoveryResult",
    "recovery_from_text",
]

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Steps of a walk in which the dense network runs beside the pruned one, and one behind it.

    Attributes:
        damping: how far weights may go from the dense ones is chosen for each layer, on a fifth of its inputs
            that they are not corrected on.
        streams: weights are corrected towards what the layer gives in the dense network, on the inputs that it
            gets in the pruned one.
        sums: where the output is added to a value that is known by then, as at the end of a residual block,
            the layer also makes up for what that value has lost.
        bias: each output channel gets its mean back.
        variance: each output channel gets its standard deviation back.
        joint: after the walk the kept weights of all layers are fitted together by gradients; of torch networks
            alone, see `sparse_export.oneshot.joint`.
    """

    damping: bool = False
    streams: bool = False
    sums: bool = False
    bias: bool = False
    variance: bool = False
    joint: bool = False

    @property
    def steps(self) -> tuple[str, ...]:
        return tuple(one.name for one in fields(self) if getattr(self, one.name))

    def __str__(self) -> str:
        return ",".join(self.steps) or NONE

    @property
    def of_walk(self) -> Recovery | None:
        """The steps of the walk; None where there are none."""
        found = replace(self, joint=False)
        return found if found.steps else None


@dataclass(frozen=True, kw_only=True)
class RecoveryResult:
    """Whether a recovery helped.

    Attributes:
        steps: that were taken.
        kept: the network is the one with them.
        change_without: squared change of the outputs by their variance, on samples that no weight was calibrated
            on, without recovery.
        change_with: likewise, with it.
        n_samples: how many these are.
    """

    steps: tuple[str, ...]
    kept: bool
    change_without: float
    change_with: float
    n_samples: int

    def __str__(self) -> str:
        steps = ", ".join(self.steps)
        changes = f"{self.change_without:.3g} without, {self.change_with:.3g} with {steps}"
        found = "recovery was kept" if self.kept else "no recovery helped"
        return f"{found}: squared change of the outputs {changes}, on {self.n_samples} other samples"


@dataclass(frozen=True, kw_only=True)
class JointResult:
    """Whether fitting the kept weights together helped.

    Attributes:
        n_steps: of the optimizer.
        kept: the network is the one with it.
        change_without: squared change of the outputs by their variance, on samples that no weight was fitted to,
            as the walk left the network.
        change_with: likewise, after the fit.
        n_samples: how many these are.
    """

    n_steps: int
    kept: bool
    change_without: float
    change_with: float
    n_samples: int

    def __str__(self) -> str:
        found = "was kept" if self.kept else "did not help and was not kept"
        return (
            f"the joint fit {found}: squared change of the outputs {self.change_without:.3g} without, "
            f"{self.change_with:.3g} after {self.n_steps} steps, on {self.n_samples} other samples"
        )


@dataclass(frozen=True, kw_only=True)
class NormsResult:
    """Whether re-estimated batch norms helped.

    Attributes:
        n_norms: that were re-estimated.
        kept: the network is the one with them.
        change_without: squared change of the outputs by their variance, on samples that nothing was calibrated on,
            with the statistics of the dense network.
        change_with: likewise, with those of the pruned one.
        n_samples: how many these are.
    """

    n_norms: int
    kept: bool
    change_without: float
    change_with: float
    n_samples: int

    def __str__(self) -> str:
        found = "were kept" if self.kept else "did not help and were not kept"
        return (
            f"re-estimated batch norms {found}: squared change of the outputs {self.change_without:.3g} without, "
            f"{self.change_with:.3g} with {self.n_norms} of them, on {self.n_samples} other samples"
        )


CHANNELS = Recovery(bias=True, variance=True)
"""What re-estimated norms do, for a network that has none: mean and standard deviation of each channel."""

_DEFAULT = Recovery(damping=True, streams=True, sums=True, bias=True)


def recovery_from_text(text: str) -> Recovery | None:
    """What `--recover` asks for.

    Args:
        text: `none`, or names of steps with commas between them, of which `auto` stands for several.

    Returns:
        None for `none`.

    Raises:
        UsageError: a step has another name, or needs one that is missing.
    """
    if text == NONE:
        return None
    known = [one.name for one in fields(Recovery)]
    asked = [step.strip() for step in text.split(",")]
    steps = [step for one in asked for step in (_DEFAULT.steps if one == AUTO else [one])]
    for step in steps:
        if step not in known:
            raise UsageError(
                f"--recover has no step {step!r}.",
                expected=f"{AUTO}, {NONE}, or some of {', '.join(known)} were expected, with commas between them.",
            )
    if "sums" in steps and "streams" not in steps:
        raise UsageError(
            "The step sums of --recover was given without streams.",
            do="Give streams,sums: sums works through the weights that streams corrects.",
        )
    return Recovery(**dict.fromkeys(steps, True))
