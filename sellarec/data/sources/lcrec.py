"""LC-Rec's format: NAME.inter.json, NAME.item.json and NAME.index.json."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from sellarec.data.raw import ATTRIBUTES, Dropped, Part, Source
from sellarec.data.sources.text import MAX_ROWS, TextFile, only_file, sliced, wanted_files, whole
from sellarec.errors import UserError

INTER, ITEM, INDEX = ".inter.json", ".item.json", ".index.json"
LABEL_RULE = "1 for every row: the data holds positives only"

_ROWS = pa.schema(
    {"user": pa.string(), "item": pa.string(), "timestamp": pa.int64(), "label": pa.int8()}
)  # fmt: skip
_ITEMS = pa.schema({"item": pa.string(), "title": pa.string(), "text": pa.string(), "attributes": ATTRIBUTES})


def open_lcrec(path: str, *, noun: str = "item") -> Source:
    """Sequences of items as LC-Rec, LETTER and MACRec publish them: JSON, each file an object by id.

    - NAME.inter.json: user -> its items, oldest first. There are no times: the column timestamp is null throughout, and
      the rows come user by user in the file's order, each user's items in theirs; that order is all the data says of time.
      Each row's label is 1. Users without items are left out and counted.
    - NAME.item.json: item -> {"title", "description", "brand", "categories"}, each a text (or a list of texts) or missing.
      Brand and categories become attributes "brand" and "category" (a text of categories is parted at commas without a
      space after them, as LC-Rec joins them).
    - NAME.index.json, where there is one: item -> its tokens, such as ["<a_12>", "<b_3>"]: attributes "index", in order.

    Ids are strings, as JSON's keys are; whole numbers in lists stand for their digits. A file is read as a whole: 50,000 users
    take some 50 MB of memory.

    Args:
        path: the folder, a zip of it, or the .inter.json file of one of several datasets in a folder; a path or URI.

    Raises:
        UserError: NAME.inter.json or NAME.item.json is missing, or there are several; or, when parts are read, a file is
            damaged, not in UTF-8, no JSON object or has a key twice, or a row is bad and bad rows are refused.
    """
    looked_for = f"LC-Rec's NAME{INTER} and NAME{ITEM}, and NAME{INDEX} where there is one"
    found, name = only_file(path, INTER, looked_for)
    inter, item = wanted_files(found, (name + INTER, name + ITEM), path, looked_for)
    index = found.get(name + INDEX)
    return Source(
        interactions=(Part(inter.name, functools.partial(_read_sequences, inter)),),
        items=(Part(item.name, functools.partial(_read_items, item, index)),),
        files=tuple(dict.fromkeys(file.path for file in (inter, item, index) if file)),
        noun=noun,
        label_rule=LABEL_RULE,
    )


def _read_sequences(file: TextFile, dropped: Dropped) -> Iterator[pa.Table]:
    users: list[str] = []
    items: list[str] = []
    alone = 0
    for user, sequence in _object(file).items():
        if _id(user) is None:
            dropped.bad(f"{file.name}, user {user!r}", "the user's id is empty or no text", json.dumps(sequence))
            continue
        if not isinstance(sequence, list):
            dropped.bad(f"{file.name}, user {user!r}", "the items are no list", json.dumps(sequence))
            continue
        alone += not sequence
        for position, value in enumerate(sequence):
            item = _id(value)
            if item is None:
                where = f"{file.name}, user {user!r}, position {position}"
                dropped.bad(where, "the item is neither a text nor a whole number", json.dumps(value))
                continue
            users.append(user)
            items.append(item)
        if len(users) >= MAX_ROWS:
            yield from sliced(_sequences(users, items))
            users, items = [], []
    yield from sliced(_sequences(users, items))
    dropped.leave_out("a user without items", alone)


def _sequences(users: list[str], items: list[str]) -> pa.Table:
    ones = pa.repeat(pa.scalar(1, pa.int8()), len(users))
    return pa.table(
        [pa.array(users, pa.string()), pa.array(items, pa.string()), pa.nulls(len(users), pa.int64()), ones], _ROWS
    )


def _read_items(file: TextFile, index_file: TextFile | None, dropped: Dropped) -> Iterator[pa.Table]:
    described = _object(file)
    index = _object(index_file) if index_file else {}
    made: list[dict[str, Any]] = []
    for item in (*described, *(item for item in index if item not in described)):
        row = _item(item, described.get(item, {}), f"{file.name}, item {item!r}", dropped)
        if row is None:
            continue
        tokens = index.get(item, [])
        if _texts(tokens) is None or isinstance(tokens, str):
            where = f"{index_file.name if index_file else ''}, item {item!r}"
            dropped.bad(where, "the index is no list of texts", json.dumps(tokens))
            tokens = []
        row["attributes"] += [{"name": "index", "value": token} for token in tokens]
        made.append(row)
    yield from sliced(pa.Table.from_pylist(made, _ITEMS))


def _item(item: str, values: Any, where: str, dropped: Dropped) -> dict[str, Any] | None:
    """A row of _ITEMS, or None where it is bad."""
    if _id(item) is None:
        dropped.bad(where, "the item's id is empty or no text", json.dumps(values))
        return None
    if not isinstance(values, dict):
        dropped.bad(where, "the item is no JSON object", json.dumps(values))
        return None
    texts: dict[str, list[str]] = {}
    for field in ("title", "brand", "categories", "description"):
        found = _texts(values.get(field))
        if found is None or (field == "title" and len(found) > 1):
            dropped.bad(where, f"the {field} is no text", json.dumps(values.get(field)))
            return None
        texts[field] = found
    categories = texts["categories"]
    if isinstance(values.get("categories"), str):
        categories = [part.strip() for part in re.split(r",(?! )", categories[0]) if part.strip()] if categories else []
    parts = [*texts["title"], *texts["brand"], ", ".join(categories), " ".join(texts["description"])]
    return {
        "item": item,
        "title": texts["title"][0] if texts["title"] else None,
        "text": ". ".join(part for part in parts if part) or None,
        "attributes": [{"name": "brand", "value": text} for text in texts["brand"]]
        + [{"name": "category", "value": text} for text in categories],
    }


def _texts(value: Any) -> list[str] | None:
    """The texts of a value that aren't empty; None where it is something else than a text, a list of texts or nothing."""
    listed = [] if value is None else value if isinstance(value, list) else [value]
    return [text for text in listed if text] if all(map(_is_text, listed)) else None


def _is_text(value: Any) -> bool:
    """Whether it is a text that UTF-8 can hold: JSON's escapes can spell halves of characters."""
    return isinstance(value, str) and (value.isascii() or not re.search("[\ud800-\udfff]", value))


def _id(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if _is_text(value) and value.strip() else None


def _object(file: TextFile) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: it is something else, cut short, or has a key twice.
    """
    content = whole(file)
    try:
        found = json.loads(content, object_pairs_hook=functools.partial(_without_repeats, file))
    except json.JSONDecodeError as error:
        shown = content.decode()[max(error.pos - 40, 0) : error.pos + 40]
        raise UserError(
            f"{file.name}, line {error.lineno}, column {error.colno}: not JSON, or cut short ({error.msg}). "
            f"It reads there: {shown!r}."
        ) from error
    except (RecursionError, ValueError) as error:  # values nested too deep, a number of thousands of digits
        raise UserError(f"{file.name} can't be read as JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{file.name} holds a JSON {type(found).__name__}, but must hold an object by id.")
    return found


def _without_repeats(file: TextFile, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise UserError(f"{file.name}: the key {repeated!r} occurs more than once in an object.")
    return found
