"""A run: its config, what each of its stages reads and depends on, and where things lie."""

import dataclasses
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sellarec.artifacts import Done, Place, Store, fingerprint, persist
from sellarec.checks import check_same_model
from sellarec.config import Config, Dense, Selection, Sparse, Steps, result_settings
from sellarec.data.files import file_hash, file_hashes
from sellarec.data.log import FACTS_FILE, Log, read_log
from sellarec.data.raw import Source
from sellarec.data.sources import open_source
from sellarec.errors import UserError
from sellarec.language.templates import AUTO, is_file, read_template, read_templates, template_mark
from sellarec.tracking import Tracker
from sellarec.training.cluster import Cluster, Group, connect
from sellarec.training.progress import Console

VERSIONS = {
    "prepare": 3,
    "pretrain": 2,
    "adapt": 3,
    "collab": 4,
    "distil": 1,
    "align": 4,
    "fuse": 6,
    "evaluate": 3,
}
"""Raised by hand when a stage's code gives other results than before."""


def inputs_of(stage: str, config: Config) -> tuple[str, ...]:
    """The stages whose artifacts a stage reads."""
    pretrained = ("pretrain",) if config.pretrains else ()
    collab = ("collab",) if config.align.init == "collab" else ()
    rows = {"collaborative": ("align",), "learned": (), "codes": ("collab",)}[config.fuse.represent]
    rows = rows if config.fuse.tokens else ()
    return {
        "prepare": (),
        "pretrain": ("prepare",),
        "adapt": ("prepare", *pretrained),
        "collab": ("prepare",),
        "distil": ("prepare", *pretrained, "adapt"),
        "align": ("prepare", *collab, "distil"),
        "fuse": ("prepare", *pretrained, "adapt", *rows),
        "evaluate": ("prepare", *pretrained, "adapt", *dict.fromkeys(("collab", *rows)), "fuse"),
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
    if stage in settings and not settings[stage].get("changes"):
        settings[stage].pop("changes", None)  # so that what was made before there were any still stands
    if stage == "evaluate":
        del settings["prompt"]["with_history"]  # all test rows are scored
    if stage == "prepare":
        data = result_settings(config.data)
        if config.data.source != "world":
            data = {name: value for name, value in data.items() if not name.startswith("world.")}
        return {"data": data}
    if stage == "pretrain" or (stage == "adapt" and config.adapt.method == "full"):
        del settings["llm"]["storage"]  # no weight is frozen there
    if stage == "distil":
        settings["llm"] = {"storage": settings["llm"]["storage"]}  # it computes in float32 always
        if not config.reads_profiles:
            settings["distil"] = {
                name: value for name, value in settings["distil"].items() if not name.startswith("profile")
            }
    if stage == "align":  # it trains the model as its own section says; what it starts from is among the inputs
        training = {f.name for section in (Steps, Selection, Dense, Sparse) for f in dataclasses.fields(section)}
        kept = {name: value for name, value in settings["collab"].items() if name not in {*training, "train_on"}}
        settings["collab"] = kept
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
    """What each worker takes of a CPU, or of a GPU where there are some."""
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
    pause_after: int | None = None
    """Evaluations on the valid split after which a training pauses, with TrainingPaused, and leaves a checkpoint."""
    window: tuple[int, int | None] = (0, None)
    """Of the training that is under way, see `loop.Training`."""

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
        from sellarec.language.llm import ADAPTER, LlmSource

        if self.config.adapt.method == "lora":
            return {"source": self.llm(), "adapter": self.artifact(stage).local() / ADAPTER}
        folder, mark = str(self.artifact("adapt").local() / "model"), self.marks["adapt"]
        return {"source": self._as_set(LlmSource(folder, None, f"adapt-{mark}")), "adapter": None}

    @cached_property
    def given_llm(self) -> Any:
        """What --llm names. Looked up once: all stages of a run take the same commit of a hub id."""
        from sellarec.language.llm import find_llm

        return find_llm(self.config.llm.model, self.config.llm.revision)

    @property
    def collab_start(self) -> tuple[Place, str]:
        """What collab.init_from names, and its fingerprint."""
        place, manifest = self._given_collab
        check_same_model(self.config.collab, manifest["settings"]["collab"])
        return place, manifest["fingerprint"]

    @property
    def log_of_start(self) -> Path | None:
        """The prepared log that the model of collab.init_from was trained on, where it lies beside it on this machine."""
        place, manifest = self._given_collab
        if not place.is_local:
            return None
        beside = place.folder.parent / f"prepare-{manifest['inputs']['prepare']}"
        return beside if (beside / FACTS_FILE).is_file() else None

    @cached_property
    def _given_collab(self) -> tuple[Place, dict[str, Any]]:
        place = Place.of(str(self.config.collab.init_from))
        manifest = place.read_json("manifest.json") or {}
        if manifest.get("stage") != "collab":
            raise UserError(f"collab.init_from is {place}, which is no finished artifact of stage collab")
        return place, manifest

    @cached_property
    def given_vectors(self) -> dict[str, str]:
        """SHA-256 of the files that collab's tables start from, by setting."""
        settings = self.config.collab
        given = {f"collab.{name}": getattr(settings, name) for name in ("init_users", "init_items")}
        return {name: file_hash(path) for name, path in given.items() if path is not None}

    def connect(self) -> None:
        workspace = self.store.workspace
        config = self.config
        self.cluster = connect(
            config.least_workers, self.console, workspace, self.groups, self.share, device=config.device,
            autoscaler=config.autoscaler, node_timeout=config.node_timeout,
        )  # fmt: skip

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
            autoscaler=config.autoscaler,
        )

    def persist(self, what: str, act: Callable[[], Done]) -> Done:
        """Write or read something in the workspace, and again while storage fails."""

        def reach_and_act() -> Done:
            self.store.workspace.reach()
            return act()

        return persist(what, reach_and_act, self.config.storage_timeout, self.console.line)


def facts_of(this: Run, stage: str) -> dict[str, Any]:
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
        facts["words"] = fingerprint({"words": template_words(config.prompt.template)})
    if stage in ("adapt", "fuse", "evaluate"):
        facts["templates"] = template_mark(config.prompt.template)
    if stage in ("adapt", "distil", "fuse", "evaluate") and not config.pretrains:
        facts["llm"] = this.llm().identity
    return json.loads(json.dumps(facts))


def template_words(name: str) -> list[str]:
    """What the embedded decoder's vocabulary is to know of the templates: of the usual ones, and of the one of this name."""
    return [text for each in dict.fromkeys([*AUTO, *read_templates(name)]) for text in read_template(each).words()]
