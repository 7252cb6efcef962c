"""Print the facts of this environment for a bug report; exit with 1 and the fix where the environment doesn't fit.

python jobs/env.py          as text
python jobs/env.py --json   as JSON
"""

import argparse  # not tyro: this script has to run where packages are missing
import json
import sys

try:
    from sellarec.environment import check_description, check_environment, describe_environment
    from sellarec.errors import UserError
except ModuleNotFoundError as error:
    if error.name != "sellarec":
        raise
    sys.exit(f"sellarec is not installed for {sys.executable}: run `make env`, then `.venv/bin/python jobs/env.py`")


def print_as_text(description: dict) -> None:
    for section, facts in description.items():
        print(section)
        for name, value in facts.items():
            print(f"  {name:<22} {', '.join(value) if isinstance(value, list) else value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()

    description = describe_environment()
    if arguments.json:
        print(json.dumps(description, indent=2))
    else:
        print_as_text(description)
    try:
        check_environment()
        check_description(description)
    except UserError as error:
        sys.stdout.flush()
        print(f"This environment doesn't fit: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
