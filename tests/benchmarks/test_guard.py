import pytest
from scripts import BENCHMARKS, command


@pytest.mark.distributed
def test_a_step_costs_what_it_did():
    """Operators, FLOPs, tokens, collectives and bytes of a step of each stage, on one and two workers."""
    found = command("guard")
    assert found.returncode == 0, found.stdout + found.stderr[-6000:]


def test_a_slip_is_told_by_its_case_with_both_values(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from guard import slips

    stored = {"adapt, 1 worker": {"FLOPs": 1000, "operations of aten": 200}, "collab, 2 workers": {"sent bytes": 4000}}
    assert slips(stored, stored) == []
    now = {"adapt, 1 worker": {"FLOPs": 1010, "operations of aten": 203}, "collab, 2 workers": {"sent bytes": 3900}}
    assert slips(stored, now) == [
        "adapt, 1 worker: operations of aten rose from 200 to 203",
        "collab, 2 workers: sent bytes fell from 4,000 to 3,900",
    ]
    assert slips(stored, {"adapt, 1 worker": stored["adapt, 1 worker"]}) == [
        "collab, 2 workers: sent bytes fell from 4,000 to 0"
    ]
