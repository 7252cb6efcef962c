"""How long the tails of a log's degrees are: the spreads of `sellarec.data.synthetic`, by maximum likelihood.

    python benchmarks/data/fit_degrees.py FILE.parquet [FILE.parquet ...]    columns user and item, one row an interaction
    python benchmarks/data/fit_degrees.py --totals 3.966 0.519               from published totals: rows a user, share of ones

Degrees below the lowest one (5 in a 5-core) count as not observed. KS is the largest distance between the fitted and the
observed distribution function. The power law beside it is cut off at the highest degree; both have their likelihood printed.
"""

import argparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sellarec.data.synthetic import degree_probabilities, spread_from_ones

POINTS = 9  # of the search grid in each direction, per round
ROUNDS = 14


def fit(degrees: np.ndarray) -> dict[str, float]:
    """The fitted spread of sorted degrees (int64 [n]), with its goodness."""
    lowest, highest = int(degrees.min()), int(degrees.max())
    seen, counts = np.unique(degrees, return_counts=True)
    below = np.arange(1, lowest)

    def probabilities(values: np.ndarray, log_mean: float, spread: float) -> np.ndarray:
        """Of degrees that are observed at all: those below the core are not."""
        found = degree_probabilities(np.concatenate([below, values]), 1 + np.exp(log_mean), spread)
        return found[len(below) :] / (1 - found[: len(below)].sum())

    def likelihood(log_mean: float, spread: float) -> float:
        return float(counts @ np.log(np.maximum(probabilities(seen, log_mean, spread), 1e-300)))

    best, span = (np.log(degrees.mean()), 1.5), (5.0, 1.4)
    for _ in range(ROUNDS):
        grid = [
            (best[0] + span[0] * x, max(0.02, best[1] + span[1] * y))
            for x in np.linspace(-1, 1, POINTS)
            for y in np.linspace(-1, 1, POINTS)
        ]
        best = max(grid, key=lambda pair: likelihood(*pair))
        span = (span[0] * 0.55, span[1] * 0.55)
    values = np.arange(lowest, highest + 1)
    fitted = np.cumsum(probabilities(values, *best))
    observed = np.searchsorted(degrees, values, side="right") / len(degrees)
    powers = np.linspace(0.5, 4, 701)
    logs = np.log(values)
    constants = np.array([np.log(np.exp(-power * logs).sum()) for power in powers])
    scores = -powers * (counts @ np.log(seen)) - constants * len(degrees)
    power = int(np.argmax(scores))
    law = np.cumsum(np.exp(-powers[power] * logs - constants[power]))
    # The share of the top 1% in the fit: its quantiles stand for as many users or items as the log has.
    quantiles = (np.arange(len(degrees)) + 0.5) / len(degrees)
    drawn = np.searchsorted(fitted, quantiles).clip(max=len(values) - 1) + lowest
    return {
        "nodes": len(degrees),
        "lowest": lowest,
        "mean": float(degrees.mean()),
        "mean_of_whole": float(1 + np.exp(best[0])),
        "spread": best[1],
        "ks": float(np.abs(fitted - observed).max()),
        "log_likelihood": likelihood(*best) / len(degrees),
        "top": top_share(degrees),
        "top_fitted": top_share(drawn),
        "power": float(powers[power]),
        "power_ks": float(np.abs(law - observed).max()),
        "power_log_likelihood": float(scores[power]) / len(degrees),
    }


def top_share(degrees: np.ndarray, share: float = 0.01) -> float:
    """The share of the rows that belong to the most frequent hundredth."""
    return float(np.sort(degrees)[::-1][: max(1, round(len(degrees) * share))].sum() / degrees.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="Parquet files of one log")
    parser.add_argument("--lowest", type=int, default=1, help="leave lower degrees out (rows; 10 for a 10-core)")
    parser.add_argument(
        "--totals",
        type=float,
        nargs=2,
        metavar=("MEAN", "ONES"),
        help="of a whole log: rows a user (or item), and the share of users (or items) with a single row",
    )
    arguments = parser.parse_args()
    if arguments.totals:
        print(f"spread {spread_from_ones(*arguments.totals):.4f}")
    if not arguments.files:
        return
    table = pa.concat_tables([pq.read_table(file, columns=["user", "item"]) for file in arguments.files])
    for side in ("user", "item"):
        degrees = np.sort(table[side].value_counts().field("counts").to_numpy())
        facts = fit(degrees[degrees >= arguments.lowest])
        print(side, ", ".join(f"{name} {value:.4g}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
