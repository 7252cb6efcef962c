"""Steps of fuse: three soft tokens in each prompt, with tables, projections and the adapter trained. The training loop's engine,
and the published way in plain torch, Transformers and PEFT.

All sides take the same global batches from the same weights, with the same loss (next-token cross-entropy of the answer's
tokens) and optimizer, so their losses agree.

Shapes: b rows, T tokens, H width of the language model.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sides import adapt
from sides.adapt import ADAPTER, ROWS, batches_of, count_tokens
from sides.engine import engine_of, steps_of
from sides.language import model_flops, model_folder, prompt_rows, titles, write_model
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.alignment.align import PROJECTION
from sellarec.collab.model import Sizes
from sellarec.collab.models.mf import Model
from sellarec.collab.task import CollabTask
from sellarec.config import Collab, Fuse, Prompt
from sellarec.fusion.fuse import FuseTask, build_fuse
from sellarec.language.llm import find_llm
from sellarec.training.table import Table, initial_rows

RATE, NO_CLIPPING = 1e-3, 1e9


def settings_of(work: dict[str, Any]) -> Fuse:
    return Fuse(
        train=("tables", "projections", "adapter"), norm="none", loss="answer-tokens", unseen_dropout=0.0,
        batch=work["batch"], micro_batch=work["micro_batch"], learning_rate=RATE, weight_decay=0.0, clip=NO_CLIPPING,
        table_optimizer="adamw", table_learning_rate=RATE,
        checkpoint_activations=work["checkpoint_activations"], compile=work["compile"],
    )  # fmt: skip


def tables_of(work: dict[str, Any]) -> dict[str, Table]:
    """Rows of users and items, and distilled vectors, all of which start at random."""
    shapes = {
        "user": (work["users"], work["dim"]), "item": (work["items"], work["dim"]),
        "semantic": (work["items"], work["hidden"]),
    }  # fmt: skip
    return {name: Table(name, *shape, (name,), init_std=0.05) for name, shape in shapes.items()}


def task_of(work: dict[str, Any], folder: Path, projections: Path | None) -> FuseTask:
    """With random projections where there is no file of some."""
    prompt = Prompt(template=work["template"], history=work["history"], max_tokens=work["max_tokens"])
    collab = Collab(dim=work["dim"], biases=False, global_mean=False)
    sizes = Sizes(work["users"], work["items"], 0.5)
    source = replace(find_llm(model_folder(work, folder), None), storage=work["dtype"])  # as the other sides load it
    return build_fuse(
        source, titles(work["items"]), prompt, "movie", folder / ADAPTER,
        CollabTask(Model(sizes, collab), collab, np.ones(work["items"], bool)), tables_of(work)["semantic"],
        work["projection"], None, projections, settings_of(work), 0,
    )  # fmt: skip


def inputs(work: dict[str, Any], folder: Path) -> None:
    """The model, an adapter and projections to start from, and the prompts of all steps of a repetition."""
    write_model(work, folder)
    adapt.task_of(work, folder).model.llm.save_pretrained(folder / ADAPTER)
    task, number = task_of(work, folder, None), work["batch"] * work["steps"]
    projections = task.model.projection.state_dict()
    task.save(folder, {f"projection.{name}": weight for name, weight in projections.items()})
    generator = np.random.default_rng(1)
    lengths = np.minimum(1 + generator.geometric(2.5 / work["history"], number), work["history"])
    histories = [generator.integers(0, work["items"], length) for length in lengths]
    rows = prompt_rows(histories, generator.integers(0, work["items"], number), generator.integers(0, 2, number))
    for name in ("user_seen", "item_seen"):
        rows = rows.append_column(name, pa.array(np.ones(number, bool)))
    rows = rows.append_column("user", pa.array(generator.integers(0, work["users"], number)))
    pq.write_table(task.prepare(rows, 0, np.zeros(number, np.int64)), folder / ROWS)


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    task, batches = task_of(work, folder, folder / PROJECTION), batches_of(work, folder)
    engine = engine_of(task, settings_of(work), work["device"], work["dtype"])
    return steps_of(engine, batches, count_tokens(batches), model_flops(work, folder, adapt.settings_of(work), batches))


class Plain(nn.Module):
    """Tables, projections and the language model, in whose input embeddings placeholders are replaced."""

    def __init__(self, work: dict[str, Any], folder: Path) -> None:
        from peft import PeftModel
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        super().__init__()
        dtype = getattr(torch, work["dtype"])
        base = AutoModelForCausalLM.from_pretrained(model_folder(work, folder), dtype=dtype, trust_remote_code=False)
        if work["checkpoint_activations"]:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable()
        self.llm = PeftModel.from_pretrained(base, folder / ADAPTER, is_trainable=True)
        self.placeholder = base.config.vocab_size - 1  # no prompt has this token
        for name, table in tables_of(work).items():
            rows = torch.from_numpy(initial_rows(table, 0, 0, table.rows))
            self.add_module(name, nn.Embedding(*rows.shape, _weight=rows))
        width = work["hidden"]
        self.collaborative = nn.Sequential(
            nn.Linear(work["dim"], work["projection"]), nn.GELU(), nn.Linear(work["projection"], width)
        )
        self.distilled = nn.Linear(width, width)
        saved = load_file(folder / PROJECTION)
        for module, beginning in ((self.collaborative, "collaborative.layers."), (self.distilled, "semantic.")):
            names = [f"projections.{beginning}{name}" for name in module.state_dict()]
            module.load_state_dict(dict(zip(module.state_dict(), map(saved.get, names), strict=True)))

    def forward(self, user: Tensor, item: Tensor, ids: Tensor, mask: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """int64 [b] and [b, T] -> the loss summed over answers' tokens, over their count in the global batch."""
        tokens = torch.stack(
            [
                self.collaborative(self.user(user)),
                self.collaborative(self.item(item)),
                self.distilled(self.semantic(item)),
            ],
            dim=1,
        )
        embedded = self.llm.get_input_embeddings()(ids)
        if embedded.requires_grad:  # as the checkpointing of activations has it
            embedded = embedded.clone()
        row, place = (ids == self.placeholder).nonzero(as_tuple=True)
        embedded[row, place] = tokens.flatten(0, 1).to(embedded.dtype)  # a row's placeholders stand in this order
        return self.llm(inputs_embeds=embedded, attention_mask=mask, labels=labels, num_items_in_batch=count).loss


def plain(work: dict[str, Any], folder: Path, fixed: bool) -> Callable[[], tuple[int, dict]]:
    """Rows in the order they come, padded on the left; the model makes logits of all positions.

    Args:
        fixed: pad to the longest prompt there may be, else to the longest of the micro-batch.
    """
    settings, batches, device = settings_of(work), batches_of(work, folder), work["device"]
    model = Plain(work, folder).to(device).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, settings.beta2), weight_decay=0.0)
    real, dtype = count_tokens(batches), getattr(torch, work["dtype"])
    asked = model_flops(work, folder, adapt.settings_of(work), batches)
    read = [_with_placeholders(batch, model.placeholder) for batch in batches]

    def step(number: int) -> float:
        batch, texts = batches[number], read[number]
        user, item = (torch.from_numpy(batch[name].to_numpy().copy()).to(device) for name in ("user", "item"))
        answers = torch.from_numpy(batch["answer"].to_numpy().copy())
        total, count = 0.0, answers.sum().to(device)
        for start in range(0, len(texts), work["micro_batch"]):
            part = slice(start, start + work["micro_batch"])
            longest = work["max_tokens"] if fixed else max(map(len, texts[part]))
            ids = torch.stack([F.pad(text, (longest - len(text), 0)) for text in texts[part]])
            lengths = torch.tensor([len(text) for text in texts[part]])
            place = torch.arange(longest)
            mask = (place >= longest - lengths[:, None]).long()
            labels = torch.where(place >= longest - answers[part, None], ids, -100)
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
                loss = model(user[part], item[part], ids.to(device), mask.to(device), labels.to(device), count)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    def repeat() -> tuple[int, dict]:
        losses = [step(number) for number in range(len(batches))]
        return real, {"first loss": losses[0], "losses": losses, **asked}

    return repeat


def _with_placeholders(batch: pa.Table, placeholder: int) -> list[Tensor]:
    """The rows' tokens with a placeholder in each slot."""
    texts = [torch.tensor(text) for text in batch["tokens"].to_pylist()]
    for name in ("user", "item", "semantic"):
        for text, place in zip(texts, batch[f"{name}_position"].to_pylist(), strict=True):
            text[place] = placeholder
    return texts


def fixed_padding(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return plain(work, folder, fixed=True)


def padded_to_longest(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return plain(work, folder, fixed=False)
