"""Run the grid of a table and write it with intervals: `python jobs/reproduce.py TABLE [--seeds 1,2] [--into FILE.md] [flags]`.

The flags are those of train.py. `--seeds` takes others than the table's own, fewer or more. What stands is not run again, so an
interrupted table goes on where it was. The table goes to WORKSPACE/tables, and with
`--into` between the lines `<!-- TABLE -->` and `<!-- end of TABLE -->` of a Markdown file (at its end, where it has none);
TABLE.json beside it, with `--into` in a folder of the file's name, has every run's resolved settings, values and versions, and
facts of its log and of what was trained.
"""

import statistics
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sellarec.environment import check_environment
from sellarec.errors import UserError, exit_status

MAIN = "sella-rec"


@dataclass(frozen=True)
class Table:
    """Recipes that are run with several seeds.

    Attributes:
        evaluation: of `jobs/evaluate.py`, for a collaborative model alone; None for the whole main job.
        variants: the runs of each seed, by the name that their SeLLa-Rec gets: recipes and flags that are laid over `recipes`.
        published: what others report, by model: AUC / UAUC on all rows, and with which language model.
    """

    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    evaluation: dict[str, Any] | None = None
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {MAIN: ()})
    published: Mapping[str, str] = field(default_factory=dict)


SCORES: dict[str, Any] = {"batch": 4096}
RANKING = {"ranking": "full", "batch": 1024}

COLLM = {"mf": ".6482 / .6361", "lightgcn": ".5959 / .6499", "sasrec": ".7078 / .6884", "din": ".7166 / .6459"}
"""AUC / UAUC on MovieLens-1M in CoLLM's table (arXiv 2310.19488)."""

# Of the figures in `published`, those with Vicuna-7B are CoLLM's and BinLLM's own, those with Qwen2-7B of SeLLa-Rec's table.
MF = f"{COLLM['mf']} (MF without biases, CoLLM)"
TALLREC = ".7097 / .6818 (TALLRec, Vicuna-7B)"

CAPTION = (
    "Each cell: the mean over seeds (their standard deviation) [lowest and highest bound of the seeds' 95% intervals, "
    "each of a bootstrap over users]; of one seed, its value and interval. A - B is a paired difference. "
    "Published: AUC / UAUC, by others."
)

ALONE = ("--fuse.collab-score", "False", "--fuse.language-weights", "1")
"""Without the score of the collaborative model."""

WITHOUT_ALIGNMENT = ("--align.weight", "0", "--align.semantic", "frozen", "--fuse.warm-start", "False")
"""Distilled vectors as distil left them, and no projection to start from: with a weight of 0 alone, weight decay would wear both
down, and the row would tell of that. The row to compare it with is the one without warm start."""

TABLES_STAY = (
    *("--fuse.table-optimizer", "rowwise-adagrad", "--fuse.table-learning-rate", "0.1"),
    *("--fuse.table-weight-decay", "0"),
)
"""The defaults again of what a recipe sets for tables, where fuse trains none and takes no such settings. Other flags of variants
that give a default (the norm, a learning rate, unseen rows, biases) are for settings that the variant doesn't read either."""

SELLA_VARIANTS: dict[str, tuple[str, ...]] = {
    MAIN: (),
    "without alignment": WITHOUT_ALIGNMENT,
    "without warm start": ("--fuse.warm-start", "False"),
    "user and item": ("--fuse.tokens", "user", "item"),
    "user and semantic": ("--fuse.tokens", "user", "semantic"),
    "item and semantic": ("--fuse.tokens", "item", "semantic"),
    "user only": ("--fuse.tokens", "user"),
    "item only": ("--fuse.tokens", "item"),
    "semantic only": ("--fuse.tokens", "semantic", "--fuse.unseen-dropout", "0.35"),
    "CoLLM style": (
        *WITHOUT_ALIGNMENT,
        *("--fuse.tokens", "user", "item", "--fuse.train", "projections"),
        *TABLES_STAY,
    ),
    "PersonPrompt": (
        *("--fuse.represent", "learned", "--fuse.tokens", "user", "item", "--fuse.train", "tables"),
        *("--fuse.norm", "match", "--fuse.learning-rate", "0.008"),
    ),
    "BinLLM": (
        *("--collab.model", "binary_mf", "--collab.biases", "True", "--collab.dim", "32"),
        *("--collab.batch", "2048", "--collab.table-learning-rate", "0.01"),
        *("--collab.table-weight-decay", "0.001", "--collab.patience", "100"),
        *("--fuse.represent", "codes", "--fuse.tokens", "user", "item", "--fuse.train", "adapter"),
        *("--fuse.norm", "match", *TABLES_STAY),
    ),
}
"""SeLLa-Rec as published, its ablations, and the other ways to tell a language model of users and items."""

THREE = ("--fuse.tokens", "user", "item", "semantic")

ROBUST_VARIANTS: dict[str, tuple[str, ...]] = {
    MAIN: (),
    "three tokens": THREE,
    "three tokens alone": (*THREE, *ALONE),
    "three tokens alone without alignment": (*THREE, *ALONE, "--align.weight", "0", "--fuse.warm-start", "False"),
    "three tokens alone without warm start": (*THREE, *ALONE, "--fuse.warm-start", "False"),
    **{
        f"{' and '.join(tokens)} alone": ("--fuse.tokens", *tokens, *ALONE)
        for tokens in (
            ("user", "item"),
            ("user", "semantic"),
            ("item", "semantic"),
            ("user",),
            ("item",),
        )
    },
    "semantic alone": ("--fuse.tokens", "semantic", *ALONE, "--fuse.unseen-dropout", "0.35"),
}
"""`sella-robust`, and by the same training SeLLa-Rec's own form, without the collaborative score (alone), with its ablations."""

TABLES = {
    "world": Table(recipes=("demo", "longer"), seeds=(1, 2, 3)),
    **{
        f"collm-{model}": Table(("collm-ml-1m", f"collm-{model}"), (1, 2, 3, 4, 5), SCORES, published=COLLM)
        for model in ("mf", "lightgcn", "sasrec", "din", "fism")
    },
    "sella-ml-1m": Table(
        recipes=("collm-ml-1m", "sella-official"),
        seeds=(1, 2, 3),
        variants=SELLA_VARIANTS,
        published={
            "collab": MF,
            "text-only": TALLREC,
            MAIN: ".7606 / .7464 (Qwen2-7B, rows with a history)",
            "CoLLM style": ".7357 / .7179 (Qwen2-7B)",
            "PersonPrompt": ".7214 / .6563 (Vicuna-7B)",
            "BinLLM": ".7425 / .6956 (Vicuna-7B)",
        },
    ),
    "sella-book": Table(
        recipes=("collm-amazon-book", "sella-official-book"),
        seeds=(1, 2, 3),
        variants=SELLA_VARIANTS,
        published={
            "collab": ".7134 / .5565 (MF without biases, CoLLM)",
            "text-only": ".7375 / .5983 (TALLRec, Vicuna-7B)",
            MAIN: ".8837 / .7459 (Qwen2-7B)",
            "CoLLM style": ".8109 / .6225 (Vicuna-7B)",
            "PersonPrompt": ".7273 / .5956 (Vicuna-7B)",
            "BinLLM": ".8264 / .6319 (Vicuna-7B), .8429 / .7073 (SeLLa-Rec's table)",
        },
    ),
    "robust-ml-1m": Table(
        recipes=("collm-ml-1m", "sella-robust"),
        seeds=(1, 2, 3),
        variants=ROBUST_VARIANTS,
        published={"text-only": TALLREC, MAIN: ".7606 / .7464 (Qwen2-7B, rows with a history)"},
    ),
    "sella-robust-ml-1m": Table(
        recipes=("collm-ml-1m", "sella-robust"),
        seeds=(1, 2, 3),
        published={"text-only": TALLREC, MAIN: ".7606 / .7464 (Qwen2-7B, rows with a history)"},
    ),
    "small-ml-1m": Table(
        recipes=("collm-ml-1m",),
        seeds=(1, 2, 3),
        variants={
            "sella-robust": ("sella-robust",),
            "CoLLM style": (
                "--collab.model",
                "mf",
                "--align.weight",
                "0",
                "--fuse.tokens",
                "user",
                "item",
                "--fuse.train",
                "projections",
                "--fuse.norm",
                "none",
                "--fuse.warm-start",
                "False",
            ),
            "sella-official": ("sella-official",),
        },
        published={
            "collab (CoLLM style)": MF,
            "collab (sella-official)": MF,
            **dict.fromkeys(("text-only", "text-only (CoLLM style)", "text-only (sella-official)"), TALLREC),
            "CoLLM style": ".7357 / .7179 (Qwen2-7B)",
            "sella-official": ".7606 / .7464 (Qwen2-7B, rows with a history)",
        },
    ),
    **{
        name: Table(("log", name), (1,), RANKING)
        for name in ("gowalla-lightgcn", "gowalla-mf", "ml-1m-lightgcn", "beauty-sasrec", "games-sasrec")
    },
}


def main(arguments: list[str]) -> None:
    if arguments in (["-h"], ["--help"]):
        print(f"{__doc__}\nTables, with how many runs each takes:")
        for name, table in TABLES.items():
            print(f"  {name}: {len(table.variants) * len(table.seeds)}, of the recipes {', '.join(table.recipes)}")
        return
    if not arguments or arguments[0] not in TABLES:
        raise UserError(
            f"the table comes first: one of {', '.join(TABLES)}; not {arguments[0] if arguments else 'nothing'}"
        )
    name, flags = arguments[0], arguments[1:]
    own = [flag for flag in flags if flag.split("=")[0] in ("--seed", "--name", "--stages")]
    if own or (flags and not flags[0].startswith("-")):
        raise UserError(
            f"{(own or flags)[0]} is given, but a table sets its recipes, names and stages itself, and its seeds, or --seeds does"
        )
    table, chosen, given = TABLES[name], taken(flags, "--seeds"), taken(flags, "--into")
    into = None if given is None else Path(given)
    if into is not None and (not into.parent.is_dir() or into.is_dir()):
        raise UserError(
            f"--into is '{into}', where no file can be written: give a Markdown file in a folder that exists"
        )
    if chosen is not None:
        if not all(seed.isdecimal() for seed in chosen.split(",")):
            raise UserError(f"--seeds is '{chosen}': give whole numbers with commas between them, as --seeds 1,2")
        table = replace(table, seeds=tuple(dict.fromkeys(map(int, chosen.split(",")))))
    check_environment()
    from sellarec.artifacts import Place, in_json
    from sellarec.command_line import parse
    from sellarec.evaluation.results import format_table
    from sellarec.pipeline import run
    from sellarec.run import Run

    if into is not None:
        around(into, name)
    of_each = len(table.variants)
    print(
        f"table {name}: {len(table.seeds) * of_each} runs, one after the other ({of_each} of each of {len(table.seeds)} seeds; "
        "stages that they share are made once). What is told of costs below is of a single run",
        flush=True,
    )
    sections, records, made = [], [], []
    for seed in table.seeds:
        standing: dict[str, str] = {}
        for variant, own_flags in table.variants.items():
            short = "" if variant == MAIN else "-" + variant.replace(" ", "-")
            run_flags = [*own_flags, *flags, "--seed", str(seed), "--name", f"{name}{short}-seed-{seed}"]
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
            if table.evaluation is None:
                differs = {stage for stage, mark in this.marks.items() if standing.setdefault(stage, mark) != mark}
                found = of_variant(found, variant, differs)
            records += found
            made.append({"run": this.config.name, "seed": seed, "values": found, "stages": resolved(this)})
            sections.append(f"Seed {seed}{', ' + variant if short else ''}\n\n{format_table(found)}")
    summary = over_seeds(records, table.published)
    if table.evaluation is None:
        summary += f"\n\n{summarise(records)}"
    print(f"\n{summary}\n")
    place = Place.of(this.config.workspace) / "tables"
    place.write_text(f"{name}.txt", "\n\n".join([*sections, summary]) + "\n")
    place.write_json(f"{name}.json", made)
    place.write_text(f"{name}.md", markdown(records, table.published))
    print(f"table        {place}/{name}.txt, {name}.md, {name}.json")
    if into is not None:
        beside = into.with_suffix("") / f"{name}.json"
        beside.parent.mkdir(exist_ok=True)
        beside.write_text(in_json(made), encoding="utf-8")
        link = f"Resolved settings and values of each run: [{beside.name}]({beside.relative_to(into.parent)})."
        put_between(into, name, f"{markdown(records, table.published)}\n{link}\n")
        print(f"written into {into}, {beside}")


def taken(flags: list[str], name: str) -> str | None:
    """The value of a flag of this job's own, `--name VALUE` or `--name=VALUE`, which is taken out; None where it isn't given, ''
    where it has no value."""
    value = None
    while found := [flag for flag in flags if flag.partition("=")[0] == name]:
        at, long = flags.index(found[0]), "=" not in found[0]
        value = "".join(flags[at + 1 : at + 2]) if long else found[0].partition("=")[2]
        del flags[at : at + 1 + long]
    return value


FACTS = {
    "prepare": ("users", "items", "rows", "positives", "split_rule", "label_rule", "history_cap", "sources"),
    "collab": ("steps", "kept_step", "optimizers", "workers"),
}
"""What else is kept of a stage: which log it was (settings don't tell that of one that was prepared before), and which state."""


def resolved(this: Any) -> dict[str, Any]:
    """Of a run's stages the settings that they were carried out with, the versions of the packages, and some facts."""
    manifests = {stage: this.manifest(stage) for stage in this.marks}
    return {
        stage: {
            "settings": of["settings"],
            "versions": of["versions"],
            "facts": {name: of["facts"][name] for name in FACTS.get(stage, ())},
        }
        for stage, of in manifests.items()
    }


def of_variant(records: list[dict], variant: str, differs: Collection[str]) -> list[dict]:
    """The records of a variant's run that no variant before it has: SeLLa-Rec under the variant's name, what it is compared
    with, and the models of stages that differ from those of the seed's first variant.

    Args:
        differs: the stages whose artifacts are others.
    """
    from sellarec.evaluation.results import PAIR_SEPARATOR

    made_by = {"collab": "collab", "text-only": "adapt"}
    names = {MAIN: variant} | {model: f"{model} ({variant})" for model, stage in made_by.items() if stage in differs}
    found = []
    for record in records:
        parts = record["model"].split(PAIR_SEPARATOR)
        if differs and not set(parts) & set(names):
            continue  # the first variant's
        found.append({**record, "model": PAIR_SEPARATOR.join(names.get(part, part) for part in parts)})
    return found


def markdown(records: list[dict], published: Mapping[str, str]) -> str:
    """AUC / UAUC (or the ranking metrics) of each model on each cut, under a caption that says what a cell holds."""
    chosen = [r for r in records if r["value"] is not None]
    columns = list(dict.fromkeys((r["rows"], r["metric"]) for r in chosen))
    lines = [
        CAPTION,
        "",
        "| model | " + " | ".join(f"{metric}, {rows}" for rows, metric in columns) + " | published, all rows | seeds |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for model in dict.fromkeys(r["model"] for r in chosen):
        cells = []
        for rows, metric in columns:
            of_seeds = [r for r in chosen if (r["model"], r["rows"], r["metric"]) == (model, rows, metric)]
            values, bounds = [r["value"] for r in of_seeds], [r for r in of_seeds if r["low"] is not None]
            cell = f"{statistics.mean(values):.4f}" if values else ""
            if len(values) > 1:
                cell += f" ({statistics.stdev(values):.4f})"
            if bounds:
                cell += f" [{min(r['low'] for r in bounds):.4f}, {max(r['high'] for r in bounds):.4f}]"
            cells.append(cell)
        seeds = sorted({r["seed"] for r in chosen if r["model"] == model})
        cells += [published.get(model, ""), ", ".join(map(str, seeds))]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def around(file: Path, name: str) -> tuple[str, str]:
    """What a Markdown file has before a table and after it, with the two lines that the table is put between; where the file
    doesn't have them, the table's place is at its end.

    Raises:
        UserError: it has one of the lines alone, or both the wrong way round.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if (begin in before) != (end in before) or (begin in before and before.index(end) < before.index(begin)):
        raise UserError(
            f"{file} has only one of the lines {begin.strip()} and {end.strip()}, or both the wrong way round"
        )
    if begin not in before:
        before += f"\n{begin}{end}"
    return before[: before.index(end)].partition(begin)[0] + begin, before[before.index(end) :]


def put_between(file: Path, name: str, text: str) -> None:
    """Put a table between its two lines of a Markdown file, see `around`."""
    head, tail = around(file, name)
    file.write_text(f"{head}\n{text}\n{tail}", encoding="utf-8")


def evaluated(this: Any, evaluation: dict[str, Any]) -> list[dict]:
    """The records of a run's collaborative model."""
    from sellarec.config import Evaluation
    from sellarec.evaluation.artifact import evaluate_artifact

    artifact, data = (this.artifact(stage).local() for stage in ("collab", "prepare"))
    out, config = this.place.local() / "results.json", this.config
    return evaluate_artifact(
        Evaluation(artifact=artifact, data=data, out=out, workers=config.workers, seed=config.seed, **evaluation)
    )


def over_seeds(records: list[dict], published: Mapping[str, str]) -> str:
    """Mean and standard deviation over seeds of each model's metrics on all rows, and what others report of it."""
    from sellarec.evaluation.results import PAIR_SEPARATOR

    chosen = [r for r in records if r["rows"] == "all" and r["value"] is not None and PAIR_SEPARATOR not in r["model"]]
    width = max([len("model"), *(len(r["model"]) for r in chosen)])
    heading = f"{'model':<{width}} metric       mean      sd   seeds"
    lines = [heading + "  published AUC / UAUC" * bool(published)]
    told: set[str] = set()
    for model, metric in dict.fromkeys((r["model"], r["metric"]) for r in chosen):
        values = [r["value"] for r in chosen if (r["model"], r["metric"]) == (model, metric)]
        spread = f"{statistics.stdev(values):7.4f}" if len(values) > 1 else "    n/a"
        others = "" if model in told else published.get(model, "")
        line = f"{model:<{width}} {metric:<9} {statistics.mean(values):7.4f} {spread} {len(values):>7}  {others}"
        lines.append(line.rstrip())
        told.add(model)
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
