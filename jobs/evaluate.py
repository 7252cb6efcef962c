"""Evaluate a trained collaborative model, or an exported recommender: AUC and UAUC of a split's rows, rankings for its users.

`--help` lists all settings.
"""

import json
import sys

from sellarec.environment import check_environment
from sellarec.errors import exit_status


def main(arguments: list[str]) -> None:
    check_environment()
    from sellarec.command_line import parse_evaluation  # after the check: these import what it looks for

    settings = parse_evaluation(arguments)
    from sellarec.artifacts import check_output
    from sellarec.evaluation.artifact import evaluate_artifact

    check_output(settings.out, "--out")
    records = evaluate_artifact(settings)
    settings.out.write_text(json.dumps(records, indent=1) + "\n")
    print()
    for record in records:
        if record["rows"] == "all":
            low, high = (record[name] for name in ("low", "high"))
            interval = "n/a" if low is None else f"{low:.4f}, {high:.4f}"
            value = "n/a" if record["value"] is None else f"{record['value']:.4f}"
            print(
                f"{record['metric']:<10} {value} [{interval}]  {record['count']:,} {record['unit']}, {record['protocol']}"
            )
    print(f"\nall records  {settings.out}")


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
