"""The losses of stages adapt and fuse, step for step: one to three workers, and a plain process with whole logits."""

from pathlib import Path

import numpy as np
import prompt_cases
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from engine_cases import rate_at
from prompt_cases import BATCH, ITEMS, STEPS, USERS, Case
from small import small_log
from torch.nn import functional as F

from sellarec.config import Adapt, Prompt
from sellarec.language import llm as llms
from sellarec.language.adapt import build_adapt

LOSSES = ("answer", "answer-tokens", "sequence")
ROWS = 19
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """More than STEPS batches, the last one short, with histories of different lengths."""
    generator = np.random.default_rng(8)
    histories = [generator.integers(0, ITEMS, generator.integers(0, 5)).tolist() for _ in range(ROWS)]
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    columns = {
        "row": np.arange(ROWS),
        "user": generator.integers(0, USERS, ROWS),
        "item": generator.integers(0, ITEMS, ROWS),
        "label": pa.array(generator.integers(0, 2, ROWS), pa.int8()),
        "history": pa.array(histories, pa.list_(pa.int64())),
        "user_seen": np.ones(ROWS, bool),
        "item_seen": np.ones(ROWS, bool),
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def adapter(decoder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    task = build_adapt(llms.find_llm(str(decoder), None), ["x"], Prompt(template="compact"), "movie", Adapt(rank=2))
    task.save(folder, {n: w.detach() for n, w in task.model.named_parameters() if w.requires_grad})
    return folder / "adapter"


def plain(case: Case) -> dict:
    """Stage adapt in one process: the logits of all positions, torch's own loss over those that count, AdamW."""
    task, settings = prompt_cases.task_of(case), prompt_cases.settings_of(case)
    model, segments = task.model.llm, task.prompts.segments
    trained = {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=settings.weight_decay)
    table, losses = pq.read_table(case.rows), []
    for step in range(STEPS):
        some = table.slice(step * BATCH, BATCH)
        bare = task.prompts.build(some["item"].to_numpy(), some["history"].combine_chunks())["tokens"].to_pylist()
        total, count = torch.zeros(()), 0
        for prompt, label in zip(bare, some["label"].to_pylist(), strict=True):
            answer = segments.answers[0 if label else 1]
            tokens = torch.tensor([[*prompt, *answer]])
            logits = model(input_ids=tokens).logits[0].double()
            if case.loss == "answer":
                pair = logits[len(prompt) - 1, [segments.yes, segments.no]]
                total, count = total + F.cross_entropy(pair, torch.tensor(1 - label)), count + 1
            else:
                first = len(prompt) if case.loss == "answer-tokens" else 1
                total = total + F.cross_entropy(logits[first - 1 : -1], tokens[0, first:], reduction="sum")
                count += tokens.shape[1] - first
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), settings.clip)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate_at(step)
        optimizer.step()
        losses.append((total / count).item())
    return {"losses": losses, "weights": {name: weight.detach().numpy() for name, weight in trained.items()}}


def close(found: dict, expected: dict) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], **CLOSE)
    assert found["weights"].keys() == expected["weights"].keys() and found["weights"]
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, **CLOSE, err_msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("loss", LOSSES)
def test_any_number_of_workers_adapts_as_a_plain_process_with_whole_logits(gloo, decoder, rows, loss):
    case = Case(decoder, rows, loss)
    expected = plain(case)
    for workers in (1, 2, 3):
        found = gloo.call(workers, prompt_cases.train, case)
        close(found[0], expected)
        assert len(found[0]["scores"]["score"]) == ROWS


@pytest.mark.distributed
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_any_number_of_workers_fuses_alike(gloo, decoder, rows, adapter, tmp_path, loss):
    case = Case(decoder, rows, loss, adapter, small_log(tmp_path, USERS, ITEMS, np.ones(ITEMS, bool)))
    alone, *more = (gloo.call(workers, prompt_cases.train, case)[0] for workers in (1, 2, 3))
    assert alone["losses"][0] > 0 and alone["losses"][-1] != alone["losses"][0]
    for found in more:
        close(found, alone)
        np.testing.assert_allclose(found["scores"]["score"], alone["scores"]["score"], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory) -> Path:
    """Two batches of rows of two users each, with long histories, which begin alike; and one in which none do."""
    generator = np.random.default_rng(9)
    user = np.concatenate([np.repeat([0, 1], [7, 5]), np.repeat([2, 3], [4, 8]), generator.permutation(12) % USERS])
    histories = [[8, 4, 2, 8], [8, 8, 1], [1, 8, 8, 2, 5], [3, 8, 8, 4]]
    lists = [histories[one] for one in user[:24]] + [[k % ITEMS, *range(1 + k % 3)] for k in range(12)]
    path = tmp_path_factory.mktemp("rows") / "candidates.parquet"
    columns = {
        "row": np.arange(36),
        "user": user,
        "item": generator.integers(0, ITEMS, 36),
        "label": pa.array(generator.integers(0, 2, 36), pa.int8()),
        "history": pa.array(lists, pa.list_(pa.int64())),
        "user_seen": np.ones(36, bool),
        "item_seen": np.ones(36, bool),
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["adapt", "fuse"])
def test_any_number_of_workers_scores_alike_with_shared_prefixes(gloo, decoder, candidates, adapter, tmp_path, stage):
    """Two passes in the slices that are worth it, one in the others, on all workers alike."""
    more = (adapter, small_log(tmp_path, USERS, ITEMS, np.ones(ITEMS, bool))) if stage == "fuse" else (None, None)
    case = Case(decoder, candidates, "answer", *more, micro_batch=6)
    expected = None
    for workers in (1, 2, 3):
        found = gloo.call(workers, prompt_cases.score_candidates, case)
        alone, shared = found[0]["alone"], found[0]["shared"]
        assert len(alone["score"]) == 36 and alone["score"].std() > 0
        expected = alone["score"] if expected is None else expected
        np.testing.assert_allclose(alone["score"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(shared["score"], expected, rtol=1e-4, atol=1e-5)
        parts = -(-12 // workers // 6)
        assert [one["calls"] for one in found] == [[3 * parts, 5 * parts]] * workers
