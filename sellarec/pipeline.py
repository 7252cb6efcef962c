"""The stages of a run, one after another. What stands already, by its fingerprint, is not run again."""

import errno
import json
import time
import traceback
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import Any

from sellarec.ahead import check_ahead, check_labels
from sellarec.artifacts import Place, fingerprint, free_bytes, in_json, lease
from sellarec.changes import windows
from sellarec.checks import check_layer, check_width
from sellarec.config import (
    CHANGING,
    EMBEDDED,
    FLASH_ATTENTION,
    STAGES,
    Backpropagation,
    Config,
    Language,
    Sparse,
    leaves,
    result_settings,
    to_yaml,
)
from sellarec.errors import StageFailed, UserError
from sellarec.language.templates import is_file, template_mark
from sellarec.run import Run, facts_of, inputs_of, settings_of
from sellarec.stages import carry_out, collab_beside_align
from sellarec.tracking import check_trackers, open_trackers
from sellarec.training.cluster import check_given_cluster, check_room, gpus_here, joins_cluster, takes_gpus
from sellarec.training.failures import keep_logs, last_line
from sellarec.training.launch import CHECKPOINTS
from sellarec.training.progress import Console, duration

PACKAGES = ("torch", "torchrec", "ray", "transformers", "peft", "pyarrow", "numpy")

NO_ROOM = 1 << 20
"""With less room than this behind the workspace (bytes), a failed stage is taken to have failed for that."""

LOGS = "logs"
"""Folder of a run's, after a failure, for what its workers have printed."""

BEGUN = "begun.json"
"""File of a run's: the artifacts that its stages have begun to write, by stage."""

COLLAB_ORIGINS = ("collab.init_from", "collab.init_users", "collab.init_items")
"""Settings that say what collab's rows start from: a run's name belongs to what they name, by content."""


def run(this: Run) -> None:
    """Carry out the stages of a run's config and write its folder.

    Raises:
        UserError: a mistake in settings, data, model or place; nothing already computed is lost.
        StageFailed: a stage failed for another reason; the traceback is written into the run's folder.
    """
    try:
        _run(this)
    except (OSError, StageFailed) as error:
        if _is_full_disk(error, this.store.workspace):
            raise UserError(
                f"the disk behind {this.store.workspace} is full: make room there, or give another --workspace; "
                "finished stages are kept"
            ) from error
        if isinstance(error, StageFailed):
            # before the cause, which is the last that is printed
            found = "".join(traceback.format_exception(error))
            try:
                this.place.write_text("error.log", found)
            except OSError as unwritten:
                this.console.line(f"the traceback can't be written to {this.place}/error.log ({unwritten}):\n{found}")
            else:
                this.console.line(f"the traceback is in {this.place}/error.log")
        raise


def _run(this: Run) -> None:
    config = this.config
    check_trackers(config.trackers)
    check_given_cluster(this.store.workspace, config.autoscaler)
    read = _closure(("evaluate",), config, set())
    wanted = config.stages or tuple(stage for stage in STAGES if stage in read)
    this.store.check_writable()
    _check_sharding(this, wanted)
    try:
        # checked before files are read, of which a hash takes minutes where they are large; but nodes that an autoscaler adds
        # cost: they are asked for when files are known to be good, and only where a stage is ahead
        if joins_cluster() and this.cluster is None and not config.autoscaler:
            this.connect()
        _check_settings(this, wanted)
        _run_stages(this, wanted)
    finally:
        if this.cluster is not None:
            import ray

            ray.shutdown()
    if "evaluate" in wanted:
        _finish(this)


def _check_settings(this: Run, wanted: tuple[str, ...]) -> None:
    """Refuse what this machine, or the language model that --llm names, can't do."""
    config = this.config
    _check_language_model(this, wanted)
    _check_layer(this, wanted)
    _check_width(this, wanted)
    if not joins_cluster():
        if config.least_workers < config.workers:
            raise UserError(
                f"min_workers is {config.min_workers} and workers {config.workers}, but RAY_ADDRESS names no cluster, and no "
                "nodes join or leave this machine: leave min_workers out, or submit the job to a cluster"
            )
        if wanted != ("prepare",):
            check_room(config.workers)
            takes_gpus(gpus_here(config.device), config.workers, config.device, this.groups, this.share)


def _run_stages(this: Run, wanted: tuple[str, ...]) -> None:
    config, console = this.config, this.console
    settings = _check_name(this, origins_of(this, wanted))
    console.line(f"run {config.name}: stages {', '.join(wanted)}; workspace {this.store.workspace}")
    recorded = this.place.read_json("artifacts.json") or {}
    needed = _closure(wanted, config, {name for name in recorded if _stands(this, name, recorded[name])})
    _check_inputs(this, [stage for stage in STAGES if stage in needed], wanted, recorded)
    ahead = [stage for stage in wanted if not _stands(this, stage, f"{stage}-{this.marks[stage]}")]
    is_told = _tell_cost(this, ahead)
    if ahead and joins_cluster() and this.cluster is None:
        this.connect()
    everything = {name: value for name, value, _ in leaves(config)}
    workspace, name = this.store.workspace, str(config.name)
    this.trackers = open_trackers(config.trackers, workspace, this.place, name, everything, console.line)
    failed = True
    try:
        _check_computing(this, wanted)
        for stage in STAGES:
            if stage in needed:
                if stage in wanted:
                    _note_begun(this, stage)
                    _stage(this, stage)
                else:
                    this.seconds[stage] = None
                recorded[stage] = f"{stage}-{this.marks[stage]}"
                this.persist(
                    f"writing {this.place}/artifacts.json",
                    partial(this.place.write_json, "artifacts.json", dict(recorded)),
                )
                if stage == "prepare":
                    check_labels(this, wanted)
                    if not is_told:
                        _tell_cost(this, ahead)
                    # the data are good: from here on the name is taken
                    what = f"writing {this.place}/settings.json and config.yaml"
                    this.persist(what, partial(this.place.write_json, "settings.json", settings))
                    this.persist(what, partial(this.place.write_text, "config.yaml", to_yaml(this.config)))
                    _check_ahead(this, wanted)
        if "evaluate" in wanted:
            _track_results(this)
        failed = False
    except StageFailed:
        if this.cluster is not None:
            keep_logs_of(this.place, this.console)  # as long as Ray runs
        raise
    finally:
        for tracker in this.trackers:
            tracker.close(failed)


def _note_begun(this: Run, stage: str) -> None:
    """Note which artifact a stage is about to write, where it doesn't stand."""
    artifact = f"{stage}-{this.marks[stage]}"
    if not _stands(this, stage, artifact):
        begun = {**(this.place.read_json(BEGUN) or {}), stage: artifact}
        this.persist(f"writing {this.place}/{BEGUN}", partial(this.place.write_json, BEGUN, begun))


def keep_logs_of(run: Place, console: Console) -> None:
    """Copy what this job's processes have printed on all nodes into a run's folder, in place of what an earlier failure left
    there."""
    place = run / LOGS
    try:
        run.delete(LOGS)
        left_out = keep_logs(place)
    except Exception as error:  # told, not raised: what failed says more, and is told next
        left_out = [last_line(error)]
    else:
        console.line(f"what workers have printed is in {place}")
    for why in left_out:
        console.line(f"workers' logs that could not be copied, which Ray keeps in its session folder: {why}")


def origins_of(this: Run, wanted: Sequence[str]) -> dict[str, Any]:
    """What --llm, --data and other files stand for that some stages read, by content: a wrong one is refused before any stage
    runs."""
    origins: dict[str, Any] = {}
    template = this.config.prompt.template
    origins["prompt.template"] = f"file ({template_mark(template)})" if is_file(template) else template
    continued = this.config.pretrain.continued
    if {"adapt", "distil", "fuse", "evaluate", *["pretrain"] * continued} & set(wanted):
        given = EMBEDDED if this.config.llm.model == EMBEDDED else this.given_llm.identity
        origins["llm"] = f"{given}, pre-trained further" if continued else given
    if "prepare" in wanted and this.config.data.source != "world":
        origins["data"] = this.hashes
    if "collab" in wanted:
        # none is an origin too: another one under the same name is refused
        origins |= dict.fromkeys(COLLAB_ORIGINS) | this.given_vectors
        if this.config.collab.init_from is not None:
            origins["collab.init_from"] = this.collab_start[1]
    return origins


def _check_name(this: Run, origins: dict[str, Any]) -> dict[str, Any]:
    """A name belongs to one config: the same one resumes, another one is refused, also of a stage that has left a checkpoint.
    Returns what to record of it."""
    mine = json.loads(json.dumps({**result_settings(this.config), **origins}))
    earlier = this.place.read_json("settings.json") or {}
    # what only stages that haven't been trained depend on may still change
    done, begun = (this.place.read_json(name) or {} for name in ("artifacts.json", BEGUN))
    trained = {stage for stage, artifact in begun.items() if (this.store.artifacts / artifact / CHECKPOINTS).names()}
    stages = [stage for stage in STAGES if stage in trained or stage in done]
    fixed = {"llm", "data", *COLLAB_ORIGINS}.union(*(_settings_names(stage, this.config) for stage in stages))
    names = [name for name in mine if name in fixed and name in earlier and earlier[name] != mine[name]]
    if names:
        shown = ", ".join(f"{name} {earlier[name]} then, {mine[name]} now" for name in names[:5])
        raise UserError(
            f"the run {this.config.name} in {this.store.workspace} was made with other settings ({shown}"
            f"{', ...' if len(names) > 5 else ''}): choose another --name, or delete {this.place}"
        )
    return {**earlier, **mine}


def _settings_names(stage: str, config: Config) -> set[str]:
    """Dotted names of the settings that a stage's result depends on."""
    names = {f"{stage}.changes"} if stage in CHANGING else set()  # none are left out of the fingerprint
    for section, found in settings_of(stage, config).items():
        names |= {f"{section}.{name}" for name in found} if isinstance(found, dict) else {section}
    return names


def _check_inputs(this: Run, needed: list[str], wanted: tuple[str, ...], recorded: dict[str, str]) -> None:
    """Find the fingerprints of all stages, and refuse before any work if one that isn't wanted doesn't stand.

    Raises:
        UserError: naming all that are missing.
    """
    missing = []
    for stage in needed:
        if stage not in wanted and stage in recorded and _stands(this, stage, recorded[stage]):
            # its inputs aren't asked for: the run's own record says which artifact it is
            this.marks[stage] = recorded[stage].removeprefix(f"{stage}-")
            continue
        if (
            stage not in wanted
            and stage == "prepare"
            and this.config.data.source != "world"
            and not this.config.data.path
        ):
            raise UserError(
                "no prepared log is recorded for this run: run stage prepare first, or name the data with --data"
            )
        this.marks[stage] = fingerprint(facts_of(this, stage))
        if stage not in wanted and not _stands(this, stage, f"{stage}-{this.marks[stage]}"):
            missing.append(stage)
    if missing:
        raise UserError(
            f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} not been run with these settings in "
            f"{this.store.workspace}: add to --stages"
        )


def _closure(wanted: tuple[str, ...], config: Config, standing: set[str]) -> set[str]:
    """The wanted stages and all that they read, directly or through a stage whose artifact doesn't stand."""
    needed: set[str] = set()
    waiting = list(wanted)
    while waiting:
        stage = waiting.pop()
        if stage not in needed:
            needed.add(stage)
            if stage in wanted or stage not in standing:
                waiting += inputs_of(stage, config)
    return needed


def _stands(this: Run, stage: str, artifact: str) -> bool:
    return this.store.manifest(stage, artifact.removeprefix(f"{stage}-")) is not None


def marks_of(this: Run, stage: str) -> dict[str, str]:
    """Fingerprints of a stage and of all that it reads, directly or through another stage, by stage."""
    this.marks = {}
    needed = _closure((stage,), this.config, set())
    for name in STAGES:
        if name in needed:
            this.marks[name] = fingerprint(facts_of(this, name))
    return this.marks


def run_stage(this: Run, stage: str) -> None:
    """Carry out one stage where its artifact doesn't stand, of a run that is connected to Ray and has its inputs' `marks`.

    Raises:
        UserError, StageFailed: as `run`.
        TrainingStopped: the run's `stop` was set.
    """
    this.marks[stage] = fingerprint(facts_of(this, stage))
    _stage(this, stage)


def check_stage(this: Run, stage: str) -> None:
    """Raises UserError where a stage can't be carried out as asked for, whatever the data."""
    _check_sharding(this, (stage,))
    _check_language_model(this, (stage,), draws=True)
    _check_layer(this, (stage,))
    _check_width(this, (stage,))
    _check_computing(this, (stage,))


def _stage(this: Run, stage: str) -> None:
    """Find the artifact of a stage, or make it."""
    facts = facts_of(this, stage)
    if fingerprint(facts) != this.marks[stage]:
        raise UserError(f"a file that stage {stage} reads has changed since the run began: start it again")
    place = this.artifact(stage)
    if this.store.manifest(stage, this.marks[stage]) is not None:
        this.console.line(f"{stage:<9} stands already: {place}")
        this.seconds[stage] = None
        return
    with lease(place, this.console.line) as is_held:
        if this.store.manifest(stage, this.marks[stage]) is not None:  # another process made it meanwhile
            this.console.line(f"{stage:<9} stands now: {place}")
            this.seconds[stage] = None
            return
        start = time.monotonic()
        if stage != "prepare" and this.cluster is None:
            this.connect()
        found = carry_out(this, stage)
        if not this.persist(f"reading the lease of {place}", is_held):
            raise StageFailed(
                f"stage {stage}: this process stood still for so long that another one took over {place}; run it again"
            )
        this.seconds[stage] = time.monotonic() - start
        manifest = {
            **facts,
            "fingerprint": this.marks[stage],
            "seconds": round(time.monotonic() - start, 1),
            "versions": {name: metadata.version(name) for name in ("sellarec", *PACKAGES)},
            "facts": found,
        }
        for name, text in (("config.yaml", to_yaml(this.config)), ("manifest.json", in_json(manifest))):
            this.persist(f"writing {place}/{name}", partial(place.write_text, name, text))
        # not before: what a checkpoint goes back to is then all there, or the stage stands without it
        this.persist(f"deleting {place / CHECKPOINTS}", partial(place.delete, CHECKPOINTS))
    this.console.line(f"{stage:<9} done in {duration(this.seconds[stage] or 0)}: {place}")


def _is_full_disk(error: BaseException, workspace: Place) -> bool:
    """Whether there is no room behind the workspace: each library words that error in its own way, or not at all."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    free = free_bytes(workspace)
    return f"[Errno {errno.ENOSPC}]" in str(error) or (free is not None and free < NO_ROOM)


def _tell_cost(this: Run, ahead: Sequence[str]) -> bool:
    """Tell what those of the stages that run a given language model will compute; False where the number of rows isn't known
    yet."""
    from sellarec.language import cost
    from sellarec.language.llm import context_length, read_config
    from sellarec.language.memory import shape_of

    config = this.config
    if config.llm.model == EMBEDDED or not set(cost.STAGES) & set(ahead):
        return True
    stands = _stands(this, "prepare", f"prepare-{this.marks['prepare']}") if "prepare" in this.marks else False
    rows = cost.known_rows(config, this.log().facts if stands else None)
    if rows is None:
        return False
    source = this.given_llm
    shape = shape_of(source, None if config.adapt.method == "full" else config.adapt)
    found = cost.costs(config, shape, context_length(read_config(source.name, source.revision)), rows, ahead)
    hours = cost.hours_in_words(found, ("A100-80GB", "H100"), config.workers)
    for line in (*cost.in_words(found), *hours, *cost.assumptions()):
        this.console.line(f"cost      {line}")
    return True


def _check_sharding(this: Run, wanted: Sequence[str]) -> None:
    """Raises UserError where a stage's tables can't be sharded, or trained, as asked for, whatever the machine."""
    from sellarec.training.plan import check_optimizer, check_sharding

    for stage in wanted:
        settings = getattr(this.config, stage, None)
        if stage != "prepare":
            is_frozen = stage == "fuse" and "tables" not in this.config.fuse.train
            optimizer = settings if isinstance(settings, Sparse) and not is_frozen else None
            check_sharding(this.config.tables, optimizer, stage)
            if optimizer is not None:
                for window in windows(this.config, stage):
                    check_optimizer(this.config.tables, getattr(window.config, stage), stage)


def _check_language_model(this: Run, wanted: Sequence[str], draws: bool = False) -> None:
    """Raises UserError where --llm names no causal language model, one whose embeddings are of another width than its hidden
    states, one whose decoder layers can't be told, or one that has no layers of adapt.targets.

    Args:
        draws: the settings are those that a sweep's trials are laid over, which may have other targets: stage adapt looks.
    """
    from sellarec.language.llm import (
        causal_config,
        check_embeddings,
        check_layers,
        check_targets,
        linear_layers,
        without_weights,
    )

    config = this.config
    if config.llm.model == EMBEDDED or not any(isinstance(getattr(config, stage, None), Language) for stage in wanted):
        return
    model = without_weights(causal_config(this.given_llm.name, this.given_llm.revision))
    check_embeddings(model, config.llm.model)
    check_layers(model, config.llm.model)
    if "adapt" in wanted and config.adapt.method == "lora" and not draws:
        check_targets(config.adapt.targets, linear_layers(model), config.llm.model)


def _check_layer(this: Run, wanted: Sequence[str]) -> None:
    """Raises UserError where the model that --llm names has no hidden states of distil.layer."""
    from sellarec.language.llm import decoder_depth

    layer = this.config.distil.layer
    if "distil" in wanted and this.config.llm.model != EMBEDDED and layer != -1:
        check_layer(layer, decoder_depth(this.given_llm), this.config.llm.model)


def _check_width(this: Run, wanted: Sequence[str]) -> None:
    """Raises UserError where tables can't have rows as wide as the language model: align's of distilled vectors, or fuse's of
    learned tokens."""
    from sellarec.language.llm import hidden_width

    config = this.config
    if "align" not in wanted and not ("fuse" in wanted and config.fuse.represent == "learned"):
        return
    if config.llm.model == EMBEDDED:
        check_width("pretrain.hidden", config.pretrain.hidden)
    else:
        check_width(f"the width of the language model {config.llm.model}", hidden_width(this.given_llm))


def _check_ahead(this: Run, wanted: Sequence[str]) -> None:
    """Once the log is there, connect to Ray and refuse what the stages that don't stand can't hold."""
    ahead = [name for name in wanted if name != "prepare" and not _stands(this, name, f"{name}-{this.marks[name]}")]
    if ahead:
        if this.cluster is None:
            this.connect()
        check_ahead(this, ahead)


def _check_computing(this: Run, wanted: Sequence[str]) -> None:
    """Raises UserError where attention can't be computed, or layers compiled, as asked for. Of a cluster's compilers and
    packages nothing is known here: its workers say so."""
    config, attention = this.config, this.config.llm.attention
    sections = [getattr(config, stage, None) for stage in wanted]
    if any(isinstance(section, Backpropagation) and section.compile for section in sections) and not joins_cluster():
        from sellarec.training.dense import check_compiler

        check_compiler()
    if attention == "auto" or not any(isinstance(section, Language) for section in sections):
        return
    if attention == FLASH_ATTENTION and not _has_gpus(this):
        raise UserError(
            f"llm.attention is {attention}, which runs on GPUs alone, but {config.workers} workers find no GPU each: take "
            "llm.attention sdpa, or fewer --workers than GPUs"
        )
    if config.llm.model != EMBEDDED and not joins_cluster():
        from sellarec.language.llm import check_attention

        check_attention(this.given_llm.name, this.given_llm.revision, attention)


def _has_gpus(this: Run) -> bool:
    """Whether workers get a GPU each. A cluster is joined by now; Ray on this machine need not be started yet."""
    config = this.config
    if this.cluster is not None:
        return this.gpus()
    return takes_gpus(gpus_here(config.device), config.workers, config.device)


def _track_results(this: Run) -> None:
    """The metrics of the results, to the run's trackers."""
    records = this.artifact("evaluate").read_json("results.json")
    assert records is not None
    values = {f"{r['model']}/{r['rows']} {r['metric']}": r["value"] for r in records if r["value"] is not None}
    for tracker in this.trackers:
        tracker.summary(values)


def _finish(this: Run) -> None:
    """The run's own files, and what the user sees at the end."""
    from sellarec.evaluation.report import write_report
    from sellarec.evaluation.results import format_table

    records = this.artifact("evaluate").read_json("results.json")
    assert records is not None
    this.persist(f"writing {this.place}/results.json", partial(this.place.write_json, "results.json", records))
    stages: list[dict[str, Any]] = [
        {
            "stage": stage,
            "artifact": f"{stage}-{this.marks[stage]}",
            "seconds": this.seconds[stage],
            "manifest": this.manifest(stage),
        }
        for stage in STAGES
        if stage in this.marks
    ]
    for made in stages:
        if made["stage"] == "align":
            # what starts from scratch was made without collab, which the run has by now
            valid = made["manifest"]["facts"]["alignment"]["valid"]
            valid["collab"] = valid["collab"] or collab_beside_align(this)
    report = write_report(
        name=str(this.config.name),
        config_yaml=to_yaml(this.config),
        records=records,
        stages=stages,
        versions=stages[-1]["manifest"]["versions"],
    )
    this.persist(f"writing {this.place}/report.html", partial(this.place.write_text, "report.html", report))
    print(f"\n{format_table(records)}\n", flush=True)
    print(f"report       {this.place}/report.html")
    print(f"results      {this.place}/results.json")
    if this.place.is_local and (this.place.folder / "tensorboard").is_dir():
        print(f"TensorBoard  tensorboard --logdir {this.place}/tensorboard")
    print(f"artifacts    {this.store.workspace}/artifacts (which ones: {this.place}/artifacts.json)", flush=True)
