"""The split that LightGCN, NGCF and KGAT publish: train.txt and test.txt, a user and its items in each line."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sellarec.data.raw import Dropped, Part, Source
from sellarec.data.sources.text import (
    Layout,
    Rows,
    TextFile,
    attributes,
    blocks,
    empty,
    files_at,
    header,
    lines_before,
    range_name,
    ranges,
    rows,
    sliced,
    wanted_files,
    whole_numbers,
    without_bad,
)
from sellarec.errors import UserError

SPLIT_FILES = {"train.txt": "train", "test.txt": "test"}
ITEM_LIST, USER_LIST = "item_list.txt", "user_list.txt"
LABEL_RULE = "1 for every row: the data holds positives only"
SPLIT_RULE = "train and test as published, one file each; no valid rows were published"

_LIST_COLUMNS = ("org_id", "remap_id")
_FREEBASE = "freebase_id"
_LAYOUT = Layout(" ")


def open_lightgcn(path: str, *, noun: str = "item") -> Source:
    """A published split of implicit feedback: lines `user item item …` in train.txt and test.txt.

    Each row's label is 1; there are no ratings and no times, and the order of rows means nothing. The column split holds
    "train" and "test" as published: valid rows were never published, and preparation takes them from train by its own
    rule. Lines without an item are left out and counted.

    Ids are int64 as in the files or, where item_list.txt (user_list.txt) is there, the strings of its column org_id; an item
    or user that isn't in its list makes a row bad. The lists' first line is `org_id remap_id`, with freebase_id after them
    or not: that becomes an item's link "freebase".

    Args:
        path: the folder, or a zip of it; a path or URI.

    Raises:
        UserError: train.txt or test.txt is missing; or, when parts are read, a file is damaged, not in UTF-8 or empty, a list
            lacks a column, or a row is bad and bad rows are refused.
    """
    looked_for = "train.txt and test.txt"
    found = files_at(path, looked_for)
    files = wanted_files(found, SPLIT_FILES, path, looked_for)
    items, users = found.get(ITEM_LIST), found.get(USER_LIST)
    return Source(
        interactions=tuple(
            Part(range_name(file, *piece), functools.partial(_read_lines, file, split, users, items, *piece))
            for file, split in zip(files, SPLIT_FILES.values(), strict=True)
            for piece in ranges(file)
        ),
        items=(Part(items.name, functools.partial(_read_list, items, "item")),) if items else (),
        users=(Part(users.name, functools.partial(_read_list, users, "user")),) if users else (),
        files=tuple(dict.fromkeys(file.path for file in (*files, items, users) if file)),
        noun=noun,
        label_rule=LABEL_RULE,
        split_rule=SPLIT_RULE,
    )


def _read_lines(
    file: TextFile,
    split: str,
    users: TextFile | None,
    items: TextFile | None,
    start: int,
    end: int | None,
    dropped: Dropped,
) -> Iterator[pa.Table]:
    user_ids, item_ids = (_ids(listed) if listed else None for listed in (users, items))
    is_empty = start == 0
    before = functools.cache(lambda: lines_before(file, start))
    for block in blocks(file, start=start, end=end):
        is_empty = False
        lines = pc.ascii_trim_whitespace(pa.array(block.content.splitlines(), pa.string()))
        lists = pc.ascii_split_whitespace(lines)
        values, offsets = lists.values, lists.offsets.to_numpy()
        sizes = np.diff(offsets)
        filled = pc.not_equal(lines, "").to_numpy(zero_copy_only=False)
        dropped.leave_out("a user without items", int(np.count_nonzero(filled & (sizes == 1))))
        # One row per item: the line's first value and its own.
        owner = np.repeat(np.arange(len(sizes)), sizes)
        is_item = np.ones(len(values), dtype=bool)
        is_item[offsets[:-1]] = False
        owner, own = owner[is_item], np.flatnonzero(is_item)
        texts = {"user": values.take(pa.array(offsets[:-1][owner])), "item": values.take(pa.array(own))}
        place = functools.partial(_place, file, before, block.first_line, owner, texts)
        user, bad_users = _known(texts["user"], "user", user_ids, USER_LIST)
        item, bad_items = _known(texts["item"], "item", item_ids, ITEM_LIST)
        table = pa.table(
            {
                "user": user,
                "item": item,
                "label": pa.repeat(pa.scalar(1, pa.int8()), len(user)),
                "split": pa.repeat(split, len(user)),
            }
        )
        yield from sliced(without_bad(Rows({}, place, 2, ()), table, [*bad_users, *bad_items], dropped))
    if is_empty:
        raise UserError(f"{file.name} is empty.")


def _place(
    file: TextFile,
    before: Callable[[], int],
    first_line: int,
    owner: np.ndarray,
    texts: dict[str, pa.Array],
    row: int,
) -> tuple[str, str]:
    return (
        f"{file.name}, line {before() + first_line + int(owner[row])}",
        f"{texts['user'][row]} … {texts['item'][row]}",
    )


def _known(
    texts: pa.Array, what: str, ids: tuple[pa.Array, pa.Array] | None, list_name: str
) -> tuple[pa.Array, list[tuple[pa.Array, str]]]:
    """The ids, and the checks of them."""
    numbers, bad = whole_numbers(texts, what)
    if ids is None:
        return numbers, [bad]
    originals, positions = ids
    at = pc.index_in(numbers, positions)
    return originals.take(at), [bad, (pc.is_null(at), f"the {what} is not in {list_name}")]


def _ids(file: TextFile) -> tuple[pa.Array, pa.Array]:
    """The original ids of a list, and the numbers that stand for them."""
    # What is bad in the list itself is told and counted by the part that reads the list.
    tables = list(_list(file, Dropped("drop")))
    table = (
        pa.concat_tables(tables)
        if tables
        else pa.table({"id": pa.array([], pa.string()), "n": pa.array([], pa.int64())})
    )
    return pa.concat_arrays(table["id"].chunks), pa.concat_arrays(table["n"].chunks)


def _read_list(file: TextFile, what: str, dropped: Dropped) -> Iterator[pa.Table]:
    for table in _list(file, dropped):
        columns = {what: table["id"]}
        if what == "item":
            columns["title"] = pa.nulls(table.num_rows, pa.string())
            if "links" in table.column_names:
                columns["links"] = table["links"]
        yield from sliced(pa.table(columns))


def _list(file: TextFile, dropped: Dropped) -> Iterator[pa.Table]:
    has_links = _FREEBASE in header(file, _LAYOUT)
    for found in rows(file, _LAYOUT, [*_LIST_COLUMNS, _FREEBASE] if has_links else _LIST_COLUMNS):
        ids, (numbers, bad) = found.columns["org_id"], whole_numbers(found.columns["remap_id"], "remap_id")
        columns = {"id": ids, "n": numbers}
        if has_links:
            columns["links"] = attributes([("freebase", found.columns[_FREEBASE])], len(ids))
        yield without_bad(found, pa.table(columns), [empty(ids, "org_id"), bad], dropped)
