"""Stage adapt: what is adapted, what is saved, and that Hugging Face's and PEFT's own loading gives the same logits."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import language_cases
import numpy as np
import pytest
import torch
from language_cases import Case
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from sellarec.config import Adapt, Config, Distil, Llm, Pretrain, Prompt
from sellarec.errors import UserError
from sellarec.language import llm as llms
from sellarec.language.adapt import TextTask, build_adapt, build_adapted
from sellarec.language.distil import ItemEncoder
from sellarec.language.pretrain import build_decoder
from sellarec.language.templates import read_template
from sellarec.run import settings_of

torch.set_num_threads(1)

TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj"),
}
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def case_of(models: dict[str, Path], titles: list[str], model: str, storage: str = "float32", **settings: Any) -> Case:
    return Case(models[model], titles, Adapt(**{"rank": 4, "targets": TARGETS[model]} | settings), storage)


def save(task: TextTask, folder: Path) -> Path:
    task.save(folder, {name: weight.detach() for name, weight in task.model.named_parameters() if weight.requires_grad})
    return folder


def adapted_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    return {name.rpartition(".")[2]: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def batch_of(task: TextTask) -> dict[str, torch.Tensor]:
    return task.collate(language_cases.prepared(task, 0), None)


@torch.no_grad()
def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of each prompt alone, at its last position."""
    prompts = [tokens[mask][None] for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True)]
    return torch.stack([model(input_ids=tokens).logits[0, -1] for tokens in prompts])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", TARGETS)
def test_the_saved_adapter_loads_elsewhere_and_gives_the_same_logits(models, titles, tmp_path, model, variant):
    task = language_cases.adapt_task(case_of(models, titles, model, **VARIANTS[variant]))
    task.model.eval()
    save(task, tmp_path)
    batch = batch_of(task)
    with torch.no_grad(), task.model.all_logits():
        logits = task.model(batch["tokens"], batch["mask"], {}, {})
    base = AutoModelForCausalLM.from_pretrained(models[model])
    without = logits_of(base, batch)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(plain, batch), logits, rtol=0, atol=1e-4)
    assert (without - logits).abs().max() > 0.1
    again = build_adapted(task.source, titles, language_cases.PROMPT, "movie", tmp_path / "adapter", "answer")
    torch.testing.assert_close(again.score(again.model, batch, {}), task.score(task.model, batch, {}))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(models[model])
    assert (config["use_rslora"], config["use_dora"]) == (variant == "rslora", variant == "dora")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", TARGETS)
def test_a_fresh_adapter_changes_nothing(models, titles, model, variant):
    case = case_of(models, titles, model, **VARIANTS[variant])
    task = build_adapt(llms.find_llm(str(case.model), None), titles, language_cases.PROMPT, "movie", case.settings)
    batch = batch_of(task)
    with torch.no_grad(), task.model.all_logits():
        logits = task.model(batch["tokens"], batch["mask"], {}, {})
    torch.testing.assert_close(logits_of(llms.load_model(case.model), batch), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 4), (True, 32 / 2)])
def test_rslora_divides_by_the_root_of_the_rank(models, titles, rslora, scale):
    task = language_cases.adapt_task(case_of(models, titles, "llama", rslora=rslora, alpha=32.0))
    assert {layer.scaling["default"] for layer in adapted_layers(task.model).values()} == {scale}


def test_dora_trains_the_norm_of_each_row(models, titles):
    case = case_of(models, titles, "gpt2", dora=True)
    task = build_adapt(llms.find_llm(str(case.model), None), titles, language_cases.PROMPT, "movie", case.settings)
    layer = adapted_layers(task.model)["c_attn"]
    vector = layer.lora_magnitude_vector["default"].weight
    assert vector.requires_grad and vector.shape == (48,)
    torch.testing.assert_close(vector.data, layer.get_base_layer().weight.norm(dim=0))  # Conv1D holds its transpose


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("qwen2", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_all_linear_is_every_layer_but_the_output_layer(models, titles, model, layers):
    task = language_cases.adapt_task(case_of(models, titles, model, targets=("all-linear",)))
    assert set(adapted_layers(task.model)) == layers


def test_layers_of_another_architecture_are_refused_naming_those_there_are(models, titles):
    source = llms.find_llm(str(models["gpt2"]), None)
    with pytest.raises(UserError, match=r"down_proj.*but the linear layers.*c_attn, c_fc, c_proj, lm_head"):
        build_adapt(source, titles, language_cases.PROMPT, "movie", Adapt())


def check(task: TextTask, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """As the engine does: what is trained stays float32, whatever the model computes in."""
    weights = {name: weight.detach() for name, weight in task.model.named_parameters() if weight.requires_grad}
    task = copy.deepcopy(task)
    for weight in task.model.eval().parameters():
        weight.data = weight.data.to(min(weight.dtype, dtype, key=lambda kind: kind.itemsize))
    llms.compute_in(task.model, dtype)
    task.check_saved(task.model, batch_of(task), folder, dtype, weights)


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", TARGETS)
def test_a_saved_adapter_that_lacks_a_tensor_ends_the_stage(models, titles, tmp_path, model, storage, computed):
    """PEFT only warns of it, and goes on with a fresh one, whose logits may be too close for bfloat16 to tell."""
    task = language_cases.adapt_task(case_of(models, titles, model, storage))
    save(task, tmp_path)
    check(task, tmp_path, computed)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has other weights than the trained model: 1 of \d+ trained ones, .*lora_B"):
        check(task, tmp_path, computed)


def test_a_model_that_caps_its_logits_takes_a_loss_over_tokens(models, titles, tmp_path):
    """That of the logits as it caps them."""
    shutil.copytree(models["llama"], tmp_path / "capped")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "final_logit_softcapping": 0.1}
    torch.manual_seed(0)
    vocabulary = len(llms.load_tokenizer(models["llama"]))
    Gemma2ForCausalLM(Gemma2Config(vocab_size=vocabulary, **sizes)).save_pretrained(tmp_path / "capped")
    settings = Adapt(rank=4, targets=("q_proj",), loss="sequence")
    task = build_adapt(llms.find_llm(str(tmp_path / "capped"), None), titles, Prompt(), "movie", settings)
    batch = task.collate(language_cases.prepared(task, 0), 0)
    found = task.loss(task.model, batch, {}, None)
    logits = task.model.llm(input_ids=batch["tokens"], attention_mask=batch["mask"].long()).logits
    assert logits.abs().max() <= 0.1
    tokens = int((batch["targets"] >= 0).sum())
    assert found.item() == pytest.approx(tokens * np.log(vocabulary), rel=0.02), "a cap of .1 leaves hardly a choice"


def test_a_saved_adapter_that_is_applied_otherwise_ends_the_stage(models, titles, tmp_path):
    task = language_cases.adapt_task(case_of(models, titles, "llama"))
    save(task, tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"lora_alpha": 4 * settings["lora_alpha"]}))
    with pytest.raises(UserError, match=r"gives other logits than the trained model: .* differ by up to"):
        check(task, tmp_path)


def full_task(models: dict[str, Path], titles: list[str], model: str, storage: str = "float32") -> TextTask:
    task = language_cases.adapt_task(Case(models[model], titles, Adapt(method="full"), storage))
    generator = torch.Generator().manual_seed(4)
    for weight in task.model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return task


@pytest.mark.parametrize("model", TARGETS)
def test_a_wholly_tuned_model_loads_elsewhere_and_gives_the_same_logits(models, titles, tmp_path, model):
    """Its weights are float32 however frozen ones are stored; the folder is all that distil and fuse need."""
    task = full_task(models, titles, model, "bfloat16")
    assert {weight.dtype for weight in task.model.parameters() if weight.requires_grad} == {torch.float32}
    assert task.facts()["trained_weights"] == task.facts()["weights"]
    task.model.eval()
    save(task, tmp_path)
    assert not (tmp_path / "adapter").exists()
    batch = batch_of(task)
    with torch.no_grad(), task.model.all_logits():
        logits = task.model(batch["tokens"], batch["mask"], {}, {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(logits_of(plain, batch), logits, rtol=0, atol=1e-4)
    assert (logits_of(llms.load_model(models[model]), batch) - logits).abs().max() > 0.1
    if model != "llama":
        assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    source = llms.find_llm(str(tmp_path / "model"), None)
    again = build_adapted(source, titles, language_cases.PROMPT, "movie", None, "answer")
    assert not any(weight.requires_grad for weight in again.model.parameters())
    torch.testing.assert_close(again.score(again.model, batch, {}), task.score(task.model, batch, {}))
    vectors = ItemEncoder(source, None, "movie", Distil()).encode(titles)
    with torch.no_grad():
        tokens = llms.load_tokenizer(models[model])(f"Movie: {titles[3]}", return_tensors="pt")["input_ids"]
        expected = plain.base_model(input_ids=tokens).last_hidden_state[0, -1]
    np.testing.assert_allclose(vectors[3], expected, atol=1e-5)


@pytest.mark.parametrize("model", TARGETS)
def test_a_wholly_tuned_model_that_was_saved_otherwise_ends_the_stage(models, titles, tmp_path, model):
    task = full_task(models, titles, model)
    save(task, tmp_path)
    check(task, tmp_path)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if ".1." in name)
    save_file(weights | {name: weights[name] * 1.2}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the model in .*, loaded with Transformers .* has other weights than"):
        check(task, tmp_path)


def test_an_adapter_without_its_magnitudes_is_refused(models, titles, tmp_path):
    task = language_cases.adapt_task(case_of(models, titles, "llama", dora=True))
    file = save(task, tmp_path) / "adapter" / "adapter_model.safetensors"
    save_file({name: weight for name, weight in load_file(file).items() if "magnitude" not in name}, file)
    with pytest.raises(UserError, match="lora_magnitude_vector"):
        llms.with_adapter(llms.load_model(models["llama"]), tmp_path / "adapter")


def test_an_adapter_that_is_not_there_is_refused(models, tmp_path):
    with pytest.raises(UserError, match="adapter"):
        llms.with_adapter(llms.load_model(models["llama"]), tmp_path / "adapter")


@pytest.mark.parametrize("model", TARGETS)
def test_stored_bfloat16_rounds_the_frozen_weights_and_nothing_else(models, titles, model):
    task = language_cases.adapt_task(case_of(models, titles, model, "bfloat16", dora=True))
    types: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for weight in task.model.parameters():
        types[weight.requires_grad].add(weight.dtype)
    assert types == {True: {torch.float32}, False: {torch.bfloat16}}
    full, half = llms.load_model(models[model]), llms.load_model(models[model], "bfloat16")
    for (name, weight), other in zip(full.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(weight.to(torch.bfloat16), other), name
    buffers = dict(full.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in half.named_buffers())


def test_how_frozen_weights_are_stored_has_no_part_in_pretraining():
    half, full = Config(llm=Llm(storage="bfloat16")), Config()
    assert settings_of("pretrain", half) == settings_of("pretrain", full)
    assert all(settings_of(stage, half) != settings_of(stage, full) for stage in ("adapt", "fuse", "evaluate"))
    half, full = (replace(config, adapt=Adapt(method="full")) for config in (half, full))
    assert settings_of("adapt", half) == settings_of("adapt", full), "nor where all weights are tuned"


@torch.no_grad()
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("model", TARGETS)
def test_vectors_are_computed_in_float32_of_stored_bfloat16(models, titles, tmp_path, model, variant):
    """As from a model of the same weights in float32, to the last bit; and the weights are held as they were, once it has run."""
    task = language_cases.adapt_task(case_of(models, titles, model, **VARIANTS[variant]))
    adapter = save(task, tmp_path) / "adapter"
    rounded = llms.load_model(models[model], "bfloat16").float()
    rounded.save_pretrained(tmp_path / "rounded")
    llms.load_tokenizer(models[model]).save_pretrained(tmp_path / "rounded")

    def encode(folder: Path, storage: str) -> tuple[np.ndarray, set[torch.dtype]]:
        encoder = ItemEncoder(llms.LlmSource(str(folder), None, "", storage), adapter, "movie", Distil())
        vectors = encoder.encode(titles)
        base = [weight for name, weight in encoder.decoder.named_parameters() if "lora_" not in name]
        return vectors, {weight.dtype for weight in base}

    vectors, types = encode(models[model], "bfloat16")
    again, full = encode(tmp_path / "rounded", "float32")
    assert (types, full) == ({torch.bfloat16}, {torch.float32})
    np.testing.assert_array_equal(vectors, again)
    assert not np.array_equal(vectors, encode(models[model], "float32")[0])


def test_no_pad_token_and_answers_of_several_tokens_are_handled(titles, tmp_path):
    """A vocabulary of bytes alone: the answers are told apart at their first letters."""
    build_decoder(
        titles, [], Pretrain(vocabulary=260, context=1024, hidden=16, layers=1, heads=2), 0, tmp_path / "model"
    )
    tokenizer = llms.load_tokenizer(tmp_path / "model")
    assert tokenizer.pad_token is None
    answers = read_template("compact").answers
    assert all(len(tokenizer(answer)["input_ids"]) > 2 for answer in answers)
    task = language_cases.adapt_task(Case(tmp_path / "model", titles, Adapt(rank=2)))
    segments = task.prompts.segments
    assert [tokenizer.decode([token]) for token in (segments.yes, segments.no)] == ["Y", "N"]
    check(task, save(task, tmp_path))
