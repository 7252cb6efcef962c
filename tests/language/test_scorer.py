"""The loss over tokens: that of whole logits, in a part of their memory, with no logits where there is no target."""

import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from sellarec.errors import UserError
from sellarec.language import scorer
from sellarec.language.llm import check_logits, load_model
from sellarec.language.scorer import (
    NO_TARGET,
    PromptScorer,
    left_padded,
    next_tokens,
    share_prefixes,
    token_losses,
)

torch.set_num_threads(1)


def llama(vocabulary: int = 50) -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2
        )
    )


ROWS = pa.table({"tokens": pa.array([[5, 6, 7, 8, 9], [1, 0, 3], [4, 2, 6, 6]]), "user_position": [2, 1, 0]})


def test_answers_are_told_apart_in_float32_where_the_model_computes_in_bfloat16():
    """The last hidden states are bfloat16's, the logits made of them are not: hardly two prompts get one score."""
    model = llama().bfloat16().eval()
    model.lm_head.weight.data.normal_()
    tokens = torch.randint(0, 50, (2000, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[:, -1]
        found = PromptScorer(model, (7, 30))(tokens, mask, {}, {})
        rounded = PromptScorer(model)(tokens, mask, {}, {})[:, [7, 30]]
    expected = hidden.float() @ model.lm_head.weight[[7, 30]].float().T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    differences = [len((logits[:, 0] - logits[:, 1]).unique()) for logits in (found, rounded)]
    assert differences[0] > 1990 and differences[1] < 1800, differences


def gemma2() -> Gemma2ForCausalLM:
    """Caps its logits, and ties its output layer to the input embeddings."""
    torch.manual_seed(3)
    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_hidden_layers=2, final_logit_softcapping=0.5,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def granite() -> GraniteForCausalLM:
    """Divides its logits."""
    torch.manual_seed(3)
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0))


def cohere() -> CohereForCausalLM:
    """Multiplies its logits, and ties its output layer to the input embeddings."""
    torch.manual_seed(3)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return CohereForCausalLM(CohereConfig(**SMALL, **special, logit_scale=0.1))


def mixtral() -> MixtralForCausalLM:
    """Its decoder gives more than states: what its router says."""
    torch.manual_seed(3)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2))


@pytest.mark.parametrize("make", [llama, gemma2])
@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "adapter on the output layer"])
def test_the_logits_of_answers_are_those_of_whole_logits(make, is_adapted):
    """So are the gradients, whatever the model does to its logits, also where all of them have to be made."""
    model = make().eval()
    if is_adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    answers = PromptScorer(model, (7, 30))
    batch = left_padded(ROWS)
    given = batch["tokens"], batch["mask"], {}, {}
    found = answers(*given)
    with answers.all_logits():
        expected = answers(*given)
    assert found.shape == (3, 2) and expected.shape == (3, 50)
    torch.testing.assert_close(found, expected[:, [7, 30]], rtol=1e-5, atol=1e-6)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = [
        torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), weights, allow_unused=True)
        for logits in (found, expected[:, [7, 30]])
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_targets_are_the_tokens_that_follow_but_for_padding_and_slots():
    batch = left_padded(ROWS)
    targets = next_tokens(batch, None)
    none = NO_TARGET
    assert targets.tolist() == [[6, none, 8, 9, none], [none, none, none, 3, none], [none, 2, 6, 6, none]]
    answers = next_tokens(batch, torch.tensor([2, 1, 1]))
    assert answers.tolist() == [[none, none, 8, 9, none], [none, none, none, 3, none], [none, none, none, 6, none]]


@pytest.mark.parametrize(
    ("make", "positions"), [(llama, 1), (llama, 3), (llama, 100), (gemma2, 3), (granite, 3), (cohere, 3), (mixtral, 3)]
)
def test_the_loss_over_tokens_is_that_of_whole_logits(monkeypatch, make, positions):
    """So are the gradients, whatever the model does to its logits; made of some positions at a time."""
    monkeypatch.setattr(scorer, "LOGIT_BYTES", positions * 4 * 50)
    model = make()
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
    assert seen == [(1, 2, 50), (1, 2, 50), (1, 1, 50)]
    loss.sum().backward()
    assert sorted(seen[3:]) == sorted(seen[:3]), "made again, some at a time"


def test_rows_without_targets_have_no_loss():
    hidden = torch.randn(2, 3, 16, requires_grad=True)
    found = token_losses(llama(), BaseModelOutputWithPast(hidden), torch.full((2, 3), NO_TARGET))
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
    model = llama(vocabulary).requires_grad_(False)
    hidden = torch.randn(1, length, 16, requires_grad=True)
    targets = torch.randint(vocabulary, (1, length))
    used = peak_bytes(lambda: token_losses(model, BaseModelOutputWithPast(hidden), targets).sum().backward())
    assert hidden.grad is not None and 0 < used < 4 * scorer.LOGIT_BYTES, used


class Copying(LlamaForCausalLM):
    """Makes the tokens that it reads likelier, as a copying head does."""

    def forward(self, input_ids=None, inputs_embeds=None, **given):
        found = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **given)
        read = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        found.logits = found.logits + self.lm_head(read)
        return found


def test_a_model_whose_logits_take_more_than_the_last_hidden_states_is_refused():
    for make in (llama, gemma2, granite, cohere, mixtral):
        check_logits(make().eval())
    check_logits(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval())
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"llama.*adapt\.loss and fuse\.loss answer"):
        check_logits(Copying(LlamaConfig(**SMALL, initializer_range=0.5)).eval())


BEGINNINGS = ([1, 5, 0, 7], [1, 5, 0, 7, 8, 9, 2, 11, 6], [1, 4])
"""Of prompts; in the first two a slot, of a user."""
CANDIDATES = [(0, [3, 9]), (1, [6]), (0, [0, 12, 13, 14, 7]), (2, [3, 0, 8]), (1, [3, 3]), (0, [6]), (1, [3, 9])]
"""Each a beginning and what follows it."""


def candidates() -> pa.Table:
    tokens = [BEGINNINGS[number] + follows for number, follows in CANDIDATES]
    columns = {
        "tokens": pa.array(tokens, pa.list_(pa.int32())),
        "prefix_tokens": [len(BEGINNINGS[number]) for number, _ in CANDIDATES],
        "user_position": [2 if number < 2 else 1 for number, _ in CANDIDATES],
        "item_position": [len(row) - 1 for row in tokens],
        "user": [number for number, _ in CANDIDATES],
        "number": range(len(tokens)),
    }
    table = pa.table(columns)
    return table.take(np.argsort([len(row) for row in tokens], kind="stable"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_prompts_that_begin_alike_score_as_each_by_itself(models, name):
    """With an adapter, soft tokens in the prefix and behind it, and beginnings and ends of different lengths."""
    torch.manual_seed(4)
    targets = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    lora = LoraConfig(r=2, target_modules=targets, fan_in_fan_out=name == "gpt2", init_lora_weights=False)
    model = PromptScorer(get_peft_model(load_model(models[name]), lora)).eval()
    of_user, of_item = torch.randn(3, 16), torch.randn(len(CANDIDATES), 16)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape[:2])))

    def logits(rows: pa.Table, prefix=None) -> torch.Tensor:
        batch = left_padded(rows)
        slots = {slot: batch[f"{slot}_position"] for slot in ("user", "item")}
        vectors = {"user": of_user[rows["user"].to_numpy()], "item": of_item[rows["number"].to_numpy()]}
        with torch.no_grad():
            return model(batch["tokens"], batch["mask"], slots, vectors, prefix=prefix)

    rows = candidates()
    alone = torch.cat([logits(rows.slice(row, 1)) for row in np.argsort(rows["number"].to_numpy())])
    arranged, shared, without = share_prefixes(model, rows, len(CANDIDATES), ("user",))
    seen.clear()
    found = logits(arranged, tuple(torch.from_numpy(arranged[c].to_numpy()) for c in ("prefix", "prefix_tokens")))
    torch.testing.assert_close(found, alone[arranged["number"].to_numpy()], rtol=1e-5, atol=1e-5)
    assert seen == [(3, 9), (7, 5)], "three beginnings of at most 9 tokens, and what follows, at most 5"
    assert shared == 3 * 9 + 7 * 5 and without == 7 * 11
    assert alone.std() > 0.1


def test_prompts_of_different_users_or_tokens_share_nothing():
    model, rows = PromptScorer(llama()), candidates()

    def prefixes(rows: pa.Table, *same: str) -> list[list[int]]:
        arranged, _, _ = share_prefixes(model, rows, 3, same)
        found: dict[int, list[int]] = {}
        for prefix, number in zip(arranged["prefix"].to_pylist(), arranged["number"].to_pylist(), strict=True):
            found.setdefault(prefix, []).append(number)
        assert list(found) == sorted(found), "together, the shortest first"
        return sorted(sorted(numbers) for numbers in found.values())

    assert prefixes(rows, "user") == [[0, 2, 5], [1, 4, 6], [3]]
    assert prefixes(rows) == [[0, 2, 5], [1, 4, 6], [3]]
    assert prefixes(rows, "number") == [[number] for number in range(7)]
    shorter = rows.set_column(1, "prefix_tokens", pa.array([1] * 7))
    assert prefixes(shorter) == [list(range(7))]
    histories = rows.append_column("history", pa.array([[1, number % 2] for number in rows["number"].to_pylist()]))
    assert prefixes(histories, "history") == [[0, 2], [1], [3], [4, 6], [5]]


def test_a_prompts_last_token_is_read_by_itself():
    rows = candidates()
    everything = rows.set_column(1, "prefix_tokens", pa.array([len(row) for row in rows["tokens"].to_pylist()]))
    arranged, _, _ = share_prefixes(PromptScorer(llama()), everything, 7)
    lengths = [len(row) - 1 for row in arranged["tokens"].to_pylist()]
    assert arranged["prefix_tokens"].to_pylist() == lengths


def test_nothing_is_shared_where_prompts_begin_with_the_candidate_or_attention_slides():
    rows = candidates()
    nothing = rows.set_column(1, "prefix_tokens", pa.array([0] * 7))
    same, shared, without = share_prefixes(PromptScorer(llama()), nothing, 7)
    assert same is nothing and shared == math.inf and without == 7 * 11
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    for window in (4, None):
        config = MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=window, **small)
        model = PromptScorer(MistralForCausalLM(config))
        _, shared, without = share_prefixes(model, rows, 7, ("user",))
        assert (shared < without) == (window is None)
