"""sparse-export plan"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparse_export.cli._click import click
from sparse_export.cli._common import code_trust_option, json_option, say, showing


@click.command("plan")
@click.argument("model")
@click.option(
    "--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Samples of a call to serve."
)
@click.option("--speedup", type=float, metavar="RATIO", help="Lose least for this much speed; else exit 4.")
@click.option(
    "--max-sparse-loss",
    type=float,
    metavar="SHARE",
    help="Save most for at most this share of the weights' magnitude, like 0.1.",
)
@click.option("--dtype", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True)
@click.option(
    "--backend", type=click.Choice(["cusparselt", "cutlass"]), default="cusparselt", show_default=True
)
@click.option(
    "--timings",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Measurements of another time, not new ones.",
)
@click.option(
    "--keep-timings", type=click.Path(path_type=Path), metavar="FILE", help="Write the measurements there."
)
@click.option(
    "--verify",
    is_flag=True,
    help=(
        "Time the whole network too, dense, 2:4 and planned; exit 4 where the plan may be slower than dense."
    ),
)
@click.option(
    "--keep-verified", type=click.Path(path_type=Path), metavar="FILE", help="Write that measurement there."
)
@click.option("--rounds", type=int, default=24, show_default=True, help="Interleaved rounds of each product.")
@code_trust_option
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the plan there.")
@json_option
def command(
    model: str,
    batch: int,
    speedup: float | None,
    max_sparse_loss: float | None,
    dtype: Any,
    backend: Any,
    timings: Path | None,
    keep_timings: Path | None,
    verify: bool,
    keep_verified: Path | None,
    rounds: int,
    trust: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Choose the layers of MODEL, a name or a run, that are worth making 2:4 on this card.

    A layer that is not faster stays dense by rule. Without a card, give measurements by --timings.
    """
    import contextlib
    from dataclasses import asdict

    from sparse_export.files import require_writable
    from sparse_export.formats.layer_plan import write_layer_plan
    from sparse_export.formats.timings import write_timings
    from sparse_export.plan.network import plan_network, require_gpu, verify_plan
    from sparse_export.plan.table import plan_shown
    from sparse_export.plan.whole import check_never_slower, write_whole

    if keep_verified is not None and not verify:
        raise click.UsageError("--keep-verified needs --verify.")
    if verify:
        require_gpu()  # before anything is measured
    for path in (out, keep_timings, keep_verified):
        if path is not None:
            require_writable(path.parent)
    plan, measured = plan_network(
        model,
        batch=batch,
        dtype=dtype,
        backend=backend,
        speedup=speedup,
        max_sparse_loss=max_sparse_loss,
        timings=timings,
        rounds=rounds,
        trust=trust,
        on_progress=say,
    )
    with contextlib.nullcontext() if verify else showing(asdict(plan), plan_shown(plan), as_json):
        if keep_timings is not None:
            write_timings(keep_timings, measured)
            say(f"wrote {keep_timings}")
        if out is not None:
            write_layer_plan(out, plan)
            say(f"wrote {out}")
    if not verify:
        return
    whole = verify_plan(model, plan, rounds=rounds, trust=trust, on_progress=say)
    both = {**asdict(plan), "whole": asdict(whole)}
    with showing(both, plan_shown(plan) + whole.shown(), as_json):
        if keep_verified is not None:
            write_whole(keep_verified, whole)
            say(f"wrote {keep_verified}")
    check_never_slower(whole)
