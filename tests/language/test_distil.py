"""Stage distil: the vector of each text is what the model gives for it alone; what stands is kept; other vectors are refused."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import prepared
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from sellarec import stages
from sellarec.artifacts import Place
from sellarec.checks import check
from sellarec.config import Adapt, Config, Distil, Llm, Pretrain, Prompt
from sellarec.errors import UserError
from sellarec.language import distil as distil_stage
from sellarec.language import llm as llms
from sellarec.language.adapt import build_adapt
from sellarec.language.distil import (
    WRITTEN,
    ItemEncoder,
    SavedVectors,
    distil,
    read_profiles,
    what_stands,
    write_profiles,
)
from sellarec.language.scorer import base_model
from sellarec.run import Run, settings_of
from sellarec.training.cluster import Cluster
from sellarec.training.progress import Console, ProgressBoard

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def adapter(decoder, titles, tmp_path_factory) -> Path:
    """An adapter that isn't fresh."""
    torch.manual_seed(5)
    adapt = build_adapt(llms.find_llm(str(decoder), None), titles, Prompt(template="compact"), "movie", Adapt(rank=2))
    weights = {name: weight.detach() for name, weight in adapt.model.named_parameters() if weight.requires_grad}
    for weight in weights.values():
        torch.nn.init.normal_(weight, std=0.05)
    folder = tmp_path_factory.mktemp("adapt")
    adapt.save(folder, weights)
    return folder / "adapter"


def alone(decoder: Path, adapter: Path, text: str, layer: int) -> np.ndarray:
    """Hidden states [T, H] of one text, without padding."""
    model = llms.with_adapter(llms.load_model(decoder), adapter)
    ids = llms.load_tokenizer(decoder)(text)["input_ids"][:64]
    with torch.no_grad():
        output = base_model(model).base_model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[layer][0].numpy()


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layer", [-1, 2, 1, 0, -3])
def test_vectors_are_those_of_each_text_alone(decoder, adapter, titles, layer, pooling):
    settings = Distil(layer=layer, pooling=pooling, prompt="a {noun}, {Noun}: {text}!", micro_batch=3)
    found = ItemEncoder(llms.find_llm(str(decoder), None), adapter, "movie", settings).encode(titles)
    assert found.dtype == np.float32 and found.shape == (len(titles), 16)
    for title, vector in zip(titles, found, strict=True):
        states = alone(decoder, adapter, f"a movie, Movie: {title}!", layer)
        np.testing.assert_allclose(vector, states[-1] if pooling == "last" else states.mean(0), atol=1e-5)
    # the final normalisation is in the last layer's states
    if layer == 2:
        last = ItemEncoder(
            llms.find_llm(str(decoder), None), adapter, "movie", Distil(pooling=pooling, prompt=settings.prompt)
        )
        np.testing.assert_allclose(last.encode(titles), found, atol=1e-5)


def test_the_default_is_the_last_state_of_noun_and_title(decoder, adapter, titles):
    found = ItemEncoder(llms.find_llm(str(decoder), None), adapter, "movie", Distil()).encode(titles)
    for title, vector in zip(titles, found, strict=True):
        np.testing.assert_allclose(vector, alone(decoder, adapter, f"Movie: {title}", -1)[-1], atol=1e-5)


def test_what_a_tokenizer_puts_behind_texts_is_not_read(decoder, adapter, titles, monkeypatch):
    """It would be the last token of those texts that aren't cut."""
    expected = ItemEncoder(llms.find_llm(str(decoder), None), adapter, "movie", Distil()).encode(titles)
    tokenizer = llms.load_tokenizer(decoder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("a")["input_ids"][-1] == 1
    monkeypatch.setattr(llms, "load_tokenizer", lambda folder: tokenizer)
    found = ItemEncoder(llms.find_llm(str(decoder), None), adapter, "movie", Distil()).encode(titles)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("limit", [3, 6])
def test_longer_texts_are_cut_to_the_setting_and_counted(decoder, adapter, titles, limit):
    source, tokenizer = llms.find_llm(str(decoder), None), llms.load_tokenizer(decoder)
    encoder = ItemEncoder(source, adapter, "movie", Distil(max_tokens=limit))
    whole = tokenizer([f"Movie: {title}" for title in titles])["input_ids"]
    ids, cut = encoder.tokens(titles)
    assert ids == [tokens[:limit] for tokens in whole]
    assert cut.tolist() == [len(tokens) > limit for tokens in whole] and cut.any()
    for title, vector in zip(titles, encoder.encode(titles), strict=True):
        np.testing.assert_allclose(vector, alone(decoder, adapter, f"Movie: {title}", -1)[:limit][-1], atol=1e-5)


def test_how_much_is_read_is_part_of_the_result():
    of_setting = {limit: settings_of("distil", Config(distil=Distil(max_tokens=limit))) for limit in (64, 65)}
    assert of_setting[64] != of_setting[65] and of_setting[64] == settings_of("distil", Config())


@pytest.mark.parametrize("cut", [0, 1200])
def test_cut_texts_are_told(monkeypatch, tmp_path, cut, capsys):
    this = Run.of(Config(workspace=str(tmp_path), distil=Distil(max_tokens=30)))
    this.cluster, this.marks = (
        Cluster(local=True, gpus=False),
        dict.fromkeys(("prepare", "pretrain", "adapt", "distil"), "x"),
    )
    monkeypatch.setattr(Run, "log", lambda self: SimpleNamespace(paths=lambda table: [], facts={"noun": "movie"}))
    monkeypatch.setattr(stages, "check_model", lambda *_: None)
    monkeypatch.setattr(stages, "_encode", lambda *_: {"items": 34567, "texts_cut": cut})
    assert stages.carry_out(this, "distil")["texts_cut"] == cut
    told = capsys.readouterr().out
    assert ("1,200 of 34,567 texts were longer" in told and "distil.max_tokens 30" in told) == (cut > 0), told


def test_little_is_padded(decoder, adapter):
    """Short and long texts by turns: in micro-batches by length, no short text is padded to a long one's length."""
    encoder = ItemEncoder(llms.find_llm(str(decoder), None), adapter, "movie", Distil(micro_batch=4))
    shapes = []
    handle = encoder.decoder.register_forward_pre_hook(
        lambda module, arguments, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    encoder.encode(["x", "the silent sailor and the golden whale of the very long winter"] * 8)
    handle.remove()
    lengths = [length for _, length in shapes]
    assert [rows for rows, _ in shapes] == [4, 4, 4, 4]
    assert lengths[0] == lengths[1] < lengths[2] == lengths[3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "{noun}"}, "{text} once is needed"),
        ({"prompt": "{text} {text}"}, "{text} once is needed"),
        ({"prompt": "{text} {title}"}, "with the fields text, title"),
        ({"prompt": "{text"}, "braces don't close"),
        ({"layer": 4}, "distil.layer is 4, but the embedded model (pretrain.layers) has 3 layers: -4 to 3"),
        ({"layer": -5}, "distil.layer is -5"),
        ({"max_tokens": 0}, "distil.max_tokens is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, words):
    with pytest.raises(UserError) as refusal:
        check(Config(distil=Distil(**changes)))
    assert words in str(refusal.value)


def test_layers_of_the_embedded_model_are_taken():
    for layer in (-4, 0, 3):
        check(Config(distil=Distil(layer=layer)))
    check(Config(distil=Distil(layer=5), pretrain=Pretrain(layers=5)))


def test_a_layer_that_the_given_model_lacks_is_refused_before_any_stage(decoder, tmp_path):
    from sellarec.pipeline import run

    config = Config(distil=Distil(layer=3), llm=Llm(model=str(decoder)), workspace=str(tmp_path), name="run", workers=1)
    with pytest.raises(UserError, match=r"distil.layer is 3, but .* has 2 layers: -3 to 2"):
        run(Run.of(config))
    assert not (tmp_path / "runs").exists()


def write_vectors(folder: Path, vectors: np.ndarray, mark: str, width: int | None = None) -> None:
    (folder / "vectors").mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(vectors)), 2)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors[part].reshape(-1)), vectors.shape[1])
        pq.write_table(pa.table({"item": part, "vector": column}), folder / f"vectors/part-{number:05d}.parquet")
    facts = {"fingerprint": mark, "parts": 2, "items": len(vectors), "width": width or vectors.shape[1]}
    (folder / WRITTEN).write_text(json.dumps(facts))


def test_vectors_of_another_model_or_width_or_number_are_refused(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    write_vectors(tmp_path / "good", vectors, "mark")
    saved = SavedVectors(tmp_path / "good", "mark")
    np.testing.assert_array_equal(saved.read(3, 8), vectors[3:8])
    with pytest.raises(UserError, match="and of other: delete it") as refusal:
        write_vectors(tmp_path / "other", vectors, "other")
        SavedVectors(tmp_path / "other", "mark")
    assert "of fingerprint mark" in str(refusal.value)
    with pytest.raises(UserError, match=r"9 vectors of 8 numbers .* holds 9 of 4"):
        write_vectors(tmp_path / "width", vectors, "mark", width=8)
        SavedVectors(tmp_path / "width", "mark")
    part = tmp_path / "good/vectors/part-00001.parquet"
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(
        UserError, match=r"the vectors in .*good can't be read \(.*delete it, and run stage distil again"
    ):
        SavedVectors(tmp_path / "good", "mark")
    part.unlink()
    with pytest.raises(UserError, match=r"should hold 9 vectors .* holds 5 of 4"):
        SavedVectors(tmp_path / "good", "mark")
    (tmp_path / "good" / WRITTEN).unlink()
    with pytest.raises(UserError, match=f"holds no {WRITTEN}"):
        SavedVectors(tmp_path / "good", "mark")


def test_a_profile_names_what_a_user_liked_last_in_train(tmp_path):
    """Of rows in time; without what has no title, and without users that are left with nothing."""
    rows = {
        "user": ["a", "b", "a", "a", "c", "a", "d", "b", "b", "a"],
        "item": ["x", "y", "y", "z", "z", "w", "v", "x", "w", "v"],
        "label": pa.array([1, 1, 1, 0, 0, 1, 1, 1, 1, 1], pa.int8()),
        "timestamp": list(range(10)),
        "split": ["train"] * 8 + ["valid", "test"],
    }
    items = pa.table({"item": ["x", "y", "z", "w", "v"], "title": ["Ex", "Why; not", "Zed", "Double", ""]})
    (tmp_path / "log").mkdir()
    log = prepared.prepare_into(
        tmp_path / "log", prepared.source_of(pa.table(rows), items), prepared.rules(split="given")
    )
    write_profiles(log, 2, tmp_path / "texts.parquet", tmp_path / "users.parquet")
    ids = log.users(["user", "external_id"]).to_pylist()
    number = {row["external_id"]: row["user"] for row in ids}
    texts, users = pq.read_table(tmp_path / "texts.parquet"), pq.read_table(tmp_path / "users.parquet")["user"]
    assert texts["item"].to_pylist() == [0, 1] and users.to_pylist() == sorted([number["a"], number["b"]])
    found = dict(zip(users.to_pylist(), texts["text"].to_pylist(), strict=True))
    assert found == {number["a"]: "Why; not; Double", number["b"]: "Why; not; Ex"}


def test_a_log_without_any_profile_is_refused(tmp_path):
    rows = {
        "user": ["a", "b", "a", "b"],
        "item": ["x", "y", "y", "x"],
        "label": pa.array([0, 1, 1, 1], pa.int8()),
        "timestamp": list(range(4)),
        "split": ["train", "train", "valid", "test"],
    }
    items = pa.table({"item": ["x", "y"], "title": ["Ex", ""]})
    (tmp_path / "log").mkdir()
    source = prepared.source_of(pa.table(rows), items)
    log = prepared.prepare_into(tmp_path / "log", source, prepared.rules(split="given"))
    with pytest.raises(UserError, match=r"no user has liked an item with a title.*--align.user-vectors liked"):
        write_profiles(log, 2, tmp_path / "texts.parquet", tmp_path / "users.parquet")


def test_users_without_a_profile_have_zeros(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    write_vectors(tmp_path / "users", vectors, "mark")
    pq.write_table(pa.table({"user": [1, 4, 5]}), tmp_path / "users" / "users.parquet")
    read = read_profiles(tmp_path, "mark")
    whole = np.zeros((8, 4), np.float32)
    whole[[1, 4, 5]] = vectors
    for start, stop in ((0, 8), (0, 1), (2, 4), (4, 6), (5, 8), (6, 7)):
        np.testing.assert_array_equal(read(start, stop), whole[start:stop])
    with pytest.raises(UserError, match="of fingerprint other"):
        read_profiles(tmp_path, "other")


def test_the_encoder_computes_where_it_is_told_though_a_gpu_is_seen(decoder, adapter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    source = llms.find_llm(str(decoder), None)
    assert ItemEncoder(source, adapter, "movie", Distil()).encode(["a title"]).shape == (1, 16)
    elsewhere = ItemEncoder(source, adapter, "movie", Distil(), device="meta")
    assert {weight.device.type for weight in elsewhere.decoder.parameters()} == {"meta"}


@pytest.mark.parametrize(("gpus", "device", "taken"), [(False, "cpu", None), (True, "cuda", 1)])
def test_actors_compute_where_the_driver_decided(gpus, device, taken, decoder, adapter, tmp_path, monkeypatch):
    import ray.data

    monkeypatch.setattr(torch.cuda, "is_available", lambda: not gpus)
    read = MagicMock()
    dataset = read.return_value.rename_columns.return_value.filter.return_value.repartition.return_value
    dataset.map_batches.return_value.iter_batches.return_value = []
    monkeypatch.setattr(ray.data, "read_parquet", read)
    pq.write_table(pa.table({"item": [0], "title": ["a"]}), tmp_path / "items.parquet")
    with pytest.raises(RuntimeError, match="0 items have vectors"):
        distil(
            [str(tmp_path / "items.parquet")], Distil(), llms.find_llm(str(decoder), None), adapter, "movie", 2, gpus,
            Place.of(str(tmp_path / "distil")), "mark", None,
        )  # fmt: skip
    asked = dataset.map_batches.call_args.kwargs
    encoder = inspect.signature(ItemEncoder).bind(*asked["fn_constructor_args"][2:])
    assert (encoder.arguments["device"], asked["num_gpus"]) == (device, taken)


@pytest.mark.ray
@pytest.mark.slow
def test_what_stands_is_kept(decoder, adapter, titles, tmp_path, monkeypatch):
    """After parts of a killed distillation, half a file among them, the rest is encoded; parts of another fingerprint go."""
    import ray

    from sellarec.training.cluster import connect

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "items").mkdir()
    texts = [f"{title} {number}" for number in range(25) for title in titles]
    files = []
    for number, part in enumerate(np.array_split(np.arange(len(texts)), 2)):
        files.append(str(tmp_path / f"items/part-{number:05d}.parquet"))
        pq.write_table(
            pa.table({"item": part, "title": [texts[place] for place in part]}), files[-1], row_group_size=50
        )
    connect(1, Console(), Place.of(str(tmp_path)), device="cpu")
    try:
        board = ray.remote(num_cpus=0)(ProgressBoard).remote()
        output = Place.of(str(tmp_path / "distil"))
        source = llms.find_llm(str(decoder), None)

        lengths = [len(ids) for ids in llms.load_tokenizer(decoder)([f"Movie: {text}" for text in texts])["input_ids"]]
        settings = Distil(max_tokens=int(np.median(lengths)))
        cut = np.array(lengths) > settings.max_tokens
        assert 0 < cut[:120].sum() < cut.sum() < 250

        def run(mark: str) -> dict:
            stood = what_stands(output, mark)["items"]
            distil(files, settings, source, adapter, "movie", 1, False, output, mark, board, part_rows=60)
            written = what_stands(output, mark)
            return {name: written[name] for name in ("items", "width", "texts_cut")} | {"items_that_stood": stood}

        facts = {"items": 250, "width": 16, "texts_cut": cut.sum()}
        assert run("mark") == {**facts, "items_that_stood": 0}
        folder = tmp_path / "distil"
        parts = sorted((folder / "vectors").iterdir())
        assert [pq.read_metadata(part).num_rows for part in parts] == [60, 60, 60, 60, 10]
        vectors = SavedVectors(folder, "mark").read(0, 250)
        expected = ItemEncoder(source, adapter, "movie", settings).encode(texts)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)

        # as a kill leaves it: two parts told of, one more that isn't, half of a fourth
        for part in parts[3:]:
            part.unlink()
        (folder / "vectors/.part-00003.parquet").write_bytes(b"PAR1")
        told = {"fingerprint": "mark", "parts": 2, "items": 120, "texts_cut": int(cut[:120].sum()), "width": 16}
        (folder / WRITTEN).write_text(json.dumps(told))
        stood = {part: part.stat().st_mtime_ns for part in parts[:2]}
        assert run("mark") == {**facts, "items_that_stood": 120}
        assert stood == {part: part.stat().st_mtime_ns for part in parts[:2]}
        np.testing.assert_allclose(SavedVectors(folder, "mark").read(0, 250), vectors, atol=1e-5)
        assert run("mark")["items_that_stood"] == 250

        assert run("another")["items_that_stood"] == 0
        assert all(part.stat().st_mtime_ns > time for part, time in stood.items())
        SavedVectors(folder, "another")

        # as many parts as leave little to be begun anew, also of a catalog that one actor takes at once
        monkeypatch.setattr(distil_stage, "FEWEST_ROWS", 8)
        distil(files, settings, source, adapter, "movie", 1, False, Place.of(str(tmp_path / "fine")), "mark", board)
        sizes = [pq.read_metadata(part).num_rows for part in sorted((tmp_path / "fine/vectors").iterdir())]
        assert sizes == [16] * 15 + [10]
        np.testing.assert_allclose(SavedVectors(tmp_path / "fine", "mark").read(0, 250), vectors, atol=1e-5)
    finally:
        ray.shutdown()
