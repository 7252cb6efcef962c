"""Stage distil with a model that workers hold together: the vectors of each one that holds it whole, on any number of workers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import encoding_cases
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sellarec.artifacts import Place
from sellarec.config import Adapt, Distil, Prompt
from sellarec.language import llm as llms
from sellarec.language.adapt import build_adapt
from sellarec.language.distil import WRITTEN, ItemEncoder, SavedVectors
from sellarec.training.encoding import Encoding

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def adapter(models, titles, tmp_path_factory) -> Callable[[str], Path]:
    """An adapter that isn't fresh, of a model by name."""

    def make(name: str) -> Path:
        torch.manual_seed(5)
        source, prompt = llms.find_llm(str(models[name]), None), Prompt(template="compact")
        adapt = build_adapt(source, titles, prompt, "movie", Adapt(rank=2, targets=("all-linear",)))
        weights = {name: weight.detach() for name, weight in adapt.model.named_parameters() if weight.requires_grad}
        for weight in weights.values():
            torch.nn.init.normal_(weight, std=0.05)
        folder = tmp_path_factory.mktemp("adapt")
        adapt.save(folder, weights)
        return folder / "adapter"

    return make


def catalog(folder: Path, titles: list[str], number: int = 47) -> tuple[list[str], list[str]]:
    """The texts, and the files that they are in."""
    texts = [f"{titles[place % len(titles)]} {place}" for place in range(number)]
    files = []
    for part in np.array_split(np.arange(number), 2):
        files.append(str(folder / f"items-{part[0]}.parquet"))
        pq.write_table(pa.table({"item": part, "text": [texts[place] for place in part]}), files[-1], row_group_size=9)
    return texts, files


@pytest.mark.parametrize(
    ("name", "storage", "settings", "workers"),
    [
        ("llama", "float32", {}, 1),
        ("llama", "float32", {"layer": 1}, 2),
        ("llama", "bfloat16", {"pooling": "mean"}, 3),
        ("qwen2", "float32", {"max_tokens": 6}, 3),
        ("gpt2", "bfloat16", {"layer": -2}, 2),
    ],
)
def test_vectors_are_those_of_a_whole_model(gloo, models, adapter, titles, tmp_path, name, storage, settings, workers):
    texts, files = catalog(tmp_path, titles)
    distil = Distil(text="text", sharded=True, micro_batch=4, **settings)
    source, tuned = replace(llms.find_llm(str(models[name]), None), storage=storage), adapter(name)
    output = Place.of(str(tmp_path / "distil"))
    output.make()
    encoding = Encoding(files, len(texts), distil, source, tuned, "movie", output, "mark", part_rows=20)
    found = gloo.call(workers, encoding_cases.run, encoding, 11)
    whole = ItemEncoder(source, tuned, "movie", distil)
    vectors = SavedVectors(tmp_path / "distil", "mark").read(0, len(texts))
    np.testing.assert_allclose(vectors, whole.encode(texts), atol=2e-5)
    parts = sorted((tmp_path / "distil/vectors").iterdir())
    assert [pq.read_metadata(part).num_rows for part in parts] == [20, 20, 7]
    written = json.loads((tmp_path / "distil" / WRITTEN).read_text())
    assert written["texts_cut"] == whole.tokens(texts)[1].sum() and (written["texts_cut"] > 0) == (
        "max_tokens" in settings
    )
    held = [worker["held"] for worker in found]
    assert {worker["blocks"] for worker in held} == {2}
    assert [worker["read"] for worker in held] == [held[0]["whole"]] + [0] * (workers - 1), (
        "worker 0 alone reads the model"
    )
    assert sum(worker["own"] for worker in held) == held[0]["whole"]
    assert max(worker["own"] for worker in held) <= held[0]["whole"] / workers * 1.2
    assert [record["done"] for record in found[0]["told"]] == [11, 20, 31, 40, 47]
    assert all(not worker["told"] for worker in found[1:])


@pytest.mark.parametrize("workers", [1, 3])
def test_a_vector_that_is_not_finite_ends_all_workers(gloo, models, titles, tmp_path, workers):
    """Whichever worker has made it, none waits for it; nothing of the part is written."""
    folder = tmp_path / "model"
    model = llms.load_model(models["llama"])
    tokenizer = llms.load_tokenizer(models["llama"])
    (last,) = tokenizer.convert_tokens_to_ids([tokenizer.tokenize("Movie: 2001 7")[-1]])
    with torch.no_grad():
        model.get_input_embeddings().weight[last] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _, files = catalog(tmp_path, titles, 12)
    source, output = llms.find_llm(str(folder), None), Place.of(str(tmp_path / "distil"))
    settings = Distil(text="text", sharded=True)
    output.make()
    encoding = Encoding(files, 12, settings, source, None, "movie", output, "mark", part_rows=20)
    found = gloo.call(workers, encoding_cases.run, encoding, 50)
    assert {worker["failure"] for worker in found} == {
        "stage distil: the vector of one of the items 0 to 11 is not finite"
    }
    assert not (tmp_path / "distil" / WRITTEN).exists()


def test_parts_that_stand_are_kept_by_another_number_of_workers(gloo, models, adapter, titles, tmp_path):
    texts, files = catalog(tmp_path, titles)
    source, tuned, output = (
        llms.find_llm(str(models["llama"]), None),
        adapter("llama"),
        Place.of(str(tmp_path / "distil")),
    )
    settings = Distil(text="text", sharded=True)
    output.make()
    encoding = Encoding(files, 47, settings, source, tuned, "movie", output, "mark", part_rows=20, storage_timeout=0)
    broken = gloo.call(3, encoding_cases.run, encoding, 50, 1)
    assert all("OSError: the disk is full" in worker["failure"] for worker in broken)
    assert json.loads((tmp_path / "distil" / WRITTEN).read_text())["items"] == 20
    first = tmp_path / "distil/vectors/part-00000.parquet"
    stood = first.stat().st_mtime_ns
    found = gloo.call(2, encoding_cases.run, encoding, 50)
    assert [record["done"] for record in found[0]["told"]] == [40, 47] and first.stat().st_mtime_ns == stood
    expected = ItemEncoder(source, tuned, "movie", settings).encode(texts)
    np.testing.assert_allclose(SavedVectors(tmp_path / "distil", "mark").read(0, 47), expected, atol=2e-5)
    of_another = replace(encoding, mark="other")
    gloo.call(1, encoding_cases.run, of_another, 50)
    assert first.stat().st_mtime_ns > stood and SavedVectors(tmp_path / "distil", "other").width == 16
