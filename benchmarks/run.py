"""Measure a case, or all: `python benchmarks/run.py CASE [--set work.batch=4096 ...] [--out FILE.json]`.

    python benchmarks/run.py --list                                         what there is
    python benchmarks/run.py infonce --quick --out /tmp/infonce.json        seconds
    python benchmarks/run.py all --out-dir benchmarks/results               every case, a file each

How it is measured stands at the top of harness.py, what a case compares in its file under cases/. Ends with status 1 where a case
failed; no memory left is a result, not a failure.
"""

import argparse
import sys
from pathlib import Path

from harness import RESULTS, CaseError, case_names, in_words, measure, read_case, resolve, write

ENVIRONMENTS = Path(__file__).parent / "environments"


def settings_of(texts: list[str]) -> dict[str, str]:
    """`key=value` texts by key.

    Raises:
        CaseError: one is none.
    """
    wrong = [text for text in texts if "=" not in text]
    if wrong:
        raise CaseError(f"--set {wrong[0]}: give it as section.name=value, as run.rounds=3")
    return {key: value for key, _, value in (text.partition("=") for text in texts)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", help="a case's name, a .yaml file, or all")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of the case"
    )
    parser.add_argument("--quick", action="store_true", help="the case's quick form: does it work")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="measure these sides of the case alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="where sides compute")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    parser.add_argument(
        "--out-dir", type=Path, help="with all: folder of the results (default: results; with --quick none)"
    )
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="folder of peers' environments")
    arguments = parser.parse_args()
    if arguments.list:
        for name in case_names():
            print(f"{name:<24} {read_case(name).what}")
        return 0
    if arguments.case is None:
        parser.error("name a case, or all; --list names them")
    names = case_names() if arguments.case == "all" else [arguments.case]
    if arguments.case == "all" and (arguments.set or arguments.sides or arguments.out or arguments.device):
        parser.error("all takes neither --set, --sides, --device nor --out: each case has its own settings and file")
    if arguments.case != "all" and arguments.out_dir:
        parser.error("--out-dir goes with all: give --out FILE.json for the result of one case")
    folder = arguments.out_dir or (None if arguments.quick else RESULTS)  # what is quick is no figure
    failed = []
    for name in names:
        try:
            overrides = settings_of(arguments.set)
            case = resolve(name, overrides, arguments.quick, arguments.device, arguments.sides)
            result = measure(case, arguments.environments, lambda line: print(line, flush=True))
        except CaseError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        print(in_words(result), flush=True)
        out = (folder / f"{name}.json" if folder else None) if arguments.case == "all" else arguments.out
        if out is not None:
            write(result, out)
    if failed and len(names) > 1:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
