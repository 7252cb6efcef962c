"""Population-based training (Jaderberg et al., arXiv 1711.09846): members train from one comparison to the next, where the worst
go on as copies of the best, with settings near theirs.

Ray Tune runs the members; they are compared here, on the sweep's driver. Ray's own scheduler for it (PopulationBasedTraining,
2.60) waits for ever where a member ends before the others, and after a sweep's driver was killed.

What a member has become is always a config: what it, or whom it goes on from, began with, and the stage's `changes` since then.
So its artifact has the fingerprint that `jobs/train.py` would give it, which trains it to the same weights; the checkpoints that
are copied from member to member only save the way there.
"""

import dataclasses
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ray import tune

from sellarec.artifacts import Place, Store, fingerprint, lease
from sellarec.changes import in_words
from sellarec.config import Config
from sellarec.errors import TrainingPaused, UserError
from sellarec.pipeline import run_stage
from sellarec.run import Run, facts_of
from sellarec.training.failures import last_line
from sellarec.training.launch import CHECKPOINTS
from sellarec.training.progress import Console
from sellarec.tuning.results import Row
from sellarec.tuning.space import Domain, with_settings
from sellarec.tuning.trial import Base, note_group

POPULATION = "population.json"
"""File of a sweep's state: its members after their last comparison."""

QUARTER = 0.25
"""Share of the members that go on as copies of as many of the best."""

DRAWN_ANEW = 0.25
"""How likely a setting of a copy is drawn anew, instead of changed a little."""

FACTORS = (0.8, 1.2)
"""By one of which numbers are changed a little."""


@dataclass
class Member:
    """One of a population.

    Attributes:
        begun: what it, or whom it goes on from, began with: by setting what was drawn.
        changes: how many evaluations lay behind it, and what was drawn then.
        evaluations: (step, metrics on the valid split by name) of each.
        seconds: of its own training.
        artifact, kept: once it has come to its end, STAGE-FINGERPRINT and the metrics of the state that it keeps.
        cause: why it failed.
    """

    begun: dict[str, Any]
    changes: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    evaluations: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    artifact: str | None = None
    kept: dict[str, float | None] | None = None
    cause: str | None = None

    @property
    def drawn(self) -> dict[str, Any]:
        """What holds of it now."""
        return self.begun | {name: value for _, changed in self.changes for name, value in changed.items()}

    @property
    def trains(self) -> bool:
        return self.artifact is None and self.cause is None

    def newest(self, metric: str) -> float | None:
        """What its newest evaluation found of a metric."""
        return self.evaluations[-1][1][metric] if self.evaluations else None

    def changes_in_words(self, space: Sequence[Domain]) -> list[str]:
        """As the stage's `changes` has them."""
        domains = {domain.name: domain for domain in space}
        return [
            in_words(after, {name.rpartition(".")[2]: domains[name].value(drawn) for name, drawn in changed.items()})
            for after, changed in self.changes
        ]

    def config(self, base: Base) -> Config:
        settings = base.settings_of(self.begun)
        if self.changes:
            settings[f"{base.stage}.changes"] = tuple(self.changes_in_words(base.space))
        return with_settings(base.config, settings)


class Part(tune.Trainable):
    """The training of a member up to the next comparison, as Ray Tune runs it: one step, in a process of its own."""

    def setup(self, config: dict[str, Any], base: Base, members: Sequence[Member], goal: int) -> None:
        self._base, self._goal = base, goal
        self._member = members[config["member"]]

    def step(self) -> dict[str, Any]:
        start = time.monotonic()
        # not in the main thread, where the training would take signals that are the process's
        with ThreadPoolExecutor(1) as threads:
            found = threads.submit(self._train).result()
        return {**found, "seconds": round(time.monotonic() - start, 1), "done": True}

    def _train(self) -> dict[str, Any]:
        base = self._base
        this = run_of(base)
        this.config, this.pause_after = self._member.config(base), self._goal
        this.on_record = lambda record: note_group(base, self.trial_id, record)
        try:
            run_stage(this, base.stage)
        except TrainingPaused as paused:
            return {"evaluations": paused.evaluations}
        except UserError as error:  # it would come again, so it isn't tried again
            return {"cause": str(error)}
        facts = this.manifest(base.stage)["facts"]
        kept = next(metrics for step, metrics in facts["evaluations"] if step == facts["kept_step"])
        artifact = f"{base.stage}-{this.marks[base.stage]}"
        return {"evaluations": facts["evaluations"], "artifact": artifact, "kept": kept}


def run_of(base: Base) -> Run:
    """A run that has the stage's inputs."""
    return Run(base.config, Store(Place.of(base.config.workspace)), Console(), base.cluster, marks=dict(base.marks))


def mark_of(this: Run, base: Base, member: Member) -> str:
    """The fingerprint of what a member has become. What the run knows of the language model's files is not found out again."""
    this.config = member.config(base)
    return fingerprint(facts_of(this, base.stage))


def run_population(
    base: Base,
    number: int,
    perturb_every: int,
    state: Place,
    console: Console,
    train: Callable[[list[Member], Sequence[int], int], Sequence[Any]],
) -> list[Row]:
    """Train a population to its end, or go on with one; how its members went.

    Args:
        number: of members.
        perturb_every: evaluations between two comparisons.
        state: the sweep's folder.
        train: trains members, by their places, up to so many evaluations, and gives Ray Tune's result of each.
    """
    metric, this = getattr(base.config, base.stage).select_on, run_of(base)
    found = state.read_json(POPULATION)
    if found is None:
        source = random.Random(f"population {base.config.seed}")
        drawn = [{domain.name: domain.label(domain.draw(source)) for domain in base.space} for _ in range(number)]
        members, goal = [Member(each) for each in drawn], perturb_every
    else:
        members, goal = [_read(each) for each in found["members"]], found["goal"]
    while any(member.trains for member in members):
        trained = [place for place, member in enumerate(members) if member.trains]
        marks = {place: mark_of(this, base, members[place]) for place in trained}
        # of those that have become the same one is trained
        first = {mark: place for place, mark in reversed(marks.items())}
        results = train(members, sorted(first.values()), goal)
        by_mark = {marks[place]: result for place, result in zip(sorted(first.values()), results, strict=True)}
        for place in trained:
            _take(members[place], by_mark[marks[place]])
        if any(member.trains for member in members):
            copies = compare(members, base.space, base.stage, metric, random.Random(f"{base.config.seed} {goal}"))
            for place, source_place in copies.items():
                told = ", ".join(f"{name} {value}" for name, value in members[place].drawn.items())
                console.line(f"trial {place + 1}/{number}  goes on from trial {source_place + 1}: {told}")
                _copy_checkpoints(this.store, base.stage, marks[source_place], mark_of(this, base, members[place]))
            goal += perturb_every
            kept = {mark_of(this, base, member) for member in members if member.trains}
            record = {"goal": goal, "members": [dataclasses.asdict(member) for member in members]}
            state.write_json(POPULATION, record)
            for mark in set(marks.values()) - kept:
                _discard(this.store, base.stage, mark)
    if goal == perturb_every:
        console.line(f"note: all ended before evaluation {perturb_every} (perturb_every), so none were compared")
    return [_row(place + 1, member, base, metric) for place, member in enumerate(members)]


def compare(
    members: Sequence[Member], space: Sequence[Domain], stage: str, metric: str, source: random.Random
) -> dict[int, int]:
    """Have the worst members that train go on from the best: a quarter of them, and a half at most.

    Returns:
        Of each that does, by its place, the place of whom it goes on from.
    """
    newest = {place: member.newest(metric) for place, member in enumerate(members) if member.trains}
    values = {place: value for place, value in newest.items() if value is not None}
    ranked = sorted(values, key=values.__getitem__)
    moved = min(math.ceil(QUARTER * len(ranked)), len(ranked) // 2)
    copies = {place: source.choice(ranked[len(ranked) - moved :]) for place in ranked[:moved]}
    for place, of in copies.items():
        mine, theirs = members[place], members[of]
        mine.begun, mine.evaluations = dict(theirs.begun), list(theirs.evaluations)
        mine.changes = list(theirs.changes)
        held = theirs.drawn
        near = {
            domain.name: neighbour(domain, held[domain.name], source) for domain in space if domain.may_change_in(stage)
        }
        changed = {name: value for name, value in near.items() if value != held[name]}
        if changed:
            mine.changes.append((len(mine.evaluations), changed))
    return copies


def neighbour(domain: Domain, drawn: Any, source: random.Random) -> Any:
    """Near what was drawn of a domain, within its bounds: a number times one of FACTORS, or the choice beside; or one drawn
    anew."""
    if source.random() < DRAWN_ANEW:
        return domain.label(domain.draw(source))
    if domain.kind == "choice":
        place = domain.labels.index(drawn) + source.choice((-1, 1))
        return domain.labels[min(max(place, 0), len(domain.labels) - 1)]
    return domain.value(drawn * source.choice(FACTORS))


def _take(member: Member, result: Any) -> None:
    """Note how a member's training went, from Ray Tune's result."""
    metrics = result.metrics or {}
    member.seconds = round(member.seconds + metrics.get("seconds", 0.0), 1)
    if result.error is not None:
        member.cause = last_line(result.error)
        return
    member.cause, member.artifact, member.kept = (metrics.get(name) for name in ("cause", "artifact", "kept"))
    member.evaluations = [list(each) for each in metrics.get("evaluations", member.evaluations)]


def _copy_checkpoints(store: Store, stage: str, mark: str, target: str) -> None:
    """Have a training find the checkpoints of another one, in place of what an attempt that was cut off has copied.

    Args:
        mark, target: the fingerprints of the other one and of it.
    """
    if target == mark or store.manifest(stage, target) is not None:
        return
    place = store.place(stage, target)
    with lease(place, Console().line), (store.place(stage, mark) / CHECKPOINTS).reading() as source:
        place.delete(CHECKPOINTS)
        with (place / CHECKPOINTS).writing() as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)


def _discard(store: Store, stage: str, mark: str) -> None:
    """Delete what is left of a training that no member goes on with."""
    place = store.place(stage, mark)
    with lease(place, Console().line):
        if store.manifest(stage, mark) is None:
            place.delete(*(name for name in place.names() if name != "lease.json"))


def _read(record: Mapping[str, Any]) -> Member:
    changes = [(after, changed) for after, changed in record["changes"]]
    return Member(**{**record, "changes": changes})


def _row(number: int, member: Member, base: Base, metric: str) -> Row:
    values = [metrics[metric] for _, metrics in member.evaluations if metrics[metric] is not None]
    return Row(
        trial=number,
        settings=base.settings_of(member.drawn),
        status="failed" if member.cause else "finished",
        value=max(values) if values and not member.cause else None,
        kept=member.kept,
        evaluations=member.evaluations,
        seconds=member.seconds,
        artifact=member.artifact,
        cause=member.cause,
        begun=base.settings_of(member.begun) if member.changes else None,
        changes=member.changes_in_words(base.space),
    )
