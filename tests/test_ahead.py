"""What stages can't hold is refused before the first of them starts: tables and language models, on CPUs and on GPUs."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prepared import prepare_into, rules, source_of
from small import small_log
from transformers import LlamaConfig

from sellarec import ahead, pipeline
from sellarec.ahead import _tables_ahead as tables_ahead
from sellarec.ahead import check_ahead, check_labels, check_start
from sellarec.checks import check_same_model
from sellarec.config import Align, Collab, Config, Fuse, Llm, Pretrain, Prompt, Tables, result_settings
from sellarec.data.log import FACTS_FILE, Log
from sellarec.errors import UserError
from sellarec.language.adapt import build_adapt
from sellarec.language.distil import PROFILES
from sellarec.language.llm import LlmSource, adapter_hash
from sellarec.preflight import GIB, Machine
from sellarec.run import Run
from sellarec.training.cluster import WORKER_MEMORY, Cluster

USERS, ITEMS, DIM, WIDTH = 30, 40, 8, 16
ROWS = {"user": USERS // 2, "item": ITEMS // 2, "semantic": ITEMS // 2}
"""Of each of two workers."""
HERE = Cluster(local=True, gpus=False)
ON_GPUS = Cluster(local=False, gpus=True, share=0.5)


@pytest.fixture
def of(models, tmp_path, monkeypatch):
    """Makes a connected run with a prepared log."""
    log = small_log(tmp_path, USERS, ITEMS, np.ones(ITEMS, bool))
    monkeypatch.setattr(Run, "log", lambda self: log)
    monkeypatch.setattr(ahead, "check_prompts", lambda *_: None)  # the log has no titles
    for check in ("_check_adapters", "_check_vectors"):  # no stage has been run
        monkeypatch.setattr(ahead, check, lambda *_: None)

    def make(cluster: Cluster = HERE, **changes: Any) -> Run:
        llm = Llm(model=str(models["llama"]))
        this = Run.of(Config(**{"workspace": str(tmp_path), "llm": llm, "collab": Collab(dim=DIM)} | changes))
        this.cluster = cluster
        return this

    return make


def set_room(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(ahead, "room_of_worker", lambda workers, memory=None: size)
    monkeypatch.setattr(ahead, "free_gpu_memory", lambda share: int(2 * share * size))


HELD = {
    # a row's weights, and one number of its optimizer
    "collab": (ROWS["user"] + ROWS["item"]) * (4 * DIM + 4),
    "align": (ROWS["user"] + ROWS["item"]) * (4 * DIM + 4) + ROWS["semantic"] * (4 * WIDTH + 4),
}

BATCH = {
    # of half of 256 rows the vectors of user and item, in float32, and their gradients; in align the distilled one beside them,
    # and a view of all 256, as wide as the language model
    "collab": 8 * 128 * 2 * DIM,
    "align": 8 * 128 * (2 * DIM + WIDTH) + 4 * 256 * WIDTH,
}


@pytest.mark.parametrize("cluster", [HERE, ON_GPUS], ids=["cpus", "gpus"])
@pytest.mark.parametrize("llm", ["given", "embedded"])
@pytest.mark.parametrize("stage", HELD)
def test_tables_are_counted_before_what_they_are_made_of_is_there(of, monkeypatch, stage, llm, cluster):
    built = {"llm": Llm(), "pretrain": Pretrain(hidden=WIDTH)}
    this = of(cluster, **(built if llm == "embedded" else {}))
    whose = "its share of a GPU" if cluster.gpus else "each of 2 workers on this machine"
    set_room(monkeypatch, HELD[stage] - 1)
    with pytest.raises(UserError, match=rf"worker 0 of 2 would hold .* of tables .*but {whose} has room"):
        check_ahead(this, [stage])
    set_room(monkeypatch, HELD[stage] + BATCH[stage])
    check_ahead(this, [stage])
    set_room(monkeypatch, HELD[stage] + BATCH[stage] - 1)
    with pytest.raises(
        UserError, match=rf"{stage}.batch is 256: its vectors .*lower {stage}.batch, or take more workers"
    ):
        check_ahead(this, [stage])


def test_negatives_count_in_a_batch(of, monkeypatch):
    this = of(collab=Collab(dim=DIM, loss="softmax", negatives_per_row=5))
    taken = HELD["collab"] + 8 * 128 * 7 * DIM  # user, item and its negatives of half a batch, and their gradients
    set_room(monkeypatch, taken)
    check_ahead(this, ["collab"])
    set_room(monkeypatch, taken - 1)
    with pytest.raises(UserError, match=r"lower collab.batch, or collab.negatives_per_row, or take more workers"):
        check_ahead(this, ["collab"])


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        # rows as they lie, the sum of layers, and both beside each other
        ({"model": "lightgcn", "loss": "bpr", "negatives_per_row": 1}, 4 * DIM * (ROWS["user"] + ROWS["item"])),
        # vectors of the catalog and their gradients
        ({"loss": "full-softmax"}, 2 * DIM * ROWS["item"]),
        ({"loss": "full-softmax", "table_optimizer": "adam"}, 0),
        ({"model": "fism"}, 2 * DIM * ROWS["item"]),
    ],
    ids=["lightgcn", "full-softmax", "dense gradients", "fism"],
)
def test_what_is_made_of_a_workers_whole_share_counts(of, monkeypatch, settings, numbers):
    this = of(collab=Collab(dim=DIM, **settings))
    widths = {table.name: table.dim for table in tables_ahead(this, "collab")}
    state = {name: 12 * width if settings.get("table_optimizer") else 4 for name, width in widths.items()}
    held = sum(ROWS[name] * (4 * width + state[name]) for name, width in widths.items())
    if numbers:
        set_room(monkeypatch, held + 4 * numbers - 1)
        with pytest.raises(UserError, match=r"collab takes .* for its share of the rows .* take more workers"):
            check_ahead(this, ["collab"])
    negatives = settings.get("loss") == "bpr"
    taken = held + 4 * numbers + 8 * 128 * (sum(widths.values()) + negatives * DIM)
    set_room(monkeypatch, taken - 1)
    also = r"tables and 0.00 GiB for the share of the rows, but" if numbers else r"tables, but"
    with pytest.raises(UserError, match=rf"collab.batch is 256: .* GiB of {also}"):
        check_ahead(this, ["collab"])
    set_room(monkeypatch, taken)
    check_ahead(this, ["collab"])


@pytest.mark.parametrize(
    ("contrastive", "temperature", "space"),
    [("rlmrec-con", 0.2, DIM), ("darec", 0.2, 0), ("info-nce", 0.01, 2 * WIDTH)],
)
def test_gathered_views_are_as_wide_and_as_many_as_are_compared(of, monkeypatch, contrastive, temperature, space):
    this = of(align=Align(contrastive=contrastive, temperature=temperature))
    taken = HELD["align"] + 8 * 128 * (2 * DIM + WIDTH) + 4 * 256 * space
    set_room(monkeypatch, taken)
    check_ahead(this, ["align"])
    set_room(monkeypatch, taken - 1)
    with pytest.raises(UserError, match=r"align.batch is 256"):
        check_ahead(this, ["align"])


def test_a_frozen_table_of_distilled_vectors_has_no_optimizer(of, monkeypatch):
    set_room(monkeypatch, HELD["align"] - 4 * ROWS["semantic"] + BATCH["align"])
    check_ahead(of(align=Align(semantic="frozen")), ["align"])
    with pytest.raises(UserError, match="GiB of tables"):
        check_ahead(of(), ["align"])


def test_learned_tokens_are_as_wide_as_the_language_model(of, monkeypatch):
    this = of(fuse=Fuse(represent="learned", tokens=("user", "item"), train=("tables",)))
    monkeypatch.setattr(ahead, "_check_model_fits", lambda *_: None)  # of its own, and larger
    held = (ROWS["user"] + ROWS["item"]) * (4 * WIDTH + 4)
    set_room(monkeypatch, held)
    check_ahead(this, ["fuse"])
    set_room(monkeypatch, held - 1)
    with pytest.raises(UserError, match="of tables"):
        check_ahead(this, ["fuse"])


def test_rows_in_the_hosts_memory_are_weighed_there(of, monkeypatch):
    """The GPU has the batch, and a float of the optimizer a row."""
    this = of(replace(ON_GPUS, local=True), tables=Tables(placement="uvm"))
    rows = ROWS["user"] + ROWS["item"]
    on_gpu, in_host = BATCH["collab"] + 4 * rows, 4 * DIM * rows

    def rooms(gpu: int, host: int) -> None:
        monkeypatch.setattr(ahead, "free_gpu_memory", lambda share: gpu)
        monkeypatch.setattr(ahead, "room_of_worker", lambda workers, memory=None: host)

    rooms(on_gpu, in_host)
    check_ahead(this, ["collab"])
    rooms(on_gpu - 1, in_host)
    with pytest.raises(UserError, match=r"collab.batch is 256"):
        check_ahead(this, ["collab"])
    rooms(on_gpu, in_host - 1)
    with pytest.raises(
        UserError, match=r"of tables in its host's memory .*but each of 2 workers on this machine has room"
    ):
        check_ahead(this, ["collab"])
    check_ahead(of(ON_GPUS, tables=Tables(placement="uvm")), ["collab"])  # nothing is known of other machines' GPUs


def test_tables_and_the_language_model_of_stage_fuse_are_weighed_together(of, monkeypatch, capsys):
    """Each by itself would fit."""
    this = of()
    tables = ahead.check_tables(this, ahead._tables_ahead(this, "fuse"), this.config.fuse, None)
    parts = [sum(found.values()) for found in ahead._memory_of_model(this, "fuse", this.given_llm, 0).values()]
    assert 0 < tables < max(parts)
    set_room(monkeypatch, max(parts) + tables)
    check_ahead(this, ["fuse"])
    ahead.check_model(this, "fuse", this.given_llm, tables)
    assert "fuse      the language model and the tables take about, of each worker, " in capsys.readouterr().out
    set_room(monkeypatch, max(parts) + tables - 1)
    for check in (
        partial(check_ahead, this, ["fuse"]),
        partial(ahead.check_model, this, "fuse", this.given_llm, tables),
    ):
        with pytest.raises(UserError, match=r"the language model and the tables would take .* \+ tables 0 MiB"):
            check()
    ahead.check_model(this, "fuse", this.given_llm)


def test_a_clusters_machines_without_gpus_have_what_preflight_found(of):
    """Of the one with the least for each of the workers that find a CPU there; a head without CPUs holds none."""
    machines = (Machine("head", 0, 1), Machine("small", 1, 4 * GIB), Machine("large", 8, 6 * GIB))
    room = ahead.room_of(of(Cluster(local=False, gpus=False, machines=machines)))
    assert room == (3 * GIB - WORKER_MEMORY, "each of 2 workers on large")
    room = ahead.room_of(of(Cluster(local=False, gpus=False, machines=machines), workers=1))
    assert room == (4 * GIB - WORKER_MEMORY, "each of 1 workers on small")
    check_ahead(of(Cluster(local=False, gpus=False)), ["collab", "align", "adapt", "evaluate"])
    full = Cluster(local=False, gpus=False, machines=(Machine("full", 2, 2 * WORKER_MEMORY),))
    with pytest.raises(UserError, match="each of 2 workers on full has room for 0"):
        check_ahead(of(full), ["adapt"])


@pytest.mark.parametrize("kind", ["a folder", "a hub id", "the embedded model"])
def test_a_context_too_short_for_codes_is_refused_once_the_log_is_there(models, tmp_path, monkeypatch, kind):
    """Of a hub id, nothing but its config and tokenizer is downloaded for that; of the embedded model as it stands."""
    asked: list[str] = []

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(models["llama"])

    llm = Llm() if kind == "the embedded model" else Llm(model=str(models["llama"]))
    codes = Fuse(represent="codes", tokens=("user", "item"), train=("adapter",))
    this = Run.of(Config(workspace=str(tmp_path), llm=llm, collab=Collab(model="binary_mf", dim=512), fuse=codes))
    this.cluster = Cluster(local=False, gpus=False)
    this.marks = dict.fromkeys(("prepare", "pretrain"), "x")
    folder = this.artifact("prepare").local()
    folder.mkdir(parents=True)
    rows = {"user": [0, 1] * 6, "item": [0, 1, 2] * 4, "label": pa.array([0, 1] * 6, pa.int8()), "timestamp": range(12)}
    prepare_into(folder, source_of(pa.table(rows)), rules())
    if kind == "a hub id":
        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        this.__dict__["given_llm"] = LlmSource("some/model", "c0ffee", "some/model@c0ffee")
    if kind == "the embedded model":
        this.artifact("pretrain").local().mkdir()
        (this.artifact("pretrain").local() / "model").symlink_to(models["llama"])
    for stages in (["adapt", "collab", "fuse"], ["fuse"]):
        with pytest.raises(UserError, match=r"the full prompt needs .* the model's context 256.*take fuse.code dotted"):
            check_ahead(this, stages)
    assert ("*.json" in asked and "*.safetensors" not in asked) == (kind == "a hub id")


@pytest.mark.parametrize("cluster", [HERE, ON_GPUS], ids=["cpus", "gpus"])
@pytest.mark.parametrize("stage", ["adapt", "distil", "fuse", "evaluate"])
def test_a_given_language_model_is_weighed_for_each_stage(of, monkeypatch, stage, cluster):
    this = of(cluster)
    set_room(monkeypatch, 1 << 30)
    check_ahead(this, ["adapt", "distil", "fuse", "evaluate"])
    large = replace(getattr(this.config, stage), micro_batch=100_000_000)
    with pytest.raises(UserError, match=rf"lower {stage}\.micro_batch \(100000000\)"):
        check_ahead(of(cluster, **{stage: large}), ["adapt", "distil", "fuse", "evaluate"])


def test_what_evaluate_cannot_hold_is_refused_once_the_log_is_there(models, tmp_path, monkeypatch):
    """Before adapt starts; a stage that stands is passed over."""
    done: list[str] = []

    class Started(Exception):
        pass

    def stage(this: Run, name: str) -> None:
        done.append(name)
        if name != "prepare":
            raise Started

    def connect(this: Run) -> None:
        this.cluster = HERE

    def start(**changes: Any) -> None:
        done.clear()
        config = Config(name="run", workspace=str(tmp_path), llm=Llm(model=str(models["llama"])), trackers=())
        pipeline._run(Run.of(replace(config, **changes)))

    facts = {"users": 9, "items": 9, "noun": "movie", "positives": {"train": 4, "valid": 4}, "rows": {}}
    facts["rows"] = {"train": 9, "valid": 9, "test": 9}
    log = replace(small_log(tmp_path / "log", 9, 9, np.ones(9, bool)), facts=facts)
    monkeypatch.setattr(Run, "log", lambda self: log)
    monkeypatch.setattr(Run, "connect", connect)
    monkeypatch.setattr(pipeline, "_stage", stage)
    monkeypatch.setattr(pipeline, "check_room", lambda workers: None)
    monkeypatch.setattr(ahead, "check_prompts", lambda *_: None)
    large = replace(Config().evaluate, micro_batch=100_000_000)
    with pytest.raises(UserError, match=r"lower evaluate\.micro_batch"):
        start(evaluate=large)
    assert done == ["prepare"]
    with pytest.raises(Started):
        start()
    assert done == ["prepare", "adapt"]
    monkeypatch.setattr(pipeline, "_stands", lambda this, name, artifact: name == "evaluate")
    with pytest.raises(Started):
        start(evaluate=large)


def test_a_width_that_tables_cannot_have_is_refused_before_any_stage(tmp_path):
    """Align's distilled vectors are as wide as the language model, as are learned tokens."""
    narrow = LlamaConfig(hidden_size=10, num_attention_heads=1, vocab_size=9, architectures=["LlamaForCausalLM"])
    narrow.save_pretrained(tmp_path / "narrow")
    given, learned = Llm(model=str(tmp_path / "narrow")), Fuse(represent="learned", tokens=("user",), train=("tables",))

    def check(stage: str, **changes: Any) -> None:
        this = Run.of(Config(**changes))
        this.__dict__["given_llm"] = SimpleNamespace(name=changes.get("llm", given).model, revision=None)
        pipeline._check_width(this, (stage,))

    with pytest.raises(UserError, match=r"the width of the language model .*narrow is 10: .* a multiple of 4"):
        check("align", llm=given)
    with pytest.raises(UserError, match="narrow is 10"):
        check("fuse", llm=given, fuse=learned)
    with pytest.raises(UserError, match=r"pretrain.hidden is 18: .* a multiple of 4"):
        check("align", pretrain=Pretrain(hidden=18, heads=3))
    check("fuse", llm=given)
    check("adapt", llm=given, fuse=learned)
    check("align", pretrain=Pretrain(hidden=20, heads=2))


def write_ids(folder, **ids) -> Log:
    """A log of which only what users and items are called is there."""
    for kind, names in ids.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        table = pa.table({"external_id": pa.array(names, pa.string())})
        pq.write_table(table, folder / kind / "part-0.parquet")
    return Log(folder, {})


@pytest.fixture
def start(tmp_path):
    """An mf of two users and three items, trained on prepare-1, which lies beside it."""
    folder = tmp_path / "artifacts" / "collab-2"
    folder.mkdir(parents=True)
    manifest = {"stage": "collab", "fingerprint": "2", "inputs": {"prepare": "1"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    log = write_ids(folder.parent / "prepare-1", users=["a", "b"], items=["x", "y", "z"])
    (log.directory / FACTS_FILE).write_text(json.dumps({"facts": {"users": 2, "items": 3}}))
    return folder


@pytest.mark.parametrize(
    ("model", "users", "items", "named"),
    [
        ("mf", ["a", "b", "c"], ["x", "y", "z", "w"], None),
        ("mf", ["a", "b"], ["x", "z", "y"], ["item 1 was 'y' in", "is 'z' in the log of this run", "--init-from"]),
        ("mf", ["b", "a"], ["x", "y", "z"], ["user 0 was 'a'", "is 'b'"]),
        ("mf", ["a", "b"], ["x", "y"], ["item 2 was 'z'", "is not there"]),
        ("sasrec", ["b", "a"], ["x", "y", "z"], None),
    ],
    ids=["grown", "items in another order", "users in another order", "an item less", "a model without rows of users"],
)
def test_rows_are_not_trained_on_as_those_of_others(of, monkeypatch, start, tmp_path, model, users, items, named):
    own = {"user_rows": False} if model == "sasrec" else {}
    settings = Collab(model=model, dim=DIM, init_from=str(start), **own)
    this = of(stages=("prepare", "collab"), collab=settings)
    set_room(monkeypatch, 1 << 40)
    whole, ids = this.log(), write_ids(tmp_path / "now", users=users, items=items)
    both = replace(whole, directory=ids.directory)
    table = pa.table({"external_id": pa.array(items, pa.string()), "seen": [True] * len(items)})
    pq.write_table(table, ids.directory / "items" / "part-0.parquet")
    monkeypatch.setattr(Run, "log", lambda self: both)
    if named is None:
        check_ahead(this, ("collab",))
        return
    with pytest.raises(UserError) as refused:
        check_ahead(this, ("collab",))
    assert all(word in str(refused.value) for word in (*named, str(start))), refused.value


def test_without_the_log_of_the_start_it_is_told_that_ids_are_not_compared(of, monkeypatch, start, capsys):
    this = of(stages=("prepare", "collab"), collab=Collab(dim=DIM, init_from=str(start)))
    set_room(monkeypatch, 1 << 40)
    (start.parent / "prepare-1" / FACTS_FILE).unlink()
    check_ahead(this, ("collab",))
    assert "isn't compared whether ids still mean the same" in capsys.readouterr().out


def with_facts(this: Run, monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    log = this.log()
    monkeypatch.setattr(Run, "log", lambda self: replace(log, facts=log.facts | facts))


@pytest.mark.parametrize("stage", ["collab", "align"])
def test_rows_that_only_an_earlier_log_trains_are_not_taken_for_trained(of, monkeypatch, stage):
    this = of(stages=("prepare", stage))
    before = {"log": "earlier", "users": 2, "items": 3}
    for alone in ({}, {"users seen there alone": 0, "items seen there alone": 0}):
        with_facts(this, monkeypatch, extends=before | alone)
        check_start(this, (stage,))
    with_facts(this, monkeypatch, extends=before | {"users seen there alone": 0, "items seen there alone": 7})
    check_start(this, ("distil",))
    with pytest.raises(
        UserError, match="goes on from earlier, but 0 of its users and 7 of its items have no train row"
    ):
        check_start(this, (stage,))
    given = replace(this.config, collab=replace(this.config.collab, init_items="vectors.parquet"))
    this.config = given
    check_start(this, (stage,))


def test_a_ranking_without_a_positive_to_learn_from_is_refused(of, monkeypatch):
    this = of(stages=("prepare", "collab"))
    collab = replace(this.config.collab, loss="bpr", select_on="ndcg@10")
    this.config = replace(this.config, collab=collab)
    check_labels(this, ("collab",))
    facts = this.log().facts
    with_facts(this, monkeypatch, positives=facts["positives"] | {"train": 0}, label_rule="rating >= 9")
    with pytest.raises(UserError, match=r"none of the .* rows of the train split is a positive \(rating >= 9\)"):
        check_labels(this, ("collab",))


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.2), ("plain_score", True)])
def test_a_model_that_scores_otherwise_does_not_go_on_from_rows(name, value):
    earlier = result_settings(Collab(dim=8))
    check_same_model(Collab(dim=8, init_from="a"), earlier)
    with pytest.raises(UserError, match=rf"collab\.{name} is {value}, but the model of collab.init_from a"):
        check_same_model(Collab(dim=8, init_from="a", **{name: value}), earlier)


def test_models_read_whole_into_this_machines_memory_are_counted_on_gpus(of, monkeypatch):
    """Of a cluster's GPU machines nothing is known of their memory beside each worker."""
    set_room(monkeypatch, 1 << 40)
    monkeypatch.setattr(ahead, "free_memory", lambda: (1000, None))
    check_ahead(of(ON_GPUS), ["adapt", "fuse"])
    for stage, readers in (("adapt", 1), ("distil", 2), ("fuse", 1), ("evaluate", 1)):
        with pytest.raises(UserError, match=rf"{readers} of the workers read the whole language model"):
            check_ahead(of(Cluster(local=True, gpus=True)), [stage])


def left_by(this: Run, stage: str, titles: list[str]) -> Path:
    """The folder of an adapter that a stage has left, which stands."""
    torch.manual_seed(5)
    adapt = build_adapt(this.llm(), titles, Prompt(template="compact"), "movie", this.config.adapt)
    this.marks[stage] = "0123456789abcdef"
    place = this.artifact(stage)
    with place.writing() as folder:
        adapt.save(folder, {name: w.detach() for name, w in adapt.model.named_parameters() if w.requires_grad})
    found = place.folder / "adapter"
    place.write_json(
        "manifest.json", {"fingerprint": this.marks[stage], "facts": {"adapter_hash": adapter_hash(found)}}
    )
    return found


def test_distilled_vectors_that_stand_are_looked_at_before_other_stages_run(tmp_path):
    """Where align will read them, perhaps hours after the collaborative model's stage began; those of users too."""
    this = Run.of(Config(workspace=str(tmp_path), align=Align(side="users", user_vectors="profile")))
    this.marks["distil"] = "0123456789abcdef"
    for folder in (place := this.artifact("distil").local(), place / PROFILES):
        (folder / "vectors").mkdir(parents=True)
        vector = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(6, np.float32)), 3)
        pq.write_table(pa.table({"item": [0, 1], "vector": vector}), folder / "vectors/part-00000.parquet")
        facts = {"fingerprint": this.marks["distil"], "parts": 1, "items": 2, "width": 3}
        (folder / "vectors.json").write_text(json.dumps(facts))
    pq.write_table(pa.table({"user": [3, 5]}), place / PROFILES / "users.parquet")
    ahead._check_vectors(this, ["collab", "align"])
    for folder in (place / PROFILES, place):
        (folder / "vectors/part-00000.parquet").write_bytes(b"PAR1")
        with pytest.raises(UserError, match=f"vectors in {folder} can't be read"):
            ahead._check_vectors(this, ["collab", "align"])
    ahead._check_vectors(this, ["collab", "distil", "align"])  # they are made anew
    ahead._check_vectors(this, ["fuse"])


def change_alpha(folder: Path) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))


@pytest.mark.parametrize(
    ("stage", "readers", "train"),
    [("adapt", ("distil", "fuse", "evaluate"), ("tables", "projections")), ("fuse", ("evaluate",), ("adapter",))],
)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "can't be read"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "is missing: there is no adapter_config.json"),
        (change_alpha, "isn't the one that stage {stage} left"),
    ],
    ids=["no weights", "no settings", "another setting"],
)
def test_an_adapter_that_stands_is_looked_at_before_other_stages_run(
    models, titles, tmp_path, stage, readers, train, damage, words
):
    """Where it will be loaded: distil and fuse may come hours later, after the collaborative model's."""
    llm = Llm(model=str(models["llama"]))
    this = Run.of(Config(workspace=str(tmp_path), llm=llm, fuse=Fuse(train=train)))
    if stage == "fuse":
        left_by(this, "adapt", titles)
    folder = left_by(this, stage, titles)
    ahead._check_adapters(this, ["collab", *readers])
    damage(folder)
    ahead._check_adapters(this, ["collab", "align"])
    ahead._check_adapters(this, ["collab", stage, *readers])  # it is made anew
    for reader in readers:
        with pytest.raises(UserError, match=words.format(stage=stage)):
            ahead._check_adapters(this, ["collab", reader])


def test_an_adapter_of_which_no_hash_was_recorded_is_refused(models, titles, tmp_path):
    this = Run.of(Config(workspace=str(tmp_path), llm=Llm(model=str(models["llama"]))))
    left_by(this, "adapt", titles)
    this.artifact("adapt").write_json("manifest.json", {"fingerprint": this.marks["adapt"], "facts": {}})
    with pytest.raises(UserError, match=r"without its hash.* delete .* and run the stage again"):
        ahead._check_adapters(this, ["fuse"])
