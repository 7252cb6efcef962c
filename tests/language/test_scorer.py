"""The loss over tokens: that of whole logits, in a part of their memory, with no logits where there is no target."""

import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from sellarec.errors import UserError
from sellarec.language import scorer
from sellarec.language.llm import check_output_layer
from sellarec.language.scorer import NO_TARGET, PromptScorer, left_padded, next_tokens, token_losses

torch.set_num_threads(1)


def llama(vocabulary: int = 50) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2
        )
    )


ROWS = pa.table({"tokens": pa.array([[5, 6, 7, 8, 9], [1, 0, 3], [4, 2, 6, 6]]), "user_position": [2, 1, 0]})


def test_targets_are_the_tokens_that_follow_but_for_padding_and_slots():
    batch = left_padded(ROWS)
    targets = next_tokens(batch, None)
    none = NO_TARGET
    assert targets.tolist() == [[6, none, 8, 9, none], [none, none, none, 3, none], [none, 2, 6, 6, none]]
    answers = next_tokens(batch, torch.tensor([2, 1, 1]))
    assert answers.tolist() == [[none, none, 8, 9, none], [none, none, none, 3, none], [none, none, none, 6, none]]


@pytest.mark.parametrize("positions", [1, 3, 100])
def test_the_loss_over_tokens_is_that_of_whole_logits(monkeypatch, positions):
    """So are the gradients; made of some positions at a time."""
    monkeypatch.setattr(scorer, "LOGIT_BYTES", positions * 4 * 50)
    model = llama()
    batch = left_padded(ROWS)
    targets = next_tokens(batch, None)
    weight = torch.tensor([1.0, 0.0, 2.0])
    vectors = {"user": torch.randn(3, 16, requires_grad=True)}
    slots = {"user": batch["user_position"]}
    found = PromptScorer(model)(batch["tokens"], batch["mask"], slots, vectors, targets)
    weights = [vectors["user"], *model.parameters()]
    gradients = torch.autograd.grad((found * weight).sum(), weights)

    embedded = model.get_input_embeddings()(batch["tokens"])
    embedded = embedded.index_put((torch.arange(3), slots["user"]), vectors["user"])
    logits = model(
        inputs_embeds=embedded,
        attention_mask=batch["mask"].long(),
        position_ids=(batch["mask"].long().cumsum(1) - 1).clamp(min=0),
    ).logits
    plain = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=NO_TARGET).sum(1)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradients, torch.autograd.grad((plain * weight).sum(), weights))
    assert gradients[0][1].abs().sum() == 0 and gradients[0][0].abs().sum() > 0


def test_logits_are_made_for_positions_with_a_target_only(monkeypatch):
    monkeypatch.setattr(scorer, "LOGIT_BYTES", 2 * 4 * 50)
    model, seen = llama(), []
    model.lm_head.register_forward_hook(lambda module, given, found: seen.append(tuple(found.shape)))
    batch = left_padded(ROWS)
    loss = PromptScorer(model)(batch["tokens"], batch["mask"], {}, {}, next_tokens(batch, torch.tensor([2, 1, 2])))
    assert seen == [(2, 50), (2, 50), (1, 50)]
    loss.sum().backward()
    assert sorted(seen[3:]) == sorted(seen[:3]), "made again, some at a time"


def test_rows_without_targets_have_no_loss():
    hidden = torch.randn(2, 3, 16, requires_grad=True)
    found = token_losses(llama().lm_head, hidden, torch.full((2, 3), NO_TARGET))
    assert found.tolist() == [0.0, 0.0]
    found.sum().backward()
    assert hidden.grad.abs().sum() == 0


def peak_bytes(work) -> int:
    """By how much `work` raises the memory that this process holds, at its highest (Linux counts it)."""

    def status(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def test_memory_is_bounded_by_logits_of_some_positions():
    """Forward and backward hold at most 4 tensors of LOGIT_BYTES; the logits of all positions alone are 8 times LOGIT_BYTES."""
    vocabulary, length = 16_384, 8192
    assert 4 * vocabulary * length == 8 * scorer.LOGIT_BYTES
    head = torch.nn.Linear(16, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(1, length, 16, requires_grad=True)
    targets = torch.randint(vocabulary, (1, length))
    used = peak_bytes(lambda: token_losses(head, hidden, targets).sum().backward())
    assert hidden.grad is not None and 0 < used < 4 * scorer.LOGIT_BYTES, used


def test_a_model_that_does_more_to_its_logits_is_refused():
    check_output_layer(llama())
    check_output_layer(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval())
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.1,
        )
    ).eval()  # fmt: skip
    with pytest.raises(UserError, match=r"gemma2.*adapt\.loss and fuse\.loss answer"):
        check_output_layer(capped)
