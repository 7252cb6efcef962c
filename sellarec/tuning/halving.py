"""Early stopping of a sweep's trials by ASHA (Li et al., 2020, arXiv 1810.05934), as Ray Tune has it."""

from typing import Any

from ray.tune.schedulers import ASHAScheduler

from sellarec.tuning.space import EVALUATION, VALUE

REDUCTION = 3
"""Of the trials that come as far, one of so many goes on; the next decision is after so many times the evaluations."""


class Halving(ASHAScheduler):
    """ASHA that goes on where it was. Ray Tune keeps of a scheduler what it was when the sweep began; so what trials came to
    before a sweep was cut off is told again, as they are added to the one that goes on.

    Args:
        metric: that trials are compared by, as evaluations name it.
    """

    def __init__(self, metric: str) -> None:
        # no trial comes to max_t: the end of a trial is its own
        super().__init__(time_attr=EVALUATION, metric=VALUE, mode="max", max_t=10**6, reduction_factor=REDUCTION)
        self._of_evaluations = metric

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        best = None
        for place, (_, metrics) in enumerate((trial.last_result or {}).get("evaluations", []), 1):
            found = metrics[self._of_evaluations]
            best = max((value for value in (best, found) if value is not None), default=None)
            if best is not None:
                self._trial_info[trial.trial_id].on_result(trial, place, best)
