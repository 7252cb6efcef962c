"""Preparation against a referee: the same rules in plain Python on a list of rows, whatever the pieces are."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import in_parts, prepare_into, rules, source_of

from sellarec.data import prepare as prepare_module
from sellarec.data.phases import Rules
from sellarec.data.raw import ATTRIBUTES, SPLITS, Source
from sellarec.errors import UserError

CATALOG = [
    # (item, title, text, genre); items 20 and 21 have no interactions, 3 and 20 are described twice, 5 and 6 not at all
    (20, "Unseen", None, "Drama"),
    (3, "Three", "Three. Comedy", "Comedy"),
    (1, None, "No title", None),
    (3, "Three again", None, None),
    (2, "Two\twith\x07 controls", None, None),
    (21, "  ", None, None),
    (20, "Unseen again", None, None),
    (4, "Three", None, "War"),
    (0, "Zero", "  ", None),
]


@dataclasses.dataclass
class Case:
    """A log, the rules for it, and into what pieces it is cut."""

    rows: list[dict[str, Any]]
    rules: Rules
    ids_are_text: bool
    parts: int
    piece_rows: int
    partitions: int

    @property
    def good(self) -> list[dict[str, Any]]:
        """The rows that have a label, or what makes one."""
        return [row for row in self.rows if "label" in row or row.get("rating", 0) is not None]

    def source(self) -> Source:
        types = {
            "timestamp": pa.int64(), "rating": pa.float32(), "label": pa.int8(), "split": pa.string(),
            "domain": pa.string(), "expected": pa.float32(),
        }  # fmt: skip
        columns: dict[str, Any] = {kind: [self.id(row[kind]) for row in self.rows] for kind in ("user", "item")}
        columns |= {
            name: pa.array([row[name] for row in self.rows], types[name]) for name in self.rows[0] if name in types
        }
        item, title, text, genre = (list(column) for column in zip(*CATALOG, strict=True))
        items = {
            "item": [self.id(value) for value in item],
            "title": title,
            "text": text,
            "attributes": pa.array([g and [{"name": "genre", "value": g}] for g in genre], ATTRIBUTES),
        }
        source = source_of(pa.table(columns), parts=self.parts, rows_about=self.partitions * self.piece_rows)
        return Source(**vars(source) | {"items": in_parts(pa.table(items), self.parts, "items")})

    def id(self, number: int) -> Any:
        return f"id-{number}" if self.ids_are_text else number


@st.composite
def cases(draw) -> Case:
    split = draw(st.sampled_from(["shares", "dates", "leave-one-out", "random", "given", "given without valid"]))
    needs_times = split in ("shares", "dates")
    times: Any = st.integers(0, 25) if needs_times or draw(st.booleans()) else st.none() | st.integers(0, 25)
    if not needs_times and draw(st.integers(0, 3)) == 0:
        times = st.none()
    row: dict[str, Any] = {"user": st.integers(0, 6), "item": st.integers(0, 8), "timestamp": times}
    if draw(st.booleans()):
        row["rating"] = st.sampled_from([1.0, 3.5, 4.0, 5.0, None])
    if draw(st.integers(0, 2)) == 0:
        row["label"] = st.integers(0, 1)
    if split.startswith("given"):
        row["split"] = st.sampled_from(SPLITS if split == "given" else ("train", "train", "test"))
    if draw(st.booleans()):
        row["domain"] = st.sampled_from(["b", "a", "null", None])
    rows = draw(st.lists(st.fixed_dictionaries(row), min_size=15, max_size=60))
    for number, made in enumerate(rows):
        made["expected"] = float(number)  # tells in the log which row of the source each one was
    chosen = rules(
        split=split.split()[0],
        shares=draw(st.sampled_from([(0.6, 0.2, 0.2), (0.8, 0.1, 0.1), (1 / 3, 1 / 3, 1 / 3)])),
        dates=(10, 18) if split == "dates" else None,
        history_cap=draw(st.integers(1, 4)),
        k_core=draw(st.sampled_from([0, 0, 2, 3])),
        k_core_once=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )
    return Case(
        rows, chosen, draw(st.booleans()), draw(st.integers(1, 4)), draw(st.integers(3, 50)), draw(st.integers(1, 6))
    )


# ---- the referee ----


def kept_rows(case: Case) -> tuple[list[dict], Counter]:
    """The rows that are left, with their place in the source, and what is dropped."""
    same = ("user", "item", "timestamp", "rating", "label", "split")
    first = {tuple(row.get(name) for name in same): row for row in reversed(case.good)}
    rows = sorted(first.values(), key=lambda row: row["expected"])
    dropped = Counter({"exact repeat of an earlier row": len(case.good) - len(rows)})
    dropped["there is no rating, of which labels are made"] = len(case.rows) - len(case.good)
    before = len(rows)
    while case.rules.k_core:
        counts = {kind: Counter(row[kind] for row in rows) for kind in ("user", "item")}
        left = [row for row in rows if all(counts[kind][row[kind]] >= case.rules.k_core for kind in counts)]
        if len(left) == len(rows) or case.rules.k_core_once:
            rows = left
            break
        rows = left
    dropped["below the k-core"] = before - len(rows)
    return rows, +dropped


def in_time(row: dict) -> tuple:
    return (math.inf if row["timestamp"] is None else row["timestamp"], row["expected"])


def label(row: dict, chosen: Rules) -> int:
    if "label" in row:
        return row["label"]
    if "rating" in row:
        return int(row["rating"] >= chosen.positive_rating)
    return 1


def split_rows(rows: list[dict], chosen: Rules, has_valid: bool, drawn: dict[float, str]) -> dict[str, list[dict]]:
    """The rows of each split, in the log's order.

    Args:
        drawn: the splits that were found, by row: where they are drawn at random, only how many of each user's there are
            is known beforehand, which is checked here.
    """
    found: dict[str, list[dict]] = {name: [] for name in SPLITS}
    ordered = sorted(rows, key=in_time)
    if chosen.split == "shares":
        train, valid = round(len(rows) * chosen.shares[0]), round(len(rows) * (chosen.shares[0] + chosen.shares[1]))
        return {"train": ordered[:train], "valid": ordered[train:valid], "test": ordered[valid:]}
    by_user: dict[int, list[dict]] = {}
    for row in ordered:
        by_user.setdefault(row["user"], []).append(row)
    name_of = {}
    for mine in by_user.values():
        size = len(mine)
        if chosen.split == "dates":
            assert chosen.dates is not None
            names = [SPLITS[sum(row["timestamp"] >= date for date in chosen.dates)] for row in mine]
        elif chosen.split == "leave-one-out":
            names = ["train"] * size if size < 3 else ["train"] * (size - 2) + ["valid", "test"]
        elif chosen.split == "given" and has_valid:
            names = [row["split"] for row in mine]
        else:
            names = [drawn.get(row["expected"], "?") for row in mine]
        name_of |= {row["expected"]: name for row, name in zip(mine, names, strict=True)}
        if drawn and chosen.split == "random":
            train, valid = round(size * chosen.shares[0]), round(size * chosen.shares[1])
            wanted = [min(size, train), min(size, train + valid) - min(size, train), max(0, size - train - valid)]
            assert [names.count(name) for name in SPLITS] == wanted
        if drawn and chosen.split == "given" and not has_valid:
            given = [row["split"] for row in mine]
            valid = math.floor(given.count("train") * chosen.shares[1] / (chosen.shares[0] + chosen.shares[1]))
            assert names.count("valid") == valid and names.count("test") == given.count("test")
            assert all(name == "test" for name, was in zip(names, given, strict=True) if was == "test")
    for row in ordered:
        found[name_of[row["expected"]]].append(row)
    return found


def expected_log(case: Case, drawn: dict[float, str]) -> dict[str, Any]:
    """All tables, and the facts that count."""
    has_valid = any(row.get("split") == "valid" for row in case.good)
    rows, dropped = kept_rows(case)
    splits = split_rows(rows, case.rules, has_valid, drawn)
    everything = [row for name in SPLITS for row in splits[name]]
    users = list(dict.fromkeys(row["user"] for row in everything))
    items = list(dict.fromkeys(row["item"] for row in everything))
    if not case.rules.k_core:
        items += [item for item in dict.fromkeys(item for item, *_ in CATALOG) if item not in items]
    seen = {kind: {row[kind] for row in splits["train"]} for kind in ("user", "item")}
    counted = Counter(row.get("domain") for row in case.good)
    domains = sorted((value for value in counted if value is not None), key=lambda value: (-counted[value], value))
    before: dict[float, list[int]] = {}
    of_train = {row["expected"] for row in splits["train"]}
    sequences: dict[int, list[dict]] = {user: [] for user in range(len(users))}
    for row in sorted(rows, key=in_time):
        sequence = sequences[users.index(row["user"])]
        before[row["expected"]] = [
            items.index(r["item"])
            for r in sequence
            if label(r, case.rules) and (case.rules.split != "random" or r["expected"] in of_train)
        ]
        sequence.append(row)
    tables: dict[str, list[dict]] = {}
    for name in SPLITS:
        tables[name] = [
            {
                "user": users.index(row["user"]),
                "item": items.index(row["item"]),
                "label": label(row, case.rules),
                "rating": row.get("rating"),
                "timestamp": row["timestamp"],
                "history": before[row["expected"]][-case.rules.history_cap :],
                "history_length": len(before[row["expected"]]),
                "user_seen": row["user"] in seen["user"],
                "item_seen": row["item"] in seen["item"],
                "warm": row["user"] in seen["user"] and row["item"] in seen["item"],
                "expected": row["expected"],
                **({"domain": row["domain"] and domains.index(row["domain"])} if domains else {}),
            }
            for row in splits[name]
        ]
    for number, row in enumerate(row for name in SPLITS for row in tables[name]):
        row["row"] = number
    described = {item: rest for item, *rest in reversed(CATALOG)}
    tables["items"] = []
    for number, item in enumerate(items):
        title, text, genre = described.get(item, (None, None, None))
        title = (title or "").replace("\t", " ").replace("\x07", " ")
        tables["items"].append(
            {
                "item": number,
                "external_id": str(case.id(item)),
                "title": title,
                "text": text if text and text.strip() else title,
                "attributes": genre and [{"name": "genre", "value": genre}],
                "links": None,
                "seen": item in seen["item"],
            }
        )
    tables["users"] = [
        {"user": number, "external_id": str(case.id(user)), "attributes": None, "seen": user in seen["user"]}
        for number, user in enumerate(users)
    ]
    tables["sequences"] = [
        {
            "user": user,
            "item": [items.index(row["item"]) for row in mine],
            "label": [label(row, case.rules) for row in mine],
            "rating": [row.get("rating") for row in mine],
            "timestamp": [row["timestamp"] for row in mine],
        }
        for user, mine in sequences.items()
    ]
    facts = {
        "users": len(users),
        "items": len(items),
        "rows": {name: len(tables[name]) for name in SPLITS},
        "positives": {name: sum(row["label"] for row in tables[name]) for name in SPLITS},
        "cold": {name: sum(not row["warm"] for row in tables[name]) for name in SPLITS[1:]},
        "dropped": dict(dropped),
        "items_without_title": sum(not row["title"].strip() for row in tables["items"]),
        "titles_cleaned": sum(item == 2 for item in items),
        "features": {"domain": domains} if domains else {},
    }
    return tables | {"facts": facts}


# ---- the two side by side ----


def tables_found(case: Case) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(prepare_module, "PIECE_ROWS", case.piece_rows)
        log = prepare_into(Path(folder), case.source(), case.rules, start_ray=None, bad_rows="drop")
        assert not (Path(folder) / "work").exists()
        tables = {name: log.split(name).to_pylist() for name in SPLITS}
        tables |= {"items": log.items().to_pylist(), "users": log.users().to_pylist()}
        sequences = [row for path in log.paths("sequences") for row in pq.ParquetFile(path).read().to_pylist()]
        return tables | {"sequences": sorted(sequences, key=lambda row: row["user"]), "facts": log.facts}


def check(case: Case) -> None:
    rows, _ = kept_rows(case)
    if not rows:
        with pytest.raises(UserError, match="the k-core leaves no rows" if case.good else "there are no rows"):
            tables_found(case)
        return
    has_valid = any(row.get("split") == "valid" for row in case.good)
    is_drawn = case.rules.split == "random" or (case.rules.split == "given" and not has_valid)
    if not is_drawn and not all(split_rows(rows, case.rules, has_valid, {}).values()):
        with pytest.raises(UserError, match="split is empty"):
            tables_found(case)
        return
    try:
        found = tables_found(case)
    except UserError as error:
        assert is_drawn and "split is empty" in str(error)
        return
    drawn = {}
    if is_drawn:
        drawn = {row["expected"]: name for name in SPLITS for row in found[name]}
        assert tables_found(dataclasses.replace(case, parts=1, piece_rows=1000, partitions=1)) == found
    wanted = expected_log(case, drawn)
    for name, table in wanted.items():
        assert table == ({fact: found["facts"][fact] for fact in table} if name == "facts" else found[name]), name
    # each row of the source is in the log once, or counted as dropped
    in_log = [row["expected"] for name in SPLITS for row in found[name]]
    assert len(set(in_log)) == len(in_log) == sum(found["facts"]["rows"].values())
    assert len(in_log) + sum(found["facts"]["dropped"].values()) == len(case.rows)


@settings(max_examples=50)
@given(cases())
def test_all_tables_are_the_referees(case):
    check(case)
