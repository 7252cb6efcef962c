"""Which artifact each part of the recommender is read from: what fuse trained from its own, the rest from where fuse read it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from prepared import prepare_into, rules, source_of
from safetensors.torch import save_file
from small import save_table

from sellarec import ahead, stages
from sellarec.ahead import check_ahead
from sellarec.artifacts import fingerprint
from sellarec.config import Adapt, Align, Collab, Config, Fuse, Llm, Pretrain, Prompt, Tables
from sellarec.errors import UserError
from sellarec.fusion.projection import Projection
from sellarec.language.adapt import build_adapt
from sellarec.language.distil import ItemEncoder
from sellarec.language.llm import find_llm
from sellarec.pipeline import _check_sharding
from sellarec.run import Run, inputs_of
from sellarec.stages import _fuse, _fuse_builder, _tables_of_fuse
from sellarec.training.cluster import Cluster

DIM, HIDDEN, WIDTH = 4, 6, 16


@pytest.fixture(scope="module")
def workspace(decoder, tmp_path_factory) -> Path:
    """Artifacts of all stages that fuse reads; align's tables hold 1 throughout."""
    folder = tmp_path_factory.mktemp("workspace")
    prepare, adapt, align = (folder / "artifacts" / f"{stage}-x" for stage in ("prepare", "adapt", "align"))
    prepare.mkdir(parents=True)
    rows = {
        "user": [0, 1, 2] * 8,
        "item": [0, 1, 2, 3] * 6,
        "label": pa.array([0, 1] * 12, pa.int8()),
        "timestamp": range(24),
    }
    log = prepare_into(prepare, source_of(pa.table(rows)), rules())
    (folder / "artifacts" / "pretrain-x").mkdir()
    (folder / "artifacts" / "pretrain-x" / "model").symlink_to(decoder)
    torch.manual_seed(1)
    task = build_adapt(find_llm(str(decoder), None), ["a"] * log.facts["items"], Prompt(), "book", Adapt(rank=2))
    adapt.mkdir()
    task.save(adapt, {name: w.detach() for name, w in task.model.named_parameters() if w.requires_grad})
    save_tables(align, log.facts, 1.0)
    save_file(Projection(DIM, HIDDEN, WIDTH).state_dict(), align / "projection.safetensors")
    return folder


def save_tables(folder: Path, facts: dict, value: float) -> None:
    for name, count, width in (("user", "users", DIM), ("item", "items", DIM), ("semantic", "items", WIDTH)):
        save_table(folder / "tables", name, np.full((facts[count], width), value, np.float32))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": ("projections",)},
        {"train": ("tables", "adapter"), "tokens": ("user", "item")},
        {"train": ("adapter",), "tokens": ("user",)},
        {"train": ("adapter", "projections"), "projections": "separate", "experts": 2, "norm": "none"},
        {"train": ("tables",), "tokens": ("item",)},
        {"tokens": ("semantic",)},
    ],
    ids=str,
)
def test_each_part_is_read_from_where_it_was_left(workspace, changes):
    config = Config(
        workspace=str(workspace), collab=Collab(dim=DIM), align=Align(hidden=HIDDEN), fuse=Fuse(**changes),
        prompt=Prompt(template="compact"),
    )  # fmt: skip
    run = Run.of(config)
    run.marks = dict.fromkeys(("prepare", "pretrain", "adapt", "align"), "x") | {"fuse": fingerprint(changes)}
    start = _fuse_builder(run, "align")()
    initial = {name: weight.detach().clone() for name, weight in start.model.named_parameters()}
    trained = {n: w.detach() + 0.5 for n, w in start.model.named_parameters() if w.requires_grad}
    fuse = run.artifact("fuse").local()
    fuse.mkdir()
    start.save(fuse, trained)
    if "tables" in config.fuse.train:
        save_tables(fuse, run.log().facts, 2.0)

    task = _fuse_builder(run, "fuse")()
    assert {table.name for table in task.tables} == set(config.fuse.tokens)
    for table in task.tables:
        assert (table.read(0, table.rows) == (2 if "tables" in config.fuse.train else 1)).all()
    found = dict(task.model.named_parameters())
    assert found.keys() == initial.keys()
    assert bool(trained) == (config.fuse.train != ("tables",))
    for name, weight in found.items():
        if name in trained:
            assert torch.equal(weight, trained[name]), name
        else:
            assert torch.equal(weight, initial[name]), name


@pytest.mark.parametrize("train", [("tables",), ("tables", "adapter")])
def test_learned_tokens_read_nothing_of_align(workspace, train):
    fuse = Fuse(represent="learned", tokens=("user", "item"), train=train)
    config = Config(workspace=str(workspace), fuse=fuse, prompt=Prompt(template="compact"))
    assert "align" not in {*inputs_of("fuse", config), *inputs_of("evaluate", config)}
    run = Run.of(config)
    run.marks = dict.fromkeys(("prepare", "pretrain", "adapt"), "x") | {"fuse": fingerprint(train)}
    start = _fuse_builder(run, "align")()
    assert {(table.name, table.dim, table.read) for table in start.tables} == {
        ("user", WIDTH, None),
        ("item", WIDTH, None),
    }
    trained = {n: w.detach() + 0.5 for n, w in start.model.named_parameters() if w.requires_grad}
    assert bool(trained) == ("adapter" in train) and all("lora_" in name for name in trained)
    folder = run.artifact("fuse").local()
    folder.mkdir()
    start.save(folder, trained)
    for table in start.tables:
        save_table(folder / "tables", table.name, np.full((table.rows, WIDTH), 2.0, np.float32))
    task = _fuse_builder(run, "fuse")()
    assert all((table.read(0, table.rows) == 2).all() for table in task.tables)
    found = dict(task.model.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in trained.items())


def test_codes_are_read_of_stage_collab(workspace):
    """Nothing of align, nor of fuse but its adapter; and no table is sharded for them."""
    fuse = Fuse(represent="codes", tokens=("user", "item"), train=("adapter",))
    config = Config(
        workspace=str(workspace), collab=Collab(model="binary_mf", dim=8), fuse=fuse, prompt=Prompt(template="compact")
    )
    for stage in ("fuse", "evaluate"):
        inputs = inputs_of(stage, config)
        assert "align" not in inputs and "distil" not in inputs and inputs.count("collab") == 1
    run = Run.of(config)
    run.marks = dict.fromkeys(("prepare", "pretrain", "adapt", "collab"), "x") | {"fuse": "codes"}
    facts, signs = run.log().facts, np.array([1, -1, -1, 1, 1, 1, -1, 1], np.float32)
    for name, count in (("user", facts["users"]), ("item", facts["items"])):
        save_table(run.artifact("collab").local() / "tables", name, np.tile(signs, (count, 1)))
    start = _fuse_builder(run, "align")()
    assert start.tables == () and _tables_of_fuse(run) == ()
    for name, codes in start.prepare.__self__.codes.items():
        assert (codes == 0b10011101).all() and len(codes) == facts[f"{name}s"]
    trained = {n: w.detach() + 0.5 for n, w in start.model.named_parameters() if w.requires_grad}
    run.artifact("fuse").local().mkdir()
    start.save(run.artifact("fuse").local(), trained)
    found = dict(_fuse_builder(run, "fuse")().model.named_parameters())
    assert trained and all(torch.equal(found[name], weight) for name, weight in trained.items())


def test_a_wholly_tuned_model_is_what_all_later_stages_read(workspace):
    config = Config(
        workspace=str(workspace), collab=Collab(dim=DIM), align=Align(hidden=HIDDEN), adapt=Adapt(method="full"),
        prompt=Prompt(template="compact"), llm=Llm(storage="bfloat16"),
    )  # fmt: skip
    run = Run.of(config)
    run.marks = dict.fromkeys(("prepare", "pretrain", "align"), "x") | {"adapt": "full", "fuse": "full"}
    task = build_adapt(run.llm(), ["a"] * run.log().facts["items"], config.prompt, "book", config.adapt)
    tuned = {name: weight.detach() + 0.5 for name, weight in task.model.named_parameters()}
    run.artifact("adapt").local().mkdir()
    task.save(run.artifact("adapt").local(), tuned)
    assert run.adapted()["adapter"] is None and "adapt-full" in run.adapted()["source"].identity

    start = _fuse_builder(run, "align")()
    trained = {n: w.detach() for n, w in start.model.named_parameters() if w.requires_grad}
    assert trained and all(name.startswith("projection.") for name in trained)
    run.artifact("fuse").local().mkdir()
    start.save(run.artifact("fuse").local(), trained)
    save_tables(run.artifact("fuse").local(), run.log().facts, 2.0)
    for recommender in (start, _fuse_builder(run, "fuse")()):
        found = dict(recommender.model.scorer.named_parameters())
        assert found.keys() == tuned.keys()
        assert all(torch.equal(found[name], weight.bfloat16()) for name, weight in tuned.items())
    encoder = ItemEncoder(**run.adapted(), noun="book", settings=config.distil)
    assert all(
        torch.equal(weight, tuned[f"llm.model.{n}"].bfloat16()) for n, weight in encoder.decoder.named_parameters()
    )


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        # 2 users and 2 items on the fullest worker; a row's weights, and its optimizer's state: one number a piece
        ({}, 2 * (4 * DIM + 4) * 2 + 2 * (4 * WIDTH + 4)),
        ({"table_optimizer": "adam"}, 2 * 16 * DIM * 2 + 2 * 16 * WIDTH),
        ({"semantic": "frozen"}, 2 * (4 * DIM + 4) * 2 + 2 * 4 * WIDTH),
        ({"train": ("projections",)}, 2 * 4 * DIM * 2 + 2 * 4 * WIDTH),
        ({"tokens": ("item",)}, 2 * (4 * DIM + 4)),
    ],
    ids=str,
)
def test_tables_without_room_are_refused_before_workers_start(workspace, monkeypatch, changes, held):
    """With what fuse's own optimizer keeps of them; one byte less than they take is too little, before stages that they are made
    by too."""

    class Started(Exception):
        pass

    def start(*_):
        raise Started

    run = Run.of(
        Config(
            workspace=str(workspace),
            collab=Collab(dim=DIM),
            align=Align(hidden=HIDDEN),
            fuse=Fuse(**changes),
            pretrain=Pretrain(hidden=WIDTH),
        )
    )
    run.marks = {"prepare": "x", "pretrain": "x"}
    run.cluster = Cluster(local=True, gpus=False)
    monkeypatch.setattr(stages, "train", start)
    monkeypatch.setattr(stages, "check_model", lambda *_: None)  # of its own, and larger
    monkeypatch.setattr(ahead, "_check_adapters", lambda *_: None)  # adapt has not been run
    monkeypatch.setattr(ahead, "room_of_worker", lambda workers: held - 1)
    with pytest.raises(UserError, match=r"worker 0 of 2 would hold .* of tables"):
        check_ahead(run, ["fuse"])
    run.marks = dict.fromkeys(("prepare", "pretrain", "adapt", "align", "fuse"), "x")
    with pytest.raises(UserError, match=r"worker 0 of 2 would hold .* of tables"):
        _fuse(run)
    monkeypatch.setattr(ahead, "room_of_worker", lambda workers: held)
    check_ahead(run, ["fuse"])
    with pytest.raises(Started):
        _fuse(run)


@pytest.mark.parametrize(
    ("tables", "changes", "said"),
    [
        ({"dtype": "float16"}, {"table_optimizer": "adam"}, r"fuse.table_optimizer is adam, tables.dtype float16"),
        (
            {},
            {"table_optimizer": "sgd", "table_weight_decay": 0.1},
            r"fuse.table_weight_decay is 0.1 and fuse.table_optimizer sgd",
        ),
        ({"sharding": "column-wise"}, {}, r"column-wise and fuse.table_optimizer rowwise-adagrad"),
    ],
)
def test_what_no_kernel_does_to_fuses_tables_is_refused_before_any_work(tmp_path, tables, changes, said):
    """Of the stages that are wanted, and of fuse only where it trains tables."""

    def check(stages: tuple[str, ...], **more: Any) -> None:
        config = Config(workspace=str(tmp_path), tables=Tables(**tables), fuse=Fuse(**changes, **more))
        _check_sharding(Run.of(config), stages)

    with pytest.raises(UserError, match=said):
        check(("prepare", "fuse"))
    check(("prepare", "evaluate"))
    check(("fuse",), train=("projections",))
