"""Stages that train through the language model, step for step: one to three workers under FSDP2 against plain torch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gloo_workers
import language_cases
import numpy as np
import pytest
import torch
from language_cases import BATCH, STEPS, Case
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from sellarec.config import Adapt, Fuse, Pretrain
from sellarec.errors import UserError
from sellarec.language import llm as llms
from sellarec.training import dense

torch.set_num_threads(1)

COMPILING = 600
"""Seconds that a call may take in which layers are compiled."""

LOSS = {"rtol": 2e-5, "atol": 1e-6}
GRADIENTS = {"rtol": 1e-3, "atol": 2e-6}
WEIGHTS = {"rtol": 1e-3, "atol": 2e-4}
"""After STEPS steps of AdamW, which makes whole steps of the smallest gradients."""


def adapt(**changes: Any) -> Adapt:
    usual: dict[str, Any] = {"rank": 3, "alpha": 4, "targets": ("q_proj", "down_proj"), "micro_batch": 2, "clip": 1e3}
    return Adapt(**usual | {"learning_rate": 0.01, "beta2": 0.95} | changes)


GPT2 = {"targets": ("c_attn", "c_proj")}
FULL = {"method": "full", "learning_rate": 0.001}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "rslora, all-linear": ("llama", {"rslora": True, "targets": ("all-linear",)}, {}),
    "dora": ("llama", {"dora": True}, {}),
    "bfloat16": ("llama", {}, {"storage": "bfloat16"}),
    "bfloat16, gathered with the root": ("qwen2", {}, {"storage": "bfloat16", "min_block": 1 << 20}),
    "bfloat16, dora, checkpointed": (
        "qwen2",
        {"dora": True, "checkpoint_activations": True},
        {"storage": "bfloat16"},
    ),
    "checkpointed": ("llama", {"checkpoint_activations": True}, {}),
    "gpt2": ("gpt2", GPT2, {}),
    "gpt2, dora, bfloat16, checkpointed": (
        "gpt2",
        GPT2 | {"dora": True, "checkpoint_activations": True},
        {"storage": "bfloat16"},
    ),
    "full": ("llama", FULL, {}),
    "full, tied, stored bfloat16, checkpointed": (
        "qwen2",
        FULL | {"checkpoint_activations": True, "clip": 0.3},
        {"storage": "bfloat16"},
    ),
    "full, gpt2, gathered with the root": ("gpt2", FULL, {"min_block": 1 << 20}),
}


@pytest.fixture(scope="module")
def plain():
    """What plain torch finds of each case, made once."""
    return {}


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_workers_takes_the_steps_of_one_process(gloo, models, titles, plain, tmp_path, name, workers):
    """Losses, gradients and weights of each step; scores; and what was saved gives the same logits when PEFT, or Transformers,
    loads it."""
    model, settings, changes = CASES[name]
    case = Case(models[model], titles, adapt(**settings), **changes)
    if name not in plain:
        plain[name] = language_cases.train_plainly(case)
    twin = plain[name]
    found = gloo.call(workers, language_cases.train, replace(case, folder=tmp_path))
    for worker in found:
        np.testing.assert_allclose(worker["losses"], twin["losses"], err_msg="losses", **LOSS)
        assert worker["moments"] == {"torch.float32"}
        for step, gradients in enumerate(twin["gradients"]):
            assert set(worker["gradients"][step]) == set(gradients)
            for weight, gradient in gradients.items():
                told = f"gradient of {weight} in step {step}"
                np.testing.assert_allclose(worker["gradients"][step][weight], gradient, err_msg=told, **GRADIENTS)
        for weight, value in twin["weights"].items():
            assert worker["weights"][weight].dtype == np.float32
            # of a bias of attention's keys the gradient is 0 but for rounding, of which AdamW makes whole steps
            largest = np.abs([gradients[weight] for gradients in twin["gradients"]]).max(0)
            moved = largest > GRADIENTS["atol"]
            np.testing.assert_allclose(worker["weights"][weight][moved], value[moved], err_msg=weight, **WEIGHTS)
    np.testing.assert_allclose(found[0]["scores"]["score"], twin["scores"], rtol=1e-3, atol=2e-3)
    assert all(worker["checked"] is None for worker in found), found[0]["checked"]
    assert "has other weights than the trained model" in found[0]["spoilt"]
    assert all(worker["spoilt"] is None for worker in found[1:])


@pytest.mark.distributed
@pytest.mark.parametrize(("workers", "then", "changes"), [(1, 3, {"dora": True}), (3, 2, {"dora": True}), (3, 2, FULL)])
def test_a_checkpoint_goes_on_with_other_workers_as_if_nothing_had_been(
    gloo, models, titles, tmp_path, workers, then, changes
):
    """It holds what is trained, with its optimizer's state; the frozen weights come from the model's folder again."""
    settings = adapt(checkpoint_activations=True, **changes)
    case = Case(models["qwen2"], titles, settings, "bfloat16", checkpoint=tmp_path)
    whole = gloo.call(workers, language_cases.train, replace(case, save_at=2))[0]
    resumed = gloo.call(then, language_cases.train, replace(case, start_at=2))[0]
    np.testing.assert_allclose(resumed["losses"], whole["losses"][2:], **LOSS)
    for name, value in whole["weights"].items():
        np.testing.assert_allclose(resumed["weights"][name], value, err_msg=name, **WEIGHTS)


def pretrained_plainly(case: language_cases.Lines) -> tuple[list[float], torch.nn.Module]:
    """By Transformers' own loss of each line alone, with whole logits."""
    model, tokenizer = llms.load_model(case.model), llms.load_tokenizer(case.model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=case.settings.weight_decay)
    losses = []
    for step in range(STEPS):
        lines = [text + tokenizer.eos_token for text in case.texts[BATCH * step : BATCH * (step + 1)]]
        tokens = [tokenizer(line, return_tensors="pt")["input_ids"][:, : case.settings.context] for line in lines]
        counts = [one.shape[1] - 1 for one in tokens]
        found = [model(input_ids=one, labels=one).loss * count for one, count in zip(tokens, counts, strict=True)]
        loss = torch.stack(found).sum() / sum(counts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), case.settings.clip)
        optimizer.param_groups[0]["lr"] = case.settings.learning_rate * (0.5, 1.0, 1.0, 0.5)[step]
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_any_number_of_workers_pretrains_a_given_model_further_as_one_process(gloo, models, titles, tmp_path, name):
    """With warm-up, stable rate and decay; lines are cut to the context. What is saved is a model with its tokenizer."""
    texts = [f"{titles[number % 10]} and {titles[number % 7]}" for number in range(BATCH * STEPS)]
    schedule = {"schedule": "wsd", "warmup": 0.5, "decay": 0.5, "learning_rate": 0.002}
    case = language_cases.Lines(models[name], texts, Pretrain(context=12, micro_batch=2, **schedule))
    losses, model = pretrained_plainly(case)
    assert losses[-1] < losses[0]
    for workers in (1, 2, 3):
        found = gloo.call(workers, language_cases.pretrain, replace(case, folder=tmp_path / str(workers)))
        for worker in found:
            np.testing.assert_allclose(worker["losses"], losses, **LOSS)
        plain = {f"llm.{name}": weight.detach().numpy() for name, weight in model.named_parameters()}
        assert found[0]["weights"].keys() == plain.keys()
        for weight, value in plain.items():
            if not weight.endswith("c_attn.bias"):  # of keys its gradient is 0 but for rounding
                np.testing.assert_allclose(found[0]["weights"][weight], value, err_msg=weight, **WEIGHTS)
        source = llms.find_llm(str(tmp_path / str(workers) / "model"), None)
        again = llms.load_model(source.folder())
        for weight, value in again.named_parameters():
            np.testing.assert_array_equal(value.detach(), found[0]["weights"][f"llm.{weight}"], err_msg=weight)
        tokenizer = llms.load_tokenizer(source.folder())
        assert tokenizer(titles)["input_ids"] == llms.load_tokenizer(models[name])(titles)["input_ids"]


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_frozen_weights_in_bfloat16_take_half_the_memory(gloo, models, titles, workers):
    """And worker 0 alone has read them."""
    case = Case(models["llama"], titles, adapt())
    full, half = (
        gloo.call(workers, language_cases.train, replace(case, storage=storage)) for storage in ("float32", "bfloat16")
    )
    for one, other in zip(full, half, strict=True):
        assert other["frozen_bytes"] * 2 == one["frozen_bytes"]
    total = sum(weight.nbytes for weight in llms.load_model(models["llama"]).parameters())
    assert sum(worker["frozen_bytes"] for worker in full) == total
    first, *others = (worker["read_bytes"] for worker in full)
    assert first > total and not any(others)


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{"targets": ("q_proj",)}, FULL])
def test_an_output_layer_of_its_own_beside_a_config_that_ties_it(gloo, models, titles, tmp_path, changes):
    """Transformers then ties nothing, as the file says more than the config; on workers without the file's weights neither."""
    model = llms.load_model(models["qwen2"])
    assert model.config.tie_word_embeddings
    model.lm_head.weight = torch.nn.Parameter(1.5 * model.lm_head.weight.detach().flip(0))
    model.save_pretrained(tmp_path)
    llms.load_tokenizer(models["qwen2"]).save_pretrained(tmp_path)
    again = llms.load_model(tmp_path)
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    case = Case(tmp_path, titles, adapt(**changes))
    twin = language_cases.train_plainly(case)
    for worker in gloo.call(2, language_cases.train, case):
        np.testing.assert_allclose(worker["losses"], twin["losses"], **LOSS)
        for weight, value in twin["weights"].items():
            assert np.abs(worker["weights"][weight] - value).max() < 5e-3, weight


@pytest.mark.distributed
@pytest.mark.parametrize("changes", [{"dora": True}, FULL])
def test_all_in_bfloat16_trains_float32_weights(gloo, models, titles, tmp_path, changes):
    case = Case(models["llama"], titles, adapt(**changes), "bfloat16", "bfloat16", folder=tmp_path)
    found = gloo.call(2, language_cases.train, case)
    twin = language_cases.train_plainly(case)
    np.testing.assert_allclose(found[0]["losses"], twin["losses"], rtol=0.05)
    assert found[0]["moments"] == {"torch.float32"}
    assert found[0]["losses"] != pytest.approx(twin["losses"], rel=1e-5), "computed in bfloat16"
    assert all(weight.dtype == np.float32 for weight in found[0]["weights"].values())
    assert found[0]["checked"] is None


@pytest.mark.distributed
def test_a_layer_that_is_computed_again_draws_the_same_dropout(gloo, models, titles):
    case = Case(models["llama"], titles, adapt(dropout=0.4))
    again = replace(case, settings=adapt(dropout=0.4, checkpoint_activations=True))
    without, kept, checkpointed = (
        gloo.call(2, language_cases.train, run)[0] for run in (replace(case, settings=adapt()), case, again)
    )
    assert kept["losses"] == checkpointed["losses"] and kept["losses"] != without["losses"]
    for name, value in kept["weights"].items():
        np.testing.assert_array_equal(checkpointed["weights"][name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.distributed
def test_dropout_is_the_same_in_distribution_on_any_number_of_workers(gloo, models, titles):
    """Masks differ, but losses and gradients have the mean and the variance that one process gives them; were masks alike on all
    workers, their variance would be two or three times as large."""
    case, number = Case(models["llama"], titles, adapt(dropout=0.4)), 150
    of_one, *others = (gloo.call(workers, language_cases.draw_dropout, case, number)[0] for workers in (1, 2, 3))
    assert of_one["losses"].std() > 0.01 and not np.array_equal(of_one["losses"], others[0]["losses"])
    for found in others:
        for name in ("losses", "gradients"):
            one, other = of_one[name], found[name]
            deviation = np.sqrt((one.var(0) + other.var(0)) / number)
            apart = np.abs(one.mean(0) - other.mean(0)) / np.maximum(deviation, 1e-12)
            assert apart.max() < 5, "standard deviations of the difference of means"
            assert other.var(0).sum() == pytest.approx(one.var(0).sum(), rel=0.5)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "workers", "changes"), [("llama", 2, {}), ("gpt2", 1, {"checkpoint_activations": True})]
)
def test_compiled_layers_take_the_same_steps(gloo, models, titles, tmp_path, model, workers, changes, monkeypatch):
    """Gradients too; and the saved adapter, whose names are the same, is loaded by PEFT."""
    monkeypatch.setattr(gloo_workers, "PATIENCE", COMPILING)
    settings = changes | (GPT2 if model == "gpt2" else {})
    case = Case(models[model], titles, adapt(**settings))
    plain = gloo.call(workers, language_cases.train, case)[0]
    compiled = replace(case, settings=adapt(**settings, compile=True), folder=tmp_path)
    for worker in gloo.call(workers, language_cases.train, compiled):
        np.testing.assert_allclose(worker["losses"], plain["losses"], **LOSS)
        for step, gradients in enumerate(plain["gradients"]):
            assert worker["gradients"][step].keys() == gradients.keys()
            for name, gradient in gradients.items():
                np.testing.assert_allclose(worker["gradients"][step][name], gradient, err_msg=name, **GRADIENTS)
        assert worker["checked"] is None


@pytest.mark.distributed
@pytest.mark.slow
def test_fuse_takes_the_same_steps_with_compiled_layers(gloo, models, titles, adapter, tmp_path_factory, monkeypatch):
    """Gradients go through the frozen layers to projections and tables."""
    monkeypatch.setattr(gloo_workers, "PATIENCE", COMPILING)
    log = language_cases.save_tables(tmp_path_factory.mktemp("tables"))
    plain, compiled = (
        gloo.call(
            2,
            language_cases.train,
            Case(models["llama"], titles, Fuse(micro_batch=2, clip=1e3, compile=compiles), adapter=adapter("llama")),
            log,
        )[0]
        for compiles in (False, True)
    )
    np.testing.assert_allclose(compiled["losses"], plain["losses"], **LOSS)
    for name, value in plain["weights"].items():
        np.testing.assert_allclose(compiled["weights"][name], value, err_msg=name, **WEIGHTS)


def test_without_a_compiler_compiling_is_refused(models, tmp_path):
    layers = llms.decoder_layers(llms.load_model(models["llama"]))
    without = inductor.patch("cpp.cxx", (str(tmp_path / "no-compiler"),))
    with without, pytest.raises(UserError, match=r"compile is True, but there is no C\+\+ compiler"):
        dense.compile_blocks(layers)


@pytest.fixture(scope="module")
def adapter(models, titles, tmp_path_factory) -> Callable[[str], Path]:
    """Saves an adapter of a model: of qwen2 with DoRA."""

    def save(name: str) -> Path:
        task = language_cases.adapt_task(Case(models[name], titles, adapt(dora=name == "qwen2")))
        folder = tmp_path_factory.mktemp("adapt")
        trained = {name: weight.detach() for name, weight in task.model.named_parameters() if weight.requires_grad}
        task.save(folder, trained)
        return folder / "adapter"

    return save


@pytest.fixture(scope="module")
def rounded(models, tmp_path_factory) -> Path:
    """qwen2 with weights that bfloat16 can hold, saved in float32."""
    folder = tmp_path_factory.mktemp("rounded")
    model = llms.load_model(models["qwen2"], "bfloat16").float()
    model.save_pretrained(folder)
    llms.load_tokenizer(models["qwen2"]).save_pretrained(folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_fuse_takes_the_same_steps_with_stored_bfloat16_and_checkpointed(
    gloo, models, rounded, titles, adapter, plain, tmp_path_factory, workers
):
    """The language model is frozen there, and stays in evaluation mode; gradients go through it to projections and tables."""
    if "fuse" not in plain:
        log = language_cases.save_tables(tmp_path_factory.mktemp("tables"))
        settings = Fuse(micro_batch=BATCH, clip=1e3, unseen_dropout=0.3)
        case = Case(rounded, titles, settings, adapter=adapter("qwen2"))
        plain["fuse"] = log, gloo.call(1, language_cases.train, case, log)[0]
    log, twin = plain["fuse"]
    settings = Fuse(micro_batch=2, clip=1e3, unseen_dropout=0.3, checkpoint_activations=True)
    case = Case(models["qwen2"], titles, settings, storage="bfloat16", adapter=adapter("qwen2"))
    for worker in gloo.call(workers, language_cases.train, case, log):
        np.testing.assert_allclose(worker["losses"], twin["losses"], **LOSS)
        for name, value in twin["weights"].items():
            np.testing.assert_allclose(worker["weights"][name], value, err_msg=name, **WEIGHTS)
    assert twin["losses"][0] != twin["losses"][-1]


def peak_bytes(model: torch.nn.Module, file: Path) -> tuple[float, float, int]:
    """The loss and a gradient's norm of a step, and the most bytes of tensors that it held at once, beside the weights."""
    tokens = torch.arange(8 * 64).reshape(8, 64) % 64
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits.square().sum()
        loss.backward()
    profiled.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    norm = model.model.layers[0].self_attn.q_proj.weight.grad.norm().item()
    return loss.item(), norm, int(np.cumsum(changes).max())


def test_checkpointed_activations_take_a_fraction_of_the_memory(tmp_path):
    """Eight layers' activations, or their inputs and one layer's. Gradients of the weights, which all are trained here, are in
    both."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4
    )
    found = {}
    for how in ("kept", "checkpointed"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        if how == "checkpointed":
            dense.checkpoint_activations(llms.decoder_layers(model))
        found[how] = peak_bytes(model, tmp_path / how)
    assert found["checkpointed"][:2] == pytest.approx(found["kept"][:2], rel=1e-5)
    assert found["checkpointed"][2] < 0.35 * found["kept"][2], found
