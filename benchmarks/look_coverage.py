"""How often the interval that a comparison of times ends with holds the true ratio, by simulation.

    python -m benchmarks.look_coverage [--runs N] [--series FILE ...] [--json FILE]

`compare` looks at its times at fixed rounds and ends as soon as they are told apart. Here its own rule is run
over simulated rounds: log-ratios that follow an autoregression, whose coefficient and spread are given, or
those of real series out of `comparison.json` files. Needs no data and no GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sparse_export.instruments.looks import looks_of
from sparse_export.instruments.outcome import outcome_of
from sparse_export.instruments.statistics import Ratio, log_location_interval, resolution
from sparse_export.version import library_versions, now

RHOS = (0.0, 0.3, 0.6)
RATIOS = (1.0, 1.02, 1.05, 1.3)
SIGMA = 0.02
MOST = 40


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Of measurements that end as `compare` ends them.

    Attributes:
        rho: autocorrelation of the log-ratios, from round to round.
        sigma: their standard deviation.
        ratio: the true one.
        share: of the measurements, whose last interval holds it.
        error: standard error of that share.
        claimed: share that claims a speed-up.
        wrong: share that claims the opposite of the truth; with a ratio of 1, either direction.
        mean_rounds: until the end.
    """

    rho: float
    sigma: float
    ratio: float
    n_runs: int
    share: float
    error: float
    claimed: float
    wrong: float
    mean_rounds: float


def _series(rng: np.random.Generator, rho: float, sigma: float, shape: tuple[int, int]) -> np.ndarray:
    """Stationary AR(1) series of standard deviation sigma."""
    shocks = rng.standard_normal(shape)
    found = np.empty_like(shocks)
    found[:, 0] = shocks[:, 0]
    for i in range(1, shape[1]):
        found[:, i] = rho * found[:, i - 1] + np.sqrt(1 - rho**2) * shocks[:, i]
    return np.asarray(sigma * found)


def _ratios(x_RN: np.ndarray, confidence: float) -> Iterator[Ratio]:
    location, low, high, rho, n_outliers = log_location_interval(x_RN, confidence=confidence)
    for row in range(len(x_RN)):
        yield Ratio(
            estimate=float(np.exp(location[row])),
            low=float(np.exp(low[row])),
            high=float(np.exp(high[row])),
            n_rounds=x_RN.shape[1],
            n_outliers=int(n_outliers[row]),
            autocorrelation=float(rho[row]),
        )


def coverage_of(rho: float, log_ratio: float, *, sigma: float, most: int, n_runs: int, seed: int) -> Coverage:
    """Simulate measurements, and end each as `compare` does without a required speed-up.

    Args:
        rho: autocorrelation of the log-ratios, of dense / sparse as of the control.
        log_ratio: the true one of dense / sparse.
        sigma: standard deviation of both.
        most: rounds.
        n_runs: measurements.
        seed: of all that is drawn.
    """
    looks = looks_of(most)
    rng = np.random.default_rng(seed)
    times = log_ratio + _series(rng, rho, sigma, (n_runs, most))
    control = _series(rng, rho, sigma, (n_runs, most))
    going = np.arange(n_runs)
    held, claimed, wrong = (np.zeros(n_runs, bool) for _ in range(3))
    rounds = np.zeros(n_runs)
    for n in looks.rounds:
        pairs = zip(
            going,
            _ratios(times[going, :n], looks.confidence),
            _ratios(control[going, :n], looks.confidence),
            strict=True,
        )
        left = []
        for run, ratio, again in pairs:
            outcome = outcome_of(ratio, resolution(again))
            if outcome == "not told apart" and n < most:
                left.append(run)
                continue
            rounds[run] = n
            held[run] = ratio.low <= np.exp(log_ratio) <= ratio.high
            claimed[run] = outcome == "speed-up"
            wrong[run] = outcome == "slow-down" or (log_ratio == 0.0 and bool(claimed[run]))
        going = np.array(left, dtype=int)
        if not left:
            break
    share = float(held.mean())
    return Coverage(
        rho=rho,
        sigma=sigma,
        ratio=float(np.exp(log_ratio)),
        n_runs=n_runs,
        share=share,
        error=float(np.sqrt(share * (1 - share) / n_runs)),
        claimed=float(claimed.mean()),
        wrong=float(wrong.mean()),
        mean_rounds=float(rounds.mean()),
    )


def real_series(path: Path) -> Iterator[tuple[float, float]]:
    """The autocorrelation and the standard deviation of the log-ratios of each batch size in a comparison."""
    for at in json.loads(path.read_text())["latency"]:
        for other in ("dense_again", "sparse"):
            logs = np.log(np.array(at["dense"]["samples_ms"]) / np.array(at[other]["samples_ms"]))
            logs -= np.median(logs)
            away = np.abs(logs)
            kept = logs[away <= 5 * 1.4826 * np.median(away)]
            rho = float(np.corrcoef(kept[:-1], kept[1:])[0, 1])
            yield min(max(rho, 0.0), 0.9), float(kept.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--series", type=Path, nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    noises = [(rho, SIGMA) for rho in RHOS]
    noises += [noise for path in args.series for noise in real_series(path)]
    rows: list[Coverage] = []
    print("rho   sigma  ratio   held     claimed  wrong   rounds")
    for rho, sigma in noises:
        for ratio in RATIOS:
            found = coverage_of(
                rho, float(np.log(ratio)), sigma=sigma, most=MOST, n_runs=args.runs, seed=len(rows)
            )
            rows.append(found)
            print(
                f"{rho:.2f}  {sigma:.4f}  {ratio:.2f}   {100 * found.share:.1f} %   "
                f"{100 * found.claimed:5.1f} %  {100 * found.wrong:4.1f} %  {found.mean_rounds:5.1f}",
                flush=True,
            )
    if args.json:
        document = {
            "kind": "look-coverage",
            "created": now(),
            "most_rounds": MOST,
            "rows": [asdict(row) for row in rows],
            "versions": library_versions(),
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
