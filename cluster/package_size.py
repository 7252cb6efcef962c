"""What `ray job submit --working-dir .` would send to the cluster, before it does: the largest files, the size of the package.

python cluster/package_size.py [FOLDER] [--limit MiB]     exits with 2 where the package is larger
"""

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

import yaml

from sellarec.errors import UserError, exit_status

EXCLUDES = Path(__file__).with_name("runtime_env.yaml")

MIB = 1 << 20


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path.cwd(), help="what --working-dir names (.)")
    parser.add_argument("--limit", type=float, default=10, help="MiB; code alone takes less than one (10)")
    given = parser.parse_args(arguments)
    if not given.folder.is_dir():
        raise UserError(f"{given.folder} is no folder")
    from ray._private.runtime_env.packaging import create_package  # Ray's own: the very file that it would send

    excludes = yaml.safe_load(EXCLUDES.read_text())["excludes"]
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package.zip"
        create_package(str(given.folder), package, include_gitignore=True, excludes=excludes)
        size = package.stat().st_size
        files = sorted(zipfile.ZipFile(package).infolist(), key=lambda file: -file.compress_size)
    for file in files[:5]:
        print(f"{file.compress_size / MIB:8.2f} MiB  {file.filename}")
    print(f"{size / MIB:8.2f} MiB  in all, {len(files)} files")
    if size > given.limit * MIB:
        raise UserError(
            f"the package of {given.folder} is {size / MIB:.1f} MiB, more than {given.limit:g}: only code goes with a job. Add "
            f"what is not code to .gitignore or to the excludes in {EXCLUDES}, or raise --limit"
        )


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
