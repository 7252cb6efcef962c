"""A sweep: what its stage reads is made once, then Ray Tune runs the trials, then they are compared."""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sellarec.ahead import check_labels, check_prompts, check_start
from sellarec.artifacts import Place, lease
from sellarec.changes import windows
from sellarec.config import CHANGEABLE, EMBEDDED, STAGES, Config, Sweep, result_settings, to_yaml
from sellarec.errors import StageFailed, UserError
from sellarec.pipeline import check_stage, keep_logs_of, marks_of, origins_of, run
from sellarec.run import Run
from sellarec.training.cluster import check_given_cluster, check_room, connect, joins_cluster
from sellarec.training.failures import last_line
from sellarec.training.progress import Console
from sellarec.tuning.results import Row, format_rows, write_results
from sellarec.tuning.space import VALUE, Domain, check_space, read_space, with_settings

if TYPE_CHECKING:
    from sellarec.tuning.trial import Base

KEPT = ("stage", "trials", "search", "concurrent", "max_failures", "perturb_every")
"""Settings that Ray Tune goes on with as the sweep was begun."""

STATE = "sweep"
"""Folder in the run's for what the sweep goes on from."""


def sweep(settings: Sweep) -> None:
    """Run a sweep, or go on with one, and write what it found into WORKSPACE/runs/NAME.

    Raises:
        UserError: a mistake in settings, search space, data, model or place.
        StageFailed: a stage before the trials failed, or all trials did.
    """
    config, stage, console = _absolute(settings.base()), settings.stage, Console()
    check_given_cluster(Place.of(config.workspace), settings.autoscaler)
    if settings.min_workers is not None:
        raise UserError(
            f"min_workers is {settings.min_workers}, but a sweep's trials have {settings.workers} workers each (workers): leave "
            "it out"
        )
    if settings.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UserError("search is optuna, but optuna is not installed: pip install -e '.[tune]' in the checkout")
    if not joins_cluster():
        check_room(settings.workers, settings.concurrent)
    space = read_space(settings.space or stage)
    _check_changes(settings, config, space)
    this = Run.of(config)
    this.store.check_writable()
    this.groups, this.share = settings.concurrent, settings.share
    # checked for all trials, before files are read, of which a hash takes minutes where they are large; an autoscaler's nodes
    # are asked for later, by `run`
    if joins_cluster() and not settings.autoscaler:
        this.connect()
    reads = check_space(space, config, stage, partial(_marks, this, stage))
    this.config = config
    check_stage(this, stage)
    place = this.place
    state = place / STATE
    identity = _check_name(state, settings, config, space, origins_of(this, tuple(marks_of(this, stage))))
    with lease(state, console.line):
        marks = _run_stages_before(this, stage, reads)
        state.write_json("sweep.json", identity)
        rows = _finished(state)
        if rows is None:
            rows = _run_trials(settings, config, space, marks, place, console)
        else:
            console.line(f"the sweep stands already: {place}")
        finished = sorted((row for row in rows if row.status == "finished"), key=lambda row: -(row.value or 0))
        write_results(place, rows, space, stage, getattr(config, stage).select_on)
        if not finished:
            raise StageFailed(
                f"of {len(rows)} trials none came to its end: {next(row.cause for row in rows if row.cause)}"
            )
        best = with_settings(config, finished[0].recipe(stage))
        recipe = dataclasses.replace(best, name=f"{config.name}-best")
        place.write_text("best.yaml", f"# trial {finished[0].trial} of the sweep {config.name}\n{to_yaml(recipe)}")
        print(f"\n{format_rows(finished[:5], space, getattr(config, stage).select_on)}\n")
        for what, name in (("table", "trials.csv, trials.parquet"), ("plots", "plots"), ("recipe", "best.yaml")):
            print(f"{what:<12} {place}/{name}")
        print(f"TensorBoard  tensorboard --logdir {place}/tensorboard", flush=True)


def _absolute(config: Config) -> Config:
    """Paths from the file system's root: trials run in folders of their own."""
    paths = {
        "data.path": config.data.path,
        "data.items": config.data.items,
        "llm.model": config.llm.model,
        "collab.init_from": config.collab.init_from,
        "collab.init_users": config.collab.init_users,
        "collab.init_items": config.collab.init_items,
    }
    named = {name: path for name, path in paths.items() if path is not None and (name, path) != ("llm.model", EMBEDDED)}
    found = {name: Path(path).expanduser().absolute() for name, path in named.items()}
    standing = {name: str(path) for name, path in found.items() if path.exists()}  # others are hub ids and URIs
    return with_settings(config, {"workspace": str(Place.of(config.workspace)), **standing})


def _marks(this: Run, stage: str, config: Config) -> dict[str, str]:
    """The fingerprints of a config's stage and of what it reads; what `this` knows of data and model is not found out again."""
    this.config = config
    return marks_of(this, stage)


def _check_name(
    state: Place, settings: Sweep, config: Config, space: Sequence[Domain], origins: Mapping[str, Any]
) -> dict[str, Any]:
    """A name belongs to one sweep: the same one resumes, another one is refused. Returns what to record of it."""
    mine = {
        **{name: getattr(settings, name) for name in KEPT},
        "space": {domain.name: {domain.kind: domain.values} for domain in space},
        **result_settings(config),
        **origins,
    }
    mine = json.loads(json.dumps(mine))
    earlier = state.read_json("sweep.json") or mine
    names = [name for name in mine if earlier.get(name) != mine[name]]
    if names:
        shown = ", ".join(f"{name} {earlier.get(name)} then, {mine[name]} now" for name in names[:5])
        raise UserError(
            f"the sweep {state} was begun with other settings ({shown}{', ...' if len(names) > 5 else ''}): choose another "
            "--name (trials that stand are not trained again), or delete that folder"
        )
    return mine


def _run_stages_before(swept: Run, stage: str, reads: Sequence[str]) -> dict[str, str]:
    """Carry out what the trials read; the fingerprints by stage. Leaves the cluster that was joined."""
    this = Run.of(dataclasses.replace(swept.config, stages=tuple(name for name in STAGES if name in reads)))
    this.groups, this.share, this.cluster = swept.groups, swept.share, swept.cluster
    run(this)
    check_labels(this, (stage,))
    check_start(this, (stage,))
    if stage in ("adapt", "fuse"):
        check_prompts(this, this.llm().folder(weights=False))
    return dict(this.marks)


def _run_trials(
    settings: Sweep, config: Config, space: Sequence[Domain], marks: Mapping[str, str], place: Place, console: Console
) -> list[Row]:
    """Run what is left of the trials of the sweep whose folder is `place`; how all of them went."""
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # what they write is in our table
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep as it ends any job
        "TUNE_GLOBAL_CHECKPOINT_S": "5",
        "TUNE_FORCE_TRIAL_CLEANUP_S": "86400",  # a step may be long, and who is killed in it leaves CPUs reserved
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(name, value)
    state, concurrent, workspace = place / STATE, settings.concurrent, Place.of(config.workspace)
    cluster = connect(
        settings.workers, console, workspace, concurrent, settings.share, stopping=concurrent, device=settings.device,
        autoscaler=settings.autoscaler, node_timeout=settings.node_timeout,
    )  # fmt: skip
    import ray
    from ray import tune

    from sellarec.tuning.progress import Progress
    from sellarec.tuning.trial import Base, Trial

    base = Base(config, space, settings.stage, marks, cluster, state / "trials")
    trainable = tune.with_resources(tune.with_parameters(Trial, base=base), _taken())
    folder = _folder(state)
    try:
        if settings.search == "pbt":
            return _with_logs(_run_population(settings, base, state, console), place, console)
        if tune.Tuner.can_restore(f"{folder}/tune"):
            console.line(f"the sweep goes on: {state}")
            tuner = tune.Tuner.restore(f"{folder}/tune", trainable, resume_unfinished=True, restart_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=_domains(space),
                tune_config=tune.TuneConfig(
                    num_samples=settings.trials,
                    max_concurrent_trials=settings.concurrent,
                    search_alg=_searcher(settings),
                    scheduler=_scheduler(settings, config),
                ),
                run_config=_run_config(settings, state, Progress(console, space, settings.trials, state / "trials")),
            )
        results = tuner.fit()
        rows = _with_logs([_row(number, result, base) for number, result in enumerate(results, 1)], place, console)
    finally:
        ray.shutdown()
    # what failed is tried again when the command is given again; where nothing was finished, everything is
    if not results.errors:
        if any(row.status == "finished" for row in rows):
            state.write_json("trials.json", [dataclasses.asdict(row) for row in rows])
        state.delete("tune", "trials")
    return rows


def _with_logs(rows: list[Row], place: Place, console: Console) -> list[Row]:
    """The trials; where some failed, what workers have printed is kept as long as Ray runs."""
    if any(row.status == "failed" for row in rows):
        keep_logs_of(place, console)
    return rows


def _domains(space: Sequence[Domain]) -> dict[str, Any]:
    """The search space as Tune takes it."""
    from ray import tune

    found: dict[str, Any] = {}
    for domain in space:
        if domain.kind == "choice":
            found[domain.name] = tune.choice(list(domain.labels))
        else:
            low, high = domain.values
            # Tune's randint leaves out the upper bound
            found[domain.name] = getattr(tune, domain.kind)(low, high + 1 if domain.kind == "randint" else high)
    return found


def _searcher(settings: Sweep) -> Any:
    if settings.search != "optuna":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(random_state=settings.seed, max_concurrent=settings.concurrent)
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(metric=VALUE, mode="max", seed=settings.seed)


def _scheduler(settings: Sweep, config: Config) -> Any:
    from ray.tune.schedulers import FIFOScheduler

    from sellarec.tuning.halving import Halving

    return Halving(getattr(config, settings.stage).select_on) if settings.search == "asha" else FIFOScheduler()


def _taken() -> Any:
    """What a trial's own process takes of Ray's resources. Tune asks for something, and of CPUs any share would leave its node
    one worker fewer than preflight counts."""
    from ray import tune

    return tune.PlacementGroupFactory([{"memory": 1 << 20}])


def _check_changes(settings: Sweep, config: Config, space: Sequence[Domain]) -> None:
    """Refuse a space that a population can't change on the way, or of which the stage's `changes` would overrule a setting."""
    stage = settings.stage
    names = [domain.name for domain in space]
    if settings.search == "pbt":
        if f"{stage}.changes" in names:
            raise UserError(
                f"search is pbt, but the search space draws {stage}.changes, which a population finds: leave it out"
            )
        if not any(domain.may_change_in(stage) for domain in space):
            raise UserError(
                f"search is pbt, but the search space draws {', '.join(names)}, none of which can be changed while {stage} "
                f"trains: those that can are {', '.join(CHANGEABLE)} of {stage}; give another --space or --search"
            )
    for window in windows(config, stage)[1:]:
        for name in names:
            section, _, leaf = name.rpartition(".")
            if section == stage and leaf in window.changed:
                raise UserError(
                    f"the search space draws {name}, but {stage}.changes sets it to {window.changed[leaf]} after evaluation "
                    f"{window.first}, whatever was drawn: leave out one of the two"
                )


def _folder(state: Place) -> str:
    """The sweep's folder as Ray Tune takes it."""
    return str(state.folder) if state.is_local else state.uri


def _run_config(settings: Sweep, state: Place, callback: Any) -> Any:
    from ray import tune

    return tune.RunConfig(
        name="tune",
        storage_path=_folder(state),
        failure_config=tune.FailureConfig(max_failures=settings.max_failures),
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the stage keeps its own
        callbacks=[callback],
        verbose=0,
    )


def _run_population(settings: Sweep, base: "Base", state: Place, console: Console) -> list[Row]:
    """Run, or go on with, population-based training."""
    from ray import tune

    from sellarec.tuning.population import POPULATION, Member, Part, run_population
    from sellarec.tuning.progress import MemberProgress

    def train(members: list[Member], places: Sequence[int], goal: int) -> Sequence[Any]:
        state.delete("tune", "trials")  # of an attempt that was cut off: its members go on from their own checkpoints
        trainable = tune.with_parameters(Part, base=base, members=members, goal=goal)
        results = tune.Tuner(
            tune.with_resources(trainable, _taken()),
            param_space={"member": tune.grid_search(list(places))},
            tune_config=tune.TuneConfig(max_concurrent_trials=settings.concurrent),
            run_config=_run_config(
                settings, state, MemberProgress(console, members, settings.trials, state / "trials")
            ),
        ).fit()
        found = {result.config["member"]: result for result in results}
        return [found[place] for place in places]

    rows = run_population(base, settings.trials, settings.perturb_every, state, console, train)
    if any(row.status == "finished" for row in rows):
        state.write_json("trials.json", [dataclasses.asdict(row) for row in rows])
    state.delete("tune", "trials", POPULATION)
    return rows


def _row(number: int, result: Any, base: "Base") -> Row:
    """How a trial went, of what it reported last."""
    metrics = result.metrics or {}
    cause = last_line(result.error) if result.error is not None else metrics.get("cause")
    artifact = metrics.get("artifact")
    return Row(
        trial=number,
        settings={domain.name: domain.value(result.config[domain.name]) for domain in base.space},
        status="failed" if cause else "finished" if artifact else "stopped",
        value=None if cause else metrics[VALUE],
        kept=metrics.get("kept"),
        evaluations=metrics.get("evaluations", []),
        seconds=metrics.get("seconds", metrics.get("time_total_s")),
        artifact=artifact,
        cause=cause,
    )


def _finished(state: Place) -> list[Row] | None:
    """The trials of a sweep that came to its end."""
    rows = state.read_json("trials.json")
    return None if rows is None else [Row(**row) for row in rows]
