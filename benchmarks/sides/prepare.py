"""From a CSV of ratings to train, valid and test rows with dense ids, labels and histories."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SPLITS = ("train", "valid", "test")
SOURCE = "ratings.csv"
CAP, POSITIVE = 50, 4.0


def inputs(work: dict[str, Any], folder: Path) -> None:
    """Users and items of long-tailed degrees, no pair and no second twice."""
    generator, number = np.random.default_rng(0), work["rows"]
    size = {"user": number // 60, "item": number // 100}
    columns: dict[str, Any] = {}
    for kind, most in size.items():
        weights = generator.lognormal(0.0, 1.2, most)
        columns[kind] = generator.choice(most, 2 * number, p=weights / weights.sum())
    frame = pd.DataFrame(columns).drop_duplicates().head(number)
    frame["rating"] = generator.integers(1, 6, len(frame)).astype(float)
    frame["timestamp"] = 10**9 + generator.permutation(len(frame))
    for kind in size:
        frame[kind] = kind[0] + frame[kind].astype(str)
    frame.to_csv(folder / SOURCE, index=False)


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    from sellarec.config import Data
    from sellarec.data.log import read_log, write_manifest
    from sellarec.data.prepare import discard_work, prepare, rules_of
    from sellarec.data.sources.tables import Columns, open_tables

    def repeat() -> tuple[int, dict]:
        out = folder / "ours"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        columns = Columns(user="user", item="item", rating="rating", timestamp="timestamp")
        source = open_tables(str(folder / SOURCE), columns)
        facts = prepare(
            source, rules_of(Data(), source), out, hashes={}, start_ray=None, say=lambda _: None
        )  # fmt: skip
        write_manifest(out, facts)
        discard_work(out)
        log = read_log(out)
        lengths = {name: log.split(name, ["history"])["history"].combine_chunks() for name in SPLITS}
        return sum(facts["rows"].values()), {
            "rows": [facts["rows"][name] for name in SPLITS],
            "users, items": [facts["users"], facts["items"]],
            "positives": [facts["positives"][name] for name in SPLITS],
            "items of histories": [len(lengths[name].flatten()) for name in SPLITS],
        }

    return repeat


def pandas(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """As such scripts are written: sort by time, cut into shares, number by first appearance, and walk through the log with each
    user's positives so far at hand."""

    def repeat() -> tuple[int, dict]:
        out = folder / "pandas"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        frame = pd.read_csv(folder / SOURCE).drop_duplicates().sort_values("timestamp", kind="stable")
        frame["label"] = (frame["rating"] >= POSITIVE).astype(np.int8)
        numbers = {kind: pd.factorize(frame[kind]) for kind in ("user", "item")}
        for kind, (codes, _) in numbers.items():
            frame[kind] = codes
        liked: dict[int, list[int]] = {}
        histories = []
        for user, item, label in zip(frame["user"], frame["item"], frame["label"], strict=True):
            of_user = liked.setdefault(user, [])
            histories.append(of_user[-CAP:])
            if label:
                of_user.append(item)
        frame["history"] = histories
        ends = [0, *(round(len(frame) * share) for share in (0.8, 0.9, 1.0))]
        parts = {name: frame.iloc[ends[i] : ends[i + 1]] for i, name in enumerate(SPLITS)}
        seen = {kind: set(parts["train"][kind]) for kind in numbers}
        for name, part in parts.items():
            known = {f"{kind}_seen": part[kind].isin(seen[kind]) for kind in numbers}
            part.assign(**known).to_parquet(out / f"{name}.parquet", index=False)
        return len(frame), {
            "rows": [len(part) for part in parts.values()],
            "users, items": [len(names) for _, names in numbers.values()],
            "positives": [int(part["label"].sum()) for part in parts.values()],
            "items of histories": [int(part["history"].map(len).sum()) for part in parts.values()],
        }

    return repeat
