"""Stage pretrain: the embedded decoder, built for a catalog and pre-trained on its texts.

It is an ordinary Hugging Face Llama with a byte-level BPE tokenizer, saved and loaded as any other model.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.config import Pretrain
from sellarec.language import llm as llms
from sellarec.language.scorer import left_padded, trim
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


class CausalLoss(nn.Module):
    """The next-token loss of a causal model, summed over targets."""

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, tokens: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        tokens, mask, _ = trim(tokens, mask)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        logits = self.llm(
            input_ids=tokens, attention_mask=mask.long(), position_ids=positions, use_cache=False
        ).logits.float()
        target = torch.where(mask[:, :-1] & mask[:, 1:], tokens[:, 1:], -100)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), target, reduction="none", ignore_index=-100)
        return (losses.sum(1) * weight).sum()


class PretrainTask(Task):
    """Next-token prediction on lines of the catalog's texts."""

    columns = ("text",)

    def __init__(self, model: Any, tokenizer: Any, context: int) -> None:
        self.model = CausalLoss(model)
        self.blocks = llms.decoder_layers(model)
        self._tokenizer = tokenizer
        self.prepare = Lines(tokenizer.backend_tokenizer, tokenizer.eos_token, context).prepare

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        return {**left_padded(rows), "weight": torch.from_numpy(rows["weight"].to_numpy().copy())}

    def targets(self, batch: Batch) -> Tensor:
        return ((batch["mask"].sum(1) - 1) * batch["weight"]).sum()

    def loss(self, model: nn.Module, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        return model(batch["tokens"], batch["mask"], batch["weight"])

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        raise TypeError("pre-training scores no rows")

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        state = {name.removeprefix("llm."): value for name, value in weights.items()}
        llms.save_model(self.model.llm, state, self._tokenizer, folder / "model")

    def facts(self) -> dict[str, Any]:
        return {"weights": sum(weight.numel() for weight in self.model.parameters())}


def build_pretrain(folder: Path, settings: Pretrain) -> PretrainTask:
    model = llms.load_model(folder)
    return PretrainTask(model, llms.load_tokenizer(folder), settings.context)
