"""What language models compute: near what torch counts, by hand for a recipe, and in hours of GPUs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from sellarec import pipeline
from sellarec.command_line import parse
from sellarec.config import Adapt
from sellarec.language import cost
from sellarec.language import llm as llms
from sellarec.language.memory import Shape, phases, shape_of, use_of
from sellarec.run import Run

SHAPE = Shape(
    weights=10_000_000,
    adapter=100_000,
    layer=2_000_000,
    layers=4,
    hidden=500,
    features=10_000,
    keys=400,
    vocabulary=30_000,
)
ROWS = {"train": 1000, "valid": 300, "test": 200, "users": 70, "items": 50}


def counted(model: torch.nn.Module, rows: int, tokens: int, train: bool) -> int:
    """What torch counts of products of matrices, of which attention's are over whole prompts."""
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % 50
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        if train:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_operations_are_those_that_torch_counts(models, name):
    """With and without gradients, which go through the first layer too. Biases, norms and causal masks are what they may differ
    by."""
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "down_proj"]
    settings = Adapt(rank=3, targets=tuple(targets))
    shape = shape_of(llms.find_llm(str(models[name]), None), settings)
    lora = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")
    model = get_peft_model(llms.load_model(models[name], attention="eager"), lora)
    model.enable_input_require_grads()
    for tokens in (4, 12):
        attention = 2.0 * shape.layers * shape.hidden * tokens * tokens * 2
        read = cost.operations(shape, 2, tokens, 1) + attention
        assert counted(model, 2, tokens, train=False) == pytest.approx(read, rel=0.08)
        trained = cost.training_operations(shape, 2, tokens, 1, "adapter", False) + 3 * attention
        assert counted(model, 2, tokens, train=True) == pytest.approx(trained, rel=0.08)


def test_a_recipes_costs_by_hand():
    config = parse(["demo", "--adapt.batch", "100", "--adapt.max-steps", "25", "--adapt.epochs", "3", "--llm", "x"])
    config = dataclasses.replace(config, adapt=dataclasses.replace(config.adapt, validate_every=0.5, valid_rows=200))
    found = cost.cost_of("adapt", config, SHAPE, 128, ROWS)
    # 10 steps an epoch, 25 of 30; every 5 of them 200 rows are scored
    assert (found.steps, found.trained, found.scored, found.tokens) == (25, 2500, 5 * 200, 128)
    linear, attention, logits = 2 * 8_100_000 * 128, 2 * 4 * 500 * 128 * 128, 2 * 500 * 30_000
    trained = 2500 * (2 * linear + 3 * attention + 2 * 100_000 * 128 + 2 * logits)
    assert found.operations == pytest.approx(trained + 1000 * (linear + attention + logits))
    again = dataclasses.replace(config, adapt=dataclasses.replace(config.adapt, checkpoint_activations=True))
    more = cost.cost_of("adapt", again, SHAPE, 128, ROWS).operations - found.operations
    assert more == pytest.approx(2500 * (linear + attention))
    sequence = dataclasses.replace(config, adapt=dataclasses.replace(config.adapt, loss="sequence"))
    more = cost.cost_of("adapt", sequence, SHAPE, 128, ROWS).operations - found.operations
    assert more == pytest.approx(2500 * logits * (3 * 128 - 2))
    chosen = dataclasses.replace(config, fuse=dataclasses.replace(config.fuse, valid_rows=60))
    among = dataclasses.replace(chosen, fuse=dataclasses.replace(chosen.fuse, language_weights=(0.0, 1.0)))
    assert (
        cost.cost_of("fuse", among, SHAPE, 128, ROWS).scored
        == cost.cost_of("fuse", chosen, SHAPE, 128, ROWS).scored + 60
    )
    distil, evaluate = (cost.cost_of(stage, config, SHAPE, 128, ROWS) for stage in ("distil", "evaluate"))
    assert (distil.scored, distil.tokens, distil.dtype) == (50, 64, "float32")
    profiles = parse(
        ["demo", "--align.side", "both", "--align.user-vectors", "profile", "--distil.profile-tokens", "99"]
    )
    distil = cost.cost_of("distil", profiles, SHAPE, 128, ROWS)
    assert (distil.scored, distil.tokens) == (50 + 70, 99)
    assert (evaluate.scored, evaluate.steps) == (2 * 200, 0)


def test_hours_are_operations_over_what_the_gpus_reach():
    one = cost.Cost("adapt", 1, 1, 0, 1, 312e12 * 3600 * 0.5, "bfloat16")
    assert one.hours(cost.GPUS["A100-80GB"], 1, 0.5) == pytest.approx(1)
    assert one.hours(cost.GPUS["A100-80GB"], 4, 0.25) == pytest.approx(0.5)
    half = dataclasses.replace(one, dtype="float32")
    assert half.hours(cost.GPUS["A100-80GB"], 1, 0.5) == pytest.approx(16)
    (line,) = cost.hours_in_words([one, dataclasses.replace(one, stage="fuse")], ["A100-80GB"], 1, 0.5)
    assert line == "1 x A100-80GB: 2.00 hours (adapt 1.00, fuse 1.00)"


def test_the_fewest_gpus_are_those_that_hold_model_and_tables():
    config = parse(["demo", "--llm", "x"])
    stages = ("adapt", "fuse")
    alone = cost.memory_of(config, SHAPE, 128, stages, 1)
    use = dataclasses.replace(use_of("adapt", config, 128), on_gpu=True, workers=1)
    assert alone == max(sum(parts.values()) for parts in phases(SHAPE, use).values())
    assert cost.memory_of(config, SHAPE, 128, stages, 4) < alone
    gpu = cost.GPUS["L4"]
    assert cost.fewest_workers(config, SHAPE, 128, stages, 0, gpu) == 1
    assert cost.fewest_workers(config, SHAPE, 128, stages, 100 << 30, gpu) == 8
    # 80 GB in float32, of which a GPU sees a layer at a time; stage distil takes it whole
    large = dataclasses.replace(SHAPE, weights=20 * 10**9, layer=2 * 10**8, layers=100)
    assert cost.fewest_workers(config, large, 128, stages, 0, gpu) == 8
    assert cost.fewest_workers(config, large, 128, (*stages, "distil"), 0, gpu) is None


@pytest.mark.parametrize("recipes", [("collm-ml-1m", "sella-official"), ("collm-amazon-book", "sella-official-book")])
def test_the_published_setting_is_reckoned_to_fit_one_gpu_of_80_gb(tmp_path, recipes):
    """As it was trained, of a model of Qwen2-7B's shape, beside its tables."""
    settings = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18_944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
        "max_position_embeddings": 32_768, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = parse([*recipes, "--llm", str(tmp_path)])
    shape = shape_of(llms.LlmSource(str(tmp_path), None, ""), config.adapt)
    assert 7.6e9 < shape.weights < 7.7e9
    for stage in ("adapt", "distil", "fuse", "evaluate"):
        assert cost.memory_of(config, shape, 32_768, (stage,), 1) < 70 << 30, stage


def test_a_run_with_a_given_model_tells_its_costs_first(models, tmp_path, capsys):
    arguments = ["collm-ml-1m", "sella-official", "--llm", str(models["llama"]), "--adapt.targets", "all-linear"]
    config = parse([*arguments, "--workers", "3", "--workspace", str(tmp_path)])
    this = Run.of(config)
    this.marks["prepare"] = "0" * 16
    assert pipeline._tell_cost(this, ("prepare", "adapt", "collab"))
    told = capsys.readouterr().out
    assert "cost      adapt     254 steps, 32,512 prompts trained on" in told and "of at most 256 tokens" in told
    assert "3 x A100-80GB: " in told and "3 x H100: " in told and "assumed: 30% of the peak" in told
    assert "fuse" not in told
    unknown = Run.of(dataclasses.replace(config, data=dataclasses.replace(config.data, expected=None)))
    assert not pipeline._tell_cost(unknown, ("adapt",)) and not capsys.readouterr().out
    embedded = Run.of(parse(["demo", "--workspace", str(Path(tmp_path))]))
    assert pipeline._tell_cost(embedded, ("adapt",)) and not capsys.readouterr().out
