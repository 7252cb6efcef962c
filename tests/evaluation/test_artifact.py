"""A trained model and the log that it is evaluated on."""

import json
from pathlib import Path

import numpy as np
import prepared
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
from safetensors.torch import save_file

from sellarec.collab.model import Sizes
from sellarec.collab.models.din import Model
from sellarec.collab.task import WEIGHTS
from sellarec.config import Collab, Config, Evaluation, to_yaml
from sellarec.data.log import FACTS_FILE, Log
from sellarec.errors import UserError
from sellarec.evaluation.artifact import check_ids, evaluate_artifact, read_trained

USERS, ITEMS = ("a", "b", "c"), ("x", "y", "z", "w")


def write_log(folder: Path, users=USERS, items=ITEMS, fingerprint: str | None = None) -> Log:
    """A log of these users and items, numbered in this order; of stage prepare where it has a fingerprint."""
    pairs = [(users[k % len(users)], items[k % len(items)]) for k in range(12)]
    user, item = zip(*pairs, strict=True)
    rows = {"user": user, "item": item, "label": [1, 0, 1] * 4, "timestamp": range(12)}
    log = prepared.prepare_into(folder, prepared.source_of(pa.table(rows)))
    assert log.users()["external_id"].to_pylist() == list(users)
    assert log.items()["external_id"].to_pylist() == list(items)
    if fingerprint is not None:
        (folder / FACTS_FILE).write_text(json.dumps({"fingerprint": fingerprint, "facts": log.facts}))
    return log


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Of an mf that was trained on prepare-1, which lies beside it."""
    folder = tmp_path / "artifacts" / "collab-2"
    for name, ids in (("user", USERS), ("item", ITEMS)):
        small.save_table(folder / "tables", name, np.zeros((len(ids), 4), np.float32))
    (folder / "config.yaml").write_text(to_yaml(Config(name="small", collab=Collab(dim=4))))
    (folder / "manifest.json").write_text(json.dumps({"stage": "collab", "inputs": {"prepare": "1"}}))
    write_log(folder.parent / "prepare-1", fingerprint="1")
    return folder


@pytest.mark.parametrize(
    ("users", "items", "named"),
    [
        (USERS, ("x", "q", "z", "w"), ["item 1 of the log", "is 'q'", "is 'y'"]),
        (USERS, ("x", "y", "w", "z"), ["item 2 of the log", "is 'w'", "is 'z'"]),
        (("a", "b", "d"), ITEMS, ["user 2 of the log", "is 'd'", "is 'c'"]),
    ],
)
def test_a_log_whose_ids_mean_others_is_refused_though_it_has_as_many(artifact, users, items, named, tmp_path):
    log = write_log(tmp_path / "other", users, items)
    with pytest.raises(UserError) as caught:
        evaluate_artifact(Evaluation(artifact=artifact, data=log.directory, out=tmp_path / "out.json"))
    found = str(caught.value)
    assert all(word in found for word in (*named, str(log.directory), str(artifact), "prepare-1")), found


def test_ids_of_a_later_part_are_compared_too(artifact, tmp_path):
    folders = [artifact.parent / "prepare-1", write_log(tmp_path / "other", items=("x", "y", "z", "q")).directory]
    for folder in folders:
        (path,) = (folder / "items").glob("part-*.parquet")
        whole = pq.read_table(path)
        pq.write_table(whole.slice(0, 3), path)
        pq.write_table(whole.slice(3), path.with_name("part-1.parquet"))
    with pytest.raises(UserError, match="item 3 of the log"):
        check_ids(read_trained(artifact), Log(folders[1], {}), ["item"])


def test_other_logs_with_the_same_ids_are_taken(artifact, tmp_path):
    trained = read_trained(artifact)
    for name, mark in (("again", None), ("of another run", "3")):
        check_ids(trained, write_log(tmp_path / name, fingerprint=mark), ["user", "item"])
    # a model without rows of users
    check_ids(trained, write_log(tmp_path / "others", ("a", "b", "d")), ["item"])


def test_without_the_log_that_it_was_trained_on_the_fingerprint_has_to_be_its(artifact, tmp_path):
    (artifact.parent / "prepare-1").rename(tmp_path / "moved")
    trained = read_trained(artifact)
    check_ids(trained, Log(tmp_path / "moved", {}), ["user", "item"])
    for name, mark, told in (("plain", None, "of no run"), ("other", "3", "prepare-3")):
        log = write_log(tmp_path / name, fingerprint=mark)
        with pytest.raises(UserError, match=f"trained on the log prepare-1, but that in .*{name} is {told}"):
            check_ids(trained, log, ["user", "item"])


def test_a_model_whose_score_is_no_product_is_refused_to_rank_the_catalog(tmp_path):
    """Before any worker is started."""
    folder = tmp_path / "artifacts" / "collab-2"
    for name, ids in (("user", USERS), ("item", ITEMS)):
        small.save_table(folder / "tables", name, np.zeros((len(ids), 4), np.float32))
    settings = Collab(model="din", dim=4, history=2, hidden=(3,))
    (folder / "config.yaml").write_text(to_yaml(Config(name="small", collab=settings)))
    (folder / "manifest.json").write_text(json.dumps({"stage": "collab", "inputs": {"prepare": "1"}}))
    log = write_log(folder.parent / "prepare-1", fingerprint="1")
    sizes = Sizes(len(USERS), len(ITEMS), 0.5)
    save_file(dict(Model(sizes, settings).state_dict()), folder / WEIGHTS)
    with pytest.raises(UserError, match=r"is a din, whose score is no product .* take --ranking candidates:100"):
        evaluate_artifact(Evaluation(artifact=folder, data=log.directory, out=tmp_path / "out.json", ranking="full"))
