"""Stage fuse: three embeddings of the prompt are replaced, nothing else; what is frozen stays; unseen rows are zeros."""

import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import represent, save_table, small_log, vectors_of
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from sellarec.collab.task import WEIGHTS, build_collab
from sellarec.config import Adapt, Collab, Fuse, Prompt
from sellarec.errors import UserError
from sellarec.fusion.fuse import FuseTask, build_fuse, represented, soft_tokens, token_rows
from sellarec.fusion.projection import Projection
from sellarec.language import llm as llms
from sellarec.language.adapt import build_adapt
from sellarec.language.prompts import SOFT
from sellarec.language.scorer import base_model
from sellarec.training.table import Jagged, Table, initial_rows
from sellarec.training.task import Alone

torch.set_num_threads(1)

USERS, ITEMS, DIM, HIDDEN, WIDTH = 7, 10, 4, 6, 16
READ = 2
"""Items of a history that the collaborative model reads; a prompt shows more."""
PROMPT = Prompt(template="compact")
ROWS = {"user": np.random.default_rng(0), "item": np.random.default_rng(1), "semantic": np.random.default_rng(2)}
TABLES = {
    "user": ROWS["user"].standard_normal((USERS, DIM)).astype(np.float32),
    "item": ROWS["item"].standard_normal((ITEMS, DIM)).astype(np.float32),
    "semantic": ROWS["semantic"].standard_normal((ITEMS, WIDTH)).astype(np.float32),
    "history": np.random.default_rng(3).standard_normal((ITEMS, DIM)).astype(np.float32),
}


SUBSETS = [tokens for count in (1, 2, 3) for tokens in combinations(SOFT, count)]


@pytest.fixture(scope="module")
def make(decoder, titles, tmp_path_factory):
    """Builds the task on the embedded decoder with an adapter that isn't fresh."""
    torch.manual_seed(5)
    source = llms.find_llm(str(decoder), None)
    adapt = build_adapt(source, titles, PROMPT, "movie", Adapt(rank=2))
    trained = {name: weight.detach() for name, weight in adapt.model.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        torch.nn.init.normal_(weight, std=0.05)  # attention that is not saturated, so that each token counts
    folder = tmp_path_factory.mktemp("adapt")
    adapt.save(folder, trained)

    start = tmp_path_factory.mktemp("collab")
    for name, rows in TABLES.items():
        save_table(start / "tables", name, rows, (2,))

    def build(
        projection=None,
        trained=None,
        adapter=None,
        seed=1,
        model="mf",
        dense=None,
        dim=DIM,
        plain=False,
        layers=1,
        **changes,
    ) -> FuseTask:
        torch.manual_seed(7)
        log = small_log(start, USERS, ITEMS, np.ones(ITEMS, bool))
        settings = Collab(dim=dim, model=model, history=READ)
        if plain:
            settings = replace(settings, temperature=0.1, plain_score=True, biases=False)
        if model in ("sasrec", "din", "fism"):
            fresh = build_collab(log, settings, None)
            fresh.save(start, {name: weight.detach() for name, weight in fresh.network.named_parameters()})
        origin = None if dim != DIM else start if dense is None else dense
        fuse = Fuse(**{"unseen_dropout": 0.3} | changes)
        if fuse.represent == "learned":
            settings, origin = token_rows(fuse, settings, source), None
        tokens = soft_tokens(fuse)
        collab = build_collab(log, settings, origin, represented=represented(fuse))
        semantic = Table("semantic", ITEMS, WIDTH, ("semantic",), read=lambda low, high: TABLES["semantic"][low:high])
        return build_fuse(
            source, titles, PROMPT, "movie", adapter or folder / "adapter", collab,
            semantic if "semantic" in tokens else None, HIDDEN, projection, trained, fuse, seed, layers=layers,
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def task(make) -> FuseTask:
    return make()


def rows(number: int = 4, **changes) -> pa.Table:
    generator = np.random.default_rng(number)
    histories = [generator.integers(0, ITEMS, generator.integers(0, 4)).tolist() for _ in range(number)]
    columns = {
        "row": np.arange(number) + 100,
        "user": generator.integers(0, USERS, number),
        "item": generator.integers(0, ITEMS, number),
        "label": pa.array(generator.integers(0, 2, number), pa.int8()),
        "history": pa.array(histories, pa.list_(pa.int64())),
        "user_seen": np.ones(number, bool),
        "item_seen": np.ones(number, bool),
        "weight": np.ones(number, np.float32),
    }
    return pa.table(columns | changes)


def batch_of(task: FuseTask, rows: pa.Table, step: int | None) -> dict[str, torch.Tensor]:
    """The rows as the stream prepares them and the loop takes them."""
    return task.collate(task.prepare(rows, 0, np.full(len(rows), step or 0)), step)


def look_up(task: FuseTask, batch: dict) -> dict:
    found = {}
    of = {feature: TABLES[table.name] for table in task.tables for feature in table.features}
    for name, ids in task.lookups(batch).items():
        if isinstance(ids, Jagged):
            found[name] = Jagged(torch.from_numpy(of[name][ids.values.numpy()]).requires_grad_(), ids.lengths)
        else:
            found[name] = torch.from_numpy(of[name][ids.numpy()]).requires_grad_()
    return found


@pytest.mark.parametrize("tokens", SUBSETS, ids=" ".join)
def test_exactly_the_slots_of_the_tokens_are_replaced(make, tokens):
    """Seen from inside: what the decoder is given against its embedding table and the projections' tokens."""
    task = make(tokens=tokens)
    batch = batch_of(task, rows(6), None)
    vectors = look_up(task, batch)
    decoder = base_model(task.model.scorer.llm).model
    seen: dict = {}

    def keep(module, arguments, named) -> None:
        seen.update(named)

    handle = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        task.score(task.model, batch, vectors)
    finally:
        handle.remove()
    made = task.model.projection(vectors)
    assert set(made) == set(vectors) == set(tokens) == {table.name for table in task.tables}
    expected = decoder.get_input_embeddings()(batch["tokens"])
    for row in range(6):
        for name in tokens:
            expected[row, batch[f"{name}_position"][row]] = made[name][row]
    assert torch.equal(seen["inputs_embeds"], expected)
    assert seen["attention_mask"].tolist() == batch["mask"].long().tolist()


@pytest.mark.parametrize(
    ("model", "plain"), [("mf", False), ("mf", True), ("sasrec", False), ("din", False), ("fism", False)]
)
@pytest.mark.parametrize("tokens", [("user",), ("semantic",), SOFT], ids=" ".join)
def test_the_collaborative_score_is_added_to_the_language_models(make, model, plain, tokens):
    """To the score, with a gradient to what the collaborative model reads, unseen rows as zeros in both."""
    task = make(tokens=tokens, model=model, plain=plain, collab_score=True)
    unseen = {"user_seen": np.array([True, False, True, True, False, True])}
    batch = batch_of(task, rows(6, **unseen), None)
    vectors = look_up(task, batch)
    both = task.score(task.model, batch, vectors)
    task.model.adds_collab = False
    alone = task.score(task.model, batch, vectors)
    collab = task.collab.score(None, batch, vectors)
    assert collab.abs().max() > 0.01
    torch.testing.assert_close(both - alone, collab, rtol=1e-4, atol=1e-5)
    item = vectors["item"].values if isinstance(vectors["item"], Jagged) else vectors["item"]
    (gradient,) = torch.autograd.grad((both - alone).sum(), [item])
    assert gradient.abs().max() > 0
    task.model.language_weight, task.model.adds_collab = 0.25, True
    weighed = task.score(task.model, batch, vectors)
    torch.testing.assert_close(weighed, 0.25 * alone + collab, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "tolerance"), [("mf", 1e-4), ("sasrec", 3e-2), ("fism", 3e-2)])
def test_a_language_model_in_bfloat16_leaves_the_collaborative_score_in_float32(make, model, tolerance):
    """Of dense weights alone it sees rounded ones: those that FSDP2 has gathered."""
    task = make(tokens=SOFT, model=model, collab_score=True)
    batch = batch_of(task, rows(6), None)
    vectors = look_up(task, batch)
    with torch.no_grad():
        collab = task.collab.score(None, batch, vectors)
        task.model.to(torch.bfloat16)
        both = task.score(task.model, batch, vectors)
        task.model.adds_collab = False
        alone = task.score(task.model, batch, vectors)
    torch.testing.assert_close(both - alone, collab, rtol=tolerance, atol=1e-5)
    assert both.dtype == torch.float32


def test_tokens_have_the_norm_of_the_models_embeddings(task):
    batch = batch_of(task, rows(), None)
    vectors = look_up(task, batch)
    tokens = task.model.projection(vectors)
    vocabulary = torch.arange(base_model(task.model.scorer.llm).config.vocab_size)
    inputs = embedded(base_model(task.model.scorer.llm), vocabulary)
    assert set(tokens) == set(SOFT)
    for token in tokens.values():
        np.testing.assert_allclose(token.detach().norm(dim=1), inputs.norm(dim=1).mean().item(), rtol=1e-5)


def embedded(model, tokens: torch.Tensor) -> torch.Tensor:
    """[n, H]: what a decoder gets of tokens [n], by itself."""
    with torch.no_grad():
        found = [
            model(input_ids=part[None], output_hidden_states=True).hidden_states[0][0] for part in tokens.split(64)
        ]
    return torch.cat(found)


@pytest.mark.parametrize("tied", [True, False])
def test_the_norm_is_that_of_what_the_decoder_gets(tied):
    """Gemma's embedding layer multiplies its weights by the square root of their width."""
    sizes: dict = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    torch.manual_seed(1)
    for kind, scale in ((Gemma2Config, 8.0), (LlamaConfig, 1.0)):
        model = AutoModelForCausalLM.from_config(kind(**sizes))
        norm = embedded(model, torch.arange(100)).norm(dim=1).mean().item()
        assert llms.embedding_norm(model).item() == pytest.approx(norm, rel=1e-5)
        weight = model.get_input_embeddings().weight
        assert norm == pytest.approx(scale * weight.norm(dim=1).mean().item(), rel=1e-3)


def test_user_and_item_share_a_projection(task):
    hybrid = task.model.projection
    x = torch.randn(3, DIM)
    tokens = hybrid({"user": x, "item": x, "semantic": torch.randn(3, WIDTH)})
    torch.testing.assert_close(tokens["user"] / hybrid.gain[0], tokens["item"] / hybrid.gain[1])


def test_only_projections_and_rows_are_trained(task):
    batch = batch_of(task, rows(6), None)
    vectors = look_up(task, batch)
    task.loss(task.model, batch, vectors, Alone()).backward()
    for name, weight in task.model.named_parameters():
        assert weight.requires_grad == name.startswith("projection."), name
        assert (weight.grad is not None and weight.grad.abs().sum() > 0) == name.startswith("projection."), name
        weight.grad = None
    assert any("lora_" in name for name, _ in task.model.named_parameters())
    for name, vector in vectors.items():
        assert (vector.grad.abs().sum(1) > 0).all(), name
    assert task.facts()["trained_weights"] == sum(w.numel() for w in task.model.projection.parameters())


@pytest.mark.parametrize(
    "train",
    [part for count in (1, 2, 3) for part in combinations(("tables", "projections", "adapter"), count)],
    ids=" ".join,
)
def test_what_is_named_is_trained_and_saved_and_nothing_else(make, tmp_path, train):
    """The collaborative model's dense weights go with the tables; gradients reach all that is named and is needed."""
    task = make(model="sasrec", train=train)
    assert all(table.frozen == ("tables" not in train) for table in task.tables)
    batch = batch_of(task, rows(6), None)
    task.loss(task.model, batch, look_up(task, batch), Alone()).backward()
    beginnings = {"network.": "tables", "projection.": "projections", "scorer.": "adapter"}
    reached = set()
    for name, weight in task.model.named_parameters():
        (part,) = (part for beginning, part in beginnings.items() if name.startswith(beginning))
        named = part in train and (part != "adapter" or "lora_" in name)
        assert weight.requires_grad == named, name
        if weight.grad is not None and weight.grad.abs().sum() > 0:
            reached.add(part)
    assert reached == set(train)
    trained = {name: w.detach() for name, w in task.model.named_parameters() if w.requires_grad}
    task.save(tmp_path, trained)
    files = {"tables": WEIGHTS, "projections": "projection.safetensors", "adapter": "adapter/adapter_model.safetensors"}
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
    assert found == {files[part] for part in train}
    assert task.facts()["trained"] == list(train) and task.facts()["tokens"] == list(SOFT)
    assert task.facts()["trained_weights"] == sum(weight.numel() for weight in trained.values())


def test_a_trained_adapter_is_scored_with(make, tmp_path):
    settings = {"train": ("projections", "adapter"), "tokens": ("user", "item")}
    task = make(**settings)
    trained = {n: w for n, w in task.model.named_parameters() if w.requires_grad}
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(0.05)
    task.save(tmp_path, {name: weight.detach() for name, weight in trained.items()})
    again = make(trained=tmp_path / "projection.safetensors", adapter=tmp_path / "adapter", **settings)
    batch = batch_of(again, rows(), None)
    vectors = look_up(again, batch)
    score = task.score(task.model, batch, vectors)
    torch.testing.assert_close(again.score(again.model, batch, vectors), score)
    forgotten = make(trained=tmp_path / "projection.safetensors", **settings)
    assert not torch.allclose(forgotten.score(forgotten.model, batch, vectors), score)


def test_an_adapter_with_a_tensor_missing_is_refused(make, tmp_path):
    task = make(train=("adapter",), tokens=("user",))
    trained = {n: w.detach() for n, w in task.model.named_parameters() if w.requires_grad}
    task.save(tmp_path, trained)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = load_file(file)
    kept.pop(sorted(kept)[0])
    save_file(kept, file)
    with pytest.raises(UserError, match="isn't one of this model"):
        make(train=("adapter",), tokens=("user",), adapter=tmp_path / "adapter")


@pytest.mark.parametrize("train", [("adapter",), ("tables", "projections", "adapter")], ids=" ".join)
def test_a_saved_adapter_that_lacks_a_tensor_ends_the_stage(make, tmp_path, train):
    """It is compared on prompts as text, whatever the soft tokens are."""
    task = make(train=train)
    trained = {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(0.05)
    task.model.eval()
    saved = {name: weight.detach() for name, weight in trained.items()}
    task.save(tmp_path, saved)
    batch = batch_of(task, rows(), None)
    task.check_saved(task.model, batch, tmp_path, torch.float32, saved)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[next(name for name in weights if "lora_B" in name)]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the adapter in .*, loaded with PEFT .* has other weights than the trained"):
        task.check_saved(task.model, batch, tmp_path, torch.float32, saved)
    task.check_saved(task.model, batch, None, torch.float32, {})


def test_where_no_adapter_is_trained_none_is_compared(task, tmp_path):
    task.check_saved(task.model, batch_of(task, rows(), None), tmp_path, torch.float32, {})


def test_rows_of_weight_zero_have_no_effect(task):
    weight = np.array([1, 0, 1, 0], np.float32)
    batch = batch_of(task, rows(weight=weight), None)
    vectors = look_up(task, batch)
    loss = task.loss(task.model, batch, vectors, Alone())
    loss.backward()
    assert task.targets(batch) == 2
    assert all((vector.grad[weight == 0] == 0).all() for vector in vectors.values())
    kept = batch_of(task, rows().take([0, 2]), None)
    torch.testing.assert_close(task.loss(task.model, kept, look_up(task, kept), Alone()), loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["user", "item"])
def test_the_score_of_an_unseen_one_does_not_depend_on_its_row(task, name):
    seen = np.array([True, False, True, False])
    batch = batch_of(task, rows(**{f"{name}_seen": seen}), None)
    vectors = look_up(task, batch)
    score = task.score(task.model, batch, vectors)
    score.sum().backward()
    assert ((vectors[name].grad.abs().sum(1) > 0).numpy() == seen).all()
    changed = {**vectors, name: vectors[name] + 3}
    moved = (task.score(task.model, batch, changed) - score).abs().detach().numpy()
    assert (moved[~seen] == 0).all() and (moved[seen] > 0).all()
    assert torch.isfinite(score).all()


def test_the_distilled_vector_of_an_unseen_item_still_counts(task):
    batch = batch_of(task, rows(item_seen=np.zeros(4, bool)), None)
    vectors = look_up(task, batch)
    changed = {**vectors, "semantic": vectors["semantic"].flip(1)}
    assert (task.score(task.model, batch, vectors) - task.score(task.model, batch, changed)).abs().min() > 0


@settings(max_examples=10)
@given(st.integers(0, 10_000))
def test_a_share_of_training_rows_is_treated_as_unseen(task, step):
    """Users and items apart, the same however rows lie on workers; none when scoring."""
    many = rows(400)
    batch = batch_of(task, many, step)
    user, item = batch["user_seen"].numpy(), batch["item_seen"].numpy()
    for seen in (user, item):
        assert abs((1 - seen).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 400)
    assert abs(((1 - user) * (1 - item)).mean() - 0.09) < 5 * np.sqrt(0.09 * 0.91 / 400)
    part = batch_of(task, many.slice(150, 20), step)
    np.testing.assert_array_equal(part["user_seen"].numpy(), user[150:170])
    other = batch_of(task, many.slice(0, 100), step + 1)
    assert (other["user_seen"].numpy() != user[:100]).any(), "drawn anew in another step"


def test_scoring_and_a_dropout_of_zero_treat_every_row_as_it_is(task, make):
    for batch in (batch_of(task, rows(50), None), batch_of(make(unseen_dropout=0.0), rows(50), 3)):
        assert batch["user_seen"].all() and batch["item_seen"].all()


def test_what_is_saved_scores_alike_when_it_is_loaded(task, make, tmp_path):
    weights = {n: w.detach() for n, w in task.model.named_parameters() if w.requires_grad}
    changed = {name: weight + 0.1 for name, weight in weights.items()}
    task.save(tmp_path, changed)
    again = make(trained=tmp_path / "projection.safetensors")
    batch = batch_of(again, rows(), None)
    found = {name: w for name, w in again.model.named_parameters() if w.requires_grad}
    assert set(found) == set(changed) and all(torch.equal(found[name], changed[name]) for name in found)
    vectors = look_up(again, batch)
    score = again.score(again.model, batch, vectors)
    assert not torch.allclose(score, task.score(task.model, batch, vectors))
    with torch.no_grad():
        for name, weight in task.model.named_parameters():
            if name in changed:
                weight.copy_(changed[name])
    torch.testing.assert_close(task.score(task.model, batch, vectors), score)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_training_starts_from_the_aligned_projection(make, tmp_path, layers):
    """Whose hidden layers are as many as are set."""
    torch.manual_seed(11)
    aligned = Projection(DIM, HIDDEN, WIDTH, layers)
    widths = [tuple(weight.shape) for weight in aligned.parameters() if weight.dim() == 2]
    assert widths == [(HIDDEN, DIM), *[(HIDDEN, HIDDEN)] * (layers - 1), (WIDTH, HIDDEN)]
    save_file(aligned.state_dict(), tmp_path / "projection.safetensors")
    warm, cold = make(projection=tmp_path / "projection.safetensors", layers=layers), make(layers=layers)
    assert warm.model.projection.projections["collaborative"].state_dict().keys() == aligned.state_dict().keys()
    for name, weight in aligned.state_dict().items():
        assert torch.equal(warm.model.projection.projections["collaborative"].state_dict()[name], weight)
        assert not torch.equal(cold.model.projection.projections["collaborative"].state_dict()[name], weight)


def warm_file(folder):
    torch.manual_seed(11)
    aligned = Projection(DIM, HIDDEN, WIDTH)
    save_file(aligned.state_dict(), folder / "projection.safetensors")
    return aligned, folder / "projection.safetensors"


def test_tokens_may_have_the_norm_that_their_projections_give_them(make, tmp_path):
    """As published: no gain is learnt."""
    aligned, file = warm_file(tmp_path)
    task = make(projection=file, norm="none", tokens=("user", "item"))
    x = torch.randn(3, DIM)
    tokens = task.model.projection({"user": x, "item": x + 1})
    torch.testing.assert_close(tokens, {"user": aligned(x), "item": aligned(x + 1)}, rtol=0, atol=0)
    assert {name.split(".")[0] for name, _ in task.model.projection.named_parameters()} == {"projections"}


def test_learned_tokens_are_rows_of_their_own_as_wide_as_the_model(make):
    """Whatever the collaborative model: small, drawn, injected as they are, and zeros for an unseen user or item."""
    task = make(represent="learned", tokens=("item", "user"), train=("tables",), model="sasrec")
    assert {(table.name, table.rows, table.dim) for table in task.tables} == {
        ("user", USERS, WIDTH),
        ("item", ITEMS, WIDTH),
    }
    drawn = [initial_rows(table, 1, 0, table.rows) for table in task.tables]
    assert all(0.01 < rows.std() < 0.03 and not table.frozen for rows, table in zip(drawn, task.tables, strict=True))
    assert not any(weight.requires_grad for weight in task.model.parameters())
    seen = {"user_seen": np.array([True, False, True, True]), "item_seen": np.array([True, True, False, True])}
    batch = batch_of(task, rows(**seen), None)
    assert set(task.lookups(batch)) == {"user", "item"} and "history" not in batch
    vectors = vectors_of(task, batch)
    given: dict = {}
    handle = task.model.scorer.register_forward_pre_hook(lambda module, given_to: given.update(given_to[3]))
    task.score(task.model, batch, vectors).sum().backward()
    handle.remove()
    for name, found in given.items():
        torch.testing.assert_close(found, vectors[name] * batch[f"{name}_seen"][:, None], rtol=0, atol=0)
        assert ((vectors[name].grad.abs().sum(1) > 0).numpy() == seen[f"{name}_seen"]).all()
    assert set(given) == {"user", "item"}


def test_user_and_item_may_have_a_projection_each(make, tmp_path):
    """Both start from the aligned one; a gradient of one token doesn't reach the other's."""
    aligned, file = warm_file(tmp_path)
    warm, cold = make(projection=file, projections="separate"), make(projections="separate")
    for name in ("user", "item"):
        for key, weight in aligned.state_dict().items():
            assert torch.equal(warm.model.projection.projections[name].state_dict()[key], weight)
    x = torch.randn(3, DIM)
    tokens = cold.model.projection({"user": x, "item": x, "semantic": torch.randn(3, WIDTH)})
    assert not torch.allclose(tokens["user"], tokens["item"])
    tokens["user"].sum().backward()
    projections = cold.model.projection.projections
    assert set(projections) == {"user", "item", "semantic"}
    assert all(
        (weight.grad is None) == (name != "user") for name in projections for weight in projections[name].parameters()
    )


def test_a_mixture_starts_as_the_aligned_projection_and_its_experts_part(make, tmp_path):
    """Whatever the gate, as all experts are alike; what each is given by the gate then tells them apart."""
    aligned, file = warm_file(tmp_path)
    task = make(projection=file, experts=3, norm="none", tokens=("user", "item"))
    mixture = task.model.projection.projections["collaborative"]
    x = torch.randn(5, DIM)
    torch.testing.assert_close(mixture(x), aligned(x))
    mixture(x).square().sum().backward()
    gradients = [expert.layers[2].weight.grad for expert in mixture.experts]
    assert len(gradients) == 3 and not torch.allclose(gradients[0], gradients[1])


def test_a_mixture_is_the_sum_of_its_experts_weighed_by_a_softmax(make):
    mixture = make(experts=2).model.projection.projections["collaborative"]
    x = torch.randn(5, DIM)
    logits = x @ mixture.gate.weight.T + mixture.gate.bias
    first = 1 / (1 + (logits[:, 1] - logits[:, 0]).exp())[:, None]
    one, other = (expert(x) for expert in mixture.experts)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(mixture(x), first * one + (1 - first) * other)


READ_BY_USER = {
    "mf": {"user": {"user"}},
    "svdpp": {"user": {"user"}, "history": {"history"}},
    "sasrec": {"user": {"user"}, "item": {"history"}},
    "din": {"user": {"user"}, "item": {"item", "history"}},
    "fism": {"user": {"user"}, "item": {"history"}},
    "lightgcn": {"user": {"user"}, "item": {"item"}},
}


@pytest.mark.parametrize("model", READ_BY_USER)
@pytest.mark.parametrize("token", ["user", "item"])
def test_tables_that_no_token_takes_are_not_read(make, model, token):
    """What is looked up is enough for the tokens, and but for a graph's table each of it has a part in the score."""
    task, whole = make(model=model, tokens=(token,)), make(model=model)
    expected = READ_BY_USER[model] if token == "user" or model == "lightgcn" else {"item": {"item"}}
    assert (task.graph is None) == (model != "lightgcn")
    # one history without an item would say nothing of the others
    some = rows(6, history=pa.array([[1, 2], [3], [4, 5, 6], [7], [8], [9]], pa.list_(pa.int64())))
    batch, all_ = batch_of(task, some, None), batch_of(whole, some, None)
    asked = set(task.lookups(batch))
    assert {table.name: asked & set(table.features) for table in task.tables} == expected
    assert ("history" in batch) == any("history" in features for features in expected.values())
    vectors = look_up(task, batch)
    task.model.eval()
    task.score(task.model, batch, vectors).sum().backward()
    for name, found in vectors.items():
        gradient = (found.values if isinstance(found, Jagged) else found).grad
        needed = model != "lightgcn" or name == token
        if needed and not (model == "fism" and name == "history"):  # of the labels none reaches those vectors
            assert gradient is not None and gradient.abs().sum() > 0, name
    of_whole = represent(whole.collab, all_, look_up(whole, all_))[0 if token == "user" else 1]
    made = {"user": task.model.network.represent_user, "item": task.model.network.represent_item}[token]
    if model not in ("sasrec", "din"):  # their layers are drawn in building
        torch.testing.assert_close(made(batch, vectors), of_whole)
    trains = any(weight.requires_grad for weight in task.model.network.parameters())
    assert trains == (token == "user" and task.model.network.has_weights)


def test_the_tables_start_from_what_stages_before_made(task):
    assert {(table.name, table.rows, table.dim) for table in task.tables} == {
        ("user", USERS, DIM),
        ("item", ITEMS, DIM),
        ("semantic", ITEMS, WIDTH),
    }
    assert all((table.read(1, 3) == TABLES[table.name][1:3]).all() for table in task.tables)
    batch = batch_of(task, rows(), None)
    assert set(task.lookups(batch)) == {feature for table in task.tables for feature in table.features}


def test_the_distilled_vectors_may_stay_as_align_left_them(task, make):
    assert not any(table.frozen for table in task.tables)
    assert [table.name for table in make(semantic="frozen").tables if table.frozen] == ["semantic"]


def test_the_frozen_language_model_has_no_dropout_while_the_projections_train(task):
    task.model.train()
    assert task.model.projection.training and not any(module.training for module in task.model.scorer.modules())
    task.model.eval()
    assert not any(module.training for module in task.model.modules())


@pytest.mark.parametrize("train", [("projections",), ("tables", "projections"), ("projections", "adapter")])
def test_dropout_is_where_there_is_training(make, train):
    task = make(model="sasrec", train=train)
    task.model.train()
    assert task.model.network.training == ("tables" in train)
    assert all(module.training == ("adapter" in train) for module in task.model.scorer.modules())


def test_the_users_token_is_that_of_a_collaborative_model_with_history(make):
    task = make(model="svdpp")
    batch = batch_of(task, rows(7), None)
    vectors = look_up(task, batch)
    lengths = vectors["history"].lengths
    assert 0 in lengths and max(lengths) > 1 and {table.name for table in task.tables} == set(TABLES)
    score = task.score(task.model, batch, vectors)
    moved = {**vectors, "history": Jagged(vectors["history"].values.detach() + 1, lengths)}
    difference = (task.score(task.model, batch, moved) - score).abs()
    assert ((difference > 0) == (lengths > 0)).all()
    # the same user row as the sum with the histories' rows
    plain = make(model="mf")
    user = vectors["user"] + vectors["history"].sum() / lengths.clamp(min=1).sqrt()[:, None]
    torch.testing.assert_close(plain.score(plain.model, batch, {**vectors, "user": user}), score)


@pytest.mark.parametrize("model", ["lightgcn", "sasrec", "din", "fism"])
def test_any_collaborative_model_is_fused(make, tmp_path, model):
    """Its users and items are what is projected; its dense weights are trained, saved and read back."""
    task = make(model=model)
    batch = batch_of(task, rows(6), None)
    vectors = look_up(task, batch)
    task.model.eval()
    user, item = represent(task.collab, batch, vectors)
    seen: dict = {}
    handle = task.model.projection.register_forward_pre_hook(lambda module, given: seen.update(given[0]))
    try:
        score = task.score(task.model, batch, vectors)
    finally:
        handle.remove()
    torch.testing.assert_close(seen, {"user": user, "item": item, "semantic": vectors["semantic"]})
    task.loss(task.model, batch, vectors, Alone()).backward()
    trained = {n: w for n, w in task.model.named_parameters() if w.requires_grad}
    assert all(n.startswith(("projection.", "network.")) for n in trained)
    if model == "lightgcn":
        assert not any(n.startswith("network.") for n in trained)
        return
    reached = [n for n, w in trained.items() if w.grad is not None and w.grad.abs().sum() > 0]
    assert sum(n.startswith("network.") for n in reached) >= (1 if model == "fism" else 4)
    for name, table in TABLES.items():
        if name in ("user", "item"):
            save_table(tmp_path / "tables", name, table)
    task.save(tmp_path, {n: w.detach() for n, w in trained.items()})
    assert set(load_file(tmp_path / WEIGHTS)) == set(task.collab.network.state_dict())
    again = make(model=model, trained=tmp_path / "projection.safetensors", dense=tmp_path)
    again.model.eval()
    torch.testing.assert_close(again.score(again.model, batch, vectors), score)


def test_the_projection_takes_what_represents_an_item_however_wide_a_users_row_is(make):
    task = make(model="fism", dim=8)
    assert {table.name: table.dim for table in task.tables} == {"user": 4, "item": 8, "semantic": WIDTH}
    batch = batch_of(task, rows(3), None)
    vectors = look_up(task, batch)
    lengths = vectors["history"].lengths
    wide = {"item": torch.ones(3, 8), "history": Jagged(torch.ones(int(lengths.sum()), 8), lengths)}
    assert task.score(task.model, batch, vectors | wide).isfinite().all()


@pytest.mark.parametrize("model", ["mf", "svdpp", "sasrec"])
def test_prompts_show_more_of_a_history_than_the_model_reads(make, model):
    long = rows(3, history=pa.array([list(range(8)), [9, 9], []], pa.list_(pa.int64())))
    task = make(model=model)
    batch, plain = batch_of(task, long, None), batch_of(make(), long, None)
    assert torch.equal(batch["tokens"], plain["tokens"]) and ("history" in batch) == (model != "mf")
    if model != "mf":
        assert (batch["history"].values.tolist(), batch["history"].lengths.tolist()) == ([6, 7, 9, 9], [2, 2, 0])


@pytest.mark.parametrize(("model", "prefixes"), [("mf", 4), ("sasrec", 4), ("din", 2)])
def test_candidates_share_the_prompt_before_them_and_the_users_token_where_it_is_the_same(make, model, prefixes):
    """Two users, each with either of two histories. What din makes of a user is of the item too, so that it ends what is shared:
    users who liked the same share their titles."""
    task, number = make(model=model), 16
    task.model.eval()
    histories = [[3, 4, 5, 6], [3, 4, 6, 5]]
    user, history = np.repeat([0, 1], 8), np.tile([0, 1], 8)
    changes = {"user": user, "item": np.arange(number) % 4, "history": [histories[one] for one in history]}
    changes["history"] = pa.array(changes["history"], pa.list_(pa.int64()))
    prepared = task.prepare_to_score(rows(number, **changes), 0, np.zeros(number, np.int64))
    arranged, shared, alone = task.share(prepared, number)
    assert len(set(arranged["prefix"].to_pylist())) == prefixes
    assert shared < 0.7 * alone

    def scores(part: pa.Table) -> dict[int, float]:
        batch = task.collate(part, None)
        with torch.no_grad():
            return dict(
                zip(part["row"].to_pylist(), task.score(task.model, batch, look_up(task, batch)).tolist(), strict=True)
            )

    expected = scores(prepared)
    assert np.std(list(expected.values())) > 0.01
    assert scores(arranged) == pytest.approx(expected, abs=1e-5)


def test_tasks_that_read_rows_dont_load_torch(task):
    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read()); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(task.prepare), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
