"""Tables and plots of results: `python benchmarks/collect.py [--results DIR] [--into FILE.md]`.

Reads every JSON that run.py and sweep.py have left in `--results`, and puts the tables between the lines
`<!-- benchmarks -->` and `<!-- end of benchmarks -->` of a Markdown file (without `--into` they are printed). Plots go to the
folder `images` beside it: one of all ratios, and one for each case that was swept over a number, where no other
setting varied with it.
"""

import argparse
import json
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from harness import RESULTS
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1] / "jobs"))

from reproduce import put_between

from sellarec.figures import ACCENT, MUTED, STYLE, show

NAME = "benchmarks"
MARKS = "os^Dv"


def read(folder: Path) -> list[dict[str, Any]]:
    """The results of a folder by the names of their files; a sweep's cells in the order of their values."""
    found = [json.loads(path.read_text()) | {"file": path.stem} for path in sorted(folder.glob("*.json"))]
    return sorted(
        found,
        key=lambda result: (
            result["case"],
            keys_of(result),
            [(isinstance(value, str), value) for value in cell_of(result).values()],
        ),
    )


def cell_of(result: dict[str, Any]) -> dict[str, Any]:
    """The settings that a sweep has given a result, by name."""
    return result.get("cell", {})


def keys_of(result: dict[str, Any]) -> list[str]:
    """Names of the settings that its sweep was over; none where it is of no sweep."""
    return list(cell_of(result))


def ratio_in_words(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3g} [{ratio['lowest']:.3g}, {ratio['highest']:.3g}]"


def found_otherwise(result: dict[str, Any]) -> set[str]:
    """Names of single numbers that the sides found to be others, such as the quality that they reach."""
    found = [side["found"] for side in result["sides"].values() if "found" in side]
    numbers = {name for of_side in found for name, value in of_side.items() if isinstance(value, int | float)}
    numbers -= {"model FLOPs", "peak FLOPs/s"}  # of which the utilisation is told
    values = {name: [of_side[name] for of_side in found if name in of_side] for name in numbers}
    return {name for name, of_sides in values.items() if max(of_sides) - min(of_sides) > 0.01 * abs(max(of_sides))}


def table(results: list[dict[str, Any]]) -> str:
    """A line for each side of each result, the first side's with what is compared."""
    lines = [
        "| case | side | units/s | first side over this one: speed | per CPU second | first repetition s | then s | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        told = found_otherwise(result)
        cell = "".join(f", {name} {show(value)}" for name, value in cell_of(result).items())
        for number, (name, side) in enumerate(result["sides"].items()):
            what = cell or f": {result['what']}"  # which tells the case's own size
            case = f"`{result['case']}`{what}" if number == 0 else ""
            if "out of memory" in side:
                lines.append(f"| {case} | {name} | out of memory | | | | | |")
                continue
            ratio = result["ratios"].get(name)
            ratios = [ratio_in_words(ratio[clock]) for clock in ("speed", "per CPU second")] if ratio else ["", ""]
            speed = f"{side['units/s']:,.0f} {result['unit']}/s"
            times = f"{side['first seconds']:.2f} | {side['seconds']:.3g} | {side['bytes above'] / 2**20:,.0f}"
            more = "".join(f"; {key} {value:,.4g}" for key, value in side["found"].items() if key in told)
            more += f"; {side['utilisation']:.0%} of the peak" if "utilisation" in side else ""
            lines.append(f"| {case} | {name}{more} | {speed} | {ratios[0]} | {ratios[1]} | {times} |")
    return "\n".join(lines)


def parts_table(results: list[dict[str, Any]]) -> str:
    """Where the time of a first repetition went, of the sides that have found it (`parts`): a column a side."""
    lines = []
    for result in results:
        sides = {
            name: side["found"]["parts"] for name, side in result["sides"].items() if "parts" in side.get("found", {})
        }
        if not sides:
            continue
        cell = "".join(f", {name} {show(value)}" for name, value in cell_of(result).items())
        lines += [
            "",
            f"| `{result['case']}`{cell}, first repetition | {' | '.join(sides)} |",
            f"|---{'|---' * len(sides)}|",
        ]
        for part in next(iter(sides.values())):
            lines.append(f"| {part} | {' | '.join(f'{found[part]:.3g}' for found in sides.values())} |")
    return "\n".join([*lines, ""]) if lines else ""


def origins(results: list[dict[str, Any]]) -> str:
    """Where, when and how the results were taken: a line for those that have it alike."""
    lines: dict[str, list[str]] = {}
    for result in results:
        machine, run = result["machine"], result["settings"]["run"]
        gpus = {side["GPU"] for side in result["sides"].values() if "GPU" in side}
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        told = (
            f"{machine['date'][:10]}, commit {machine['commit'][:10]}{machine['commit'][40:]}, {machine['processor']}, "
            f"{machine['cores used']} cores, {machine['memory bytes'] / 2**30:.0f} GiB{''.join(f', {gpu}' for gpu in gpus)}, "
            f"{run['threads']} thread{'s' if run['threads'] > 1 else ''} a side; Python {machine['python']}, {versions}"
        )
        kept = f"{result['file']} ({result['rounds kept']} of {len(result['rounds'])} rounds)"
        lines.setdefault(told, []).append(kept)
    return "\n".join(f"- {', '.join(files)}: {told}." for told, files in lines.items())


def plot(draw: Callable[[Any], None], file: Path, size: tuple[float, float], panels: int = 1) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(1, panels))
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, facecolor="white", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def draw_ratios(axes: Axes, results: list[dict[str, Any]]) -> None:
    """Speed of the first side over each other one: the median of rounds, and the lowest and highest."""
    found = [
        (f"{result['case']}, against {name}", ratio["speed"])
        for result in reversed(results)
        for name, ratio in reversed(result["ratios"].items())
    ]
    for place, (_, ratio) in enumerate(found):
        axes.plot([ratio["lowest"], ratio["highest"]], [place, place], color=MUTED)
        axes.plot(ratio["median"], place, "o", color=ACCENT)
    axes.axvline(1, color=MUTED, linestyle=":")
    axes.set(xscale="log", yticks=range(len(found)), yticklabels=[name for name, _ in found])
    axes.set_xlabel("times as fast: median of rounds, lowest and highest")


def draw_sweep(panels: Any, cells: list[dict[str, Any]], key: str) -> None:
    """Speed and memory of each side over a setting; a side ends where it had no memory left."""
    measures = {
        f"{cells[0]['unit']}/s": lambda side: side["units/s"],
        "MiB": lambda side: side["bytes above"] / 2**20,
    }
    for axes, (label, value) in zip(panels, measures.items(), strict=True):
        for mark, name in zip(MARKS, cells[0]["sides"], strict=False):
            fitting = [cell for cell in cells if "out of memory" not in cell["sides"][name]]
            places = [cell_of(cell)[key] for cell in fitting]
            axes.plot(places, [value(cell["sides"][name]) for cell in fitting], f"{mark}-", label=name)
        axes.set(xscale="log", yscale="log", xlabel=key, ylabel=label)
    panels[0].legend()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, help="Markdown file, whose tables are replaced")
    arguments = parser.parse_args()
    results = read(arguments.results)
    if not results:
        parser.error(f"there are no results in {arguments.results}: benchmarks/run.py all makes them")
    single = [result for result in results if not cell_of(result)]
    text, pictures = f"{table(results)}\n{parts_table(results)}\n{origins(results)}\n", []
    images = (arguments.into.parent if arguments.into else Path()) / "images"
    if single and arguments.into:
        lines = sum(len(result["ratios"]) for result in single)
        plot(lambda axes: draw_ratios(axes, single), images / f"{NAME}.svg", (7, 0.8 + 0.25 * lines))
        pictures.append(f"![How many times as fast the first side of each case is]({images.name}/{NAME}.svg)\n")
    swept = [result for result in results if cell_of(result)]
    for (case, *keys), group in groupby(swept, key=lambda result: [result["case"], *keys_of(result)]):
        cells = list(group)
        varied = [key for key in keys if len({cell_of(cell)[key] for cell in cells}) > 1]
        if len(varied) != 1 or not arguments.into or type(cell_of(cells[0])[varied[0]]) not in (int, float):
            continue  # yes and no make no axis
        (over,) = varied
        plot(
            lambda panels, cells=cells, over=over: draw_sweep(panels, cells, over),
            images / f"{NAME}-{case}-{over}.svg",
            (7, 2.6),
            panels=2,
        )
        pictures.append(f"![{case} over {over}: speed and memory]({images.name}/{NAME}-{case}-{over}.svg)\n")
    if arguments.into:
        put_between(arguments.into, NAME, "\n".join([*pictures, text]))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
