"""Scripts that measure what growth and failures cost, in their quick forms."""

import json

import pytest
from scripts import command


@pytest.mark.slow
@pytest.mark.distributed
def test_checkpoints_are_restored_as_they_were_written(tmp_path):
    """By 1 and 2 workers, those of 2 by 1 too; the script itself compares rows and state."""
    found = command("tables/checkpoints", "--quick", "--out", tmp_path / "out.json")
    assert found.returncode == 0, found.stderr
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [(case["workers"], case["restored on"]) for case in cases] == [(1, 1), (2, 2), (2, 1)]
    for case in cases:
        assert case["bytes"] > 10_000 * (64 + 1) * 4, "rows and a sum of squares of each"
        assert min(case["write seconds"] + case["check seconds"] + case["load seconds"]) > 0
    assert len(found.stdout.splitlines()) == 1 + len(cases)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("script", ["memory", "traffic", "train_speed"])
def test_what_tables_cost_by_the_number_of_workers(script, tmp_path):
    """In their quick forms. train_speed compares losses itself; what the others find is compared here."""
    found = command(f"tables/{script}", "--quick", "--out", tmp_path / "out.json")
    assert found.returncode == 0, found.stderr
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert {case["workers"] for case in cases} == {1, 2}
    if script == "memory":
        one, two = cases
        assert 1.9 < one["planned bytes"] / two["planned bytes"] <= 2
        for case in cases:  # beside it workers keep what they free
            assert case["planned bytes"] < case["resident bytes"] < case["planned bytes"] + (128 << 20)
    if script == "traffic":
        for case in cases:
            assert case["workers"] == 1 or case["sent bytes"] == pytest.approx(case["formula bytes"], rel=0.1)


@pytest.mark.distributed
@pytest.mark.ray
@pytest.mark.slow
def test_what_a_lost_worker_costs(tmp_path):
    """The parts add up to the whole, and some steps are made again."""
    found = command("recovery", "--quick", "--out", tmp_path / "out.json")
    assert found.returncode == 0, found.stderr
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [case["stage"] for case in cases] == ["collab", "adapt"]
    for case in cases:
        (one,) = case["rounds"]
        parts = [one[name] for name in ("noticing", "starting", "restoring", "first step", "steps again")]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(one["all"])
        assert one["steps made again"] >= 10


@pytest.mark.distributed
@pytest.mark.ray
@pytest.mark.slow
def test_rows_reach_workers(tmp_path):
    """The script itself counts that they are all of the log's."""
    found = command("data/stream", "--quick", "--out", tmp_path / "out.json")
    assert found.returncode == 0, found.stderr
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    sides = {case: {run["side"] for run in runs if run["case"] == case} for case in {run["case"] for run in runs}}
    assert sides == {
        "plain": {"ours", "Ray Data"}, "histories": {"ours", "Ray Data"}, "8 negatives": {"ours"}, "prompts": {"ours"}
    }  # fmt: skip
    assert {run["workers"] for run in runs} == {1, 2} and all(speed > 0 for run in runs for speed in run["rows/s"])
