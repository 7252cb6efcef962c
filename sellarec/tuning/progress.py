"""What the driver of a sweep does while trials run: it says how they go, and frees what a lost one leaves."""

from collections.abc import Sequence
from typing import Any

from ray import tune
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from sellarec.artifacts import Place
from sellarec.training.failures import last_line
from sellarec.training.progress import Console
from sellarec.tuning.population import Member
from sellarec.tuning.space import EVALUATION, VALUE, Domain
from sellarec.tuning.trial import GROUP


class Progress(tune.Callback):
    """Lines of a sweep's trials, on its driver."""

    def __init__(self, console: Console, space: Sequence[Domain], trials: int, folder: Place) -> None:
        self._console, self._space, self._trials, self._folder = console, space, trials, folder

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        shown = ", ".join(f"{domain.name} {domain.value(trial.config[domain.name])}" for domain in self._space)
        self._line(trials, trial, shown)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if not result["done"]:
            self._line(trials, trial, f"evaluation {result[EVALUATION]}: best so far {result[VALUE]:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # nothing is freed: of one that is stopped early the workers are still at their last step
        result = trial.last_result
        if "cause" in result:
            self._line(trials, trial, f"failed: {result['cause']}")
        elif "artifact" in result:
            self._line(trials, trial, f"finished: {result[VALUE]:.4f}, {result['artifact']}")
        else:
            self._line(trials, trial, f"stopped after evaluation {result[EVALUATION]}: {result[VALUE]:.4f}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._free(trial)
        self._line(trials, trial, f"lost, and taken up again: {self._cause(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._free(trial)
        self._line(trials, trial, f"failed: {self._cause(trial)}")

    def _cause(self, trial: Any) -> str:
        error = trial.get_pickled_error()
        return last_line(error) if error is not None else "its process ended"

    def _free(self, trial: Any) -> None:
        """Remove the placement group of a trial whose process is gone: Ray keeps it, with its CPUs, until the job ends."""
        group = (self._folder / trial.trial_id).read_json(GROUP)
        if group is None:
            return
        left = PlacementGroup(PlacementGroupID(bytes.fromhex(group)))
        if placement_group_table(left).get("state") not in (None, "REMOVED"):
            remove_placement_group(left)

    def _line(self, trials: list[Any], trial: Any, text: str) -> None:
        self._console.line(f"trial {self._number(trials, trial)}/{self._trials}  {text}")

    def _number(self, trials: list[Any], trial: Any) -> int:
        return trials.index(trial) + 1


class MemberProgress(Progress):
    """Lines of a population's members, from one comparison to the next."""

    def __init__(self, console: Console, members: Sequence[Member], trials: int, folder: Place) -> None:
        super().__init__(console, (), trials, folder)
        self._members = members

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        member = self._members[trial.config["member"]]
        if not member.evaluations:
            self._line(trials, trial, ", ".join(f"{name} {value}" for name, value in member.drawn.items()))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        found = trial.last_result
        if "cause" in found:
            self._line(trials, trial, f"failed: {found['cause']}")
            return
        newest = found["evaluations"][-1][1]
        metrics = ", ".join(f"{name.upper()} {value:.4f}" for name, value in newest.items() if value is not None)
        ended = f", finished: {found['artifact']}" if "artifact" in found else ""
        self._line(trials, trial, f"evaluation {len(found['evaluations'])}: {metrics}{ended}")

    def _number(self, trials: list[Any], trial: Any) -> int:
        return trial.config["member"] + 1
