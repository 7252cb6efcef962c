"""Language models: what is refused and why, adapters that come back as they were, scores that padding doesn't touch."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch._inductor import config as inductor
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sellarec import pipeline
from sellarec.command_line import parse
from sellarec.config import Adapt, Prompt
from sellarec.errors import UserError
from sellarec.language import llm as llms
from sellarec.language.adapt import build_adapt, build_adapted
from sellarec.language.prompts import SOFT, Prompts
from sellarec.language.scorer import PromptScorer, left_padded, trim
from sellarec.run import Run

torch.set_num_threads(1)

PROMPT = Prompt(template="compact")
WIDTHS = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**WIDTHS, "num_hidden_layers": 2} | changes))


@pytest.fixture
def copy(decoder, tmp_path) -> Path:
    """A copy of the embedded decoder's folder, to be spoilt."""
    return Path(shutil.copytree(decoder, tmp_path / "copy"))


def test_a_damaged_tokenizer_is_refused(copy):
    (copy / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(UserError, match=r"tokenizer in .* can't be read"):
        llms.load_tokenizer(copy)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", r"no weights \(\*\.safetensors.*config\.json.*save_pretrained"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused_naming_it(copy, missing, said):
    (copy / missing).unlink()
    with pytest.raises(UserError, match=said) as caught:
        llms.find_llm(str(copy), None)
    assert str(copy) in str(caught.value)


def test_pickled_weights_do_not_count(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights.*pytorch_model\.bin"):
        llms.find_llm(str(copy), None)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    for model in (str(tmp_path / "nothing"), "./nothing", "a/b/c"):
        with pytest.raises(UserError, match="there is no folder"):
            llms.find_llm(model, None)


def test_a_hub_id_without_a_network_is_refused():
    code = "from sellarec.language.llm import find_llm; find_llm('some/model', None)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sellarec.errors.UserError: --llm some/model is no folder here"), done.stderr


def test_a_source_is_told_by_its_files(copy, decoder):
    source, original = llms.find_llm(str(copy), None), llms.find_llm(str(decoder), None)
    assert source.folder() == copy
    assert source.identity == original.identity, "not by where it lies"
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert llms.find_llm(str(copy), None).identity != original.identity


def test_models_that_are_no_causal_ones_are_refused(tmp_path):
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**small, intermediate_size=16)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"BertModel, which is no causal language model"):
        llms.load_model(tmp_path / "bert")
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="T5ForConditionalGeneration, which is no causal"):
        llms.load_model(tmp_path / "t5")


def test_a_model_saved_without_its_output_layer_is_refused_unless_it_is_tied(tmp_path):
    """A fresh random layer in its place would give scores of no meaning."""
    for name, model in (("headless", LlamaModel), ("tied", LlamaForCausalLM)):
        config = LlamaConfig(**WIDTHS, num_hidden_layers=1, tie_word_embeddings=name == "tied")
        model(config).save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        llms.load_model(tmp_path / "headless")
    tied = llms.load_model(tmp_path / "tied")
    assert tied.lm_head.weight is tied.get_input_embeddings().weight


@pytest.mark.parametrize("content", ["{}", '{"model_type": "no-such-model"}', "{"])
def test_a_config_that_is_none_is_refused(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is no model's config"):
        llms.load_model(copy)


def test_weights_that_do_not_fit_their_config_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"lack 9 tensors .*layers\.2"):
        llms.load_model(copy)
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    with pytest.raises(UserError, match="can't be read as those of its config"):
        llms.load_model(copy)
    (copy / "config.json").write_text(json.dumps(config))
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="can't be read"):
        llms.load_model(copy)


def save_adapter(model: torch.nn.Module, folder: Path) -> Path:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"hidden_size": 32}, r"\(2, 32\) in the file and \(2, 16\) in the model"),
        ({"num_hidden_layers": 3}, r"layers\.2.*None in the model"),
        ({"num_hidden_layers": 1}, r"layers\.1.*None in the file"),
    ],
)
def test_the_adapter_of_another_base_is_refused(tmp_path, other, said):
    adapter = save_adapter(llama(**other), tmp_path / "adapter")
    with pytest.raises(UserError, match=said):
        llms.with_adapter(llama(), adapter)


def test_the_adapter_of_another_architecture_is_refused(tmp_path):
    adapter = save_adapter(llama(), tmp_path / "adapter")
    with pytest.raises(UserError, match="q_proj"):
        llms.with_adapter(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)), adapter)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="adapter_config"):
        llms.with_adapter(llama(), tmp_path / "empty")


def test_an_adapter_that_lacks_a_tensor_is_refused(tmp_path):
    file = save_adapter(llama(), tmp_path / "adapter") / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[1]
    del weights[name]
    save_file(weights, file)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        llms.with_adapter(llama(), tmp_path / "adapter")


def test_an_adapter_without_whole_weights_is_refused(tmp_path):
    file = save_adapter(llama(), tmp_path / "adapter") / "adapter_model.safetensors"
    said = rf"{tmp_path}/adapter has an adapter_config\.json, but its weights, adapter_model\.safetensors, can't be read \(.*copy"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=said):
        llms.with_adapter(llama(), tmp_path / "adapter")
    file.unlink()
    with pytest.raises(UserError, match=said):
        llms.with_adapter(llama(), tmp_path / "adapter")


def test_an_adapter_comes_back_frozen_and_as_it_was(tmp_path):
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(tmp_path / "base")
    tokens = torch.arange(12).reshape(2, 6)
    before = base(tokens).logits
    adapter = save_adapter(base, tmp_path / "adapter")
    adapted = base(tokens).logits  # peft puts its layers into the model itself
    again = llms.with_adapter(llms.load_model(tmp_path / "base"), adapter)
    assert torch.equal(again(tokens).logits, adapted)
    assert not torch.allclose(before, adapted)
    assert not any(weight.requires_grad for weight in again.parameters())
    assert not again.training


def rows_of(items: list[int], histories: list[list[int]]) -> pa.Table:
    return pa.table(
        {
            "row": range(len(items)),
            "item": items,
            "label": pa.array([i % 2 for i in items], pa.int8()),
            "history": pa.array(histories, pa.list_(pa.int64())),
            "weight": pa.array([1.0] * len(items), pa.float32()),
        }
    )


def batch_of(task: Any, rows: pa.Table, step: int | None) -> dict[str, torch.Tensor]:
    """The rows as the stream prepares them and the loop takes them."""
    return task.collate(task.prepare(rows, 0, np.full(len(rows), step or 0)), step)


ROWS = rows_of([0, 1, 2, 3], [[4, 5, 6, 8], [], [1], [0, 9, 8, 7, 6]])


def test_stage_adapt_saves_what_scoring_loads(decoder, titles, tmp_path):
    """The trained weights by name, as the training loop hands them to `save`; only LoRA matrices are trained."""
    source = llms.find_llm(str(decoder), None)
    task = build_adapt(source, titles, PROMPT, "movie", Adapt(rank=2, targets=("q_proj", "down_proj")))
    trained = {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    batch = batch_of(task, ROWS, 0)
    fresh = task.score(task.model, batch, {})
    for weight in trained.values():
        torch.nn.init.normal_(weight, std=0.3)
    score = task.score(task.model, batch, {})
    assert (score - fresh).abs().min() > 1e-4
    task.save(tmp_path, {name: weight.detach() for name, weight in trained.items()})
    again = build_adapted(source, titles, PROMPT, "movie", tmp_path / "adapter", "answer")
    torch.testing.assert_close(again.score(again.model, batch_of(again, ROWS, None), {}), score)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        decoder
    )


def test_targets_that_the_model_has_not_are_refused(decoder, titles):
    source = llms.find_llm(str(decoder), None)
    with pytest.raises(UserError, match=r"c_attn.*but the linear layers.*q_proj"):
        build_adapt(source, titles, PROMPT, "movie", Adapt(targets=("q_proj", "c_attn")))


def test_the_loss_is_the_logistic_one_of_the_score_over_rows_of_weight_one(decoder, titles):
    task = build_adapt(llms.find_llm(str(decoder), None), titles, PROMPT, "movie", Adapt(rank=2))
    batch = batch_of(task, ROWS, 0)
    score, label = task.score(task.model, batch, {}).detach().double(), batch["label"]
    losses = torch.log1p(torch.exp(torch.where(label == 1, -score, score)))
    assert task.loss(task.model, batch, {}, torch.clone).item() == pytest.approx(losses.sum().item(), rel=1e-5)
    batch["weight"][1] = 0
    assert task.targets(batch) == 3
    assert task.loss(task.model, batch, {}, torch.clone).item() == pytest.approx(
        losses[[0, 2, 3]].sum().item(), rel=1e-5
    )


@torch.no_grad()
def test_attention_is_computed_as_asked_for(models):
    tokens = torch.arange(3, 15)[None]
    found = {}
    for attention in ("auto", "sdpa", "eager"):
        model = llms.load_model(models["qwen2"], attention=attention).eval()
        assert model.config._attn_implementation == {"auto": "sdpa"}.get(attention, attention)
        found[attention] = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found["sdpa"], found["auto"], rtol=0, atol=0)
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=0, atol=1e-4)


def test_attention_that_cannot_be_had_is_refused(models, tmp_path):
    """Of a model that caps its attention's logits, which sdpa can't; by a package that isn't installed."""
    small: dict = WIDTHS | {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 8}
    Gemma2Config(**small, architectures=["Gemma2ForCausalLM"]).save_pretrained(tmp_path)
    llms.check_attention(tmp_path, None, "eager")
    llms.check_attention(models["llama"], None, "sdpa")
    with pytest.raises(UserError, match=r"llm.attention is sdpa, which can't be had here of .*take llm.attention auto"):
        llms.check_attention(tmp_path, None, "sdpa")
    assert importlib.util.find_spec("flash_attn") is None, "this environment has none"
    with pytest.raises(UserError, match=r"llm.attention is flash_attention_2, .*installed"):
        llms.check_attention(models["llama"], None, "flash_attention_2")


def test_attention_and_compiling_are_refused_before_any_stage(models, tmp_path):
    """Where there is no GPU, and no compiler."""
    flags = ["--llm", str(models["llama"]), "--workspace", str(tmp_path)]
    flash = ["--llm.attention", "flash_attention_2", "--llm.dtype", "bfloat16"]
    with pytest.raises(UserError, match="runs on GPUs alone, but 2 workers find no GPU each"):
        pipeline.check_stage(Run.of(parse([*flags, *flash])), "fuse")
    pipeline.check_stage(Run.of(parse([*flags, *flash])), "collab")
    this = Run.of(parse([*flags, "--fuse.compile", "True"]))
    without = inductor.patch("cpp.cxx", (str(tmp_path / "no-compiler"),))
    with without, pytest.raises(UserError, match=r"there is no C\+\+ compiler"):
        pipeline.check_stage(this, "fuse")
    pipeline.check_stage(this, "fuse")


def test_embeddings_of_another_width_are_refused_before_any_stage(decoder, tmp_path):
    config = OPTConfig(
        vocab_size=100, hidden_size=16, word_embed_proj_dim=8, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    llms.load_tokenizer(decoder).save_pretrained(tmp_path / "model")
    this = Run.of(parse(["--llm", str(tmp_path / "model"), "--workspace", str(tmp_path)]))
    with pytest.raises(UserError, match=r"input embeddings of .* are 8 wide, but its hidden states 16"):
        pipeline.check_stage(this, "fuse")
    pipeline.check_stage(this, "collab")


@pytest.fixture(scope="module", params=["embedded", "lm-stories260k", "lm-babyllama"])
def folder(request) -> Path:
    if request.param == "embedded":
        return request.getfixturevalue("decoder")
    return request.getfixturevalue("sellarec_data") / request.param / "hf"


@pytest.mark.parametrize("kind", ["text", "fused"])
@torch.no_grad()
def test_padding_does_not_touch_a_rows_logits(folder, titles, kind):
    """Each prompt alone, all in one batch, and with more padding than any row needs; also against a plain forward pass."""
    model = llms.load_model(folder)
    prompts = Prompts(llms.load_tokenizer(folder), titles, PROMPT, "movie", llms.context_length(model.config), kind)
    scorer = PromptScorer(model)
    histories = ROWS["history"].combine_chunks()
    items = ROWS["item"].to_numpy()
    vectors = {name: torch.randn(len(items), model.config.hidden_size) * 0.1 for name in SOFT if kind == "fused"}
    batch = left_padded(prompts.build(items, histories))
    slots = {name: batch[f"{name}_position"] for name in vectors}
    together = scorer(batch["tokens"], batch["mask"], slots, vectors)
    assert together.shape == (4, model.config.vocab_size) and together.dtype == torch.float32
    wider = scorer(
        torch.nn.functional.pad(batch["tokens"], (5, 0), value=3),
        torch.nn.functional.pad(batch["mask"], (5, 0)),
        {name: at + 5 for name, at in slots.items()},
        vectors,
    )
    torch.testing.assert_close(wider, together, rtol=0, atol=1e-5)
    for row in range(len(items)):
        alone = left_padded(prompts.build(items[row : row + 1], histories.slice(row, 1)))
        single = scorer(
            alone["tokens"],
            alone["mask"],
            {name: alone[f"{name}_position"] for name in slots},
            {name: vector[row : row + 1] for name, vector in vectors.items()},
        )
        torch.testing.assert_close(together[row], single[0], rtol=0, atol=1e-5)
        if kind == "text":
            torch.testing.assert_close(single[0], model(alone["tokens"]).logits[0, -1], rtol=0, atol=1e-5)


def oldest() -> OpenAIGPTLMHeadModel:
    """A model whose class names no layers, and without a cache of keys and values."""
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize(
    "make", [oldest, lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)).eval()]
)
@torch.no_grad()
def test_padding_does_not_move_the_positions_of_a_model_that_learns_them(make):
    model = make()
    tokens = torch.randint(50, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    together = PromptScorer(model)(tokens, mask, {}, {})
    for row, prompt in enumerate((tokens[:1, 3:], tokens[1:])):
        torch.testing.assert_close(together[row], model(prompt).logits[0, -1], rtol=0, atol=1e-5)


def test_a_model_that_names_no_layers_and_has_no_cache():
    """Its layers are the one list that has their number; what prompts begin with can't be read once for all."""
    model = oldest()
    assert not model._no_split_modules and list(llms.decoder_layers(model)) == list(model.transformer.h)
    assert not PromptScorer(model).shares
    llms.check_layers(model, "it")


def test_layers_that_cannot_be_told_are_refused_before_any_stage(decoder, tmp_path, monkeypatch):
    model = oldest()
    model.also = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))
    assert llms.decoder_layers(model) == [], "either list might be that of the layers"
    monkeypatch.setattr(LlamaForCausalLM, "_no_split_modules", None)
    this = Run.of(parse(["--llm", str(decoder), "--workspace", str(tmp_path)]))
    pipeline.check_stage(this, "fuse")
    monkeypatch.setattr(llms, "decoder_layers", lambda model: [])
    with pytest.raises(UserError, match=r"the decoder layers of .* \(LlamaForCausalLM\) can't be told"):
        pipeline.check_stage(this, "fuse")


def test_trim_cuts_what_is_padding_in_every_row():
    tokens = torch.arange(10).reshape(2, 5)
    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    cut, kept, padding = trim(tokens, mask)
    assert padding == 2 and cut.tolist() == [[2, 3, 4], [7, 8, 9]] and kept.tolist() == mask[:, 2:].tolist()
    assert trim(tokens, torch.ones(2, 5, dtype=torch.bool))[2] == 0


def test_the_blocks_are_the_decoder_layers(decoder):
    model = llms.load_model(decoder)
    assert list(PromptScorer(model).blocks) == list(model.model.layers)
    assert llms.context_length(model.config) == 256
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert list(PromptScorer(adapted).blocks) == list(model.model.layers)


def test_pretraining_text_is_scored_alike_however_it_is_padded(decoder):
    """The summed loss of texts of different lengths is the sum of each text's own."""
    from sellarec.config import Pretrain
    from sellarec.language.pretrain import build_pretrain

    task = build_pretrain(decoder, Pretrain(context=256))
    texts = ["the harbor sea", "x", "golden anchor and tide ; detective alibi crime"]

    def loss(*chosen: str) -> tuple[float, float]:
        weight = pa.array(np.ones(len(chosen), np.float32))
        batch = batch_of(task, pa.table({"text": list(chosen), "weight": weight}), 0)
        return task.loss(task.model, batch, {}, torch.clone).item(), task.targets(batch).item()

    singles = [loss(text) for text in texts]
    assert loss(*texts) == pytest.approx(tuple(np.sum(singles, axis=0)), rel=1e-5)
    tokenizer = llms.load_tokenizer(decoder)
    assert singles[0][1] == len(tokenizer(texts[0])["input_ids"]), "each token but the start, and the end token"


def test_of_a_text_of_several_lines_each_step_reads_one(decoder):
    from sellarec.language.texts import Lines

    tokenizer = llms.load_tokenizer(decoder)
    lines = ["the harbor sea", "x", "golden anchor and tide ; detective alibi crime"]
    whole = [tokenizer(line + tokenizer.eos_token)["input_ids"] for line in lines]
    rows = pa.table({"text": ["\n".join(lines)] * 60})
    prepare = Lines(tokenizer.backend_tokenizer, tokenizer.eos_token, 256).prepare
    found = prepare(rows, 0, np.arange(60))["tokens"].to_pylist()
    assert all(found.count(tokens) > 5 for tokens in whole) and all(tokens in whole for tokens in found)
    assert prepare(rows.slice(0, 7), 3, np.arange(7))["tokens"].to_pylist() == found[:7], "a function of text and step"
    short = Lines(tokenizer.backend_tokenizer, tokenizer.eos_token, 4).prepare
    assert short(rows, 0, np.arange(60))["tokens"].to_pylist() == [tokens[:4] for tokens in found]


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_masked_language_model_is_refused(kind, decoder, tmp_path):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for name in (f"{kind}ForMaskedLM", "BertLMHeadModel" if kind == "Bert" else "RobertaForCausalLM"):
        getattr(transformers, name)(config).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}, which is no causal language model"):
            llms.load_model(tmp_path / name)


def test_a_model_without_position_ids_is_refused(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=100, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bloom has no max_position_embeddings"):
        llms.load_model(tmp_path)


def test_gpt2_is_a_causal_model_with_a_context(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(
        tmp_path
    )
    assert llms.context_length(llms.load_model(tmp_path).config) == 64
