"""A case over a grid of settings: `python benchmarks/sweep.py CASE work.batch=1024,4096 [KEY=V1,V2 ...] [--dry-run]`.

Each cell is a run of run.py's with its own file, `CASE.KEY=VALUE.KEY=VALUE.json` in `--out-dir`, of the settings that vary. A
cell that has no memory left is a result. One that fails otherwise doesn't end the grid, but the command ends with status 1.
"""

import argparse
import itertools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import RESULTS, Case, CaseError, in_words, measure, resolve, write
from run import ENVIRONMENTS, settings_of


def cells(axes: dict[str, str]) -> list[dict[str, str]]:
    """The grid's cells: a value for each key."""
    values = [text.split(",") for text in axes.values()]
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*values)]


def cell_name(case: str, cell: dict[str, str], grid: list[dict[str, str]]) -> str:
    """Of its file, without the ending: no two cells of a grid have the same. Settings that are one for all are left out."""
    named = {key: value for key, value in cell.items() if any(other[key] != value for other in grid)} or cell
    settings = (f"{key.replace('/', '_')}={value.replace('/', '_')}" for key, value in named.items())
    return ".".join([Path(case).stem, *settings])


def values_of(case: Case, cell: dict[str, str]) -> dict[str, Any]:
    """A cell's settings as the case has them."""
    settings = {"work": case.work, "run": asdict(case.run), "same": case.same}
    return {key: settings[section][name] for key in cell for section, _, name in [key.partition(".")]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case")
    parser.add_argument("axes", nargs="+", metavar="KEY=V1,V2", help="values of a setting, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="only name the cells")
    parser.add_argument(
        "--quick", action="store_true", help="the case's quick form, with the cells' settings laid over it"
    )
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="measure these sides of the case alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="where sides compute")
    parser.add_argument("--out-dir", type=Path, help="folder of the results (default: results; --quick wants it named)")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="folder of peers' environments")
    arguments = parser.parse_args()
    if arguments.quick and arguments.out_dir is None:
        parser.error("--quick gives no figures: name a folder for them with --out-dir")
    folder = arguments.out_dir or RESULTS
    try:
        grid = cells(settings_of(arguments.axes))
        # all are resolved before any is run: a mistake in the last one costs nothing
        resolved = {
            cell_name(arguments.case, cell, grid): resolve(
                arguments.case, cell, arguments.quick, arguments.device, arguments.sides
            )
            for cell in grid
        }
        if len(resolved) < len(grid):
            raise CaseError(f"two cells of {' '.join(arguments.axes)} have one name: give each value once")
    except CaseError as error:
        parser.error(str(error))
    failed = []
    for number, (name, case) in enumerate(resolved.items()):
        if arguments.dry_run:
            print(name)
            continue
        try:
            result = measure(case, arguments.environments, lambda line: print(line, flush=True))
        except CaseError as error:
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        print(f"{name}\n{in_words(result)}", flush=True)
        write(result | {"cell": values_of(case, grid[number])}, folder / f"{name}.json")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
