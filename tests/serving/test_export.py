"""An export scores as the stages do, in a fresh process without Ray; half a one is never taken for a whole one."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import prepared
import pyarrow as pa
import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import sellarec
from sellarec.artifacts import Place, Store, fingerprint
from sellarec.collab.task import build_collab
from sellarec.config import Adapt, Align, Collab, Config, Data, Evaluate, Fuse, Llm, Prompt, to_yaml
from sellarec.data.log import Log
from sellarec.errors import UserError
from sellarec.evaluation.artifact import evaluate_artifact
from sellarec.evaluation.results import evaluate_scores
from sellarec.fusion.codes import CodesTask
from sellarec.fusion.fuse import FuseTask, build_fuse, token_rows
from sellarec.language import llm as llms
from sellarec.language.adapt import build_adapt, build_adapted
from sellarec.language.templates import template_mark
from sellarec.serving.export import export_run
from sellarec.training.stream import LEFT_OUT
from sellarec.training.table import Table
from sellarec.training.task import INITIAL

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
USERS, DIM, WIDTH, HIDDEN = 12, 4, 16, 6
MODELS = ("mf", "svdpp", "sasrec", "din", "lightgcn")
CODES: dict[str, Any] = {"represent": "codes", "tokens": ("user", "item"), "train": ("adapter",), "code": "dotted"}


@dataclasses.dataclass
class Workspace:
    """A run as jobs/train.py leaves one, made by hand, and its stage fuse's task."""

    folder: Path
    log: Log
    task: FuseTask | CodesTask
    source: llms.LlmSource
    config: Config

    @property
    def run(self) -> Path:
        return self.folder / "runs/small"

    def artifact(self, stage: str) -> Path:
        return self.folder / "artifacts" / json.loads((self.run / "artifacts.json").read_text())[stage]

    def test_rows(self) -> pa.Table:
        test = self.log.split("test")
        return test.append_column("weight", pa.array(np.ones(len(test), np.float32)))


def interactions(titles: list[str]) -> pa.Table:
    """Users "0" ... and items "i0" ... in time; user 11 and the last item are first seen in the test split, and user 12 likes
    nothing."""
    generator = np.random.default_rng(1)
    lines = []
    for time in range(150):
        late = time >= 120
        user, item = generator.integers(USERS - (not late)), generator.integers(len(titles) - (not late))
        lines.append((f"{user}", f"i{item}", int(generator.random() < 0.6), time, "test" if late else "train"))
    lines += [(f"{USERS - 1}", f"i{len(titles) - 1}", 1, 150, "test"), (f"{USERS - 1}", "i0", 0, 151, "test")]
    lines += [(f"{USERS}", "i0", 0, 5.5, "train"), ("0", "i1", 1, 119.5, "valid"), ("0", "i2", 0, 119.6, "valid")]
    lines = list({line[:2]: line for line in lines}.values())
    columns = zip(*sorted(lines, key=lambda line: line[3]), strict=True)
    table = pa.table(dict(zip(("user", "item", "label", "timestamp", "split"), map(list, columns), strict=True)))
    return table.set_column(3, "timestamp", pa.array((10 * table["timestamp"].to_numpy()).astype(np.int64)))


def make_workspace(
    folder: Path, model: str, decoder: Path, titles: list[str], method: str = "lora", **fuse_settings: Any
) -> Workspace:
    has_tokens = fuse_settings.get("tokens") != ()
    projects = has_tokens and fuse_settings.get("represent", "collaborative") == "collaborative"
    coded = fuse_settings.get("represent") == "codes"
    titles = [*titles[:-1], ""]  # the last item, which has no train row, has no title either
    items = pa.table({"item": [f"i{number}" for number in range(len(titles))], "title": titles})
    store = Store(Place.of(str(folder)))
    marks: dict[str, str] = {}

    def place(stage: str) -> Path:
        marks[stage] = fingerprint({"stage": stage, "model": model})
        found = store.place(stage, marks[stage]).folder
        found.mkdir(parents=True)
        return found

    def finish(stage: str, facts: dict[str, Any], **more: Any) -> None:
        left = store.place(stage, marks[stage]).folder / "adapter"
        of_adapter = {"adapter_hash": llms.adapter_hash(left)} if left.exists() else {}
        manifest = {"fingerprint": marks[stage], "inputs": {}, "versions": {}, "facts": facts | of_adapter, **more}
        store.place(stage, marks[stage]).write_json("manifest.json", manifest)

    log = prepared.prepare_into(
        place("prepare"), prepared.source_of(interactions(titles), items), prepared.rules(split="given")
    )
    finish("prepare", log.facts)
    rows, by_id = log.items(["external_id", "title"]), dict(zip(items["item"].to_pylist(), titles, strict=True))
    assert [by_id[name] for name in rows["external_id"].to_pylist()] == rows["title"].to_pylist()
    titles = rows["title"].to_pylist()

    config = Config(
        name="small",
        data=Data(source="log", path="somewhere"),
        llm=Llm(model=str(decoder)),
        prompt=Prompt(template="compact", history=3),
        adapt=Adapt(method="full") if method == "full" else Adapt(rank=2),
        collab=Collab(
            model=model,
            dim=8 if coded else DIM,
            **{} if model in ("mf", "lightgcn", "binary_mf") else {"history": 3},
        ),
        align=Align(hidden=HIDDEN),
        fuse=Fuse(**{"max_steps": 1} | fuse_settings),
        evaluate=Evaluate(batch=16, micro_batch=4, replicates=20),
    )
    source = llms.find_llm(str(decoder), None)
    torch.manual_seed(5)
    adapt = build_adapt(source, titles, config.prompt, log.facts["noun"], config.adapt)
    weights = {name: weight.detach() for name, weight in adapt.model.named_parameters() if weight.requires_grad}
    for weight in weights.values():
        if method == "full":
            weight += 0.05 * torch.randn_like(weight)
        else:
            torch.nn.init.normal_(weight, std=0.05)
    tuned = place("adapt")
    adapt.save(tuned, weights)
    adapted: dict[str, Any] = {"source": source, "adapter": tuned / "adapter"}
    if method == "full":
        adapted = {"source": llms.find_llm(str(tuned / "model"), None), "adapter": None}
    finish("adapt", {"steps": 3, "kept_step": 2})

    fuse, generator = place("fuse"), np.random.default_rng(3)
    tables = place("collab") if coded else fuse
    rows_of_tokens = token_rows(config.fuse, config.collab, source)
    fresh = build_collab(log, rows_of_tokens, None)
    count = len(titles)
    last_item = rows["external_id"].to_pylist().index(f"i{count - 1}")
    semantic = generator.standard_normal((count, WIDTH)).astype(np.float32)
    semantic[last_item] = 0
    small.save_table(tables / "tables", "semantic", semantic, (4,))
    for table in fresh.tables:
        small.save_table(
            tables / "tables", table.name, generator.standard_normal((table.rows, table.dim)).astype(np.float32), (3,)
        )
    if fresh.network.has_weights:
        fresh.save(fuse, {name: weight.detach() for name, weight in fresh.network.named_parameters()})

    weight = config.fuse.language_weights[0]

    def build(trained: Path | None) -> FuseTask | CodesTask:
        table = Table("semantic", count, WIDTH, ("semantic",), read=lambda start, stop: semantic[start:stop])
        return build_fuse(
            **adapted, titles=titles, prompt=config.prompt, noun=log.facts["noun"],
            collab=build_collab(log, rows_of_tokens, tables) if has_tokens else None,
            semantic=table if projects else None, hidden=HIDDEN, projection=None, trained=trained,
            settings=config.fuse, seed=1, language_weight=weight,
        )  # fmt: skip

    torch.manual_seed(6)
    task = build(None)
    if coded or not has_tokens:
        if coded:
            finish("collab", {"steps": 2, "kept_step": 2})
        trained = {name: weight.detach() for name, weight in task.model.named_parameters() if weight.requires_grad}
        task.save(fuse, {name: weight + 0.05 * torch.randn_like(weight) for name, weight in trained.items()})
        adapted["adapter"] = fuse / "adapter"
    else:
        task.save(
            fuse, {f"projection.{name}": weight.detach() for name, weight in task.model.projection.named_parameters()}
        )
    task = build(fuse / "projection.safetensors" if projects else None)
    task.model.eval()
    marked = {"llm": source.identity, "templates": template_mark("compact")}
    facts = {"steps": 1, "kept_step": 1, "template": "compact", "language_weight": weight}
    finish("fuse", facts, **marked)
    workspace = Workspace(folder, log, task, source, config)
    test = workspace.test_rows()
    records = evaluate_scores(
        test, {"sella-rec": stage_scores(workspace, test)}, pairs=[], seed=1, protocol="pointwise", replicates=20
    )
    evaluate = place("evaluate")
    finish("evaluate", {}, inputs={stage: marks[stage] for stage in ("prepare", "adapt", "fuse")})
    (evaluate / "results.json").write_text(json.dumps(records))
    run = Place.of(str(workspace.run))
    run.write_json("artifacts.json", {stage: f"{stage}-{mark}" for stage, mark in marks.items()})
    run.write_text("config.yaml", to_yaml(config))
    return workspace


def vectors_of(workspace: Workspace, batch: dict[str, Any]) -> dict[str, Any]:
    """Rows as the engine looks them up; LightGCN's smoothed by its formula on a dense matrix."""
    task, log = workspace.task, workspace.log
    with torch.no_grad():
        vectors = small.vectors_of(task, batch)
    if task.graph is None:
        return vectors
    users, items = (torch.from_numpy(read_all(task, name)) for name in ("user", "item"))
    train = log.split("train")
    adjacency = torch.zeros(len(users) + len(items), len(users) + len(items))
    for user, item, label in zip(*(train[name].to_pylist() for name in ("user", "item", "label")), strict=True):
        if label:
            adjacency[user, len(users) + item] = adjacency[len(users) + item, user] = 1
    degree = adjacency.sum(1).clamp(min=1).rsqrt()
    matrix = degree[:, None] * adjacency * degree
    rows = torch.cat([users, items])
    layers = [rows[:, :-1]]
    for _ in range(workspace.config.collab.layers):
        layers.append(matrix @ layers[-1])
    smoothed = torch.cat([torch.stack(layers).mean(0), rows[:, -1:]], dim=1)
    vectors |= {"user": smoothed[batch["user"]], "item": smoothed[len(users) + batch["item"]]}
    return {name: found for name, found in vectors.items() if not name.startswith(INITIAL)}


def read_all(task: FuseTask, name: str) -> np.ndarray:
    (table,) = (table for table in task.tables if table.name == name)
    assert table.read is not None
    return table.read(0, table.rows)


@torch.no_grad()
def stage_scores(workspace: Workspace, rows: pa.Table, **batch: torch.Tensor) -> np.ndarray:
    """Scores of stage fuse's task itself, all rows at once; some of the batch may be given otherwise."""
    found = small.batch_of(workspace.task, rows, None)
    vectors = vectors_of(workspace, found)
    return workspace.task.score(workspace.task.model, found | batch, vectors).numpy()


def text_only(workspace: Workspace, stage: str, row: pa.Table) -> float:
    """The score of one row's text-only prompt, by a stage's adapter."""
    titles, noun = workspace.log.items(["title"])["title"].to_pylist(), workspace.log.facts["noun"]
    adapter = workspace.artifact(stage) / "adapter"
    task = build_adapted(workspace.source, titles, workspace.config.prompt, noun, adapter, "answer")
    with torch.no_grad():
        return task.score(task.model, small.batch_of(task, row, None), {}).item()


def named(workspace: Workspace, rows: pa.Table) -> tuple[list[str], list[str], list[list[str]]]:
    """Users, items and histories of rows by the source's ids."""
    users, items = (
        table.column("external_id").to_pylist()
        for table in (workspace.log.users(["external_id"]), workspace.log.items(["external_id"]))
    )
    return (
        [users[user] for user in rows["user"].to_pylist()],
        [items[item] for item in rows["item"].to_pylist()],
        [[items[item] for item in history] for history in rows["history"].to_pylist()],
    )


@pytest.fixture(scope="module")
def made(decoder, titles, tmp_path_factory):
    """By model and settings of fuse, the run and its export."""
    found: dict[str, tuple[Workspace, Path]] = {}

    def make(model: str = "mf", **fuse_settings: Any) -> tuple[Workspace, Path]:
        key = f"{model} {fuse_settings}"
        if key not in found:
            folder = tmp_path_factory.mktemp(model)
            workspace = make_workspace(folder / "workspace", model, decoder, titles, **fuse_settings)
            export_run(str(workspace.run), folder / "export", histories=True, with_model=False)
            found[key] = workspace, folder / "export"
        return found[key]

    return make


@pytest.fixture(scope="module")
def recommender(made):
    return sellarec.load(made()[1])


@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_the_stages(made, model):
    workspace, export = made(model)
    rows = workspace.test_rows()
    expected = stage_scores(workspace, rows)
    found = sellarec.load(export).score(*named(workspace, rows))
    assert found.scores.dtype == np.float32 and expected.std() > 0.01
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)
    assert not (found.unknown_user.any() or found.unknown_item.any() or found.unknown_history.any())


def test_titles_that_do_not_fit_are_counted_by_pair(made, tmp_path, monkeypatch, capsys):
    """As the stages count them; jobs/evaluate.py prints the sum."""
    from sellarec.config import Evaluation

    workspace, export = made()
    rows = workspace.test_rows()
    recommender = sellarec.load(export)
    monkeypatch.setattr(recommender._task.prompts, "_limit", 70)
    monkeypatch.setattr(workspace.task.prompts, "_limit", 70)
    expected = small.prepared(workspace.task, rows, None)[LEFT_OUT].to_numpy()
    assert len(set(expected)) > 2
    found = recommender.score(*named(workspace, rows))
    assert np.array_equal(found.titles_left_out, expected)
    monkeypatch.setattr("sellarec.evaluation.artifact.read_export", lambda *_: recommender)
    evaluate_artifact(
        Evaluation(artifact=export, data=workspace.log.directory, out=tmp_path / "out.json", replicates=5)
    )
    cut = f"{(expected > 0).sum()} of {len(expected)} prompts, {expected.sum()} titles left out"
    assert f"histories cut to fit: sella-rec: {cut}" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["mf", "din"])
def test_candidates_of_a_user_are_scored_alike_though_their_history_is_read_once(made, model, monkeypatch):
    workspace, export = made(model)
    recommender, tokens = sellarec.load(export), []
    recommender._task.blocks[0].register_forward_pre_hook(lambda module, given: tokens.append(given[0][..., 0].numel()))
    items = workspace.log.items(["external_id"])["external_id"].to_pylist()
    pairs = [(f"{user}", item) for item in items for user in (1, 2)]

    def scores() -> tuple[np.ndarray, int]:
        tokens.clear()
        return recommender.score(*zip(*pairs, strict=True)).scores, sum(tokens)

    shared, shared_tokens = scores()
    monkeypatch.setattr("sellarec.serving.recommender.WORTH_SHARING", 0.0)
    alone, all_tokens = scores()
    assert alone.std() > 0.01 and shared_tokens < 0.75 * all_tokens
    np.testing.assert_allclose(shared, alone, atol=1e-5)


def test_without_histories_the_last_positives_of_all_splits_are_taken(made, recommender):
    workspace, _ = made()
    rows = pa.concat_tables([workspace.log.split(name) for name in ("train", "valid", "test")])
    users = sorted(set(rows["user"].to_pylist()))
    liked = {user: [] for user in users}
    for user, item, label in zip(*(rows[name].to_pylist() for name in ("user", "item", "label")), strict=True):
        if label:
            liked[user].append(item)
    assert max(map(len, liked.values())) > workspace.log.facts["history_cap"] and not all(liked.values())
    names, ids = (
        workspace.log.users(["external_id"])["external_id"],
        workspace.log.items(["external_id"])["external_id"],
    )
    histories = [[ids[item].as_py() for item in liked[user]] for user in users]
    named_users = [names[user].as_py() for user in users] + [names[users[0]].as_py()]
    items = ["i3"] * len(named_users)
    found = recommender.score(named_users, items)
    expected = recommender.score(named_users, items, [*histories, histories[0]])
    assert np.ptp(expected.scores) > 0.01
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)


def test_no_pairs_have_no_scores(recommender):
    assert recommender.score([], []).scores.shape == (0,)
    assert recommender.score([], [], []).scores.shape == (0,)


def test_unknown_ids_are_scored_as_unseen_ones_and_flagged(made, recommender):
    """The last user and item have no train row, the item no title and a distilled vector of zeros: all that is unknown of an
    unknown one."""
    workspace, _ = made()
    unseen_user, unseen_item = f"{USERS - 1}", f"i{len(workspace.log.items()) - 1}"
    assert [table.filter(pa.compute.equal(table["external_id"], name))["seen"].to_pylist() for table, name in (
        (workspace.log.users(), unseen_user), (workspace.log.items(), unseen_item)
    )] == [[False], [False]]  # fmt: skip
    history = ["i1", "i4"]
    known = recommender.score([unseen_user, "1", unseen_user], ["i2", unseen_item, unseen_item], [history] * 3)
    unknown = recommender.score(["nobody", "1", ""], ["i2", "nothing", "i"], [history] * 3)
    np.testing.assert_allclose(unknown.scores, known.scores, atol=1e-6)
    assert np.ptp(known.scores) > 0.01
    assert unknown.unknown_user.tolist() == [True, False, True] and unknown.unknown_item.tolist() == [False, True, True]
    assert not known.unknown_user.any() and not known.unknown_item.any()
    with_more = recommender.score(["1"], ["i2"], [["i1", "nothing", "i4", "nobody"]])
    assert with_more.unknown_history.tolist() == [2]
    np.testing.assert_allclose(with_more.scores, recommender.score(["1"], ["i2"], [history]).scores, atol=1e-6)
    # without a history in the export
    assert recommender.score(["nobody"], ["i2"]).scores == pytest.approx(
        recommender.score(["nobody"], ["i2"], [[]]).scores, abs=1e-6
    )


def test_numbers_are_ids_by_their_digits(recommender):
    found = recommender.score([1, 99], ["i2"] * 2)
    assert found.unknown_user.tolist() == [False, True]
    assert found.scores[0] == pytest.approx(recommender.score(["1"], ["i2"]).scores[0], abs=1e-6)


def test_explanations_are_what_the_score_loses(made, recommender):
    workspace, _ = made()
    rows = workspace.test_rows().slice(0, 1)
    ((user,), (item,), (history,)) = named(workspace, rows)
    (whole,) = stage_scores(workspace, rows)
    found = recommender.explain(user, item, history)
    assert (
        rows["user_seen"][0].as_py()
        and rows["item_seen"][0].as_py()
        and set(found["tokens"]) == {"user", "item", "semantic"}
    )
    zero = torch.zeros(1)
    assert found["score"] == pytest.approx(whole, abs=1e-5)
    assert found["tokens"]["user"] == pytest.approx(whole - stage_scores(workspace, rows, user_seen=zero)[0], abs=1e-5)
    assert found["tokens"]["item"] == pytest.approx(whole - stage_scores(workspace, rows, item_seen=zero)[0], abs=1e-5)
    batch = small.batch_of(workspace.task, rows, None)
    vectors = vectors_of(workspace, batch)
    with torch.no_grad():
        vectors["semantic"] = torch.zeros_like(vectors["semantic"])
        without = workspace.task.score(workspace.task.model, batch, vectors).item()
    assert found["tokens"]["semantic"] == pytest.approx(whole - without, abs=1e-5)
    assert all(abs(part) > 1e-4 for part in found["tokens"].values())
    assert found["text_only"] == pytest.approx(text_only(workspace, "adapt", rows), abs=1e-5)
    # nothing is left on the model
    assert recommender.score([user], [item], [history]).scores[0] == pytest.approx(whole, abs=1e-5)
    unknown = recommender.explain("nobody", item, [])
    assert unknown["unknown_user"] and not unknown["unknown_item"] and unknown["tokens"]["user"] == 0


def test_a_collaborative_score_that_is_added_is_in_the_export_and_its_explanations(made, recommender):
    workspace, export = made("sasrec", collab_score=True, language_weights=(0.5, 1.0))
    rows = workspace.test_rows()
    found, (users, items, histories) = sellarec.load(export), named(workspace, rows)
    np.testing.assert_allclose(found.score(users, items, histories).scores, stage_scores(workspace, rows), atol=1e-5)
    batch = small.batch_of(workspace.task, rows.slice(0, 1), None)
    with torch.no_grad():
        collab = workspace.task.collab.score(None, batch, vectors_of(workspace, batch)).item()
    explained = found.explain(users[0], items[0], histories[0])
    assert explained["collab"] == pytest.approx(collab, abs=1e-5) and abs(collab) > 1e-3
    assert (
        found.explain(users[0], items[0], histories[0])["score"] == explained["score"]
    )  # nothing is left on the model
    assert recommender.explain(users[0], items[0], histories[0])["collab"] is None


def test_the_export_is_evaluated_as_the_run_was(made, tmp_path):
    from sellarec.config import Evaluation

    workspace, export = made()
    settings = Evaluation(artifact=export, data=workspace.log.directory, out=tmp_path / "out.json", replicates=20)
    expected = json.loads((workspace.artifact("evaluate") / "results.json").read_text())
    found = evaluate_artifact(settings)
    assert [{**record, **dict.fromkeys(("value", "low", "high"))} for record in found] == [
        {**record, **dict.fromkeys(("value", "low", "high"))} for record in expected
    ]
    for name in ("value", "low", "high"):
        assert [record[name] for record in found] == pytest.approx([record[name] for record in expected], abs=1e-6)
    ranked = evaluate_artifact(dataclasses.replace(settings, ranking="candidates:2", cutoffs=(1,)))
    assert {record["metric"] for record in ranked} > {"auc", "uauc", "ndcg@1"}
    refused = {
        "whole catalog isn't ranked": {"ranking": "full"},
        "--workers is 3": {"workers": 3},
        "--device is cuda, but this process sees no GPU": {"device": "cuda"},
        "there is no folder /nowhere": {"llm": "/nowhere"},
    }
    for words, changes in refused.items():
        if changes != {"device": "cuda"} or not torch.cuda.is_available():
            with pytest.raises(UserError, match=words):
                evaluate_artifact(dataclasses.replace(settings, **changes))
    train = evaluate_artifact(dataclasses.replace(settings, split="train"))
    assert {record["split"] for record in train} == {"train"}
    assert train[0]["count"] == workspace.log.facts["rows"]["train"]


def test_an_export_whose_base_model_has_moved_is_evaluated(made, tmp_path):
    from sellarec.config import Evaluation

    workspace, export = made()
    shutil.copytree(export, tmp_path / "export")
    facts = json.loads((export / "export.json").read_text())
    facts["base_model"]["name"] = str(tmp_path / "gone")
    (tmp_path / "export/export.json").write_text(json.dumps(facts))
    settings = Evaluation(artifact=tmp_path / "export", data=workspace.log.directory, out=tmp_path / "o", replicates=2)
    with pytest.raises(UserError, match="there is no folder"):
        evaluate_artifact(settings)
    moved = evaluate_artifact(dataclasses.replace(settings, llm=workspace.source.name, device="cpu"))
    assert [r["value"] for r in moved] == [
        r["value"] for r in evaluate_artifact(dataclasses.replace(settings, artifact=export))
    ]
    other = dataclasses.replace(settings, artifact=workspace.artifact("fuse"), llm=workspace.source.name)
    with pytest.raises(UserError, match="is no export"):
        evaluate_artifact(other)


def test_the_export_is_evaluated_on_another_log_by_the_sources_ids(made, tmp_path, titles):
    """The same rows, prepared so that users and items are numbered otherwise, with an item that the export doesn't have."""
    from sellarec.config import Evaluation

    workspace, export = made()
    table = interactions(titles)
    more = pa.table({"user": ["7"], "item": ["i99"], "label": [1], "timestamp": [-1], "split": ["train"]}, table.schema)
    other = prepared.prepare_into(
        tmp_path / "log", prepared.source_of(pa.concat_tables([more, table])), prepared.rules(split="given")
    )
    assert other.users()["external_id"].to_pylist() != workspace.log.users()["external_id"].to_pylist()
    settings = Evaluation(artifact=export, data=other.directory, out=tmp_path / "out.json", replicates=20)
    (value,) = (r["value"] for r in evaluate_artifact(settings) if (r["metric"], r["rows"]) == ("auc", "all"))
    expected = json.loads((workspace.artifact("evaluate") / "results.json").read_text())
    (before,) = (r["value"] for r in expected if (r["metric"], r["rows"]) == ("auc", "all"))
    assert value == pytest.approx(before, abs=0.02)  # one history is longer by an item that is unknown, and left out


def test_what_is_written(made):
    workspace, export = made()
    base = json.loads((export / "export.json").read_text())["base_model"]
    assert base == {
        "name": workspace.source.name,
        "revision": None,
        "identity": workspace.source.identity,
        "copied": False,
    }
    assert not (export / "model").exists() and (export / "adapter/adapter_model.safetensors").is_file()
    for name in ("user", "item", "semantic"):
        assert len(list((export / "tables").glob(f"{name}-*.safetensors"))) == 2
    card = (export / "README.md").read_text()
    for words in (
        "sella-rec",
        workspace.source.identity,
        "| fuse | 1 | 1 |",
        "13 users",
        "licences of their own",
        "AUC all",
    ):
        assert words in card


def test_a_copied_base_model_is_used(made, tmp_path):
    workspace, _ = made()
    export_run(str(workspace.run), tmp_path / "whole", histories=False, with_model=True)
    rows = workspace.test_rows()
    model = load_file(tmp_path / "whole/model/model.safetensors")
    assert model.keys() == load_file(Path(workspace.source.name) / "model.safetensors").keys()
    recommender = sellarec.load(tmp_path / "whole")
    found = recommender.score(*named(workspace, rows)).scores
    np.testing.assert_allclose(found, stage_scores(workspace, rows), atol=1e-5)
    with pytest.raises(UserError, match="written without histories"):
        recommender.score(["1"], ["i1"])
    with pytest.raises(UserError, match="holds its base model itself"):
        sellarec.load(tmp_path / "whole", llm=workspace.source.name)


def test_a_wholly_tuned_model_is_always_copied_and_needs_no_base_model(decoder, titles, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(decoder, base)
    workspace = make_workspace(tmp_path / "workspace", "mf", base, titles, method="full")
    shutil.rmtree(base)
    export_run(str(workspace.run), tmp_path / "export", histories=True, with_model=False)
    tuned = load_file(workspace.artifact("adapt") / "model/model.safetensors")
    copied = load_file(tmp_path / "export/model/model.safetensors")
    assert copied.keys() == tuned.keys() and all(torch.equal(copied[name], weight) for name, weight in tuned.items())
    assert not (tmp_path / "export/adapter").exists()
    card = (tmp_path / "export/README.md").read_text()
    assert "whose weights were all tuned" in card and "all weights tuned (adapt-" in card
    rows, recommender = workspace.test_rows(), sellarec.load(tmp_path / "export")
    users, items, histories = named(workspace, rows)
    found = recommender.score(users, items, histories).scores
    np.testing.assert_allclose(found, stage_scores(workspace, rows), atol=1e-5)
    assert np.isfinite(recommender.explain(users[0], items[0], histories[0])["text_only"])


def test_learned_tokens_are_exported(decoder, titles, tmp_path):
    """Without a projection, and without the collaborative model, whose table of histories they know nothing of."""
    workspace = make_workspace(
        tmp_path / "workspace",
        "svdpp",
        decoder,
        titles,
        represent="learned",
        tokens=("user", "item"),
        train=("tables",),
    )
    export_run(str(workspace.run), tmp_path / "export", histories=True, with_model=False)
    assert {file.stem for file in (tmp_path / "export/tables").glob("*.json")} == {"user", "item"}
    assert not (tmp_path / "export/projection.safetensors").exists()
    assert "Collaborative model: none." in (tmp_path / "export/README.md").read_text()
    rows, recommender = workspace.test_rows(), sellarec.load(tmp_path / "export")
    users, items, histories = named(workspace, rows)
    found, expected = recommender.score(users, items, histories).scores, stage_scores(workspace, rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    explained = recommender.explain(users[0], items[0], histories[0])
    assert set(explained["tokens"]) == {"user", "item"} and explained["tokens"]["item"] != 0


def test_codes_are_exported(decoder, titles, tmp_path):
    """With the rows whose signs they are, of stage collab; an unseen user or item, and an unknown one, has none."""
    workspace = make_workspace(tmp_path / "workspace", "binary_mf", decoder, titles, **CODES)
    export_run(str(workspace.run), tmp_path / "export", histories=True, with_model=False)
    assert {file.stem for file in (tmp_path / "export/tables").glob("*.json")} == {"user", "item"}
    assert not (tmp_path / "export/projection.safetensors").exists()
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "export" / adapter).read_bytes() == (workspace.artifact("fuse") / adapter).read_bytes()
    card = (tmp_path / "export/README.md").read_text()
    assert "that it reads as codes in text (dotted)" in card and "Collaborative model: binary_mf." in card
    rows, recommender = workspace.test_rows(), sellarec.load(tmp_path / "export")
    users, items, histories = named(workspace, rows)
    found, expected = recommender.score(users, items, histories).scores, stage_scores(workspace, rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    unseen = f"{USERS - 1}"
    explained = {user: recommender.explain(user, "i2", ["i1", "i4"]) for user in ("1", unseen, "nobody")}
    for user, parts in explained.items():
        assert set(parts["tokens"]) == {"user", "item"} and parts["collab"] is None
        assert (abs(parts["tokens"]["user"]) > 1e-4) == (user == "1") and abs(parts["tokens"]["item"]) > 1e-4
    # by the adapter that fuse trained, not by adapt's, which evaluate scores "text-only" with
    by_fuse, by_adapt = (text_only(workspace, stage, rows.slice(0, 1)) for stage in ("fuse", "adapt"))
    found_alone = recommender.explain(users[0], items[0], histories[0])["text_only"]
    assert found_alone == pytest.approx(by_fuse, abs=1e-5) and abs(by_fuse - by_adapt) > 1e-3
    without = explained["1"]["score"] - explained["1"]["tokens"]["user"]
    assert explained[unseen]["score"] == pytest.approx(without, abs=1e-5)
    assert explained["nobody"]["score"] == pytest.approx(without, abs=1e-5)
    # nothing is left on the task
    assert recommender.score(["1"], ["i2"], [["i1", "i4"]]).scores == pytest.approx([explained["1"]["score"]], abs=1e-5)


def test_without_tokens_the_tuned_language_model_is_exported_alone(decoder, titles, tmp_path):
    """TALLRec: no rows, no projections; what is unknown counts as what has no history, or title."""
    workspace = make_workspace(tmp_path / "workspace", "mf", decoder, titles, tokens=(), train=("adapter",))
    export_run(str(workspace.run), tmp_path / "export", histories=True, with_model=False)
    assert not (tmp_path / "export/tables").exists() and not list((tmp_path / "export").glob("*.safetensors"))
    card = (tmp_path / "export/README.md").read_text()
    assert "with an adapter that reads book titles. It" in card and "Collaborative model: none." in card
    rows, recommender = workspace.test_rows(), sellarec.load(tmp_path / "export")
    users, items, histories = named(workspace, rows)
    found = recommender.score(users, items, histories).scores
    np.testing.assert_allclose(found, stage_scores(workspace, rows), atol=1e-5)
    explained = recommender.explain(users[0], items[0], histories[0])
    assert explained["tokens"] == {} and explained["collab"] is None
    assert explained["score"] == pytest.approx(explained["text_only"], abs=1e-6)
    assert recommender.score(["1"], ["nothing"]).unknown_item.tolist() == [True]


def test_another_base_model_is_refused(made, tmp_path, decoder):
    _, export = made()
    other = tmp_path / "other"
    other.mkdir()
    for file in decoder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert sellarec.load(export, llm=str(other)).score(["1"], ["i1"]).scores.shape == (1,)
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="isn't the base model that"):
        sellarec.load(export, llm=str(other))


def test_another_adapter_is_refused(made, tmp_path):
    """Of the same shapes, as one that was trained on another base model has them; and one that is gone."""
    _, export = made()
    shutil.copytree(export, tmp_path / "export")
    file = tmp_path / "export/adapter/adapter_model.safetensors"
    save_file({name: weight + 0.01 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="is not the adapter that was exported"):
        sellarec.load(tmp_path / "export")
    file.unlink()
    with pytest.raises(UserError, match="is not there; export again"):
        sellarec.load(tmp_path / "export")
    shutil.copytree(export / "adapter", tmp_path / "export/adapter", dirs_exist_ok=True)
    change_alpha(tmp_path / "export/adapter")
    with pytest.raises(UserError, match="is not the adapter that was exported"):
        sellarec.load(tmp_path / "export")


@pytest.mark.parametrize("name", ["projection.safetensors", "collab.safetensors"])
def test_other_projections_or_weights_are_refused(made, tmp_path, name):
    _, export = made("sasrec")
    shutil.copytree(export, tmp_path / "export")
    change_tensor(tmp_path / "export" / name)
    with pytest.raises(UserError, match=f"{name} is not what was exported"):
        sellarec.load(tmp_path / "export")
    (tmp_path / "export" / name).unlink()
    with pytest.raises(UserError, match=f"{name} is not there; export again"):
        sellarec.load(tmp_path / "export")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is missing: there is no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "can't be read"),
        (lambda folder: drop_tensor(folder / "adapter_model.safetensors"), "has shape None in the file"),
        (lambda folder: change_tensor(folder / "adapter_model.safetensors"), "isn't the one that stage adapt left"),
        (lambda folder: change_alpha(folder), "isn't the one that stage adapt left"),
    ],
    ids=["no folder", "no weights", "a tensor is missing", "a tensor has changed", "a setting has changed"],
)
def test_a_run_without_its_whole_adapter_is_not_exported(made, tmp_path, damage, words):
    workspace, _ = made()
    run = copy_run(workspace, tmp_path / "copy")
    damage(tmp_path / "copy/artifacts" / json.loads((run / "artifacts.json").read_text())["adapt"] / "adapter")
    with pytest.raises(UserError, match=words):
        export_run(str(run), tmp_path / "exports/out", histories=True, with_model=False)
    assert list((tmp_path / "exports").iterdir()) == []


def drop_tensor(file: Path) -> None:
    weights = load_file(file)
    weights.pop(min(weights))
    save_file(weights, file, {"format": "pt"})


def change_alpha(folder: Path) -> None:
    """The shapes stay, but what the adapter adds is four times as large."""
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"lora_alpha": 4 * settings["lora_alpha"]}))


def change_tensor(file: Path) -> None:
    weights = load_file(file)
    weights[min(weights)] += 1e-3
    save_file(weights, file, {"format": "pt"})


def test_lengths_that_differ_are_refused(recommender):
    with pytest.raises(UserError, match="2 users, 1 items: as many"):
        recommender.score(["1", "2"], ["i1"])
    with pytest.raises(UserError, match="1 users, 1 items, 2 histories"):
        recommender.score(["1"], ["i1"], [[], []])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"users": "17", "items": "i1"}, r"users: '17' stands where a list belongs: give \['17'\]"),
        ({"users": ["17"], "items": ["i1"], "histories": ["i2"]}, "histories: 'i2' stands"),
        ({"users": ["17"], "items": ["i1"], "histories": "i2"}, "histories: 'i2' stands"),
        ({"users": [17.0], "items": ["i1"]}, "users has 17.0, which is no id"),
        ({"users": ["17"], "items": [None]}, "items has None, which is no id"),
    ],
)
def test_what_is_no_list_of_ids_is_refused(recommender, given, words):
    """Their characters, or digits with a point, would count as unknown ids, or as others."""
    with pytest.raises(UserError, match=words):
        recommender.score(**given)


def test_explain_takes_a_single_pair(recommender):
    for given, words in ((("1", ["i1"]), "which is no id"), (("1", "i1", "i2"), "histories: 'i2' stands")):
        with pytest.raises(UserError, match=words):
            recommender.explain(*given)
    assert recommender.explain(1, "i1", ["i2"]) == recommender.explain("1", "i1", ["i2"])


def test_a_gpu_that_is_not_there_is_refused(made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device is cuda:0, but this process sees no GPU"):
        sellarec.load(made()[1], device="cuda:0")


@pytest.mark.parametrize(
    ("weights", "words"), [((0.0,), "counts 0 times in it"), ((0.5,), "is 0.5 times the language")]
)
def test_the_card_says_how_much_the_language_model_counts(made, weights, words):
    _, export = made("mf", tokens=("semantic",), collab_score=True, language_weights=weights)
    card = (export / "README.md").read_text()
    assert words in card and "a distilled vector of each item" in card
    assert "Its score is" not in (made()[1] / "README.md").read_text()


def copy_run(workspace: Workspace, folder: Path) -> Path:
    shutil.copytree(workspace.folder, folder)
    return folder / "runs/small"


def test_what_cannot_be_exported_is_refused(made, tmp_path):
    workspace, export = made()
    with pytest.raises(UserError, match="is there already"):
        export_run(str(workspace.run), export, histories=True, with_model=False)
    with pytest.raises(UserError, match="is no run's folder"):
        export_run(str(tmp_path), tmp_path / "out", histories=True, with_model=False)
    run = copy_run(workspace, tmp_path / "copy")
    marks = json.loads((run / "artifacts.json").read_text())
    (run / "artifacts.json").write_text(json.dumps({**marks, "fuse": "fuse-0123456789abcdef"}))
    (run / "../../artifacts/fuse-0123456789abcdef").mkdir()
    with pytest.raises(UserError, match="no artifact of fuse:"):
        export_run(str(run), tmp_path / "out", histories=True, with_model=False)
    (run / "../../artifacts/fuse-0123456789abcdef/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="run stage evaluate again"):
        export_run(str(run), tmp_path / "out", histories=True, with_model=False)
    (run / "artifacts.json").write_text(json.dumps({stage: marks[stage] for stage in ("prepare", "adapt")}))
    with pytest.raises(UserError, match="no artifact of fuse, evaluate:"):
        export_run(str(run), tmp_path / "out", histories=True, with_model=False)
    assert not (tmp_path / "out").exists()


def change_fuse(run: Path, **changes: str) -> None:
    """Other facts in the manifest of the run's fuse artifact."""
    fuse = run.parents[1] / "artifacts" / json.loads((run / "artifacts.json").read_text())["fuse"]
    manifest = json.loads((fuse / "manifest.json").read_text())
    (fuse / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_a_base_model_that_has_changed_since_the_run_is_refused(made, tmp_path):
    workspace, _ = made()
    run = copy_run(workspace, tmp_path / "copy")
    change_fuse(run, llm="0" * 64)
    with pytest.raises(UserError, match="aren't those that the run was made with"):
        export_run(str(run), tmp_path / "out", histories=True, with_model=False)


def test_a_prompt_template_that_has_changed_since_the_run_is_refused(made, tmp_path):
    workspace, _ = made()
    run = copy_run(workspace, tmp_path / "copy")
    change_fuse(run, templates="0" * 16)
    with pytest.raises(UserError, match="prompt template compact isn't as the run was made with"):
        export_run(str(run), tmp_path / "out", histories=True, with_model=False)


def test_an_export_that_fails_leaves_nothing(made, tmp_path):
    workspace, _ = made()
    run = copy_run(workspace, tmp_path / "copy")
    fuse = tmp_path / "copy/artifacts" / json.loads((run / "artifacts.json").read_text())["fuse"]
    next((fuse / "tables").glob("semantic-*")).unlink()
    with pytest.raises(FileNotFoundError):
        export_run(str(run), tmp_path / "exports/out", histories=True, with_model=False)
    assert list((tmp_path / "exports").iterdir()) == []


def test_in_bfloat16(made, tmp_path):
    workspace, export = made("sasrec")
    shutil.copytree(export, tmp_path / "export")
    config = (export / "config.yaml").read_text()
    (tmp_path / "export/config.yaml").write_text(config.replace("  dtype: float32", "  dtype: bfloat16", 1))
    rows = workspace.test_rows()
    recommender = sellarec.load(tmp_path / "export")
    found, expected = recommender.score(*named(workspace, rows)).scores, stage_scores(workspace, rows)
    assert 0 < np.abs(found - expected).max() < 0.2 and np.corrcoef(found, expected)[0, 1] > 0.995


def test_half_an_export_is_refused(made, tmp_path):
    _, export = made()
    shutil.copytree(export, tmp_path / "half")
    (tmp_path / "half/export.json").unlink()
    with pytest.raises(UserError, match="holds no whole export"):
        sellarec.load(tmp_path / "half")
    (tmp_path / "half/export.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(UserError, match="is an export of format 0"):
        sellarec.load(tmp_path / "half")


def test_in_a_fresh_process(made):
    """The package alone loads nothing; scoring starts neither Ray nor process groups."""
    _, export = made()
    program = """
import sys, sellarec
assert not {"torch", "numpy", "pyarrow", "ray"} & set(sys.modules)
found = sellarec.load(sys.argv[1]).score(users=["1", "2"], items=["i1", "i2"], histories=None)
import torch.distributed
assert "ray" not in sys.modules and "torchrec" not in sys.modules and not torch.distributed.is_initialized()
print(*found.scores.tolist())
"""
    done = subprocess.run([sys.executable, "-c", program, export], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = sellarec.load(export).score(["1", "2"], ["i1", "i2"]).scores
    assert [float(text) for text in done.stdout.split()] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_job(made, tmp_path):
    workspace, _ = made()
    command = [sys.executable, ROOT / "jobs/export.py", workspace.run, "--out", tmp_path / "out", "--no-histories"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sellarec.load(" in done.stdout and not (tmp_path / "out/histories").exists()
    again = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and len(again.stderr.splitlines()) == 1
