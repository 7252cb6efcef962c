"""The HTML report: whole, self-contained, escaped, the same for the same run."""

import copy
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pyarrow as pa
import pytest

from sellarec.evaluation.report import ALIGNMENT_MEASURES, BEST_ATTAINABLE, write_report
from sellarec.evaluation.results import evaluate_scores

VOID = {"meta", "br", "hr", "link", "img", "input"}


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and collects the text outside <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def make_records(names: tuple[str, ...] = ("collab", "sella-rec", BEST_ATTAINABLE)) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = 300
    user, item, label = rng.integers(0, 20, rows), rng.integers(0, 30, rows), rng.integers(0, 2, rows)
    seen, item_seen = user < 12, item < 25
    test = pa.table(
        {
            "user": user,
            "item": item,
            "label": label.astype(np.int8),
            "warm": seen & item_seen,
            "user_seen": seen,
            "item_seen": item_seen,
            "history_length": (user % 4).astype(np.int32),
        }
    )
    scores = {name: label * strength + rng.normal(size=rows) for strength, name in enumerate(names)}
    return evaluate_scores(test, scores, pairs=[(names[1], names[0])], seed=3, protocol="pointwise", replicates=50)


def make_stages() -> list[dict]:
    prepared = {
        "users": 897,
        "items": 4321,
        "rows": {"train": 12204, "valid": 1526, "test": 300},
        "positives": {"train": 7110, "valid": 833, "test": 150},
        "cold": {"valid": 12, "test": 29},
        "label_rule": "1 where the rating is at least 4, else 0",
        "split_rule": "by time",
        "warm_rule": "user and item both occur in the train split",
        "history_cap": 50,
        "dates": {
            "train": ["2020-01-01T00:46:07+00:00", "2021-08-01T13:55:23+00:00"],
            "valid": ["2021-08-02T17:27:32+00:00", "2021-10-13T09:28:12+00:00"],
            "test": [None, None],
        },
        "dropped": {"repeated user and item": 745},
        "items_without_title": 0,
        "sources": {"ratings.csv": "ab12"},
        "noun": "movie",
    }
    collab = {
        "steps": 1096,
        "kept_step": 700,
        "losses": [[350, 0.69], [700, 0.6], [1096, 0.5]],
        "evaluations": [
            [step, {"auc": auc, "uauc": uauc}] for step, auc, uauc in ((350, 0.6, 0.55), (700, 0.7, None), (1096, 0.65, 0.57))
        ],
        "optimizers": {"tables": "row-wise Adagrad (fused), learning rate 0.1"},
        "sharding": [
            {"table": "user", "rows": 897, "columns": 32, "sharding": "row-wise", "rows per worker": 449,
             "MiB per worker": 0.056}
        ],
        "workers": 2,
        "device": "cpu",
        "log_odds": 0.3331,
    }  # fmt: skip
    pretrain = {**collab, "evaluations": [], "sharding": [], "optimizers": {}, "kept_step": 1096}
    facts = {"prepare": prepared, "pretrain": pretrain, "collab": collab, "distil": {"items": 4321, "width": 64}}
    return [
        {
            "stage": stage,
            "artifact": f"{stage}-0123",
            "seconds": None if stage == "prepare" else 12.34 + index,
            "manifest": {"seconds": 98.7, "facts": found},
        }
        for index, (stage, found) in enumerate(facts.items())
    ]


def report(**changes) -> str:
    settings = {
        "name": "demo",
        "config_yaml": "seed: 3\nllm:\n  model: embedded\n",
        "records": make_records(),
        "stages": make_stages(),
        "versions": {"torch": "2.13.0+cpu", "ray": "2.60.0"},
    }
    return write_report(**(settings | changes))


def show(number: float, *, signed: bool = False) -> str:
    return (f"{number:+z.4f}" if signed else f"{number:z.4f}").replace("-", "−")


def test_page_holds_the_run():
    html = report()
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    for record in make_records():
        signed = " - " in record["model"]
        value, low, high = (show(record[key], signed=signed) for key in ("value", "low", "high"))
        assert f"{value} [{low}, {high}]" in page.text
        assert record["model"] in page.text
        assert f"{record['count']:,} {record['unit']}" in page.text
    # one figure a cut of the main table, two for the stage with a validation curve, one for the stage without
    assert page.tags.count("svg") == 3 + 2 + 1
    assert page.tags.count("details") == 2
    for text in (
        "1,096, kept: 700", "2 (cpu)", "row-wise Adagrad (fused), learning rate 0.1", "0.3331",
        "449", "0.056", "MiB per worker",
        "98.7", "13.3", "14.3", "15.3", "43.0", "collab-0123", "the artifact stood already",
        "897", "4,321, each a movie", "12,204", "7,110 (58.3%)", "29 (9.7%)", "2020-01-01", "2021-08-01",
        "1 where the rating is at least 4, else 0", "745 rows: repeated user and item", "sha256 ab12",
        "model: embedded", "2.13.0+cpu", "Not validated while it trained.",
    ):  # fmt: skip
        assert text in page.text, text


def test_page_needs_nothing_but_itself():
    html = report()
    assert "<script" not in html and "<link" not in html and "<img" not in html
    assert "@import" not in html and not re.findall(r"url\((?!#)", html)
    assert {link for link in re.findall(r'href="([^"]*)"', html) if not link.startswith("#")} == set()
    # what is left are the names of namespaces, which nothing fetches
    assert set(re.findall(r"https?://[^\"' ]*", html)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_the_same_run_gives_the_same_page():
    first = report()
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path"}):  # a matplotlibrc of the user's
        assert report() == first
        assert matplotlib.rcParams["font.size"] == 20
    assert "#1c2733" not in first[first.index("<body>") :]  # figures follow the page's colours


def test_every_name_is_escaped():
    evil = "<script>alert('x')</script> & \"$x$\" -->"
    stages = make_stages()
    for stage in stages:
        stage["artifact"] = evil
    stages[2]["stage"] = evil
    stages[2]["manifest"]["facts"] |= {"note": evil, "device": evil, "optimizers": {evil: evil}}
    stages[2]["manifest"]["facts"]["sharding"][0]["table"] = evil
    stages[0]["manifest"]["facts"] |= {"label_rule": evil, "noun": evil, "dropped": {evil: 1}, "sources": {evil: evil}}
    html = report(
        name=evil,
        config_yaml=evil,
        records=make_records((evil, f"{evil} 2", BEST_ATTAINABLE)),
        stages=stages,
        versions={evil: evil},
    )
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert page.text.count(evil) > 15


def test_missing_numbers_are_dashes():
    records = make_records()
    for record in records:
        record["low"] = record["high"] = None
        if record["rows"] == "cold":
            record["value"] = None
    assert "– –" in Page(report(records=records)).text
    for record in records:
        record["value"] = None
    page = Page(report(records=records))
    assert page.tags.count("svg") == 3  # nothing to draw but the curves
    assert "None" not in page.text and "nan" not in page.text


def test_missing_facts():
    stages = make_stages()
    facts = stages[2]["manifest"]["facts"]
    facts |= {"losses": [], "evaluations": [], "kept_step": None, "log_odds": None}
    stages[0]["manifest"] |= {"seconds": None}
    stages[0]["manifest"]["facts"] |= {"dropped": {}, "sources": {}}
    page = Page(report(stages=stages, versions={"torch": None}))
    assert "1,096, kept: –" in page.text and "no rows" in page.text
    assert "None" not in page.text

    page = Page(report(stages=[], versions={}))
    assert "No stage of this run has embedding tables." in page.text


def test_facts_of_several_numbers_are_told_in_words():
    stages = make_stages()
    stages[2]["manifest"]["facts"] |= {
        "valid by language weight": {"0.0": 0.74422, "2.0": None},
        "kept rows": [1200, 7],
        "odd": {},
    }
    page = Page(report(stages=stages))
    assert "0.0: 0.7442, 2.0: –" in page.text and "1,200, 7" in page.text
    assert "{" not in page.text.partition("Settings")[0]


def test_models_without_pairs_or_best():
    records = [record for record in make_records() if record["model"] == "collab" and record["rows"] == "all"]
    page = Page(report(records=records))
    assert "difference" not in page.text and "Other rows" not in page.text
    assert BEST_ATTAINABLE not in page.text


def aligned_stages(collab, of_users: bool = False) -> list[dict]:
    stages = make_stages()
    of = next(stage for stage in stages if stage["stage"] == "collab")
    measures = {name: 0.125 * number for number, name in enumerate(ALIGNMENT_MEASURES)}
    alignment = {
        "items": 1234,
        "before": measures | {"uniformity_collab": None},
        "after": {name: value + 0.01 for name, value in measures.items()},
        "valid": {"align": {"auc": 0.7111, "uauc": None}, "collab": collab},
    }
    if of_users:
        alignment["users"] = 567
        for when in ("before", "after"):
            alignment[when] |= {"users": {name: value + 0.4 for name, value in measures.items()}}
    facts = {**of["manifest"]["facts"], "alignment": alignment}
    return [*stages, {**of, "stage": "align", "manifest": {"seconds": 1.0, "facts": facts}}]


def test_what_align_did_is_shown_with_its_price():
    text = Page(report(stages=aligned_stages({"auc": 0.7222, "uauc": 0.6}))).text
    assert "1,234 items of the train split before after" in text
    assert "projected row and distilled vector 0.0000 0.0100" in text
    assert "uniformity of projected rows – 0.1350" in text
    assert "vectors that find their row among the first 10 0.7500 0.7600" in text
    assert "AUC 0.7111 (collab 0.7222); UAUC – (collab 0.6000)." in text
    alone = Page(report(stages=aligned_stages(None))).text
    assert "AUC 0.7111; UAUC –; collab was not measured on the same rows" in alone
    assert "items of the train split before" not in Page(report()).text
    assert "users of the train split" not in text
    both = Page(report(stages=aligned_stages(None, of_users=True))).text
    assert both.index("1,234 items of the train split") < both.index("567 users of the train split before after")
    assert "vectors that find their row among the first 10 1.1500 1.1500" in both


def test_histories_that_were_cut_are_counted_by_stage_and_split():
    counts = {"prompts": 2000, "shortened": 30, "titles left out": 1041}
    stages = make_stages()
    stages[2]["manifest"]["facts"]["histories"] = {"train": counts, "valid": counts | {"shortened": 0}}
    stages.append({**stages[3], "stage": "evaluate"})
    stages[4]["manifest"] = {"seconds": 1.0, "facts": {"rows": 300, "histories": {"text-only": counts}}}
    text = Page(report(stages=stages)).text
    assert "collab train 2,000 30 (1.5%) 1,041 collab valid 2,000 0 (0.0%) 1,041" in text
    assert "evaluate text-only 2,000 30 (1.5%) 1,041" in text
    assert "titles left out" not in Page(report()).text


def test_the_input_stays_as_it_was():
    stages = make_stages()
    before = copy.deepcopy(stages)
    report(stages=stages)
    assert stages == before
    assert report(stages=json.loads(json.dumps(stages))) == report(stages=stages)


def test_refused_records():
    with pytest.raises(ValueError, match="no records"):
        report(records=[])
    records = make_records()
    with pytest.raises(ValueError, match="one run at a time"):
        report(records=records + records[:1])
    records[0] = {**records[0], "count": 1}
    with pytest.raises(ValueError, match="not measured on the same rows"):
        report(records=records)
