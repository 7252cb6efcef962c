"""Steps of LoRA tuning of a language model on prompts: the training loop's engine, plain Transformers and PEFT, and the Trainer.

All sides take the same global batches through the same micro-batches of rows, from the same weights, with the same loss (next-
token cross-entropy of the answer's tokens) and optimizer, so their losses agree.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel
from sides.engine import engine_of, steps_of
from sides.language import model_flops, model_folder, prompt_rows, titles, write_model
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sellarec.config import Adapt, Prompt
from sellarec.language.adapt import TextTask, build_adapt
from sellarec.language.llm import find_llm

ROWS, ADAPTER = "rows.parquet", "adapter"


def settings_of(work: dict[str, Any]) -> Adapt:
    return Adapt(
        loss="answer-tokens", batch=work["batch"], micro_batch=work["micro_batch"], rank=work["rank"],
        checkpoint_activations=work["checkpoint_activations"], compile=work["compile"],
    )  # fmt: skip


def task_of(work: dict[str, Any], folder: Path) -> TextTask:
    prompt = Prompt(template=work["template"], history=work["history"], max_tokens=work["max_tokens"])
    source = replace(find_llm(model_folder(work, folder), None), storage=work["dtype"])  # as the other sides load it
    return build_adapt(source, titles(work["items"]), prompt, "movie", settings_of(work))


def inputs(work: dict[str, Any], folder: Path) -> None:
    """The model, an adapter to start from, and the prompts of all steps of a repetition. Histories are as skewed as users are:
    most are short, some full."""
    write_model(work, folder)
    task, number = task_of(work, folder), work["batch"] * work["steps"]
    task.model.llm.save_pretrained(folder / ADAPTER)
    generator = np.random.default_rng(1)
    lengths = np.minimum(1 + generator.geometric(2.5 / work["history"], number), work["history"])
    histories = [generator.integers(0, work["items"], length) for length in lengths]
    rows = prompt_rows(histories, generator.integers(0, work["items"], number), generator.integers(0, 2, number))
    pq.write_table(task.prepare(rows, 0, np.zeros(number, np.int64)), folder / ROWS)


def batches_of(work: dict[str, Any], folder: Path) -> list[pa.Table]:
    rows = pq.read_table(folder / ROWS)
    return [rows.slice(step * work["batch"], work["batch"]).combine_chunks() for step in range(work["steps"])]


def count_tokens(batches: list[pa.Table]) -> int:
    """Without padding."""
    return sum(len(batch["tokens"].combine_chunks().flatten()) for batch in batches)


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    task, settings, batches = task_of(work, folder), settings_of(work), batches_of(work, folder)
    set_peft_model_state_dict(task.model.llm, load_file(folder / ADAPTER / "adapter_model.safetensors"))
    engine = engine_of(task, settings, work["device"], work["dtype"])
    real = count_tokens(batches)
    return steps_of(engine, batches, real, model_flops(work, folder, settings, batches))


def padded_on_the_left(tokens: list[list[int]], answers: list[int], longest: int) -> dict[str, Tensor]:
    """Prompts [b, longest] as a causal model of Transformers takes them, with labels where the answer is."""
    ids = torch.stack([F.pad(torch.tensor(text), (longest - len(text), 0)) for text in tokens])
    places, lengths = torch.arange(longest), torch.tensor([len(text) for text in tokens])
    answered = places >= longest - torch.tensor(answers)[:, None]
    mask = (places >= longest - lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(answered, ids, -100)}


def published_model(work: dict[str, Any], folder: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(
        model_folder(work, folder), dtype=getattr(torch, work["dtype"]), trust_remote_code=False
    )
    return PeftModel.from_pretrained(base, folder / ADAPTER, is_trainable=True)


def plain(work: dict[str, Any], folder: Path, fixed: bool) -> Callable[[], tuple[int, dict]]:
    """A loop as it is published: rows in the order they come, padded on the left; the model makes logits of all positions, and
    the loss ignores those without a label. As the Trainer does, micro-batches share one normaliser, and with bfloat16 the model
    is loaded so, the adapter stays float32, and products are cast.

    Args:
        fixed: pad to the longest prompt there may be, else to the longest of the micro-batch.
    """
    settings, batches, device = settings_of(work), batches_of(work, folder), work["device"]
    dtype = getattr(torch, work["dtype"])
    model = published_model(work, folder).to(device).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=settings.learning_rate, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay
    )
    real, size = count_tokens(batches), work["micro_batch"]
    asked = model_flops(work, folder, settings, batches)
    if work["checkpoint_activations"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()

    def step(batch: pa.Table) -> float:
        tokens, answers = batch["tokens"].to_pylist(), batch["answer"].to_pylist()
        total, normaliser = 0.0, torch.tensor(sum(answers), device=device)
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            longest = work["max_tokens"] if fixed else max(map(len, tokens[part]))
            given = padded_on_the_left(tokens[part], answers[part], longest)
            given = {name: value.to(device) for name, value in given.items()}
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                loss = model(**given, num_items_in_batch=normaliser).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    def repeat() -> tuple[int, dict]:
        return real, {"losses": [step(batch) for batch in batches], **asked}

    return repeat


def trainer(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """Hugging Face's Trainer on the same rows, in their order, with a collator that pads to the longest of a micro-batch. What it
    sets up whenever it is called, a quarter of a second, is in its time."""
    settings, batches = settings_of(work), batches_of(work, folder)
    real, asked = count_tokens(batches), model_flops(work, folder, settings, batches)
    if work["batch"] % work["micro_batch"]:
        raise ValueError(
            f"the Trainer takes whole micro-batches: {work['batch']} rows are none of {work['micro_batch']}"
        )
    rows = [row for batch in batches for row in batch.select(["tokens", "answer"]).to_pylist()]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        tokens, answers = ([row[name] for row in rows] for name in ("tokens", "answer"))
        return padded_on_the_left(tokens, answers, max(map(len, tokens)))

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=work["micro_batch"],
        gradient_accumulation_steps=work["batch"] // work["micro_batch"], num_train_epochs=1,
        train_sampling_strategy="sequential", learning_rate=settings.learning_rate, lr_scheduler_type="constant",
        weight_decay=settings.weight_decay, adam_beta2=settings.beta2, max_grad_norm=settings.clip,
        bf16=work["dtype"] == "bfloat16", activation_checkpointing=work["checkpoint_activations"],
        remove_unused_columns=False, use_cpu=work["device"] == "cpu", dataloader_pin_memory=work["device"] == "cuda",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    loop = Trainer(published_model(work, folder), arguments, data_collator=collate, train_dataset=rows)

    def repeat() -> tuple[int, dict]:
        loop.train()
        return real, {"losses": [told["loss"] for told in loop.state.log_history if "loss" in told], **asked}

    return repeat


def fixed_padding(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return plain(work, folder, fixed=True)


def padded_to_longest(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return plain(work, folder, fixed=False)
