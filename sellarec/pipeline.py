"""The stages of a run: what each needs, what its fingerprint is made of, and how it is carried out.

A stage reads artifacts and writes one. What stands already, by its fingerprint, is not run again.
"""

import dataclasses
import errno
import json
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sellarec.artifacts import Place, Store, fingerprint, free_bytes, in_json, lease, persist
from sellarec.checks import check_layer
from sellarec.config import (
    EMBEDDED,
    FLASH_ATTENTION,
    STAGES,
    Backpropagation,
    Config,
    Language,
    Selection,
    Sparse,
    leaves,
    result_settings,
    to_yaml,
)
from sellarec.data.files import file_hash, file_hashes
from sellarec.data.log import Log, copy_log, read_log
from sellarec.data.prepare import check_expected, discard_work, in_words, prepare, rules_of
from sellarec.data.raw import Source
from sellarec.data.sources import open_source
from sellarec.errors import StageFailed, TrainingStopped, UserError
from sellarec.language.templates import AUTO, is_file, read_template, read_templates, template_mark
from sellarec.tracking import Tracker, open_trackers
from sellarec.training.launch import (
    CHECKPOINTS,
    Cluster,
    Group,
    check_room,
    connect,
    first_workers,
    free_gpu_memory,
    joins_cluster,
    room_of_worker,
    run_task,
    run_workers,
    train,
)
from sellarec.training.progress import Console, duration

VERSIONS = {
    "prepare": 2,
    "pretrain": 2,
    "adapt": 2,
    "collab": 3,
    "distil": 1,
    "align": 3,
    "fuse": 4,
    "evaluate": 2,
}
"""Raised by hand when a stage's code gives other results than before."""

PACKAGES = ("torch", "torchrec", "ray", "transformers", "peft", "pyarrow", "numpy")

WORK = "work"
"""Folder in an unfinished artifact for what its training reads beside its inputs."""

NO_ROOM = 1 << 20
"""With less room than this behind the workspace (bytes), a failed stage is taken to have failed for that."""

MODELS = ("collab", "text-only", "sella-rec")

COLLAB_ORIGINS = ("collab.init_from", "collab.init_users", "collab.init_items")
"""Settings that say what collab's rows start from: a run's name belongs to what they name, by content."""


def inputs_of(stage: str, config: Config) -> tuple[str, ...]:
    """The stages whose artifacts a stage reads."""
    pretrained = ("pretrain",) if config.pretrains else ()
    collab = ("collab",) if config.align.init == "collab" else ()
    aligned = ("align",) if config.fuse.represent == "collaborative" else ()
    return {
        "prepare": (),
        "pretrain": ("prepare",),
        "adapt": ("prepare", *pretrained),
        "collab": ("prepare",),
        "distil": ("prepare", *pretrained, "adapt"),
        "align": ("prepare", *collab, "distil"),
        "fuse": ("prepare", *pretrained, "adapt", *aligned),
        "evaluate": ("prepare", *pretrained, "adapt", "collab", *aligned, "fuse"),
    }[stage]


def settings_of(stage: str, config: Config) -> dict[str, Any]:
    """What of the config a stage's result depends on, beside its inputs."""
    sections = {
        "prepare": (),
        "pretrain": ("pretrain", "llm"),
        "adapt": ("prompt", "adapt", "llm"),
        "collab": ("collab", "tables"),
        "distil": ("distil", "llm"),
        "align": ("align", "collab", "tables"),
        "fuse": ("prompt", "fuse", "llm", "tables"),
        "evaluate": ("prompt", "evaluate", "llm"),
    }[stage]
    settings = {name: result_settings(getattr(config, name)) for name in sections}
    if stage == "prepare":
        data = result_settings(config.data)
        if config.data.source != "world":
            data = {name: value for name, value in data.items() if not name.startswith("world.")}
        return {"data": data}
    if stage == "pretrain" or (stage == "adapt" and config.adapt.method == "full"):
        del settings["llm"]["storage"]  # no weight is frozen there
    if stage == "distil":
        settings["llm"] = {"storage": settings["llm"]["storage"]}  # it computes in float32 always
    if "prompt" in settings and is_file(config.prompt.template):
        settings["prompt"]["template"] = "file"  # what it says is among the facts
    return {**settings, "seed": config.seed}


@dataclass
class Run:
    """One run of the pipeline: its config, where things lie, and what stands so far."""

    config: Config
    store: Store
    console: Console
    cluster: Cluster | None = None
    groups: int = 1
    """Worker groups that are to run at a time: of a sweep its trials'."""
    share: float = 1.0
    """What each worker takes of a CPU, or of a GPU where there are some for all."""
    marks: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each stage, known once its inputs' are."""
    seconds: dict[str, float | None] = field(default_factory=dict)
    """Wall time of each stage that this run carried out; None where the artifact stood already."""
    trackers: list[Tracker] = field(default_factory=list)
    """Where the numbers of trainings go, while the run goes on."""
    on_record: Callable[[dict[str, Any]], None] | None = None
    """Takes the progress records of trainings; None: they go to the run's trackers."""
    stop: threading.Event | None = None
    """Once it is set, a training ends with TrainingStopped, and leaves nothing."""

    @classmethod
    def of(cls, config: Config) -> "Run":
        return cls(config, Store(Place.of(config.workspace)), Console())

    @cached_property
    def source(self) -> Source:
        return open_source(self.config.data)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the source's files, by name; of a prepared log, the fingerprint of its facts."""
        if self.config.data.source == "log":
            return {"log": fingerprint(self.given_log.facts)}
        return file_hashes(self.source.files)

    @cached_property
    def given_log(self) -> Log:
        """What --data names, where that is a prepared log."""
        path = self.config.data.path
        if path is None:
            raise UserError("the log is not given: name its folder with --data")
        return read_log(Path(path))

    @property
    def place(self) -> Place:
        return self.store.workspace / "runs" / str(self.config.name)

    def artifact(self, stage: str) -> Place:
        return self.store.place(stage, self.marks[stage])

    def manifest(self, stage: str) -> dict[str, Any]:
        found = self.store.manifest(stage, self.marks[stage])
        assert found is not None
        return found

    def log(self) -> Log:
        return read_log(self.artifact("prepare").local())

    def llm(self) -> Any:
        """The source of the language model: `--llm`, or what stage pretrain made."""
        from sellarec.language.llm import LlmSource

        if self.config.pretrains:
            mark = self.marks["pretrain"]
            folder = str(self.artifact("pretrain").local() / "model")
            return self._as_set(LlmSource(folder, None, f"pretrain-{mark}"))
        return self._as_set(self.given_llm)

    def _as_set(self, source: Any) -> Any:
        """A language model's source, to be loaded as the settings say."""
        return dataclasses.replace(source, storage=self.config.llm.storage, attention=self.config.llm.attention)

    def adapted(self, stage: str = "adapt") -> dict[str, Any]:
        """The language model that stage adapt leaves: its source, and the adapter on it, from the artifact of a stage; None where
        all its weights were tuned."""
        from sellarec.language.llm import LlmSource

        if self.config.adapt.method == "lora":
            return {"source": self.llm(), "adapter": self.artifact(stage).local() / "adapter"}
        folder, mark = str(self.artifact("adapt").local() / "model"), self.marks["adapt"]
        return {"source": self._as_set(LlmSource(folder, None, f"adapt-{mark}")), "adapter": None}

    @cached_property
    def given_llm(self) -> Any:
        """What --llm names. Looked up once: all stages of a run take the same commit of a hub id."""
        from sellarec.language.llm import find_llm

        return find_llm(self.config.llm.model, self.config.llm.revision)

    @cached_property
    def collab_start(self) -> tuple[Place, str]:
        """What collab.init_from names, and its fingerprint."""
        place = Place.of(str(self.config.collab.init_from))
        manifest = place.read_json("manifest.json") or {}
        if manifest.get("stage") != "collab":
            raise UserError(f"collab.init_from is {place}, which is no finished artifact of stage collab")
        return place, manifest["fingerprint"]

    @cached_property
    def given_vectors(self) -> dict[str, str]:
        """SHA-256 of the files that collab's tables start from, by setting."""
        settings = self.config.collab
        given = {f"collab.{name}": getattr(settings, name) for name in ("init_users", "init_items")}
        return {name: file_hash(path) for name, path in given.items() if path is not None}

    def connect(self) -> None:
        workspace = self.store.workspace
        self.cluster = connect(self.config.least_workers, self.console, workspace, self.groups, self.share)

    def gpus(self) -> bool:
        assert self.cluster is not None
        return self.cluster.gpus

    def group(self) -> Group:
        """The workers of a stage."""
        assert self.cluster is not None
        config = self.config
        return Group(
            most=config.workers,
            gpus=self.cluster.gpus,
            least=config.least_workers,
            share=self.cluster.share,
            worker_timeout=config.worker_timeout,
            storage_timeout=config.storage_timeout,
            node_timeout=config.node_timeout,
            grow_every=config.grow_every,
        )

    def persist(self, what: str, act: Callable[[], None]) -> None:
        """Write something, and again while storage fails."""
        persist(what, act, self.config.storage_timeout, self.console.line)


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
            found = "".join(traceback.format_exception(error))
            try:
                this.place.write_text("error.log", found)
            except OSError as unwritten:
                where = f"The traceback can't be written to {this.place}/error.log ({unwritten}):\n{found}"
            else:
                where = f"The traceback is in {this.place}/error.log"
            raise StageFailed(f"{error}\n{where}") from error
        raise


def _run(this: Run) -> None:
    config, console = this.config, this.console
    read = _closure(("evaluate",), config, set())
    wanted = config.stages or tuple(stage for stage in STAGES if stage in read)
    this.store.check_writable()
    _check_sharding(this, wanted)
    _check_layer(this, wanted)
    if not joins_cluster():
        if config.least_workers < config.workers:
            raise UserError(
                f"min_workers is {config.min_workers} and workers {config.workers}, but RAY_ADDRESS names no cluster, and no "
                "nodes join or leave this machine: leave min_workers out, or submit the job to a cluster"
            )
        if wanted != ("prepare",):
            check_room(config.workers)
    settings = _check_name(this, _origins(this, wanted))
    console.line(f"run {config.name}: stages {', '.join(wanted)}; workspace {this.store.workspace}")
    recorded = this.place.read_json("artifacts.json") or {}
    needed = _closure(wanted, config, {name for name in recorded if _stands(this, name, recorded[name])})
    _check_inputs(this, [stage for stage in STAGES if stage in needed], wanted, recorded)
    ahead = [stage for stage in wanted if not (stage in recorded and _stands(this, stage, recorded[stage]))]
    is_told = _tell_cost(this, ahead)
    everything = {name: value for name, value, _ in leaves(config)}
    this.trackers = open_trackers(config.trackers, this.place, str(config.name), everything, console.line)
    failed = True
    try:
        if joins_cluster():  # checked before any work
            this.connect()
        _check_computing(this, wanted)
        for stage in STAGES:
            if stage in needed:
                if stage in wanted:
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
        if "evaluate" in wanted:
            _track_results(this)
        failed = False
    finally:
        for tracker in this.trackers:
            tracker.close(failed)
        if this.cluster is not None:
            import ray

            ray.shutdown()
    if "evaluate" in wanted:
        _finish(this)


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


def _origins(this: Run, wanted: tuple[str, ...]) -> dict[str, Any]:
    """What --llm and --data stand for, by content: a wrong one is refused before any stage runs."""
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
    """A name belongs to one config: the same one resumes, another one is refused. Returns what to record of it."""
    mine = json.loads(json.dumps({**result_settings(this.config), **origins}))
    earlier = this.place.read_json("settings.json") or {}
    # what only stages that haven't been run depend on may still change
    stages = [stage for stage in STAGES if stage in (this.place.read_json("artifacts.json") or {})]
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
    names: set[str] = set()
    for section, found in settings_of(stage, config).items():
        names |= {f"{section}.{name}" for name in found} if isinstance(found, dict) else {section}
    return names


def _stands(this: Run, stage: str, artifact: str) -> bool:
    return this.store.manifest(stage, artifact.removeprefix(f"{stage}-")) is not None


def marks_of(this: Run, stage: str) -> dict[str, str]:
    """Fingerprints of a stage and of all that it reads, directly or through another stage, by stage."""
    this.marks = {}
    needed = _closure((stage,), this.config, set())
    for name in STAGES:
        if name in needed:
            this.marks[name] = fingerprint(_facts(this, name))
    return this.marks


def run_stage(this: Run, stage: str) -> None:
    """Carry out one stage where its artifact doesn't stand, of a run that is connected to Ray and has its inputs' `marks`.

    Raises:
        UserError, StageFailed: as `run`.
        TrainingStopped: the run's `stop` was set.
    """
    this.marks[stage] = fingerprint(_facts(this, stage))
    _stage(this, stage)


def check_stage(this: Run, stage: str) -> None:
    """Raises UserError where a stage can't be carried out as asked for, whatever the data."""
    _check_sharding(this, (stage,))
    _check_layer(this, (stage,))
    _check_computing(this, (stage,))


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


def _facts(this: Run, stage: str) -> dict[str, Any]:
    """All that a stage's result depends on."""
    config = this.config
    facts: dict[str, Any] = {
        "stage": stage,
        "version": VERSIONS[stage],
        "settings": settings_of(stage, config),
        "inputs": {name: this.marks[name] for name in inputs_of(stage, config)},
    }
    if stage == "prepare" and config.data.source != "world":
        facts["sources"] = this.hashes
    if stage == "collab":
        facts |= this.given_vectors
        if config.collab.init_from is not None:
            facts["init_from"] = this.collab_start[1]
    if stage == "pretrain" and config.pretrain.continued:
        facts["llm"] = this.given_llm.identity
    elif stage == "pretrain":
        facts["words"] = fingerprint({"words": _template_words(config.prompt.template)})
    if stage in ("adapt", "fuse", "evaluate"):
        facts["templates"] = template_mark(config.prompt.template)
    if stage in ("adapt", "distil", "fuse", "evaluate") and not config.pretrains:
        facts["llm"] = this.llm().identity
    return json.loads(json.dumps(facts))


def _template_words(name: str) -> list[str]:
    """What the embedded decoder's vocabulary is to know of the templates: of the usual ones, and of the one of this name."""
    return [text for each in dict.fromkeys([*AUTO, *read_templates(name)]) for text in read_template(each).words()]


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
        this.marks[stage] = fingerprint(_facts(this, stage))
        if stage not in wanted and not _stands(this, stage, f"{stage}-{this.marks[stage]}"):
            missing.append(stage)
    if missing:
        raise UserError(
            f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} not been run with these settings in "
            f"{this.store.workspace}: add to --stages"
        )


def _stage(this: Run, stage: str) -> None:
    """Find the artifact of a stage, or make it."""
    facts = _facts(this, stage)
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
        found = RUN[stage](this)
        if not is_held():
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


def _prepare(this: Run) -> dict[str, Any]:
    def start_ray() -> None:
        if this.cluster is None:
            this.connect()

    data = this.config.data
    if data.source == "log":
        with this.artifact("prepare").writing() as folder:
            copy_log(this.given_log, folder)
        facts = this.given_log.facts
        check_expected(facts, data.expected)
        for name in ("prompt", "collab", *["align"] * (this.config.align.side != "items")):
            read = getattr(this.config, name).history
            if read > facts["history_cap"]:
                this.console.line(
                    f"prepare   note: {name}.history is {read}, but the log keeps only {facts['history_cap']} items a row"
                )
        return {**facts, "noun": data.noun or facts["noun"]}
    with this.artifact("prepare").writing() as folder:
        facts = prepare(
            this.source,
            rules_of(data, this.source),
            folder,
            hashes=this.hashes,
            bad_rows=data.bad_rows,
            start_ray=start_ray,
            say=this.console.line,
        )
        check_expected(facts, data.expected)
        discard_work(folder)
    for line in in_words(facts):
        this.console.line(f"prepare   {line}")
    return facts


def _order(this: Run, split: str, batch: int, seed: int | None) -> Any:
    from sellarec.training.stream import Order, row_groups

    return Order(tuple(row_groups([str(path) for path in this.log().split_paths(split)])), batch, seed)


def _titles(log: Log) -> list[str]:
    return log.items(["title"])["title"].to_pylist()


def _train(
    this: Run, stage: str, build: Callable[[], Any], train_order: Any, tables: Sequence[Any] = (), source: Any = None
) -> dict[str, Any]:
    """Train a stage on a worker group; gives the facts that the workers leave.

    Args:
        tables: the embedding tables that it will make: refused here where they can't be held.
        source: of the language model that it trains whole; None for the run's own.
    """
    from sellarec.training.loop import Training

    settings = getattr(this.config, stage)
    dtype = this.config.llm.dtype if isinstance(settings, Language) else "float32"
    in_epochs = settings.epochs * train_order.steps_per_epoch
    if settings.max_steps is not None and settings.max_steps < in_epochs:
        done = settings.max_steps / train_order.steps_per_epoch
        this.console.line(
            f"{stage:<9} {stage}.max_steps {settings.max_steps} ends it after {done:.2f} of {settings.epochs:g} epochs"
        )
    if tables:
        _check_tables(this, tables, settings)
    if isinstance(settings, Language):
        _check_model(this, stage, this.llm() if source is None else source)
    valid = None
    if isinstance(settings, Selection):
        valid = _valid_order(this, stage, settings)
    training = Training(
        stage, build, settings, this.config.seed, train_order, valid, this.artifact(stage),
        dtype=dtype, storage=this.config.tables,
    )  # fmt: skip
    training = dataclasses.replace(training, profiled=_profiled(this, stage, training.steps))
    on_record = this.on_record or partial(_track, this)
    assert this.cluster is not None
    try:
        train(training, this.group(), this.console, on_record, this.stop)
    except TrainingStopped:
        this.artifact(stage).delete(*(name for name in this.artifact(stage).names() if name != "lease.json"))
        raise
    this.artifact(stage).delete(WORK)
    found = this.artifact(stage).read_json("training.json")
    assert found is not None
    _tell_shortened(this, stage, found.get("histories", {}))
    return found


def _tell_shortened(this: Run, stage: str, histories: dict[str, dict[str, int]]) -> None:
    from sellarec.training.stream import counts_in_words

    if any(found["shortened"] for found in histories.values()):
        this.console.line(f"{stage:<9} histories cut to fit: {counts_in_words(histories)}")


def _valid_order(this: Run, stage: str, settings: Selection) -> Any:
    """The rows, or queries, by which a stage's state is selected."""
    from sellarec.training.stream import Order, row_groups

    batch = this.config.evaluate.batch
    if settings.select_on in ("auc", "uauc"):
        valid = _order(this, "valid", batch, None)
        return dataclasses.replace(valid, every=-(-valid.rows // settings.valid_rows))
    from sellarec.evaluation.queries import write_queries

    place = this.artifact(stage) / WORK
    with place.writing() as folder:
        write_queries(this.log(), "valid", folder / "queries.parquet", settings.valid_rows)
    return Order(tuple(row_groups([str(place.local() / "queries.parquet")])), batch, None)


def _check_tables(this: Run, tables: Sequence[Any], settings: Any) -> None:
    """Raises UserError where the kernels can't do what is asked of the tables, or this machine's memory can't hold them."""
    from sellarec.training.plan import check_fits, place

    assert this.cluster is not None
    workers, storage = this.config.least_workers, this.config.tables
    optimizer = None if all(table.frozen for table in tables) else settings
    placements = place(tables, storage, optimizer, workers, "cuda" if this.gpus() else "cpu")
    if this.cluster.local and not this.gpus():
        # its workers' own memory was seen to be free before Ray was started
        at_once = workers * this.cluster.groups
        whose = f"each of {at_once} workers on this machine"
        check_fits(placements, storage, optimizer, workers, room_of_worker(at_once), whose)


def _check_model(this: Run, stage: str, source: Any) -> None:
    """Tell what a stage's language model takes of each worker.

    Raises:
        UserError: the worker's GPU, or this machine's memory, has less free.
    """
    from sellarec.language.llm import context_length, read_config
    from sellarec.language.memory import advice_of, check_model_fits, phases, shape_of, summary, use_of

    assert this.cluster is not None
    config = this.config
    shape = shape_of(source, None if stage == "pretrain" or config.adapt.method == "full" else config.adapt)
    use = use_of(stage, config, context_length(read_config(source.name, source.revision)))
    if this.gpus():  # what is saved is loaded again into the host's memory
        use = dataclasses.replace(use, compares=False)
    found = phases(shape, use)
    this.console.line(f"{stage:<9} the language model takes about, of each worker, {summary(found)}")
    advice = advice_of(stage, config)
    if this.gpus():
        check_model_fits(found, free_gpu_memory(this.cluster.share), "its share of a GPU", advice)
    elif this.cluster.local:
        at_once = config.workers * this.cluster.groups
        check_model_fits(found, room_of_worker(at_once), f"each of {at_once} workers on this machine", advice)


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
                check_optimizer(this.config.tables, optimizer, stage)


def _check_layer(this: Run, wanted: Sequence[str]) -> None:
    """Raises UserError where the model that --llm names has no hidden states of distil.layer."""
    from sellarec.language.llm import decoder_depth

    layer = this.config.distil.layer
    if "distil" in wanted and this.config.llm.model != EMBEDDED and layer != -1:
        check_layer(layer, decoder_depth(this.given_llm), this.config.llm.model)


def _check_computing(this: Run, wanted: Sequence[str]) -> None:
    """Raises UserError where attention can't be computed, or layers compiled, as asked for. Of a cluster's compilers and
    packages, and of its GPUs before it is joined, nothing is known here: its workers say so."""
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
    """Whether workers get a GPU each; taken to be so of a cluster that isn't joined yet."""
    import torch

    if this.cluster is not None:
        return this.gpus()
    return joins_cluster() or torch.cuda.device_count() >= this.config.workers


def check_labels(this: Run, stages: Sequence[str]) -> None:
    """Raises UserError where a stage can't be trained, or selected, for want of rows of one label."""
    facts = this.log().facts
    for stage in stages:
        settings = getattr(this.config, stage, None)
        if not isinstance(settings, Selection) or settings.select_on not in ("auc", "uauc"):
            continue
        for split in ("train", "valid"):
            count, positives = facts["rows"][split], facts["positives"][split]
            if positives in (0, count):
                raise UserError(
                    f"{positives} of the {count} rows of the {split} split are positives ({facts['label_rule']}): stage {stage} "
                    f"takes both labels to train and to select by {settings.select_on}; mend the label rule or the split, or "
                    "rank: --stages prepare,collab --collab.loss softmax --collab.select-on ndcg@10"
                )


def _profiled(this: Run, stage: str, steps: int) -> Any:
    from sellarec.training.loop import Profiled

    asked = this.config.profile
    if stage not in asked.stages:
        return None
    if asked.first > steps:
        raise UserError(f"profile.first is {asked.first}, but stage {stage} takes {steps} steps: lower it")
    return Profiled(asked.first, asked.steps, this.place / "profile")


def _track(this: Run, record: dict[str, Any]) -> None:
    """The numbers of a progress record, to the run's trackers."""
    if "step" not in record:
        return
    shown = {
        name: value
        for name, value in record.items()
        if isinstance(value, float) and name not in ("step", "steps", "seconds left")
    }
    shown |= {f"valid {name.upper()}": value for name, value in record.get("valid", {}).items() if value is not None}
    titles = {name.replace("/s", " per s").replace(" %", " (%)"): value for name, value in shown.items()}
    for tracker in this.trackers:
        tracker.scalars(record["stage"], record["step"], titles)


def _track_results(this: Run) -> None:
    """The metrics of the results, to the run's trackers."""
    records = this.artifact("evaluate").read_json("results.json")
    assert records is not None
    values = {f"{r['model']}/{r['rows']} {r['metric']}": r["value"] for r in records if r["value"] is not None}
    for tracker in this.trackers:
        tracker.summary(values)


def _pretrain(this: Run) -> dict[str, Any]:
    from sellarec.language.llm import LlmSource
    from sellarec.language.pretrain import build_decoder
    from sellarec.training.stream import Order, row_groups

    log = this.log()
    settings = this.config.pretrain
    if settings.continued:
        start = this.given_llm.folder
    else:
        words = _template_words(this.config.prompt.template)
        with this.artifact("pretrain").writing() as folder:
            build_decoder(
                log.items(["text"])["text"].to_pylist(), words, settings, this.config.seed, folder / "initial"
            )
        start = (this.artifact("pretrain") / "initial").local
    _check_prompts(this, start())
    order = Order(tuple(row_groups([str(path) for path in log.paths("items")])), settings.batch, this.config.seed)
    source = LlmSource(str(start()), None, "initial")
    build = partial(_build_pretrain, start, settings, this.config.llm.attention)
    return _train(this, "pretrain", build, order, source=source)


def _check_prompts(this: Run, folder: Path) -> None:
    """Raises UserError where prompts don't fit the context of the model that is about to be pre-trained."""
    from sellarec.language.llm import context_length, load_tokenizer, read_config
    from sellarec.language.prompts import Prompts

    log, config = this.log(), this.config
    answers = {config.adapt.loss, config.fuse.loss} != {"answer"}
    tokenizer, context = load_tokenizer(folder), context_length(read_config(folder))
    Prompts(tokenizer, _titles(log), config.prompt, log.facts["noun"], context, "fused", answers=answers)


def _build_pretrain(start: Callable[[], Path], settings: Any, attention: str) -> Any:
    from sellarec.language.pretrain import build_pretrain

    return build_pretrain(start(), settings, attention)


def _adapt(this: Run) -> dict[str, Any]:
    from sellarec.language.adapt import build_adapt

    log, config = this.log(), this.config
    build = partial(build_adapt, this.llm(), _titles(log), config.prompt, log.facts["noun"], config.adapt)
    return _train(this, "adapt", build, _order(this, "train", config.adapt.batch, config.seed))


def _collab(this: Run) -> dict[str, Any]:
    settings, seed = this.config.collab, this.config.seed
    order = _order(this, "train", settings.batch, seed)
    if settings.train_on == "sequences":
        order = _sequences(this)
    origin = this.collab_start[0] if this.config.collab.init_from is not None else None
    build = _collab_builder(this, origin, trains="collab")
    task = build()
    facts = _train(this, "collab", build, order, task.tables)
    cold = _cold_rows(this.log())
    shares = ", ".join(f"{share:.1%} an unseen {name}" for name, share in cold.items())
    this.console.line(f"collab    unseen users and items are {task.network.unseen}; of the test rows have {shares}")
    return {**facts, "test rows unseen": cold}


def _cold_rows(log: Log) -> dict[str, float]:
    """Share of the test rows whose user, item, or either, the train split doesn't have."""
    seen = log.split("test", ["user_seen", "item_seen"])
    user, item = (seen[name].to_numpy() for name in seen.column_names)
    return {"user": float((~user).mean()), "item": float((~item).mean()), "user or item": float((~user | ~item).mean())}


def _sequences(this: Run) -> Any:
    """The order of train sequences, which are put beside the artifact while it is made."""
    from sellarec.data.log import write_sequences
    from sellarec.training.stream import Order, row_groups

    place = this.artifact("collab") / WORK
    with place.writing() as folder:
        write_sequences(this.log(), folder / "sequences.parquet", this.config.collab.history + 1)
    groups = tuple(row_groups([str(place.local() / "sequences.parquet")]))
    return Order(groups, this.config.collab.batch, this.config.seed)


def _collab_builder(this: Run, origin: Place | None, trains: str | None = None) -> Callable[[], Any]:
    """Builds the collaborative model.

    Args:
        origin: the artifact whose tables and dense weights it starts from; None for fresh ones.
        trains: the stage that trains it, which may take negatives; None where it is only scored with.
    """
    from sellarec.collab.task import build_collab, reads_counts
    from sellarec.data.log import item_counts

    log, settings = this.log(), this.config.collab
    if trains != "collab":  # other stages go through the rows
        settings = dataclasses.replace(settings, train_on="rows")
    counts = None
    if trains is not None and reads_counts(settings):
        place = this.artifact(trains) / WORK
        with place.writing() as folder:
            np.save(folder / "counts.npy", item_counts(log))
        counts = place.local() / "counts.npy"
    start = None if origin is None else origin.local()
    given = _given_tables(this) if trains == "collab" else {}
    return partial(build_collab, log, settings, start, counts, this.config.seed, given)


def _given_tables(this: Run) -> dict[str, Path]:
    """Folders of the tables that start from vectors of a file, by name. They are put beside the artifact while it is made."""
    from sellarec.collab.task import build_collab
    from sellarec.collab.vectors import write_table

    collab, place = this.config.collab, this.artifact("collab") / WORK / "tables"
    files = {"user": collab.init_users, "item": collab.init_items}
    given = {name: path for name, path in files.items() if path is not None}
    if not given:
        return {}
    network = build_collab(this.log(), collab, None).network
    for name, path in given.items():
        (table,) = (table for table in network.tables if table.name == name)
        with place.writing() as folder:
            known = write_table(this.log(), table, path, network.has_biases, this.config.seed, folder)
        this.console.line(f"collab    {known:,} of {table.rows:,} {name}s start from {path}")
    return dict.fromkeys(given, place.local())


def _distil(this: Run) -> dict[str, Any]:
    from sellarec.language.distil import distil

    config, log = this.config, this.log()
    _check_model(this, "distil", this.llm())
    return run_task(
        distil,
        "distil",
        this.console,
        items=[str(path) for path in log.paths("items")],
        settings=config.distil,
        **this.adapted(),
        noun=log.facts["noun"],
        workers=first_workers("distil", this.group(), this.console),
        gpus=this.gpus(),
        output=this.artifact("distil"),
        mark=this.marks["distil"],
    )


def _align(this: Run) -> dict[str, Any]:
    from sellarec.alignment.measures import draw_items, kept_metrics, summary
    from sellarec.language.distil import SavedVectors

    config, log = this.config, this.log()
    vectors = SavedVectors(this.artifact("distil").local(), this.marks["distil"])
    if vectors.width % 4:
        raise UserError(f"the language model is {vectors.width} wide, but the table kernels need a multiple of 4")
    origin = this.artifact("collab") if config.align.init == "collab" else None
    collab = _collab_builder(this, origin, trains="align")
    measured = draw_items(log.items(["seen"])["seen"].to_numpy(), config.seed)
    build = partial(
        _build_align, collab, vectors.width, vectors.read, config.collab.dim, config.align, measured, config.seed
    )
    facts = _train(this, "align", build, _order(this, "train", config.align.batch, config.seed), build().tables)
    valid = {"align": kept_metrics(facts), "collab": None}
    rows = log.facts["rows"]["valid"]
    alike = min(rows, config.collab.valid_rows) == min(rows, config.align.valid_rows)
    if origin is not None and alike and config.collab.select_on in ("auc", "uauc"):
        valid["collab"] = kept_metrics(this.manifest("collab")["facts"])
    found = {"items": len(measured), **facts.pop("measured"), "valid": valid}
    where = this.artifact("align")
    this.persist(f"writing {where}/alignment.json", partial(where.write_json, "alignment.json", found))
    this.console.line(f"align     {summary(found)}")
    return {**facts, "alignment": found}


def _build_align(collab: Callable[[], Any], *arguments: Any) -> Any:
    from sellarec.alignment.align import build_align

    return build_align(collab(), *arguments)


def _fuse_builder(this: Run, stage: str) -> Callable[[], Any]:
    """Builds the recommender from what stages before fuse left (align), or as stage fuse left it."""
    config, of = this.config, _parts_of_fuse(this, stage)
    collab, tables = _rows_of_fuse(this, stage)
    aligned = config.fuse.warm_start and config.fuse.represent == "collaborative"
    start = this.artifact("align").local() / "projection.safetensors" if aligned else None
    return partial(
        _build_fuse,
        collab,
        tables,
        **this.adapted(of["adapter"]),
        titles=_titles(this.log()),
        prompt=config.prompt,
        noun=this.log().facts["noun"],
        hidden=config.align.hidden,
        projection=start if of.get("projections") == "align" else None,
        trained=this.artifact("fuse").local() / "projection.safetensors" if of.get("projections") == "fuse" else None,
        settings=config.fuse,
        seed=config.seed,
    )


def _parts_of_fuse(this: Run, stage: str) -> dict[str, str]:
    """The stage that has made each part of what stage fuse starts from (align), or has left."""
    from sellarec.fusion.fuse import made_by

    settings = this.config.fuse
    return made_by(settings if stage == "fuse" else dataclasses.replace(settings, train=()))


def _rows_of_fuse(this: Run, stage: str) -> tuple[Callable[[], Any], Path]:
    """Builds what represents users and items in tokens, and the folder of its tables; of no language model more than its width
    is read."""
    from sellarec.collab.task import build_collab
    from sellarec.fusion.fuse import represented, token_rows

    settings, of = this.config.fuse, _parts_of_fuse(this, stage)
    rows = token_rows(settings, this.config.collab, this.adapted(of["adapter"])["source"])
    folder = this.artifact(of["tables"]).local()
    origin = None if settings.represent == "learned" and stage != "fuse" else folder
    return partial(build_collab, this.log(), rows, origin, represented=represented(settings)), folder / "tables"


def _tables_of_fuse(this: Run) -> tuple[Any, ...]:
    """The tables that stage fuse looks up in."""
    from sellarec.fusion.fuse import semantic_table, tables_of

    collab, tables = _rows_of_fuse(this, "align")
    return tables_of(collab(), semantic_table(tables, this.config.fuse), this.config.fuse)


def _build_fuse(collab: Callable[[], Any], tables: Path, **arguments: Any) -> Any:
    from sellarec.fusion.fuse import build_fuse, semantic_table

    return build_fuse(collab=collab(), semantic=semantic_table(tables, arguments["settings"]), **arguments)


def _fuse(this: Run) -> dict[str, Any]:
    config = this.config
    tokens, trained = (" and ".join(names) for names in (config.fuse.tokens, config.fuse.train))
    what = "learned tokens" if config.fuse.represent == "learned" else "tokens"
    this.console.line(f"fuse      {what} of {tokens}; trains {trained}")
    order = _order(this, "train", config.fuse.batch, config.seed)
    return _train(this, "fuse", _fuse_builder(this, "align"), order, _tables_of_fuse(this))


def _evaluate(this: Run) -> dict[str, Any]:
    from sellarec.evaluation.baselines import fit_means, item_mean, item_user_mean
    from sellarec.evaluation.report import BEST_ATTAINABLE
    from sellarec.evaluation.results import evaluate_scores
    from sellarec.language.adapt import build_adapted
    from sellarec.training.scoring import Scoring, score_worker

    log, config = this.log(), this.config
    _check_model(this, "evaluate", this.llm())
    build: dict[str, Callable[[], Any]] = {
        "collab": _collab_builder(this, this.artifact("collab")),
        "text-only": partial(
            build_adapted, **this.adapted(), titles=_titles(log), prompt=config.prompt, noun=log.facts["noun"],
            loss=config.adapt.loss,
        ),
        "sella-rec": _fuse_builder(this, "fuse"),
    }  # fmt: skip
    order = _order(this, "test", config.evaluate.batch, None)
    output = this.artifact("evaluate")
    scoring = Scoring("evaluate", build, config.evaluate, order, output, dtype=config.llm.dtype, storage=config.tables)
    run_workers(score_worker, {"scoring": scoring}, "evaluate", this.group(), this.console, partial(_track, this))
    scored = pq.read_table(this.artifact("evaluate").local() / "scores.parquet")
    test, training = log.split("test"), log.split("train", ["user", "item", "label"])
    if not np.array_equal(scored["row"].to_numpy(), test["row"].to_numpy()):
        raise RuntimeError(f"evaluate: {len(scored)} rows were scored, but the test split has {len(test)} others")
    user, item = test["user"].to_numpy(), test["item"].to_numpy()
    means = fit_means(*(training[name].to_numpy() for name in ("user", "item", "label")))
    scores = {"item mean": item_mean(means, item), "item + user mean": item_user_mean(means, user, item)}
    scores |= {name: scored[name].to_numpy() for name in MODELS}
    if test["expected"].null_count == 0:
        scores[BEST_ATTAINABLE] = test["expected"].to_numpy()
    for name, values in scores.items():
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise StageFailed(f"stage evaluate: {bad} of the {len(test)} scores of {name} are not finite")
    records = evaluate_scores(
        test, scores, pairs=[("sella-rec", "collab"), ("sella-rec", "text-only")], seed=config.seed,
        protocol="pointwise", replicates=config.evaluate.replicates,
    )  # fmt: skip
    where = this.artifact("evaluate")
    this.persist(f"writing {where}/results.json", partial(where.write_json, "results.json", records))
    found = this.artifact("evaluate").read_json("scoring.json")
    assert found is not None
    _tell_shortened(this, "evaluate", found["histories"])
    return {"rows": len(test), **found}


RUN: dict[str, Callable[[Run], dict[str, Any]]] = {
    "prepare": _prepare,
    "pretrain": _pretrain,
    "adapt": _adapt,
    "collab": _collab,
    "distil": _distil,
    "align": _align,
    "fuse": _fuse,
    "evaluate": _evaluate,
}


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
