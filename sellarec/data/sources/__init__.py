"""Where interactions come from: each module opens datasets in one published format, `open_source` any of them by config."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, cast, get_args

from sellarec.data.raw import Source
from sellarec.errors import UserError

if TYPE_CHECKING:
    from sellarec.config import Data


def open_source(data: Data) -> Source:
    """Open what `data` names: find its files, without reading their rows.

    Raises:
        UserError: files that are missing or of another format, or settings that the source doesn't know.
    """
    from sellarec.checks import seconds
    from sellarec.data.sources import amazon, collm, lcrec, lightgcn, movielens, recbole, tables
    from sellarec.data.world import generate_world

    if data.source == "world":
        source = generate_world(data.world, data.split, data.split_seed)
    elif data.path is None:
        raise UserError(
            f"the data of source {data.source} are not given: name their folder or file with --data (--path in prepare.py)"
        )
    elif data.source == "movielens":
        source = movielens.open_movielens(data.path, named_dataset(data))
    elif data.source == "amazon":
        period = None if data.period is None else (seconds(data.period[0]), seconds(data.period[1]))
        edition = cast(amazon.Edition, named_dataset(data))
        source = amazon.open_amazon(data.path, edition, data.categories, form=data.form, period=period)
    elif data.source == "tables":
        described = None if data.items is None else data.item_columns
        source = tables.open_tables(data.path, data.columns, items=data.items, item_columns=described)
    else:
        reader = {"collm": collm.open_collm, "lcrec": lcrec.open_lcrec, "recbole": recbole.open_recbole}
        source = {**reader, "lightgcn": lightgcn.open_lightgcn}[data.source](data.path)
    return dataclasses.replace(source, noun=data.noun or source.noun)


def named_dataset(data: Data) -> str:
    """Which dataset of MovieLens or Amazon is meant.

    Raises:
        UserError: none, or one that doesn't exist.
    """
    from sellarec.data.sources import amazon, movielens

    known = movielens.DATASETS if data.source == "movielens" else get_args(amazon.Edition)
    if data.dataset is None or data.dataset not in known:
        raise UserError(f"data.dataset is {data.dataset}, but the datasets of {data.source} are {', '.join(known)}")
    return data.dataset
