"""Run the grid of a table and write it with intervals: `python jobs/reproduce.py TABLE [--workspace DIR] [flags of train.py]`.

What stands is not run again, so an interrupted table goes on where it was.
"""

import statistics
import sys
from dataclasses import dataclass
from typing import Any

from sellarec.environment import check_environment
from sellarec.errors import UserError, exit_status


@dataclass(frozen=True)
class Table:
    """Recipes that are run with several seeds.

    Attributes:
        evaluation: of `jobs/evaluate.py`, for a collaborative model alone; None for the whole main job.
    """

    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    evaluation: dict[str, Any] | None = None


SCORES: dict[str, Any] = {"batch": 4096}
RANKING = {"ranking": "full", "batch": 1024}

TABLES = {
    "world": Table(recipes=("demo", "longer"), seeds=(1, 2, 3)),
    **{
        f"collm-{model}": Table(("collm-ml-1m", f"collm-{model}"), (1, 2, 3, 4, 5), SCORES)
        for model in ("mf", "lightgcn", "sasrec", "din", "fism")
    },
    **{
        name: Table(("log", name), (1,), RANKING)
        for name in ("gowalla-lightgcn", "ml-1m-lightgcn", "beauty-sasrec", "games-sasrec")
    },
}


def main(arguments: list[str]) -> None:
    if arguments in (["-h"], ["--help"]):
        print(f"{__doc__}\nTables: {', '.join(TABLES)}")
        return
    if not arguments or arguments[0] not in TABLES:
        raise UserError(
            f"the table comes first: one of {', '.join(TABLES)}; not {arguments[0] if arguments else 'nothing'}"
        )
    name, flags = arguments[0], arguments[1:]
    own = [flag for flag in flags if flag.split("=")[0] in ("--seed", "--name", "--stages")]
    if own or (flags and not flags[0].startswith("-")):
        raise UserError(f"{(own or flags)[0]} is given, but a table sets its recipes, seeds, names and stages itself")
    table = TABLES[name]
    check_environment()
    from sellarec.artifacts import Place
    from sellarec.config import parse
    from sellarec.evaluation.results import format_table
    from sellarec.pipeline import Run, run

    sections, records = [], []
    for seed in table.seeds:
        run_flags = [*flags, "--seed", str(seed), "--name", f"{name}-seed-{seed}"]
        if table.evaluation is not None:
            run_flags += ["--stages", "prepare,collab"]
        this = Run.of(parse([*table.recipes, *run_flags], program="reproduce.py"))
        run(this)
        if table.evaluation is None:
            found = this.place.read_json("results.json")
        else:
            file = f"results-collab-{this.marks['collab']}.json"
            found = this.place.read_json(file)
            if found is None:
                found = evaluated(this, table.evaluation)
                this.place.write_json(file, found)
        records += found
        sections.append(f"Seed {seed}\n\n{format_table(found)}")
    summary = over_seeds(records) if table.evaluation is not None else summarise(records)
    print(f"\n{summary}\n")
    place = Place.of(this.config.workspace) / "tables"
    place.write_text(f"{name}.txt", "\n\n".join([*sections, summary]) + "\n")
    place.write_json(f"{name}.json", records)
    print(f"table        {place}/{name}.txt")


def evaluated(this: Any, evaluation: dict[str, Any]) -> list[dict]:
    """The records of a run's collaborative model."""
    from sellarec.config import Evaluation
    from sellarec.evaluation.artifact import evaluate_artifact

    artifact, data = (this.artifact(stage).local() for stage in ("collab", "prepare"))
    out, config = this.place.local() / "results.json", this.config
    return evaluate_artifact(
        Evaluation(artifact=artifact, data=data, out=out, workers=config.workers, seed=config.seed, **evaluation)
    )


def over_seeds(records: list[dict]) -> str:
    """Mean and standard deviation over seeds of each model's metrics on all rows."""
    lines = ["model              metric      mean      sd   seeds"]
    chosen = [r for r in records if r["rows"] == "all" and r["value"] is not None]
    for model, metric in dict.fromkeys((r["model"], r["metric"]) for r in chosen):
        values = [r["value"] for r in chosen if (r["model"], r["metric"]) == (model, metric)]
        spread = f"{statistics.stdev(values):7.4f}" if len(values) > 1 else "    n/a"
        lines.append(f"{model:<18} {metric:<8} {statistics.mean(values):7.4f} {spread} {len(values):>7}")
    return "\n".join(lines)


def summarise(records: list[dict]) -> str:
    """For each paired difference of AUC, all rows and cold rows: mean over seeds, and the lowest bound of any seed."""
    from sellarec.evaluation.results import PAIR_SEPARATOR

    lines = [
        "paired difference of AUC     rows   mean over seeds   lowest 95% bound of a seed   above zero in every seed"
    ]
    differences = [r for r in records if PAIR_SEPARATOR in r["model"] and r["metric"] == "auc"]
    for model in dict.fromkeys(r["model"] for r in differences):
        for rows in ("all", "cold"):
            chosen = [r for r in differences if r["model"] == model and r["rows"] == rows]
            if any(r["low"] is None for r in chosen):  # users too few for an interval
                lines.append(f"{model:<28} {rows:<6} {'n/a':>15}   {'n/a':>26}   NO")
                continue
            mean, low = sum(r["value"] for r in chosen) / len(chosen), min(r["low"] for r in chosen)
            lines.append(f"{model:<28} {rows:<6} {mean:>+15.4f}   {low:>+26.4f}   {'yes' if low > 0 else 'NO'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
