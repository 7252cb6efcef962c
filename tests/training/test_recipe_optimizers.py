"""Recipes of published methods: the optimizers that step their stages, beside what was published.

The settings, models and losses are the recipe's; the data are some dozen rows, and the language model a small one.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import recipe_cases
import torch
from prepared import prepare_into, rules, source_of
from published import SELLA, SELLA_BOOK
from recipe_cases import Case
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from sellarec.command_line import parse

pytestmark = pytest.mark.distributed

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
)

CLASSES = {"adam": "Adam", "adamw": "AdamW"}

STEPS = 254
"""Of a whole training, by which its learning rates are compared at some."""

AT = (0, 127)


@pytest.fixture(scope="module")
def inputs(decoder, tmp_path_factory) -> Path:
    """What the stages read: a log, a language model with a ChatML template, and the adapter of stage adapt."""
    folder = tmp_path_factory.mktemp("recipe")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "llama")
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"hidden_size": recipe_cases.WIDTH, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 1024, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "llama")
    generator = np.random.default_rng(4)
    count = 16
    rows = {
        "user": generator.integers(0, 5, count),
        "item": generator.integers(0, 9, count),
        "label": pa.array(generator.random(count) < 0.6, pa.int8()),
        "timestamp": np.arange(count),
    }
    (folder / "log").mkdir()
    prepare_into(folder / "log", source_of(pa.table(rows)), rules(history_cap=3))
    task = recipe_cases.task_of(Case("adapt", parse(RECIPE), folder, AT, STEPS))
    task.save(folder, {name: weight.detach() for name, weight in task.model.named_parameters() if weight.requires_grad})
    return folder


RECIPE = ["collm-ml-1m", "sella-official"]


BOOK = ["collm-amazon-book", "sella-official-book"]


# a step of fuse for books has 1,024 prompts
@pytest.mark.parametrize(
    ("stage", "workers", "recipe"),
    [
        pytest.param(
            stage,
            workers,
            recipe,
            id=f"{stage}-{workers}-{name}",
            marks=[pytest.mark.slow] if (stage, name) == ("fuse", "books") else [],
        )
        for stage, workers in (("adapt", 1), ("collab", 2), ("align", 2), ("fuse", 1))
        for name, recipe in (("movies", RECIPE), ("books", BOOK))
    ],
)
def test_sella_official_is_stepped_by_the_published_optimizers(gloo, inputs, stage, workers, recipe):
    """Class, betas, weight decay, and the learning rate of each step; and that is what training.json says of them."""
    published = SELLA[stage] | (SELLA_BOOK[stage] if recipe == BOOK else {})
    found = gloo.call(workers, recipe_cases.train, Case(stage, parse(recipe), inputs, AT, STEPS))
    kinds = {"dense": "", "tables": "table_"}
    expected = {kind for kind, beginning in kinds.items() if f"{beginning}optimizer" in published}
    for worker in found:
        assert worker["classes"].keys() == expected
        for kind in expected:
            of_kind = {name: published[kinds[kind] + name] for name in ("optimizer", "learning_rate", "weight_decay")}
            assert worker["classes"][kind] == CLASSES[of_kind["optimizer"]]
            betas = (0.9, published.get("beta2", 0.999))
            for step, taken in zip(AT, worker["taken"][kind], strict=True):
                rate = pytest.approx(
                    factor(published, step) * of_kind["learning_rate"], abs=0.01 * of_kind["learning_rate"]
                )
                assert taken == {"lr": rate, "betas": betas, "weight_decay": of_kind["weight_decay"]}
            said = worker["recorded"][kind]
            assert said.startswith(CLASSES[of_kind["optimizer"]]) and f"betas {betas}" in said
            for name in ("learning_rate", "weight_decay"):
                assert f"{name.replace('_', ' ')} {of_kind[name]}," in said
        assert worker["recorded"]["schedule"].startswith(published.get("schedule", "constant"))
        if "clip" in published:
            assert worker["recorded"]["dense"].endswith(f"largest gradient norm {published['clip']}")


def factor(published: dict[str, Any], step: int) -> float:
    """What the peak learning rate is multiplied by at a step, by transformers' schedules, with which the published code trains.
    Those begin a warm-up at 0, a step before ours, and without one go down from the first step on, ours from the second."""
    if published.get("schedule", "constant") == "constant":
        return 1.0
    warmup = math.ceil(published["warmup"] * STEPS)
    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    (theirs,) = get_cosine_schedule_with_warmup(unused, warmup, STEPS).lr_lambdas
    return theirs(step + 1 if step < warmup else step)
