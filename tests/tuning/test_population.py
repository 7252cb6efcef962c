"""A population between its comparisons: who goes on from whom, with what, and from where the sweep goes on.

How members train is made up here; with Ray Tune: tests/end_to_end/test_sweep.py.
"""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sellarec.artifacts import Place
from sellarec.changes import windows
from sellarec.command_line import parse_sweep
from sellarec.errors import UserError
from sellarec.training.cluster import Cluster
from sellarec.training.launch import CHECKPOINTS
from sellarec.training.progress import Console
from sellarec.tuning.population import Member, compare, mark_of, neighbour, run_of, run_population
from sellarec.tuning.results import Row
from sellarec.tuning.space import Domain, with_settings
from sellarec.tuning.sweep import sweep
from sellarec.tuning.trial import Base

SPACE = [
    Domain("align.temperature", "loguniform", (0.05, 1.0)),
    Domain("align.weight", "choice", (0.1, 0.3, 1.0)),
    Domain("align.hidden", "choice", (64, 128)),
]
MARKS = {name: f"{name}-mark" for name in ("prepare", "pretrain", "adapt", "collab", "distil")}


def base_of(folder: Path, space: Sequence[Domain] = SPACE) -> Base:
    config = dataclasses.replace(parse_sweep(["demo", "--search", "pbt"]).base(), workspace=str(folder))
    return Base(config, space, "align", MARKS, Cluster(local=True, gpus=False), Place.of(str(folder / "trials")))


def member(value: float | None, temperature: float = 0.2, weight: float = 0.3, hidden: int = 64, **more: Any) -> Member:
    drawn = {"align.temperature": temperature, "align.weight": weight, "align.hidden": hidden}
    evaluations = [[3, {"auc": 0.5, "uauc": None}], [6, {"auc": value, "uauc": None}]]
    return Member(drawn, evaluations=evaluations, **more)


@pytest.mark.parametrize(("number", "moved"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_the_worst_quarter_goes_on_from_the_best(number: int, moved: int) -> None:
    members = [member(0.5 + place / 100, temperature=0.1 + place / 100) for place in range(number)]
    before = [dataclasses.replace(each) for each in members]
    copies = compare(members, SPACE, "align", "auc", random.Random(3))
    assert set(copies) == set(range(moved)) and all(of >= number - moved for of in copies.values())
    for place, each in enumerate(members):
        if place not in copies:
            assert each == before[place]
            continue
        of = before[copies[place]]
        assert each.begun == of.begun and each.evaluations == of.evaluations
        assert [after for after, _ in each.changes] in ([], [2])
        assert each.drawn["align.hidden"] == 64, "what says which weights there are is copied with them"
        assert 0.05 <= each.drawn["align.temperature"] <= 1.0


def test_who_has_ended_failed_or_has_no_metric_is_left_out() -> None:
    members = [
        member(0.1, artifact="align-0"), member(0.2, cause="not finite"), member(None),
        member(0.7), member(0.9), member(0.8, artifact="align-1"),
    ]  # fmt: skip
    assert compare(members, SPACE, "align", "auc", random.Random(1)) == {3: 4}
    assert compare(members, SPACE, "align", "uauc", random.Random(1)) == {}


def test_numbers_move_a_little_within_their_bounds_and_choices_to_their_neighbours() -> None:
    source = random.Random(2)
    temperatures = {neighbour(SPACE[0], 0.2, source) for _ in range(60)}
    assert {0.16, 0.24} < temperatures and len(temperatures) > 5, "some are drawn anew"
    assert all(0.05 <= found <= 1.0 for found in temperatures)
    assert max(neighbour(SPACE[0], 0.99, source) for _ in range(30)) == 1.0
    assert {neighbour(SPACE[1], 0.3, source) for _ in range(60)} == {0.1, 0.3, 1.0}
    near = [neighbour(SPACE[1], 0.1, source) for _ in range(60)]
    assert near.count(1.0) < 15 < near.count(0.1) + near.count(0.3)


def test_a_copys_recipe_is_what_its_line_began_with_and_the_changes_since(tmp_path: Path) -> None:
    copy = Member(
        {"align.temperature": 0.2, "align.weight": 0.3, "align.hidden": 128},
        [(2, {"align.temperature": 0.24}), (4, {"align.weight": 1.0, "align.temperature": 0.19})],
    )
    config = copy.config(base_of(tmp_path))
    assert config.align.changes == ("2 temperature=0.24", "4 weight=1.0 temperature=0.19")
    held = [(part.config.align.temperature, part.config.align.weight) for part in windows(config, "align")]
    assert held == [(0.2, 0.3), (0.24, 0.3), (0.19, 1.0)] and config.align.hidden == 128


class Training:
    """Stands in for members' trainings: each evaluation of one is the better, the nearer its temperature is to .3; a checkpoint
    holds how it has been trained so far."""

    def __init__(self, base: Base, ends: dict[int, int], killed_at: int = 0, fails: int = -1) -> None:
        self.base, self.ends, self.killed_at, self.fails = base, ends, killed_at, fails
        self.calls: list[tuple[list[int], int]] = []

    def __call__(self, members: list[Member], places: Sequence[int], goal: int) -> list[Any]:
        self.calls.append((list(places), goal))
        results = []
        for place in places:
            this = run_of(self.base)
            this.marks["align"] = mark_of(this, self.base, members[place])
            folder = this.artifact("align") / CHECKPOINTS
            told = folder.read_json("told.json") or []
            assert len(told) == len(members[place].evaluations) or len(told) == goal, "from the checkpoint it was given"
            temperature = members[place].drawn["align.temperature"]
            end = self.ends.get(place, 6)
            told += [temperature] * (min(goal, end) - len(told))
            folder.write_json("told.json", told)
            if goal == self.killed_at:
                raise KeyboardInterrupt
            metrics: dict[str, Any] = {
                "evaluations": [[step, {"auc": 1 - abs(each - 0.3), "uauc": None}] for step, each in enumerate(told, 1)]
            }
            if place == self.fails:
                metrics = {"cause": "the loss is not finite"}
            elif len(told) >= end:
                mark = this.marks["align"]
                metrics |= {"artifact": f"align-{mark}", "kept": {"auc": 0.5, "uauc": None}}
                this.artifact("align").write_json("manifest.json", {"fingerprint": mark})
            results.append(SimpleNamespace(error=None, metrics={**metrics, "seconds": 1.0}))
        return results


def run(base: Base, folder: Path, training: Training, number: int = 4, every: int = 2) -> list[Row]:
    return run_population(base, number, every, Place.of(str(folder / "state")), Console(), training)


def test_a_population_comes_to_its_end_and_each_artifact_was_trained_as_its_recipe_says(tmp_path: Path) -> None:
    base = base_of(tmp_path)
    training = Training(base, {})
    rows = run(base, tmp_path, training)
    assert [goal for _, goal in training.calls] == [2, 4, 6]
    assert all(row.status == "finished" for row in rows) and any(row.changes for row in rows)
    for row in rows:
        folder = tmp_path / "artifacts" / str(row.artifact)
        told = json.loads((folder / CHECKPOINTS / "told.json").read_text())
        parts = windows(with_settings(base.config, row.recipe("align")), "align")
        expected = [
            next(part for part in reversed(parts) if part.first <= place).config.align.temperature for place in range(6)
        ]
        assert told == expected
    left = {path.parent.name for path in (tmp_path / "artifacts").glob("align-*/*")}
    assert left == {row.artifact for row in rows}, "nothing stays of trainings that were given up"


@pytest.mark.parametrize("killed_at", [2, 4, 6])
def test_one_that_was_killed_goes_on_to_the_same_end(killed_at: int, tmp_path: Path) -> None:
    undisturbed = run(base_of(tmp_path / "a"), tmp_path / "a", Training(base_of(tmp_path / "a"), {}))
    base = base_of(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "b", Training(base, {}, killed_at=killed_at))
    training = Training(base, {})
    again = run(base, tmp_path / "b", training)
    assert training.calls[0][1] == killed_at
    assert again == undisturbed


def test_members_that_end_early_or_fail_hold_up_no_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_of(tmp_path)
    training = Training(base, {0: 1, 1: 4}, fails=2)
    rows = run(base, tmp_path, training)
    assert [row.status for row in rows] == ["finished", "finished", "failed", "finished"]
    assert rows[2].value is None and rows[2].cause == "the loss is not finite"
    assert [len(row.evaluations) for row in rows] == [1, 4, 0, 6]
    assert "none were compared" not in capsys.readouterr().out
    base = base_of(tmp_path / "short")
    run(base, tmp_path / "short", Training(base, dict.fromkeys(range(4), 1)))
    assert "all ended before evaluation 2" in capsys.readouterr().out


def test_members_that_have_become_the_same_are_trained_once(tmp_path: Path) -> None:
    space = [Domain("align.weight", "choice", (0.1, 0.3))]
    base = base_of(tmp_path, space)
    trained: list[int] = []

    def train(members: list[Member], places: Sequence[int], goal: int) -> list[Any]:
        trained.append(len(places))
        done = {"artifact": "align-0", "kept": None, "evaluations": [[1, {"auc": 0.5, "uauc": None}]], "seconds": 1.0}
        return [SimpleNamespace(error=None, metrics=done) for _ in places]

    rows = run_population(base, 6, 1, Place.of(str(tmp_path / "state")), Console(), train)
    assert trained == [2] and len(rows) == 6 and all(row.status == "finished" for row in rows)


@pytest.mark.parametrize(
    ("space", "flags", "words"),
    [
        ("align.hidden: {choice: [64, 128]}", (), "none of which can be changed while align trains"),
        ("collab.temperature: {uniform: [0.1, 1.0]}", ("--align.init", "scratch"), "none of which can be changed"),
        ("align.changes: {choice: [['2 weight=0.1'], ['2 weight=0.2']]}", (), "which a population finds"),
        ("align.weight: {uniform: [0.1, 1.0]}", ("--trials", "1"), "two members or more"),
        ("align.weight: {uniform: [0.1, 1.0]}", ("--align.changes", "2 weight=0.2"), "finds the changes itself"),
        ("align.weight: {uniform: [0.1, 1.0]}", ("--search", "asha", "--perturb-every", "2"), "only pbt reads it"),
        (
            "align.weight: {uniform: [0.1, 1.0]}",
            ("--search", "random", "--align.changes", "2 weight=0.2"),
            "sets it to 0.2 after evaluation 2, whatever was drawn",
        ),
    ],
)
def test_what_is_refused(space: str, flags: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(space)
    given = [
        "demo",
        "--search",
        "pbt",
        "--space",
        str(tmp_path / "space.yaml"),
        "--workspace",
        str(tmp_path / "w"),
        *flags,
    ]
    with pytest.raises(UserError, match=words):
        sweep(parse_sweep(given))
    assert not (tmp_path / "w").exists()
