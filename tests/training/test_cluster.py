"""What a run takes of a cluster."""

import re

import pytest

from sellarec.errors import UserError
from sellarec.training import cluster
from sellarec.training.cluster import RAY_MEMORY, WORKER_MEMORY, check_room, takes_gpus


def test_gpus_for_all_workers_or_for_none() -> None:
    """GPUs that are too few are no reason to run on CPUs, unless CPUs are asked for."""
    for gpus, workers, device, groups, share, takes in (
        (0, 2, "auto", 1, 1.0, False),
        (2, 2, "auto", 1, 1.0, True),
        (2, 2, "cuda", 1, 1.0, True),
        (1, 2, "cpu", 1, 1.0, False),
        (2, 2, "cpu", 1, 1.0, False),
        (2, 1, "auto", 4, 0.5, True),
    ):
        assert takes_gpus(gpus, workers, device, groups, share) == takes
    for gpus, workers, device, groups, share, words in (
        (
            1,
            2,
            "auto",
            1,
            1.0,
            "2 workers of 1 GPU each find 1 GPUs, which have room for 1: give --workers 1, or give --device cpu",
        ),
        (8, 16, "cuda", 1, 1.0, "16 workers of 1 GPU each find 8 GPUs, which have room for 8: give --workers 8"),
        (
            2,
            1,
            "auto",
            3,
            0.6,
            "3 x 1 workers of 0.6 GPU each find 2 GPUs, which have room for 2: lower --workers or --concurrent",
        ),
        (0, 2, "cuda", 1, 1.0, "device is cuda, but there is no GPU"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            takes_gpus(gpus, workers, device, groups, share)


def test_processes_that_this_machines_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six workers, or two trials of two workers, each beside a process of its own; the advice is itself accepted."""
    monkeypatch.setattr(cluster, "free_memory", lambda: (RAY_MEMORY + 6 * WORKER_MEMORY, None))
    check_room(6)
    check_room(2, 2)
    check_room(5, 1)
    for workers, trials, words in (
        (7, None, "7 workers x 0.78 GiB . 2 GiB for Ray = 7.5 GiB.*lower --workers to 6"),
        (2, 400, "400 trials at a time x .2 workers and a process of their own. x .*: lower --concurrent to 2"),
        (9, 1, "1 trials at a time x .9 workers .*: give --concurrent 1 and --workers 5"),
    ):
        with pytest.raises(UserError, match=words):
            check_room(workers, trials)
    monkeypatch.setattr(cluster, "free_memory", lambda: (RAY_MEMORY, None))
    for trials in (None, 1):
        with pytest.raises(UserError, match="machine: free some memory"):
            check_room(1, trials)
