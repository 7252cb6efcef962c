"""Interactions of any size: python jobs/generate.py --users U --items I --interactions N --out DIR

Leaves DIR/raw, files in the format of Amazon Reviews 2023, and DIR/log, the prepared log.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from sellarec.environment import check_environment
from sellarec.errors import exit_status


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Generate interactions with the long tails of Amazon's reviews, as raw files and as a prepared log."""

    users: int
    """Users; each has at least one interaction."""
    items: int
    """Items of the catalog; each has at least one interaction."""
    interactions: int
    """Rows, repeats of a user and an item included; no fewer than users or items."""
    out: Path
    """Folder to write into; on a cluster, one that all nodes share."""
    seed: int = 0
    """Seed of everything that is drawn."""
    gzip: bool = False
    """Compress the raw files (.jsonl.gz)."""
    raw_only: bool = False
    """Leave out the prepared log."""


def main(arguments: list[str]) -> None:
    settings = tyro.cli(
        Settings, args=arguments, prog="generate.py", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    check_environment()
    from sellarec.artifacts import Place
    from sellarec.data.synthetic import Synthetic, synthetic_source, write_raw
    from sellarec.training.cluster import connect
    from sellarec.training.progress import Console

    generated = Synthetic(
        users=settings.users, items=settings.items, interactions=settings.interactions, seed=settings.seed
    )
    console = Console()
    connect(1, console, Place.of(str(settings.out)), device="cpu")
    write_raw(generated, settings.out, settings.gzip, lambda name, size: console.line(f"{name}: {size:,} bytes"))
    if not settings.raw_only:
        from sellarec.config import Data
        from sellarec.data.log import write_manifest
        from sellarec.data.prepare import discard_work, in_words, prepare, rules_of

        source = synthetic_source(generated)
        log = settings.out / "log"
        # Ray runs already, for the raw files
        facts = prepare(source, rules_of(Data(), source), log, hashes={}, start_ray=lambda: None, say=console.line)
        write_manifest(log, facts)
        discard_work(log)
        for line in in_words(facts):
            console.line(line)
        console.line(f"log        {log}")


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
