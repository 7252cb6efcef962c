"""Tables of docs/collab.md, of the results that stand: `python benchmarks/tables/collect.py [--into docs/collab.md]`.

Each goes between the lines `<!-- NAME -->` and `<!-- end of NAME -->`; without `--into` all are printed.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "jobs"))

from reproduce import put_between

ROOT = Path(__file__).parents[2]
HERE, MIB = Path(__file__).parent / "results", 2**20
SIZES = {10**4: "10^4", 10**6: "10^6", 10**7: "10^7", 4 * 10**6: "4 million", 10**8: "100 million"}


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((HERE / f"{name}.json").read_text())["cases"]


def origin(path: Path) -> str:
    facts = json.loads(path.read_text())
    return f"`{path.relative_to(ROOT)}`: commit {facts['commit'][:7]}, {facts['date'][:10]}, {facts['processor']}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *paths: Path) -> str:
    """Rows in Markdown, a first cell that repeats the one above left out, and where they are from."""
    lines, above = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)], None
    for first, *others in rows:
        lines.append(f"| {' | '.join(str(cell) for cell in ('' if first == above else first, *others))} |")
        above = first
    return "\n".join([*lines, "", "; ".join(origin(path) for path in paths) + "."])


def spread(of: Sequence[float]) -> str:
    """A median with the lowest and highest."""
    median, low, high = of
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def rounded(value: float) -> str:
    """To three digits, thousands apart."""
    return f"{float(f'{value:.3g}'):,.0f}"


def memory() -> str:
    rows = [
        (
            f"{SIZES[case['rows']]}, {kind}", case["workers"], f"{case['planned bytes'] / MIB:,.0f}",
            f"{case['resident bytes'] / MIB:,.0f}", rounded(case["lookups/s"]),
        )
        for name, kind in (("memory", "float32"), ("memory_100m", "float16"))
        for case in cases(name)
    ]  # fmt: skip
    head = ("rows, type", "workers", "planned MiB", "resident MiB", "lookups/s of training")
    return table(head, rows, HERE / "memory.json", HERE / "memory_100m.json")


def speed() -> str:
    rows = []
    for name, ids in (("train_speed", "uniform"), ("train_speed_long_tailed", "long-tailed")):
        for case in cases(name):
            others = [case["times as fast"].get(f"ours / {side}") for side in ("plain", "torchrec", "bags")]
            rows.append(
                (
                    f"{SIZES[case['rows']]}, {ids}", case["workers"], rounded(case["ours rows/s"]),
                    *("not measured" if other is None else spread(other["speed"]) for other in others),
                    spread(case["times as fast"]["ours / plain"]["per CPU second"]),
                    f"{case['ours MiB']:,.0f}", f"{case['plain MiB']:,.0f}",
                )
            )  # fmt: skip
    head = (
        "rows of both tables, ids", "workers", "ours rows/s", "ours / plain", "ours / TorchRec's rows",
        "ours / TorchRec's bags", "per CPU second: ours / plain", "ours MiB a worker", "plain MiB",
    )  # fmt: skip
    return table(head, rows, HERE / "train_speed.json", HERE / "train_speed_long_tailed.json")


def speed_adam() -> str:
    rows = []
    for case in cases("train_speed_adam"):
        sides = ("ours rowwise-adagrad", "ours adam")
        found = [case["times as fast"].get(f"{side} / plain") for side in sides]
        held = ", ".join(f"{case[f'{side} MiB']:,.0f}" for side in sides if f"{side} MiB" in case)
        rows.append(
            (
                SIZES[case["rows"]], case["workers"],
                *("not measured" if side is None else spread(side["speed"]) for side in found), held,
                f"{case['plain MiB']:,.0f}",
            )
        )  # fmt: skip
    head = (
        "rows of both tables", "workers", "row-wise Adagrad", "adam", "ours MiB a worker (row-wise Adagrad, adam)",
        "plain MiB",
    )  # fmt: skip
    return table(head, rows, HERE / "train_speed_adam.json")


def traffic() -> str:
    found = [*cases("traffic"), *cases("traffic_models"), *cases("traffic_lightgcn")]
    rows = []
    for name in dict.fromkeys(case["case"] for case in found):
        for case in found:
            if case["case"] != name or (case["workers"] == 1 and name.startswith("lightgcn")):
                continue
            sent, most, formula = (f"{case[of] / 1e6:.3f}" for of in ("sent bytes", "most sent bytes", "formula bytes"))
            cpu = ""
            if "CPU microseconds a row" in case:
                low, high = case["lowest, highest"]
                cpu = spread((case["CPU microseconds a row"], low, high))
            rows.append(
                (name, case["workers"], f"{sent} ({most})", formula, f"{sum(case['collectives'].values()):.0f}", cpu)
            )
    head = ("", "workers", "sent MB", "formula MB", "collectives a step", "CPU microseconds a row [lowest, highest]")
    return table(head, rows, *(HERE / f"{name}.json" for name in ("traffic", "traffic_models", "traffic_lightgcn")))


def recbole() -> str:
    paths = [ROOT / f"benchmarks/collab/results/{name}.json" for name in ("recbole", "recbole_lightgcn")]
    found = {(case["case"], case["what"]): case for path in paths for case in json.loads(path.read_text())["cases"]}
    rows = []
    for (name, what), case in found.items():
        unit = "users" if what == "rank" else "targets"
        theirs = name.split(",")[0] + ", recbole"
        ratio = spread((case["ratio"], *case["lowest, highest ratio"])) if "ratio" in case else ""
        of_theirs = f"{rounded(found[theirs, what][f'{unit}/s'])}" if ratio else ""
        rows.append((what, name, f"{rounded(case[f'{unit}/s'])} {unit}/s", of_theirs, ratio))
    return table(("", "side", "speed", "RecBole's", "ratio"), sorted(rows, reverse=True), *paths)


TABLES = {
    "memory of tables": memory,
    "speed of tables": speed,
    "speed beside SparseAdam": speed_adam,
    "RecBole": recbole,
    "traffic": traffic,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, metavar="FILE.md")
    settings = parser.parse_args()
    for name, make in TABLES.items():
        if settings.into is None:
            print(f"{name}\n\n{make()}\n")
        else:
            put_between(settings.into, name, make())


if __name__ == "__main__":
    main()
