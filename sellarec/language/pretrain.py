"""Stage pretrain: the embedded decoder, built for a catalog, or a given model, is pre-trained on the catalog's texts.

The decoder is an ordinary Hugging Face Llama with a byte-level BPE tokenizer, saved and loaded as any other model. Going on
with a given one is continued, or domain-adaptive, pre-training (Gururangan et al., "Don't Stop Pretraining", arXiv 2004.10964).
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from sellarec.config import Pretrain
from sellarec.errors import UserError
from sellarec.language import llm as llms
from sellarec.language.adapt import count_targets
from sellarec.language.scorer import PromptScorer, left_padded, next_tokens
from sellarec.language.texts import Lines
from sellarec.training.task import Batch, Peers, Task, Vectors


def build_decoder(texts: list[str], extra: list[str], settings: Pretrain, seed: int, folder: Path) -> None:
    """Write a fresh decoder with a tokenizer trained on `texts` into `folder`.

    Args:
        extra: sentences that the vocabulary should know too (the prompt templates' own words).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*(line for text in texts for line in text.split("\n")), *extra * 20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=settings.context
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        initializer_range=settings.hidden**-0.5,
        max_position_embeddings=settings.context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class PretrainTask(Task):
    """Next-token prediction on lines of the catalog's texts, by all weights of a model."""

    columns = ("text",)

    def __init__(self, model: Any, tokenizer: Any, lines: Lines) -> None:
        self.model = PromptScorer(model)
        self.blocks = self.model.blocks
        self._tokenizer = tokenizer
        self.prepare = lines.prepare

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        batch = left_padded(rows)
        weight = torch.from_numpy(rows["weight"].to_numpy().copy())
        return {**batch, "targets": next_tokens(batch, None), "weight": weight}

    def targets(self, batch: Batch) -> Tensor:
        return count_targets(batch)

    def loss(self, model: nn.Module, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        return (model(batch["tokens"], batch["mask"], {}, {}, batch["targets"]) * batch["weight"]).sum()

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        raise TypeError("pre-training scores no rows")

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        state = {name.removeprefix("llm."): value for name, value in weights.items()}
        llms.save_model(self.model.llm, state, self._tokenizer, folder / "model")

    def facts(self) -> dict[str, Any]:
        return {"weights": sum(weight.numel() for weight in self.model.parameters())}


def make_lines(folder: Path, settings: Pretrain) -> tuple[Lines, Any]:
    """What makes lines of texts for the model of a folder, and its tokenizer.

    Raises:
        UserError: its tokenizer can't make lines.
    """
    tokenizer = llms.load_tokenizer(folder)
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        lacking = "no end token" if tokenizer.is_fast else "no form for the tokenizers library (tokenizer.json)"
        raise UserError(
            f"the tokenizer in {folder} has {lacking}, which lines of the catalog's texts take: leave out pretrain.continued"
        )
    tokenizer.backend_tokenizer.no_padding()  # what it was saved with says nothing of lines
    tokenizer.backend_tokenizer.no_truncation()
    context = min(settings.context, llms.context_length(llms.read_config(folder)))
    return Lines(tokenizer.backend_tokenizer, tokenizer.eos_token, context), tokenizer


def build_pretrain(folder: Path, settings: Pretrain, attention: str = "auto") -> PretrainTask:
    """The task of pre-training the model of a folder, from the weights that it has.

    Args:
        attention: as `llm.attention`.

    Raises:
        UserError: texts can't be made into lines by its tokenizer, its logits don't go with a loss over tokens, or it can't be
            loaded.
    """
    lines, tokenizer = make_lines(folder, settings)
    model = llms.load_model(folder, attention=attention)
    llms.check_logits(model)
    return PretrainTask(model, tokenizer, lines)
