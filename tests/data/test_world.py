"""Laws of the generated world: what is planted, who is new when, and what texts must not tell."""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from prepared import prepare_into, read_parts, rules
from sklearn.metrics import roc_auc_score

from sellarec.config import World
from sellarec.data.raw import SPLITS, Dropped
from sellarec.data.world import QUESTIONS, generate_world
from sellarec.errors import UserError
from sellarec.language.templates import read_template

SPLIT = (0.8, 0.1, 0.1)
SMALL = {"users": 200, "items": 150, "interactions": 6000}


@dataclass
class Tables:
    """A world's rows and catalog, as preparation reads them."""

    interactions: pa.Table
    items: pa.Table
    dropped: Dropped


def tables_of(settings: World, seed: int = 0) -> Tables:
    source = generate_world(settings, SPLIT, seed)
    dropped = Dropped("refuse")
    return Tables(read_parts(source.interactions, dropped), read_parts(source.items), dropped)


def world(seed: int = 0, **changes) -> Tables:
    return tables_of(World(**SMALL | changes), seed)


@pytest.fixture(scope="module")
def large() -> Tables:
    return tables_of(World(users=1500, items=800, interactions=40_000), 3)


def column(raw: Tables, name: str) -> np.ndarray:
    return raw.interactions[name].to_numpy()


def test_the_same_seed_gives_the_same_world_and_another_one_another():
    one, again, other = world(), world(), world(seed=1)
    assert one.interactions.equals(again.interactions) and one.items.equals(again.items)
    assert not one.interactions.equals(other.interactions) and not one.items["title"].equals(other.items["title"])


def test_the_log_is_in_time_order_and_has_each_pair_once():
    raw = world()
    assert (np.diff(column(raw, "timestamp")) >= 0).all()
    pairs = set(zip(column(raw, "user"), column(raw, "item"), strict=True))
    assert len(pairs) == len(raw.interactions)
    assert len(raw.interactions) + raw.dropped.counts["repeated user and item"] == SMALL["interactions"]
    assert column(raw, "user").max() < SMALL["users"] and column(raw, "item").max() < SMALL["items"]
    assert len(raw.items) == SMALL["items"]


@pytest.mark.parametrize("kind", ["user", "item"])
def test_new_users_and_items_appear_first_in_the_test_period(kind):
    """Of those planted as new nearly all that occur; without new ones nearly none."""
    found = {}
    for share in (0.0, 0.2):
        raw = tables_of(World(**{f"new_{kind}s": share}))
        ids = column(raw, kind)
        test = round(len(ids) * (1 - SPLIT[2]))
        found[share] = len(set(ids[test:]) - set(ids[:test])) / getattr(World(), f"{kind}s")
    assert found[0.0] < 0.03
    assert 0.12 < found[0.2] < 0.23  # some are drawn for no row at all


@pytest.mark.parametrize("interactions", [3000, 10_000, 30_000])
def test_none_of_the_new_comes_before_the_test_split_however_dense_the_log(interactions):
    users, items = 200, 200
    raw = tables_of(World(users=users, items=items, interactions=interactions, new_items=0.0))
    first = np.flatnonzero(column(raw, "user") >= users - round(users * World().new_users))[0]
    test_start = round(len(raw.interactions) * (SPLIT[0] + SPLIT[1]))
    assert test_start <= first < test_start + 50


def test_once_prepared_new_users_are_cold_in_the_test_split_alone(tmp_path):
    log = prepare_into(tmp_path, generate_world(World(), SPLIT, 0), rules(shares=SPLIT))
    splits = {name: log.split(name) for name in SPLITS}
    assert log.facts["items_without_title"] == 0 and log.facts["dropped"]["repeated user and item"] > 0
    for seen in ("user_seen", "item_seen"):
        cold = {name: 1 - np.mean(table[seen].to_numpy()) for name, table in splits.items()}
        assert cold["train"] == 0 and cold["valid"] < 0.01 and cold["test"] > 0.1
    assert all(table["expected"].null_count == 0 for table in splits.values())


def test_labels_are_drawn_from_the_expected_probability(large):
    """By bins of it: the share of positives is within sampling error."""
    expected, label = column(large, "expected").astype(np.float64), column(large, "label")
    assert ((expected > 0) & (expected < 1)).all() and set(label) == {0, 1}
    order = np.argsort(expected)
    for rows in np.array_split(order, 20):
        error = np.sqrt((expected[rows] * (1 - expected[rows])).sum()) / len(rows)
        assert abs(label[rows].mean() - expected[rows].mean()) < 4 * error


def test_no_score_ranks_better_than_the_expected_probability(large):
    expected, label = column(large, "expected").astype(np.float64), column(large, "label")
    best = roc_auc_score(label, expected)
    # What such probabilities give on average: pairs weighted by being a positive and a negative.
    order = np.argsort(expected)
    negative = (1 - expected)[order]
    lower = np.cumsum(negative) - negative / 2
    attainable = (expected[order] * lower).sum() / (expected.sum() * (1 - expected).sum())
    assert best == pytest.approx(attainable, abs=0.01)
    generator = np.random.default_rng(0)
    log_odds = np.log(expected / (1 - expected))
    item, user = column(large, "item"), column(large, "user")
    means = {name: np.bincount(ids, log_odds)[ids] / np.bincount(ids)[ids] for name, ids in (("i", item), ("u", user))}
    others = [log_odds + generator.standard_normal(len(label)), means["i"], means["u"], means["i"] + means["u"]]
    assert best > 0.7 and all(roc_auc_score(label, score) < best - 0.01 for score in others)


@pytest.mark.parametrize("strength", ["text_strength", "behaviour_strength", "quality_strength"])
def test_each_planted_part_makes_the_log_easier_to_rank(strength):
    def best(value: float) -> float:
        weak = {"text_strength": 0.5, "behaviour_strength": 0.5, "quality_strength": 0.5}
        raw = world(**{**weak, strength: value})
        return roc_auc_score(column(raw, "label"), column(raw, "expected"))

    assert best(3.0) > best(0.0) + 0.02


def test_titles_are_distinct_and_texts_are_there():
    raw = tables_of(World(users=50, items=3000, interactions=4000))
    titles, texts = raw.items["title"].to_pylist(), raw.items["text"].to_pylist()
    assert len(set(titles)) == len(titles)
    assert all(title.strip() == title and title for title in titles)
    assert all(len(text) > len(title) for title, text in zip(titles, texts, strict=True))


@pytest.mark.parametrize("strength", ["text_strength", "behaviour_strength", "quality_strength"])
def test_texts_tell_nothing_of_the_labels(strength):
    """Drawn again from other odds, the labels are others and the catalog is the same."""
    one, other = world(**{strength: 0.5}), world(**{strength: 2.5})
    assert one.interactions["label"].to_pylist() != other.interactions["label"].to_pylist()
    assert one.items.equals(other.items)


def test_titles_tell_the_part_of_the_taste_that_is_in_the_text():
    """The genre stands in the title's words: with text alone, items of one genre are liked alike by each user."""
    raw = world(behaviour_strength=0.0, quality_strength=0.0, interactions=8000)
    expected, user, item = column(raw, "expected"), column(raw, "user"), column(raw, "item")
    words = [set(title.split()) for title in raw.items["title"].to_pylist()]
    common = max(set.union(*words), key=lambda word: sum(word in of for of in words) * (len(word) > 2))
    with_word = np.array([common in of for of in words])[item]
    between = [
        abs(expected[(user == u) & with_word].mean() - expected[(user == u) & ~with_word].mean())
        for u in range(SMALL["users"])
        if ((user == u) & with_word).any() and ((user == u) & ~with_word).any()
    ]
    assert len(between) > 50 and np.mean(between) > 0.05


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"genres": 99}, "genres is 99"),
        ({"new_users": 0.9}, "new_users is 0.9"),
        ({"new_items": -0.1}, "new_items is -0.1"),
    ],
)
def test_a_world_that_cannot_be_made_is_refused(changes, named):
    with pytest.raises(UserError, match=named):
        world(**changes)


def test_questions_in_a_text_are_worded_as_the_compact_prompt(large):
    template = read_template("compact")
    (turn,) = template.turns("text")
    pattern = re.escape(turn.text).replace(r"\{history\}", "(.+)").replace(r"\{title\}", "(.+)")
    answers = "|".join(re.escape(answer) for answer in template.answers)
    for row in large.items.slice(0, 20).to_pylist():
        questions = [line for line in row["text"].splitlines() if not line.startswith("Movie: ")]
        assert len(questions) == QUESTIONS
        for line in questions:
            found = re.fullmatch(f"{pattern}({answers})", line)
            assert found and found[2] == row["title"], line
