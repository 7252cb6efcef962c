"""What is measured of two views: against plain numpy over all pairs, in blocks of any size."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sellarec.alignment import measures
from sellarec.alignment.measures import compare_views, draw_items, draw_rows_of_users, kept_metrics, summary
from sellarec.training import stream

torch.set_num_threads(1)


def by_hand(collab: np.ndarray, semantic: np.ndarray) -> dict[str, float | None]:
    views = {"collab": collab, "semantic": semantic}
    unit = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in views.items()}
    n = len(collab)
    found: dict[str, float | None] = {"alignment": ((unit["collab"] - unit["semantic"]) ** 2).sum(1).mean()}
    for name, rows in unit.items():
        pairs = [np.exp(-2 * ((rows[i] - rows[j]) ** 2).sum()) for i in range(n) for j in range(n) if i != j]
        found[f"uniformity_{name}"] = np.log(np.mean(pairs)) if pairs else None
    for one, other in (("collab", "semantic"), ("semantic", "collab")):
        distance = ((unit[one][:, None] - unit[other]) ** 2).sum(2)
        nearer = [(np.delete(distance[i], i) <= distance[i, i]).sum() for i in range(n)]
        found |= {f"{one}_to_{other}@{k}": (np.array(nearer) < k).mean() for k in (1, 10)}
    return found


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 12), st.floats(0, 2))
def test_they_are_what_all_pairs_give(seed, items, block, noise):
    generator = np.random.default_rng(seed)
    collab = generator.standard_normal((items, 5))
    semantic = 3 * (collab + noise * generator.standard_normal((items, 5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "BLOCK", block)
        found = compare_views(torch.from_numpy(collab), torch.from_numpy(semantic))
    expected = by_hand(collab, semantic)
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value == (None if expected[name] is None else pytest.approx(expected[name], abs=1e-9)), name


def test_views_that_are_the_same_are_aligned_and_found():
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    found = compare_views(rows, 2 * rows)
    assert found["alignment"] == pytest.approx(0, abs=1e-6)
    assert {found[f"{way}@1"] for way in ("collab_to_semantic", "semantic_to_collab")} == {1.0}
    assert found["uniformity_collab"] == pytest.approx(found["uniformity_semantic"])


def test_of_vectors_that_have_collapsed_none_is_found():
    """As near as all others isn't found, and nothing is less uniform."""
    rows = torch.ones(20, 4)
    found = compare_views(rows, rows)
    assert found["uniformity_collab"] == pytest.approx(0, abs=1e-6)
    assert (found["collab_to_semantic@1"], found["semantic_to_collab@10"]) == (0, 0)


def test_items_are_drawn_by_seed_from_those_of_the_train_split(monkeypatch):
    seen = np.arange(50) % 3 > 0
    assert draw_items(seen, 1).tolist() == np.flatnonzero(seen).tolist()
    monkeypatch.setattr(measures, "MOST_ITEMS", 10)
    drawn = draw_items(seen, 1)
    assert len(set(drawn.tolist())) == 10 and seen[drawn].all() and (np.diff(drawn) > 0).all()
    assert draw_items(seen, 1).tolist() == drawn.tolist() != draw_items(seen, 2).tolist()


@pytest.mark.parametrize("most", [3, 100])
def test_users_are_measured_by_their_first_row_that_has_a_vector(most, tmp_path, monkeypatch):
    """In the order of the first epoch, over all windows; of more than are measured the first ones."""
    monkeypatch.setattr(stream, "WINDOW_ROWS", 8)
    monkeypatch.setattr(measures, "MOST_USERS", most)
    generator = np.random.default_rng(3)
    columns = {"row": np.arange(50), "user": generator.integers(0, 9, 50), "item": generator.integers(0, 7, 50)}
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table(columns), path, row_group_size=5)
    order = stream.Order(tuple(stream.row_groups([path])), 4, 1)
    found = draw_rows_of_users(order, ["row", "user", "item"], lambda rows: rows["item"].to_numpy() > 2)
    pieces = pa.concat_tables(order.read(piece, list(columns)) for piece in order.pieces(0, order.steps_per_epoch))
    expected: dict[int, int] = {}
    for row in pieces.to_pylist():
        if row["item"] > 2:
            expected.setdefault(row["user"], row["row"])
    assert len(expected) > 3 and sorted(expected) != list(expected)
    assert dict(zip(found["user"].to_pylist(), found["row"].to_pylist(), strict=True)) == dict(
        list(expected.items())[:most]
    )
    assert found.column_names == ["row", "user", "item"]


def test_the_line_tells_of_users_too_where_they_are_aligned():
    rows, other = (torch.randn(30, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    views = compare_views(rows, other), compare_views(rows, rows)
    before, after = (of_items | {"users": of_users} for of_items, of_users in zip(views, views[::-1], strict=True))
    valid = {"align": {"auc": 0.75}, "collab": None}
    line = summary({"items": 30, "users": 30, "before": before, "after": after, "valid": valid})
    of_items, of_users = line.split("of 30 items")[0], line.split("of 30 items")[1]
    assert of_items.startswith(f"alignment {before['alignment']:.3f} to 0.000;")
    assert f"alignment 0.000 to {before['alignment']:.3f};" in of_users and "of 30 users find their vector" in of_users


def test_the_line_tells_what_changed_and_its_price():
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    other = torch.randn(30, 6, generator=torch.Generator().manual_seed(2))
    valid = {"align": {"auc": 0.75, "uauc": None}, "collab": {"auc": 0.76, "uauc": 0.7}}
    found = {"items": 30, "before": compare_views(rows, other), "after": compare_views(rows, rows), "valid": valid}
    line = summary(found)
    assert f"alignment {found['before']['alignment']:.3f} to 0.000;" in line
    assert "of 30 items find their vector first" in line and " to 100.0%" in line
    assert line.endswith("valid AUC 0.7500 (collab 0.7600); valid UAUC - (collab 0.7000)")
    alone = summary(found | {"valid": valid | {"collab": None}})
    assert alone.endswith("valid AUC 0.7500; valid UAUC -")


def test_the_kept_states_metrics_are_those_of_its_step():
    facts = {"kept_step": 4, "evaluations": [[2, {"auc": 0.6}], [4, {"auc": 0.7}], [6, {"auc": 0.65}]]}
    assert kept_metrics(facts) == {"auc": 0.7}
