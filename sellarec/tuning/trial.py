"""One trial of a sweep, as Ray Tune runs it: a process that carries out one stage of the pipeline, workers and all.

A trial that Tune stops early isn't killed in the middle: Ray Train's worker group would be left behind with its CPUs. `cleanup`
asks the training to end, which it does after its step, and waits for it.
"""

import math
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune

from sellarec.artifacts import Place, Store
from sellarec.config import Config
from sellarec.errors import TrainingStopped, UserError
from sellarec.pipeline import run_stage
from sellarec.run import Run
from sellarec.training.cluster import Cluster
from sellarec.training.progress import Console
from sellarec.tuning.space import EVALUATION, VALUE, Domain, with_settings

GROUP = "group.json"
"""File of a trial's folder that names the placement group of its workers."""


@dataclass(frozen=True)
class Base:
    """What all trials of a sweep have in common.

    Attributes:
        config: what the trials' settings are laid over.
        space: what they are drawn from.
        stage: the stage that they carry out.
        marks: fingerprints of the artifacts that it reads, by stage.
        cluster: what Ray offers.
        trials: the folder in which each trial has one.
    """

    config: Config
    space: Sequence[Domain]
    stage: str
    marks: Mapping[str, str]
    cluster: Cluster
    trials: Place

    def settings_of(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a trial, by dotted name, of what Tune drew."""
        return {domain.name: domain.value(drawn[domain.name]) for domain in self.space}


def note_group(base: Base, trial: str, record: dict[str, Any]) -> None:
    """Of a trial's progress record, note the placement group of its workers, if it names that."""
    if "group" in record:
        (base.trials / trial).write_json(GROUP, record["group"])


class Trial(tune.Trainable):
    """Reports one evaluation a step, and with the last one what the stage left."""

    def setup(self, config: dict[str, Any], base: Base) -> None:
        self._base, self._metric = base, getattr(base.config, base.stage).select_on
        self._reports: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._carry_out, args=(with_settings(base.config, base.settings_of(config)),)
        )
        self._thread.start()

    def step(self) -> dict[str, Any]:
        found = self._reports.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def cleanup(self) -> None:
        self._stop.set()
        self._thread.join()

    def _carry_out(self, config: Config) -> None:
        start = time.monotonic()
        stage, store = self._base.stage, Store(Place.of(config.workspace))
        try:
            this = Run(
                config, store, Console(), self._base.cluster, marks=dict(self._base.marks),
                on_record=self._on_record, stop=self._stop,
            )  # fmt: skip
            run_stage(this, stage)
            facts = this.manifest(stage)["facts"]
            if this.seconds[stage] is None:  # it stood already: the scheduler is told how it went
                for place in range(1, len(facts["evaluations"])):
                    self._reports.put(self._report(facts["evaluations"][:place]))
            kept = next(metrics for step, metrics in facts["evaluations"] if step == facts["kept_step"])
            artifact = {"artifact": f"{stage}-{this.marks[stage]}", "seconds": round(time.monotonic() - start, 1)}
            self._reports.put({**self._report(facts["evaluations"]), **artifact, "kept": kept, "done": True})
        except TrainingStopped:
            pass
        except UserError as error:  # it would come again, so it isn't tried again
            self._reports.put({VALUE: math.nan, EVALUATION: 0, "evaluations": [], "cause": str(error), "done": True})
        except BaseException as error:
            self._reports.put(error)

    def _on_record(self, record: dict[str, Any]) -> None:
        note_group(self._base, self.trial_id, record)
        # the last evaluation is reported when the artifact stands
        if "evaluations" in record and record["step"] < record["steps"]:
            self._reports.put(self._report(record["evaluations"]))

    def _report(self, evaluations: Sequence[tuple[int, Mapping[str, float | None]]]) -> dict[str, Any]:
        values = [metrics[self._metric] for _, metrics in evaluations]
        best = max(value for value in values if value is not None)
        return {VALUE: best, EVALUATION: len(evaluations), "evaluations": [list(each) for each in evaluations]}
