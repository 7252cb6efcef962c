"""ASHA that goes on where it was."""

import copy

import numpy as np
import pytest
from ray.tune.experiment import Trial

from sellarec.tuning.halving import Halving
from sellarec.tuning.space import EVALUATION, VALUE

TRIALS, EVALUATIONS = 12, 9


def of_values(values: np.ndarray) -> dict:
    """What a trial reports last, of what it came to on the valid split at each evaluation."""
    known = values[~np.isnan(values)]
    evaluations = [[step, {"auc": None if np.isnan(value) else float(value)}] for step, value in enumerate(values)]
    return {EVALUATION: len(values), VALUE: float(known.max()), "evaluations": evaluations}


@pytest.mark.parametrize("seed", range(20))
def test_a_sweep_that_was_cut_off_stops_the_same_trials(seed: int) -> None:
    """Decisions after the cut are those of a sweep that was not cut off, by the trials of which results were known."""
    rng = np.random.default_rng(seed)
    values = rng.random((TRIALS, EVALUATIONS))
    values[rng.random(values.shape) < 0.1] = np.nan  # of one class alone, the metric has no value
    values[:, 0] = rng.random(TRIALS)
    trials = [Trial("trial", stub=True) for _ in range(TRIALS)]
    whole = Halving("auc")
    begun = copy.deepcopy(whole)  # what Ray Tune keeps
    for trial in trials:
        whole.on_trial_add(None, trial)
    order = [(place, trial) for place in range(EVALUATIONS) for trial in rng.permutation(TRIALS)]
    cut, stopped, decisions = int(rng.integers(TRIALS, len(order))), set(), []
    for at, (place, number) in enumerate(order):
        if at == cut:
            for trial in rng.permutation(np.array(trials, dtype=object)):
                begun.on_trial_add(None, trial)
        if number in stopped:
            continue
        result = of_values(values[number, : place + 1])
        decided = whole.on_trial_result(None, trials[number], result)
        if at < cut:
            trials[number].run_metadata.last_result = result
        else:
            decisions.append((decided, begun.on_trial_result(None, trials[number], result)))
        if decided == Halving.STOP:
            stopped.add(number)
    assert all(one == other for one, other in decisions)
    assert stopped, "else nothing was decided"
