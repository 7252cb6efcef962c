"""A dataset to the prepared log: `python jobs/prepare.py DATASET [--path P] --out DIR`. `--help` lists all settings."""

import sys

from sellarec.environment import check_environment
from sellarec.errors import UserError, exit_status


def main(arguments: list[str]) -> None:
    check_environment()
    from sellarec.command_line import parse_prepare  # after the check: these import what it looks for

    settings = parse_prepare(arguments)
    from sellarec.artifacts import Place, lease
    from sellarec.data.files import file_hashes
    from sellarec.data.log import write_manifest
    from sellarec.data.prepare import check_expected, discard_work, in_words, prepare, rules_of
    from sellarec.data.sources import open_source
    from sellarec.data.sources.published import fetch
    from sellarec.training.cluster import connect
    from sellarec.training.progress import Console

    console = Console()
    out = settings.out
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give --out a folder")
    with lease(Place.of(str(out)), console.line):
        if (out / "manifest.json").exists():
            raise UserError(f"{out} holds a prepared log already: give another --out, or delete it")
        data = fetch(settings.data, settings.downloads, console.line)
        source = open_source(data)
        facts = prepare(
            source,
            rules_of(data, source),
            out,
            hashes=file_hashes(source.files),
            bad_rows=data.bad_rows,
            previous=settings.init_from,
            start_ray=lambda: connect(1, console, Place.of(str(out)), device="cpu"),
            say=console.line,
        )
        check_expected(facts, data.expected)
        write_manifest(out, facts)
        discard_work(out)
    for line in in_words(facts):
        console.line(line)
    console.line(f"log        {out}")


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
