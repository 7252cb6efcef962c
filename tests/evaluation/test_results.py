"""The cuts, the records of results.json and the printed table."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sellarec.evaluation.bootstrap import bootstrap
from sellarec.evaluation.metrics import auc, uauc
from sellarec.evaluation.results import CUTS, cut_masks, evaluate_scores, format_table

ROWS = 400


def make_test(rows: int = ROWS, *, warm: bool | None = None) -> pa.Table:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 30, rows), rng.integers(0, 50, rows)
    user_seen, item_seen = user < 20, item < 45
    return pa.table(
        {
            "user": user,
            "item": item,
            "label": rng.integers(0, 2, rows).astype(np.int8),
            # Published warm marks need not be the same as user_seen & item_seen.
            "warm": user_seen & (item < 40) if warm is None else np.full(rows, warm),
            "user_seen": user_seen,
            "item_seen": item_seen,
            "history_length": (user % 4).astype(np.int32),
        }
    )


def make_scores(test: pa.Table) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = test["label"].to_numpy()
    return {
        "collab": rng.normal(size=len(labels)).astype(np.float32),
        "SeLLa-Rec": labels + rng.normal(size=len(labels)),
    }


def evaluate(test: pa.Table, scores: dict[str, np.ndarray], **changes) -> list[dict]:
    settings = {"pairs": [("SeLLa-Rec", "collab")], "seed": 7, "protocol": "all rows scored", "replicates": 50}
    return evaluate_scores(test, scores, **(settings | changes))


def test_cuts():
    test = make_test()
    masks = cut_masks(test)
    assert tuple(masks) == CUTS
    columns = {name: test[name].to_numpy() for name in test.column_names}
    assert masks["all"].sum() == ROWS
    assert (masks["warm"] ^ masks["cold"]).all()
    np.testing.assert_array_equal(masks["warm"], columns["warm"])
    np.testing.assert_array_equal(masks["cold_user"], columns["user"] >= 20)
    np.testing.assert_array_equal(masks["cold_item"], columns["item"] >= 45)
    np.testing.assert_array_equal(masks["with_history"], columns["user"] % 4 > 0)


def test_cuts_of_collm_ml_1m(sellarec_data: Path):
    columns = ["uid", "iid", "not_cold", "his"]
    folder = sellarec_data / "collm-ml1m"
    train, test = (pq.read_table(folder / f"{split}_ood2.parquet", columns=columns) for split in ("train", "test"))
    prepared = pa.table(
        {
            "warm": pc.equal(test["not_cold"], 1),
            "user_seen": pc.is_in(test["uid"], value_set=train["uid"]),
            "item_seen": pc.is_in(test["iid"], value_set=train["iid"]),
            # The published histories begin with a placeholder.
            "history_length": pc.subtract(pc.list_value_length(test["his"]), 1),
        }
    )
    assert {cut: int(mask.sum()) for cut, mask in cut_masks(prepared).items()} == {
        "all": 7_331,
        "warm": 4_153,
        "cold": 3_178,
        "cold_user": 3_111,
        "cold_item": 93,
        "with_history": 7_269,
    }


def test_records():
    test = make_test()
    scores = make_scores(test)
    records = evaluate(test, scores)
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    assert len(records) == 3 * len(CUTS) * 2
    keys = ["model", "rows", "metric", "value", "low", "high", "count", "unit", "seed", "split", "protocol"]
    assert all(list(record) == keys for record in records)
    assert {(r["seed"], r["split"], r["protocol"]) for r in records} == {(7, "test", "all rows scored")}
    found = {(r["model"], r["rows"], r["metric"]): r for r in records}
    users, labels = test["user"].to_numpy(), test["label"].to_numpy()
    for cut, mask in cut_masks(test).items():
        for model, values in scores.items():
            of_auc, of_uauc = found[model, cut, "auc"], found[model, cut, "uauc"]
            assert of_auc["value"] == auc(labels[mask], values[mask])
            assert (of_auc["count"], of_auc["unit"]) == (mask.sum(), "rows")
            assert (of_uauc["value"], of_uauc["count"]) == uauc(users[mask], labels[mask], values[mask])
            assert of_uauc["unit"] == "users"
            assert of_auc["low"] < of_auc["value"] < of_auc["high"]
        cut_scores = {model: values[mask] for model, values in scores.items()}
        pair = ("SeLLa-Rec", "collab")
        expected = bootstrap(users[mask], labels[mask], cut_scores, "auc", pairs=[pair], replicates=50, seed=7)[pair]
        record = found["SeLLa-Rec - collab", cut, "auc"]
        assert (record["value"], record["low"], record["high"]) == (expected.value, expected.low, expected.high)
        assert record["count"] == mask.sum()


def test_a_cut_without_rows_or_with_one_class_is_null_with_its_count():
    test = make_test(warm=True)
    labels = np.where(test["item_seen"].to_numpy(), test["label"].to_numpy(), 1).astype(np.int8)
    test = test.set_column(2, "label", pa.array(labels))
    found = {(r["model"], r["rows"], r["metric"]): r for r in evaluate(test, make_scores(test))}
    for model in ("collab", "SeLLa-Rec - collab"):
        for cut, rows in (("cold", 0), ("cold_item", int((~test["item_seen"].to_numpy()).sum()))):
            for metric, count in (("auc", rows), ("uauc", 0)):
                record = found[model, cut, metric]
                assert (record["value"], record["low"], record["high"], record["count"]) == (None, None, None, count)
    json.dumps(list(found.values()), allow_nan=False)
    assert "n/a" in format_table(list(found.values()))


def test_no_row_is_dropped_silently():
    test = make_test()
    scores = make_scores(test)
    for bad in (np.nan, np.inf, -np.inf):
        broken = scores["SeLLa-Rec"].copy()
        broken[[3, 5]] = bad
        with pytest.raises(ValueError, match="'SeLLa-Rec' has 2 missing or non-finite scores in 400 rows"):
            evaluate(test, scores | {"SeLLa-Rec": broken})
    with pytest.raises(ValueError, match=r"'collab' has scores of shape \(397,\) for 400 rows \(3 missing\)"):
        evaluate(test, scores | {"collab": scores["collab"][3:]})
    with pytest.raises(ValueError, match="'collab' has 1 missing or non-finite scores"):
        evaluate(test, scores | {"collab": pa.array([None, *scores["collab"][1:].tolist()])})


def test_other_refusals():
    test = make_test()
    scores = make_scores(test)
    with pytest.raises(ValueError, match="lack the column 'warm'"):
        evaluate(test.drop_columns("warm"), scores)
    with pytest.raises(ValueError, match="'warm' has 400 nulls"):
        evaluate(test.set_column(3, "warm", pa.nulls(ROWS, pa.bool_())), scores)
    with pytest.raises(ValueError, match=r"names \['other'\]"):
        evaluate(test, scores, pairs=[("SeLLa-Rec", "other")])
    with pytest.raises(ValueError, match="names a difference"):
        evaluate(test, {"a - b": scores["collab"]}, pairs=[])
    with pytest.raises(ValueError, match="named twice"):
        evaluate(test, scores, pairs=[("SeLLa-Rec", "collab")] * 2)


def test_table():
    def record(model, rows, metric, value, low, high, count):
        unit = "rows" if metric == "auc" else "users"
        found = {"model": model, "rows": rows, "metric": metric, "value": value, "low": low, "high": high}
        return found | {"count": count, "unit": unit, "seed": 0, "split": "test", "protocol": "all rows"}

    records = [
        record("item mean", "all", "auc", 0.73166, 0.7201, 0.7432, 7331),
        record("item mean", "all", "uauc", 1.0, None, None, 1),
        record("item mean", "cold_user", "auc", 0.5, 0.4, 0.6, 3111),
        record("a model with a long name", "all", "auc", 0.5, 0.4, 0.6, 7331),
        record("a model with a long name", "all", "uauc", None, None, None, 1),
        record("x - y", "all", "auc", 0.0123, -0.00001, 0.02, 7331),
        record("x - y", "all", "uauc", -0.0123, -0.02, 0.0, 1),
    ]
    assert format_table(records) == "\n".join(
        [
            "test rows, all rows; [95% interval, bootstrap over users]",
            "",
            "                        AUC all     UAUC all",
            "model                7,331 rows       1 user",
            "--------------------------------------------",
            "item mean  .7317 [.7201, .7432]  1.000 [n/a]",
            "a model with a long name",
            "           .5000 [.4000, .6000]          n/a",
            "",
            "paired difference                            all",
            "------------------------------------------------",
            "x - y               AUC  +.0123 [+.0000, +.0200]",
            "                   UAUC  -.0123 [-.0200, +.0000]",
        ]
    )


def test_table_fits_150_columns():
    test = make_test()
    of_collab, of_sella = make_scores(test).values()
    scores = {
        "item + user mean": of_collab,
        "SeLLa-Rec": of_sella,
        "the best attainable score": test["label"].to_numpy() * 1.0,
    }
    table = format_table(evaluate(test, scores, pairs=[("SeLLa-Rec", "item + user mean")]))
    assert max(map(len, table.splitlines())) <= 150


def test_table_refuses_what_is_not_one_run():
    test = make_test()
    records = evaluate(test, make_scores(test))
    with pytest.raises(ValueError, match="no records"):
        format_table([])
    with pytest.raises(ValueError, match="one run at a time"):
        format_table(records + records)
    with pytest.raises(ValueError, match="not measured on the same rows"):
        format_table([records[0], records[0] | {"model": "other", "count": 3}])
