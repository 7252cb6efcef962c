"""Where interactions come from: each source returns `Raw`, under its own ids."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sellarec.data.raw import file_hash
from sellarec.data.sources import collm, movielens

Kind = Literal["collm", "movielens"]
"""A published format: CoLLM's zip of pickles (or the same as Parquet), or GroupLens's CSV files."""


def source_hashes(path: Path, kind: Kind) -> dict[str, str]:
    """Return file name to SHA-256 of the files that reading `path` as `kind` reads, without reading their rows.

    Raises:
        UserError: the files are not there, or cannot be read.
    """
    files = {"collm": collm.find_files, "movielens": movielens.find_files}[kind](path)
    return {file.name: file_hash(file) for file in files}
