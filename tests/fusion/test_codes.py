"""Users and items as text: their codes are the signs of stored rows, and a prompt with them scores as the text that it is."""

import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from small import batch_of, save_table, small_log

from sellarec.collab.task import build_collab
from sellarec.config import Adapt, Collab, Fuse, Prompt
from sellarec.fusion.codes import CodesTask, codes_of
from sellarec.fusion.fuse import build_fuse, represented
from sellarec.language import llm as llms
from sellarec.language.adapt import build_adapt
from sellarec.training.table import SavedTable, Table
from sellarec.training.task import Alone

torch.set_num_threads(1)

USERS, ITEMS, DIM = 7, 10, 16
PROMPT = Prompt(template="compact")
TABLES = {
    name: np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    for seed, (name, count) in enumerate((("user", USERS), ("item", ITEMS)))
}


@pytest.fixture(scope="module")
def make(decoder, titles, tmp_path_factory):
    """Builds the task on the embedded decoder with an adapter that isn't fresh."""
    torch.manual_seed(5)
    source, folder = llms.find_llm(str(decoder), None), tmp_path_factory.mktemp("start")
    adapt = build_adapt(source, titles, PROMPT, "movie", Adapt(rank=2))
    trained = {name: weight.detach() for name, weight in adapt.model.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        torch.nn.init.normal_(weight, std=0.05)
    adapt.save(folder, trained)
    for name, rows in TABLES.items():
        save_table(folder / "tables", name, rows, (2,))
    log = small_log(folder, USERS, ITEMS, np.ones(ITEMS, bool))

    def build(**changes) -> CodesTask:
        usual = {"represent": "codes", "tokens": ("user", "item"), "train": ("adapter",), "unseen_dropout": 0.3}
        fuse = Fuse(**usual | changes)
        collab = build_collab(log, Collab(model="binary_mf", dim=DIM), folder, represented=represented(fuse))
        return build_fuse(
            source, titles, PROMPT, "movie", folder / "adapter", collab, None, 6, None, None, fuse, seed=3
        )

    return build


def rows(number: int, **changes) -> pa.Table:
    columns = {
        "row": np.arange(number) + 100,
        "user": np.arange(number) % USERS,
        "item": np.arange(number) % ITEMS,
        "label": pa.array(np.arange(number) % 2, pa.int8()),
        "history": pa.array([[1, 2]] * number, pa.list_(pa.int64())),
        "user_seen": np.ones(number, bool),
        "item_seen": np.ones(number, bool),
        "weight": np.ones(number, np.float32),
    }
    return pa.table(columns | changes)


def dotted(name: str, row: int) -> str:
    bits = "".join("1" if value > 0 else "0" for value in TABLES[name][row])
    return f"{int(bits[:8], 2)}.{int(bits[8:], 2)}"


def test_a_code_is_the_signs_of_the_stored_row(tmp_path, monkeypatch):
    rows = np.array([[0.5, -0.5, 1e-30, -1e-30, 0, -0.0, 2, 3], [-1] * 8, [1] * 8], np.float32)
    save_table(tmp_path, "item", rows, (1,))
    table = Table("item", 3, 8, ("item",), read=SavedTable(tmp_path, "item").read)
    for at_once in (2, 100):
        monkeypatch.setattr("sellarec.fusion.codes.ROWS_AT_ONCE", at_once)
        assert codes_of(table).tolist() == [[0b10100011], [0], [255]]


def test_prompts_say_the_codes_and_are_scored_as_that_text(make, decoder, titles):
    """The first user and the second item are unseen, so that nothing stands for them."""
    task = make(code="dotted")
    table = rows(3, user_seen=[False, True, True], item_seen=[True, False, True])
    prepared = task.prepare_to_score(table, 0, np.zeros(3, np.int64))
    tokenizer = llms.load_tokenizer(decoder)
    liked = f"Liked: {titles[1]}; {titles[2]}."
    assert [
        tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in prepared["tokens"].to_pylist()
    ] == [
        f"{liked} User. Next {dotted('item', 0)}: {titles[0]}. Good?",
        f"{liked} User {dotted('user', 1)}. Next: {titles[1]}. Good?",
        f"{liked} User {dotted('user', 2)}. Next {dotted('item', 2)}: {titles[2]}. Good?",
    ]
    with torch.no_grad():
        scores = task.score(task.model, batch_of(task, table, None), {})
        for tokens, score in zip(prepared["tokens"].to_pylist(), scores, strict=True):
            logits = task.model.llm(input_ids=torch.tensor([tokens])).logits[0, -1]
            yes, no = (task.prompts.segments.answers[k][0] for k in (0, 1))
            torch.testing.assert_close(logits[yes] - logits[no], score, rtol=1e-4, atol=1e-5)
    with task.without("user"):
        without = task.prepare_to_score(table, 0, np.zeros(3, np.int64))["tokens"].to_pylist()
    assert " User. Next" in tokenizer.decode(without[2]) and without[0] == prepared["tokens"][0].as_py()


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_share_of_rows_to_train_on_is_without_codes(make, share):
    """Drawn by row and epoch alone, of user and item apart; never where rows are scored."""
    task, number = make(code="dotted", unseen_dropout=share), 2000
    table = rows(number, user=[0] * number, item=[0] * number)

    def kinds(prepare, table: pa.Table, epoch: int) -> list[int]:
        made = prepare(table, epoch, np.zeros(len(table), np.int64))
        return [len(tokens) for tokens in made["tokens"].to_pylist()]

    lengths = [kinds(task.prepare, table, epoch) for epoch in (0, 1)]
    assert len(set(kinds(task.prepare_to_score, table, 0))) == 1
    assert (lengths[0] == lengths[1]) == (share == 0)
    assert lengths[0][:500] == kinds(task.prepare, table.slice(0, 500), 0)
    counts = Counter(lengths[0])
    shares = [counts[length] / number for length in sorted(counts)]
    if share == 0:
        assert shares == [1.0]
        return
    # from the shortest on: without both codes, without one of them (of one length or of two), with both
    expected = [share**2, share * (1 - share), share * (1 - share), (1 - share) ** 2]
    assert [shares[0], sum(shares[1:-1]), shares[-1]] == pytest.approx(
        [expected[0], expected[1] + expected[2], expected[3]], abs=0.05
    )


def test_the_adapter_alone_is_trained_and_no_table_looked_up(make):
    task = make()
    batch = batch_of(task, rows(4))
    assert task.tables == () and task.lookups(batch) == {}
    task.loss(task.model, batch, {}, Alone()).backward()
    trained = {name for name, weight in task.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(weight.grad is not None for weight in task.model.parameters() if weight.requires_grad)
    facts = task.facts()
    assert (facts["tokens"], facts["trained"], facts["code"]) == (["user", "item"], ["adapter"], "binary")


def test_candidates_share_the_prompt_up_to_the_items_code(make):
    task, number = make(), 8
    prepared = task.prepare_to_score(rows(number, user=[0, 1] * 4), 0, np.zeros(number, np.int64))
    arranged, shared, alone = task.share(prepared, number)
    assert len(set(arranged["prefix"].to_pylist())) == 2 and shared < 0.8 * alone


def test_tasks_that_read_rows_dont_load_torch(make):
    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read()); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(make().prepare), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
