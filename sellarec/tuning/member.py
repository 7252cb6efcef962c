"""One member of a population (population-based training), as Ray Tune runs it: a process that trains a stage from one
comparison to the next.

What a member has become is always a config: what it, or whom it goes on from, began with, and the stage's `changes` since then.
So its artifact has the fingerprint that `jobs/train.py` would give it, which trains it to the same weights. The checkpoints that
Tune hands from member to member only save the way there.
"""

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from sellarec.artifacts import Place, Store, fingerprint, lease
from sellarec.changes import in_words
from sellarec.config import Config
from sellarec.errors import TrainingPaused, UserError
from sellarec.pipeline import run_stage
from sellarec.run import Run, facts_of
from sellarec.training.launch import CHECKPOINTS
from sellarec.training.progress import Console
from sellarec.tuning.space import EVALUATION, NEWEST, VALUE, with_settings
from sellarec.tuning.trial import Base, note_group

LINEAGE = "lineage.json"
"""File of a member's checkpoint: what it has become, and its evaluations."""

ARTIFACT = "artifact.json"
"""File of a trial's folder that names the artifact that it trains."""


class Member(tune.Trainable):
    """Trains for `perturb_every` evaluations a step, and reports what the last one found."""

    def setup(self, config: dict[str, Any], base: Base) -> None:
        self._base, self._metric = base, getattr(base.config, base.stage).select_on
        self._start = time.monotonic()
        self._begun = dict(config)
        self._changes: list[tuple[int, dict[str, Any]]] = []
        self._evaluations: list[Any] = []

    def step(self) -> dict[str, Any]:
        base, this = self._base, self._run()
        this.pause_after = len(self._evaluations) + base.perturb_every
        this.on_record = lambda record: note_group(base, self.trial_id, record)
        done: dict[str, Any] = {}
        try:
            run_stage(this, base.stage)
        except TrainingPaused as paused:
            # one of the same settings may have come further meanwhile
            self._evaluations = paused.evaluations[: this.pause_after]
        except UserError as error:  # it would come again, so it isn't tried again
            ended = {VALUE: math.nan, NEWEST: math.nan, EVALUATION: len(self._evaluations), "cause": str(error)}
            return {**ended, "evaluations": self._evaluations, "done": True}
        else:
            facts = this.manifest(base.stage)["facts"]
            self._evaluations = facts["evaluations"]
            kept = next(metrics for step, metrics in self._evaluations if step == facts["kept_step"])
            seconds = round(time.monotonic() - self._start, 1)
            artifact = f"{base.stage}-{this.marks[base.stage]}"
            done = {"artifact": artifact, "seconds": seconds, "kept": kept, "done": True}
        values = [metrics[self._metric] for _, metrics in self._evaluations]
        return {
            VALUE: max(value for value in values if value is not None),
            NEWEST: values[-1],
            EVALUATION: len(values),
            "evaluations": [list(each) for each in self._evaluations],
            "begun": self._base.settings_of(self._begun),
            "changes": self._changes_in_words(),
            **done,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        this = self._run()
        with (this.artifact(self._base.stage) / CHECKPOINTS).reading() as folder:
            shutil.copytree(folder, Path(checkpoint_dir) / CHECKPOINTS)
        lineage = {"begun": self._begun, "changes": self._changes, "evaluations": self._evaluations}
        (Path(checkpoint_dir) / LINEAGE).write_text(json.dumps(lineage))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on from a member's checkpoint, its own or another's, with the settings that this one was made with."""
        lineage = json.loads((Path(checkpoint_dir) / LINEAGE).read_text())
        drawn, self._begun, self._evaluations = self._begun, lineage["begun"], lineage["evaluations"]
        self._changes = [(after, settings) for after, settings in lineage["changes"]]
        held = self._begun | {name: value for _, settings in self._changes for name, value in settings.items()}
        changed = {
            domain.name: drawn[domain.name]
            for domain in self._base.space
            if domain.value(drawn[domain.name]) != domain.value(held[domain.name])
        }
        if changed:
            self._changes.append((len(self._evaluations), changed))
        before = (self._base.trials / self.trial_id).read_json(ARTIFACT)
        this = self._run()
        self._discard(this, before)
        place = this.artifact(self._base.stage)
        if this.store.manifest(self._base.stage, this.marks[self._base.stage]) is None:
            with lease(place, this.console.line), (place / CHECKPOINTS).writing() as folder:
                if not any(folder.iterdir()):
                    shutil.copytree(Path(checkpoint_dir) / CHECKPOINTS, folder, dirs_exist_ok=True)

    def _discard(self, this: Run, before: str | None) -> None:
        """Delete what this member has left of a training, by its fingerprint, that it goes on with no more."""
        stage = self._base.stage
        if before not in (None, this.marks[stage]) and this.store.manifest(stage, str(before)) is None:
            place = this.store.place(stage, str(before))
            with lease(place, this.console.line):
                place.delete(*(name for name in place.names() if name != "lease.json"))

    def _run(self) -> Run:
        """A run of the stage, with what this member has become."""
        base = self._base
        this = Run(
            self._config(), Store(Place.of(base.config.workspace)), Console(), base.cluster, marks=dict(base.marks)
        )
        this.marks[base.stage] = fingerprint(facts_of(this, base.stage))
        (base.trials / self.trial_id).write_json(ARTIFACT, this.marks[base.stage])
        return this

    def _config(self) -> Config:
        settings = self._base.settings_of(self._begun)
        if self._changes:
            settings[f"{self._base.stage}.changes"] = tuple(self._changes_in_words())
        return with_settings(self._base.config, settings)

    def _changes_in_words(self) -> Sequence[str]:
        return [in_words(after, self._short(settings)) for after, settings in self._changes]

    def _short(self, drawn: Mapping[str, Any]) -> dict[str, float]:
        """The values of what was drawn, by the names that the stage's section has for them."""
        return {
            domain.name.partition(".")[2]: domain.value(drawn[domain.name])
            for domain in self._base.space
            if domain.name in drawn
        }
