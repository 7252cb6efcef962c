"""Stage fuse's choices, step for step on one to three workers: the same steps, checkpoints, and what is left to be scored with.

The engine is the loop's own, with sharded tables and FSDP2, in processes over gloo and without Ray.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import fuse_cases
import numpy as np
import pyarrow as pa
import pytest
import torch
from fuse_cases import Case
from prepared import prepare_into, rules, source_of
from safetensors.numpy import load_file
from safetensors.torch import save_file
from small import save_table

from sellarec.collab.task import build_collab
from sellarec.config import Adapt, Collab, Fuse, Prompt
from sellarec.fusion.projection import Projection
from sellarec.language.adapt import build_adapt
from sellarec.language.llm import find_llm
from sellarec.training.table import SavedTable, Table, initial_rows

pytestmark = pytest.mark.distributed

DIM, WIDTH = 8, 16
SASREC = Collab(model="sasrec", dim=DIM, layers=1, history=4, init_std=0.4)
LIGHTGCN = Collab(model="lightgcn", dim=DIM, layers=2, init_std=0.4)
MF = Collab(dim=DIM, init_std=0.4)
BINARY = Collab(model="binary_mf", dim=DIM, init_std=0.4)
ADAPTED: dict[str, Any] = {"train": ("projections", "adapter"), "tokens": ("user", "item"), "learning_rate": 0.003}
LEARNED: dict[str, Any] = {"represent": "learned", "tokens": ("user", "item"), "table_learning_rate": 0.02}
CODES: dict[str, Any] = {
    "represent": "codes",
    "tokens": ("user", "item"),
    "train": ("adapter",),
    "learning_rate": 0.003,
}
CASES: dict[str, tuple[Collab, dict[str, Any]]] = {
    "as it is": (MF, {}),
    "collm": (MF, {"tokens": ("item", "user"), "train": ("projections",), "norm": "none", "clip": 0.1}),
    "adapter": (MF, ADAPTED),
    "all": (SASREC, {"train": ("adapter", "tables", "projections"), "projections": "separate", "experts": 2}),
    "tables alone": (MF, {"tokens": ("user",), "train": ("tables",), "table_optimizer": "adam"}),
    "frozen sasrec": (SASREC, {"tokens": ("user",), "train": ("projections",), "experts": 3}),
    "frozen lightgcn": (LIGHTGCN, {"train": ("projections",), "clip": 0.2}),
    "semantic alone": (SASREC, {"tokens": ("semantic",), "norm": "none"}),
    "with the collaborative score": (MF, {"tokens": ("semantic",), "collab_score": True}),
    "learned": (SASREC, LEARNED | {"train": ("tables",), "tokens": ("item",), "table_optimizer": "adam"}),
    "learned, adapter": (LIGHTGCN, LEARNED | {"train": ("tables", "adapter"), "learning_rate": 0.003}),
    "codes": (BINARY, CODES),
    "no token": (MF, {"tokens": (), "train": ("adapter",), "learning_rate": 0.003}),
    "codes, sequence": (BINARY, CODES | {"code": "dotted", "loss": "sequence", "tokens": ("user",)}),
}
QUICK = ("collm", "all", "tables alone", "frozen lightgcn", "with the collaborative score", "learned, adapter", "codes")
CLIPPED = (
    "collm",
    "frozen lightgcn",
    *(name for name, (_, chosen) in CASES.items() if "adapter" in chosen.get("train", ())),
)
"""The gradient of each step is larger than `clip`; it never is of the others."""
LEFT: dict[str, tuple[set[str], set[str]]] = {
    "as it is": ({"user", "item", "semantic"}, {"projection.safetensors"}),
    "collm": (set(), {"projection.safetensors"}),
    "adapter": (set(), {"projection.safetensors", "adapter/adapter_model.safetensors"}),
    "all": (
        {"user", "item", "semantic"},
        {"projection.safetensors", "collab.safetensors", "adapter/adapter_model.safetensors"},
    ),
    "tables alone": ({"user"}, set()),
    "frozen sasrec": (set(), {"projection.safetensors"}),
    "frozen lightgcn": (set(), {"projection.safetensors"}),
    "semantic alone": ({"semantic"}, {"projection.safetensors"}),
    "with the collaborative score": ({"user", "item", "semantic"}, {"projection.safetensors"}),
    "learned": ({"item"}, set()),
    "learned, adapter": ({"user", "item"}, {"adapter/adapter_model.safetensors"}),
    "codes": (set(), {"adapter/adapter_model.safetensors"}),
    "no token": (set(), {"adapter/adapter_model.safetensors"}),
    "codes, sequence": (set(), {"adapter/adapter_model.safetensors"}),
}
"""Tables, and files of dense weights: what is trained, and nothing else."""


@pytest.fixture(scope="module")
def inputs(decoder, tmp_path_factory) -> dict[str, Path]:
    """By collaborative model, what the stages before fuse leave; the adapter isn't fresh."""
    made = {}
    for collab in (MF, SASREC, LIGHTGCN, BINARY):
        folder = made[collab.model] = tmp_path_factory.mktemp(collab.model)
        (folder / "decoder").symlink_to(decoder)
        generator = np.random.default_rng(4)
        count = 90
        rows = {
            "user": generator.integers(0, 9, count),
            "item": generator.integers(0, 13, count),
            "label": pa.array(generator.random(count) < 0.6, pa.int8()),
            "timestamp": np.arange(count),
        }
        (folder / "log").mkdir()
        log = prepare_into(folder / "log", source_of(pa.table(rows)), rules(history_cap=6))
        torch.manual_seed(3)
        task = build_collab(log, collab, None)
        for table in task.tables:
            save_table(folder / "tables", table.name, initial_rows(table, 1, 0, table.rows))
        save_table(folder / "tables", "semantic", generator.standard_normal((log.facts["items"], WIDTH), np.float32))
        if task.network.has_weights:
            task.save(folder, {name: weight.detach() for name, weight in task.network.named_parameters()})
        save_file(Projection(DIM, fuse_cases.HIDDEN, WIDTH).state_dict(), folder / "projection.safetensors")
        titles = fuse_cases.titles_of(folder)
        adapt = build_adapt(find_llm(str(decoder), None), titles, Prompt(), "movie", Adapt(rank=2))
        weights = {name: weight.detach() for name, weight in adapt.model.named_parameters() if weight.requires_grad}
        for weight in weights.values():
            torch.nn.init.normal_(weight, std=0.05)
        adapt.save(folder, weights)
    return made


def case_of(name: str, inputs: dict[str, Path], output: Path, **changes: Any) -> Case:
    collab, chosen = CASES[name]
    output.mkdir()
    settings = Fuse(**{"batch": 16, "micro_batch": 3, "learning_rate": 0.01} | chosen)
    return Case(settings, collab, inputs[collab.model], output, **changes)


def fresh_tables(case: Case) -> tuple[Table, ...]:
    return fuse_cases.task_of(case, trained=False).tables


def left(case: Case) -> dict[str, np.ndarray]:
    """All that was exported, by file and tensor; tables put together."""
    files = {path for path in case.output.rglob("*.safetensors") if path.parent.name != "tables"}
    found = {
        f"{file.relative_to(case.output)} {name}": value for file in files for name, value in load_file(file).items()
    }
    for index in (case.output / "tables").glob("*.json"):
        table = SavedTable(index.parent, index.stem)
        found[f"table {index.stem}"] = table.read(0, table.facts["rows"])
    return found


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_any_number_of_workers_takes_the_same_steps_and_leaves_what_is_scored_with(gloo, inputs, tmp_path, name):
    """Losses, norms of gradients, what is exported, scores. All that is trained has moved; the other parts are left where they
    were read."""
    runs = {}
    for workers in (1, 2, 3):
        case = case_of(name, inputs, tmp_path / str(workers))
        found = gloo.call(workers, fuse_cases.train, case)
        runs[workers] = (found[0], left(case))
        # the engine that has trained, and one made of its artifact and, for what was frozen, those before, which scores in
        # larger micro-batches: a score is a difference of logits, whose last bits differ
        np.testing.assert_allclose(found[0]["again"]["score"], found[0]["scores"]["score"], rtol=1e-5, atol=1e-5)
        assert all(worker["losses"] == found[0]["losses"] for worker in found)
        assert all(worker["norms"] == found[0]["norms"] for worker in found)
        assert all(worker["checked"] is None for worker in found), found[0]["checked"]
        if "adapter" in case.settings.train:
            assert "loaded with PEFT" in found[0]["spoilt"] and all(worker["spoilt"] is None for worker in found[1:])
    expected, weights = runs[1]
    tables, files = LEFT[name]
    assert len(expected["norms"]) == (fuse_cases.STEPS if files else 0)
    for norm, clipped in expected["norms"]:
        assert (norm > case.settings.clip) == (name in CLIPPED), expected["norms"]
        assert clipped == pytest.approx(min(norm, case.settings.clip), rel=1e-4)
    assert {key.removeprefix("table ") for key in weights if key.startswith("table ")} == tables
    assert {key.split()[0] for key in weights if not key.startswith("table ")} == files
    assert expected["facts"]["trained_weights"] == sum(v.size for k, v in weights.items() if not k.startswith("table "))
    for found, exported in (runs[2], runs[3]):
        np.testing.assert_allclose(found["losses"], expected["losses"], rtol=2e-5)
        np.testing.assert_allclose(found["norms"], expected["norms"], rtol=1e-3)
        np.testing.assert_allclose(found["scores"]["score"], expected["scores"]["score"], rtol=1e-3, atol=2e-4)
        assert exported.keys() == weights.keys()
        for key in weights:
            np.testing.assert_allclose(exported[key], weights[key], rtol=1e-3, atol=2e-4, err_msg=key)
    before = left(Case(case.settings, case.collab, case.inputs, case.inputs))
    if case.settings.represent == "learned":  # from nothing that stages before made
        before |= {f"table {t.name}": initial_rows(t, fuse_cases.SEED, 0, t.rows) for t in fresh_tables(case)}
    moved = {key for key in weights.keys() & before.keys() if not np.array_equal(weights[key], before[key])}
    for part in (*(f"table {table}" for table in tables), *(files - {"projection.safetensors"})):
        assert any(key.startswith(part) for key in moved), part


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("all", 3),
        ("tables alone", 1),
        ("learned, adapter", 2),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("adapter", "collm", "tables alone")),
        pytest.param("all", 1, marks=pytest.mark.slow),
    ],
)
def test_what_is_broken_off_goes_on_bit_for_bit(gloo, inputs, tmp_path, name, workers):
    whole, broken = (
        case_of(name, inputs, tmp_path / which, stop_before=stop) for which, stop in (("whole", None), ("broken", 3))
    )
    expected, found = (gloo.call(workers, fuse_cases.train, case)[0] for case in (whole, broken))
    assert found["losses"] == expected["losses"]
    assert np.array_equal(found["scores"]["score"], expected["scores"]["score"])
    left_whole, left_broken = left(whole), left(broken)
    assert left_whole.keys() == left_broken.keys()
    for key, value in left_whole.items():
        np.testing.assert_array_equal(left_broken[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["collm", "frozen lightgcn"])
def test_gradients_are_clipped_once_all_micro_batches_are_in(gloo, inputs, tmp_path, name):
    """As those of a batch that goes through the model at once are."""
    parts, whole = (case_of(name, inputs, tmp_path / which) for which in ("parts", "whole"))
    whole = replace(whole, settings=replace(whole.settings, micro_batch=whole.settings.batch))
    found, expected = (gloo.call(2, fuse_cases.train, case)[0] for case in (parts, whole))
    assert all(norm > whole.settings.clip for norm, _ in expected["norms"])
    np.testing.assert_allclose(found["norms"], expected["norms"], rtol=1e-3)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=2e-5)
    left_whole, left_parts = left(whole), left(parts)
    assert left_parts.keys() == left_whole.keys()
    for key, value in left_whole.items():
        np.testing.assert_allclose(left_parts[key], value, rtol=1e-3, atol=2e-4, err_msg=key)


@pytest.mark.parametrize("what", ["vectors", "gradient"])
@pytest.mark.parametrize("name", ["all", "tables alone"])
def test_what_is_not_finite_on_one_worker_ends_all_at_the_same_step_and_changes_nothing(
    gloo, inputs, tmp_path, name, what
):
    """Neither tables nor dense weights, nor what their optimizers keep; also where the loss is finite on all, and the gradient
    of but one worker's rows isn't."""
    case, at = case_of(name, inputs, tmp_path / "output"), 2
    for workers in (1, 2, 3):
        found = gloo.call(workers, fuse_cases.refused, case, workers - 1, at, what)
        for worker in found:
            assert worker["step"] == at and worker["told"] == found[0]["told"]
            assert f"the {'loss' if what == 'vectors' else 'gradient'} is not finite" in worker["told"]
            earlier, before, after = worker["held"]
            assert before and before.keys() == after.keys() == earlier.keys()
            for key in before:
                assert np.isfinite(before[key]).all() and np.array_equal(after[key], before[key]), key
        parts = {key.split("/")[1] for worker in found for key in worker["held"][1]}
        assert parts == ({"tables", "model", "optimizer"} if name == "all" else {"tables"})
        moved = {
            key.split("/")[1]
            for worker in found
            for key in worker["held"][1]
            if not np.array_equal(worker["held"][1][key], worker["held"][0][key])
        }
        assert moved == parts  # by the step before
