"""Where publishers serve their datasets, and fetching them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from sellarec.config import Data
from sellarec.data.download import download
from sellarec.data.sources import named_dataset
from sellarec.errors import UserError

MOVIELENS = "https://files.grouplens.org/datasets/movielens"
AMAZON = {
    "2014": "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles",
    "2018": "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2",
    "2023": "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw",
}


def published_files(data: Data) -> list[str]:
    """Addresses of the files of a dataset; [] where its publisher serves none that could be fetched plainly."""
    if data.source == "movielens":
        return [f"{MOVIELENS}/{named_dataset(data)}.zip"]
    if data.source != "amazon":
        return []
    if not data.categories:
        raise UserError("data.categories names no category of amazon, for instance --data.categories Video_Games")
    edition, form = named_dataset(data), data.form or "reviews"
    reviews = {
        ("2014", "reviews"): "reviews_{}.json.gz",
        ("2014", "5core"): "reviews_{}_5.json.gz",
        ("2014", "ratings"): "ratings_{}.csv",
        ("2018", "reviews"): "categoryFiles/{}.json.gz",
        ("2018", "5core"): "categoryFilesSmall/{}_5.json.gz",
        ("2018", "ratings"): "categoryFilesSmall/{}.csv",
        ("2023", "reviews"): "review_categories/{}.jsonl.gz",
    }.get((edition, form))
    described = {
        "2014": "meta_{}.json.gz",
        "2018": "metaFiles2/meta_{}.json.gz",
        "2023": "meta_categories/meta_{}.jsonl.gz",
    }
    if reviews is None:
        raise UserError(
            f"data.dataset is {edition} and data.form {form}: these files are not fetched, so name their folder with --data"
        )
    names = [template.format(name) for name in data.categories for template in (reviews, described[edition])]
    return [f"{AMAZON[edition]}/{name}" for name in names]


def fetch(data: Data, folder: Path, say: Callable[[str], None]) -> Data:
    """`data` with its path: as given, or where its files lie in `folder` once they are downloaded.

    Raises:
        UserError: a file that can't be had, or one that is not what its publisher's checksum says.
    """
    files = [] if data.path is not None else published_files(data)
    if not files:
        return data
    own = folder / (data.dataset or data.source)
    paths = [download(url, own, progress=say) for url in files]
    return dataclasses.replace(data, path=str(paths[0] if data.source == "movielens" else own))
