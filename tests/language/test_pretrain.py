"""Stage pretrain for a given model: what it takes, what is refused, and that later stages read its result."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from prepared import prepare_into, rules, source_of
from transformers import ByT5Tokenizer

from sellarec.ahead import check_prompts
from sellarec.config import DECODER_LINEAR, Config, Llm, Pretrain
from sellarec.errors import UserError
from sellarec.language import llm as llms
from sellarec.language.pretrain import build_pretrain, make_lines
from sellarec.pipeline import _check_name, origins_of
from sellarec.run import Run, facts_of, inputs_of

torch.set_num_threads(1)

LATER = ("adapt", "distil", "fuse", "evaluate")


@pytest.fixture
def copied(models, tmp_path) -> Path:
    """The folder of a small model, to change."""
    return Path(shutil.copytree(models["llama"], tmp_path / "copied"))


def tokens_of(folder: Path, settings: Pretrain, texts: list[str]) -> list[list[int]]:
    task = build_pretrain(folder, settings)
    return task.prepare(pa.table({"text": texts}), 0, np.zeros(len(texts), int))["tokens"].to_pylist()


def test_lines_end_with_the_models_own_token_and_are_cut_to_the_shorter_context(copied, titles):
    tokenizer = llms.load_tokenizer(copied)
    whole = [tokenizer(title + tokenizer.eos_token)["input_ids"] for title in titles]
    assert tokens_of(copied, Pretrain(), titles) == whole
    assert tokens_of(copied, Pretrain(context=5), titles) == [tokens[:5] for tokens in whole]
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 7}))
    assert tokens_of(copied, Pretrain(), titles) == [tokens[:7] for tokens in whole]
    longer = sum(len(tokens) > 7 for tokens in whole)
    texts = ["\n".join(titles[:3]), *titles[3:]]
    assert make_lines(copied, Pretrain())[0].cut(texts) == (len(titles), longer) and 0 < longer < len(titles)


def test_padding_and_truncation_that_a_tokenizer_was_saved_with_are_none_of_the_lines(copied, titles):
    expected = tokens_of(copied, Pretrain(), titles)
    saved = json.loads((copied / "tokenizer.json").read_text())
    assert saved["padding"] is None and saved["truncation"] is None
    padding = {"strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None}
    saved["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    saved["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (copied / "tokenizer.json").write_text(json.dumps(saved))
    assert tokens_of(copied, Pretrain(), titles) == expected


def test_a_tokenizer_without_an_end_token_is_refused(copied):
    tokenizer = llms.load_tokenizer(copied)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(copied)
    with pytest.raises(UserError, match=r"has no end token, .* leave out pretrain.continued"):
        build_pretrain(copied, Pretrain())


def test_a_tokenizer_of_python_code_is_refused(copied):
    for file in copied.glob("tokenizer*"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(copied)
    with pytest.raises(UserError, match=r"no form for the tokenizers library .* leave out pretrain.continued"):
        build_pretrain(copied, Pretrain())


@pytest.fixture
def run(models, tmp_path) -> Run:
    """A run that pre-trains a given model further, with its prepared log."""
    config = Config(
        workspace=str(tmp_path / "workspace"), name="run", llm=Llm(model=str(models["gpt2"])), pretrain=Pretrain(continued=True)
    )  # fmt: skip
    run = Run.of(config)
    run.marks = dict.fromkeys(("prepare", "pretrain", "adapt", "collab", "distil", "align", "fuse"), "x")
    folder = run.artifact("prepare").local()
    folder.mkdir(parents=True)
    rows = {"user": [0, 1] * 6, "item": [0, 1, 2] * 4, "label": pa.array([0, 1] * 6, pa.int8()), "timestamp": range(12)}
    prepare_into(folder, source_of(pa.table(rows)), rules())
    return run


def test_later_stages_take_the_model_that_was_pretrained_further(run, models):
    """By its fingerprint, of which the given model is a part."""
    plain = Run.of(replace(run.config, pretrain=Pretrain()))
    plain.marks = run.marks
    for stage in LATER:
        assert set(inputs_of(stage, run.config)) - set(inputs_of(stage, plain.config)) == {"pretrain"}
        assert "llm" in facts_of(plain, stage) and "llm" not in facts_of(run, stage)
    assert facts_of(run, "pretrain")["llm"] == run.given_llm.identity and "words" not in facts_of(run, "pretrain")
    assert run.llm().name == str(run.artifact("pretrain").local() / "model")
    assert plain.llm().name == str(models["gpt2"])


def test_a_runs_name_belongs_to_whether_its_model_was_pretrained_further(run):
    run.place.write_json("settings.json", _check_name(run, origins_of(run, LATER)))
    run.place.write_json("artifacts.json", {"adapt": "adapt-x"})
    _check_name(run, origins_of(run, LATER))
    other = Run.of(replace(run.config, pretrain=Pretrain()))
    with pytest.raises(UserError, match=r"llm .*, pre-trained further then"):
        _check_name(other, origins_of(other, LATER))


def test_prompts_that_the_given_model_has_no_room_for_are_refused_before_it_is_trained(run, copied):
    check_prompts(run, run.given_llm.folder())
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    with pytest.raises(UserError, match="context 12"):
        check_prompts(run, copied)


def test_the_embedded_decoders_linear_layers_are_those_that_adapt_can_name(decoder):
    layers = llms.linear_layers(llms.load_model(decoder))
    assert {name.rpartition(".")[2] for name in layers} == set(DECODER_LINEAR)
