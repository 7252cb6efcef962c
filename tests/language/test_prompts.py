"""Prompts: the tokens of readable text, slots where they belong, histories that are shortened and never the instruction."""

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sellarec.config import Pretrain, Prompt
from sellarec.errors import UserError
from sellarec.language.llm import load_tokenizer
from sellarec.language.pretrain import build_decoder
from sellarec.language.prompts import (
    MIN_HISTORY,
    NO_CODE,
    SOFT,
    Catalog,
    Coded,
    Prompts,
    SegmentTokenizer,
    Written,
    compile_template,
)
from sellarec.language.scorer import left_padded
from sellarec.language.templates import Template, read_template
from sellarec.training.stream import LEFT_OUT

EMBEDDED, PRETRAINED = "embedded", ("lm-stories260k", "lm-babyllama")
BOTH = [(name, kind) for name in ("full", "compact") for kind in ("text", "fused")]
PLENTY = 100_000


@pytest.fixture(scope="module", params=[EMBEDDED, *PRETRAINED])
def tokenizer(request):
    """The embedded decoder's tokenizer, and those of two pretrained models."""
    if request.param == EMBEDDED:
        return load_tokenizer(request.getfixturevalue("decoder"))
    return load_tokenizer(request.getfixturevalue("sellarec_data") / request.param / "hf")


@pytest.fixture(scope="module")
def embedded(decoder):
    return load_tokenizer(decoder)


def make(tokenizer, titles, kind="text", context=PLENTY, soft=SOFT, coded=None, **changes) -> Prompts:
    settings = Prompt(**{"template": "compact", "max_tokens": PLENTY} | changes)
    return Prompts(tokenizer, titles, settings, "movie", context, kind, soft=soft, coded=coded)


def build(
    prompts: Prompts, rows: list[tuple[int, list[int]]], codes: Mapping[str, np.ndarray] = {}
) -> dict[str, np.ndarray]:
    """The prompts of (candidate, history) rows."""
    items, histories = zip(*rows, strict=True)
    found = prompts.build(np.asarray(items), pa.array(histories, pa.list_(pa.int64())), codes=codes)
    counts = {name: found[name].to_numpy() for name in ("shown", LEFT_OUT)}
    return {**counts, **{name: value.numpy() for name, value in left_padded(found).items()}}


def tokens_of(found: dict[str, np.ndarray], row: int) -> list[int]:
    return found["tokens"][row][found["mask"][row]].tolist()


def readable(template: str, history: list[str], title: str, kind: str = "text", soft: tuple[str, ...] = SOFT) -> str:
    """The prompt as one reads it, without the answer; soft tokens and the spaces before them left out."""
    words = read_template(template)
    text = "\n".join(turn.text for turn in words.turns(kind, soft))
    for slot in SOFT:
        text = text.replace(f"{{{slot}}}", "")
    shown = (
        words.separator.join(words.history_title.format(title=title) for title in history) if history else words.none
    )
    return text.format(noun="movie", Noun="Movie", history=shown, title=title)


SUBSETS = [soft for count in (1, 2, 3) for soft in combinations(SOFT, count)]

ROWS = [(0, []), (4, [1]), (2, [3, 0, 1, 5]), (7, [9, 7])]


@pytest.mark.parametrize(("template", "kind"), BOTH)
def test_answers_are_told_apart_where_their_tokens_in_context_first_differ(tokenizer, titles, template, kind):
    """Soft tokens stand for a break: only what follows the last one has a tokenisation to be compared with."""
    prompts = make(tokenizer, titles, kind, template=template)
    found = build(prompts, ROWS)
    for row, (item, history) in enumerate(ROWS):
        prompt = readable(template, [titles[i] for i in history], titles[item], kind)
        yes, no = (tokenizer(prompt + answer)["input_ids"] for answer in read_template(template).answers)
        differs = next(i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b)
        assert (prompts.segments.yes, prompts.segments.no) == (yes[differs], no[differs])
        if kind == "text":
            assert tokens_of(found, row) == yes[:differs]
        else:
            after = tokens_of(found, row)[found["semantic_position"][row] - (~found["mask"][row]).sum() + 1 :]
            assert len(after) > 2 and after[-8:] == yes[:differs][-len(after[-8:]) :]


@pytest.mark.parametrize(("template", "kind"), BOTH)
def test_a_prompt_reads_as_its_template_says(tokenizer, titles, template, kind):
    """Where letters are in the vocabulary; the tokens before the answers' own are what is read."""
    known = [title for title in titles if tokenizer.unk_token_id not in tokenizer(title)["input_ids"]]
    assert len(known) > 5
    rows = [(len(known) - 1, [0, 1, 2]), (1, [])]
    found = build(make(tokenizer, known, kind, template=template), rows)
    for row, (item, history) in enumerate(rows):
        padding = int((~found["mask"][row]).sum())
        slots = {int(found[f"{slot}_position"][row]) - padding for slot in SOFT if f"{slot}_position" in found}
        kept = [token for at, token in enumerate(tokens_of(found, row)) if at not in slots]
        said = tokenizer.decode(kept, skip_special_tokens=True).strip()
        assert said == readable(template, [known[i] for i in history], known[item], kind)


def test_spaces_stay_where_the_vocabulary_has_no_word_that_begins_with_a_space_and_an_a(tmp_path):
    """Such a byte-level tokenizer takes " a" for two tokens, as one does that puts a space before its input."""
    titles = ["Golden Voyage", "Moon Detective", "Silent Harbour", "Bad Santa", "Heat"]
    build_decoder(titles * 20, [], Pretrain(vocabulary=1024, hidden=16, layers=1, heads=2), 0, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer(" a")["input_ids"]) > len(tokenizer("a")["input_ids"])
    found = build(make(tokenizer, titles, template="compact"), [(0, [1, 2])])
    said = tokenizer.decode(tokens_of(found, 0), skip_special_tokens=True)
    assert said.strip() == readable("compact", titles[1:3], titles[0])


WORDS = st.lists(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=50)
@given(catalog=st.lists(WORDS, min_size=1, max_size=5), data=st.data())
def test_the_tokens_are_those_of_the_readable_text(embedded, catalog, data):
    """Exactly so for a tokenizer that breaks at spaces and punctuation, and titles of words."""
    item = st.integers(0, len(catalog) - 1)
    rows = data.draw(st.lists(st.tuples(item, st.lists(item, max_size=5)), min_size=1, max_size=4))
    template = data.draw(st.sampled_from(["full", "compact"]))
    found = build(make(embedded, catalog, template=template), rows)
    for row, (candidate, history) in enumerate(rows):
        text = readable(template, [catalog[i] for i in history], catalog[candidate])
        assert tokens_of(found, row) == embedded(text)["input_ids"]


@pytest.mark.parametrize("template", ["full", "compact"])
def test_slots_point_at_their_places_under_left_padding(tokenizer, titles, template):
    prompts = make(tokenizer, titles, "fused", template=template)
    found = build(prompts, ROWS)
    text = read_template(template).turns("fused")[0].text
    before = {slot: text.partition(f"{{{slot}}}")[0] for slot in ("user", "item")}
    for row, (item, _) in enumerate(ROWS):
        tokens, mask = found["tokens"][row], found["mask"][row]
        padding = int((~mask).sum())
        assert not mask[:padding].any() and mask[padding:].all(), "padding lies on the left"
        assert (tokens[:padding] == 0).all() and all(tokens[found[f"{slot}_position"][row]] == 0 for slot in SOFT)
        assert (
            padding < found["user_position"][row] < found["item_position"][row] == found["semantic_position"][row] - 1
        )
        for slot, literal in before.items():
            said = tokenizer.decode(tokens[padding : found[f"{slot}_position"][row]].tolist())
            assert said.endswith(literal.split()[-1].format(noun="movie")), (slot, said)
        after = tokenizer.decode(tokens[found["semantic_position"][row] + 1 :].tolist())
        title = tokenizer.decode(tokenizer(titles[item], add_special_tokens=False)["input_ids"]).strip()
        assert after.lstrip(": ").startswith(title)
    alone = [build(prompts, [pair]) for pair in ROWS]
    for row, single in enumerate(alone):
        assert not (~single["mask"]).any()
        padding = int((~found["mask"][row]).sum())
        assert tokens_of(found, row) == single["tokens"][0].tolist()
        assert all(found[f"{slot}_position"][row] - padding == single[f"{slot}_position"][0] for slot in SOFT)


@pytest.mark.parametrize("template", ["full", "compact"])
@pytest.mark.parametrize("soft", SUBSETS, ids=" ".join)
def test_a_prompt_speaks_of_the_injected_tokens_alone(tokenizer, titles, template, soft):
    """Its text is the template's for them, its slots are theirs, in the template's order; no room is lost to the others."""
    prompts = make(tokenizer, titles, "fused", template=template, soft=soft)
    found = build(prompts, ROWS)
    slots = [f"{name}_position" for name in SOFT if name in soft]
    assert {name for name in found if name.endswith("_position")} == set(slots)
    for row, (item, history) in enumerate(ROWS):
        places = [int(found[slot][row]) for slot in slots]
        assert places == sorted(places) and (found["tokens"][row][places] == 0).all()
        padding = int((~found["mask"][row]).sum())
        kept = np.delete(found["tokens"][row], places)[padding:].tolist()
        text = readable(template, [titles[i] for i in history], titles[item], "fused", soft)
        others = readable(template, [titles[i] for i in history], titles[item], "fused", SOFT)
        assert (text == others) == (soft == SOFT or (template == "compact" and "user" in soft))
        if tokenizer.unk_token_id not in kept:
            assert tokenizer.decode(kept, skip_special_tokens=True).strip() == text
    assert prompts.segments.fixed <= make(tokenizer, titles, "fused", template=template).segments.fixed


def test_what_the_fused_templates_say():
    """The wording for each set of tokens; with all three that of before there was a choice."""
    full, compact = (read_template(name) for name in ("full", "compact"))

    def said(template: Template, soft: tuple[str, ...]) -> str:
        (turn,) = template.turns("fused", soft)
        return turn.text

    assert {soft: said(compact, soft) for soft in SUBSETS} == {
        ("user",): "Liked: {history}. User{user}. Next: {title}. Good?",
        ("item",): "Liked: {history}. Next{item}: {title}. Good?",
        ("semantic",): "Liked: {history}. Next{semantic}: {title}. Good?",
        ("user", "item"): "Liked: {history}. User{user}. Next{item}: {title}. Good?",
        ("user", "semantic"): "Liked: {history}. User{user}. Next{semantic}: {title}. Good?",
        ("item", "semantic"): "Liked: {history}. Next{item}{semantic}: {title}. Good?",
        ("user", "item", "semantic"): "Liked: {history}. User{user}. Next{item}{semantic}: {title}. Good?",
    }
    assert said(full, SOFT) == (
        "Below are {noun}s that a user liked, the most recent one last, a vector that describes the user, and a target {noun} "
        "with two vectors that describe it. Judge from all of this whether the user will like the target {noun} too. Answer "
        'with "Yes." or "No." Liked {noun}s: {history}. User:{user}. Target {noun}:{item}{semantic} {title}. Answer:'
    )
    assert said(full, ("user",)).startswith(
        "Below are {noun}s that a user liked, the most recent one last, a vector that describes the user, and a target {noun}. "
    )
    assert "last, and a target {noun} with a vector that describes it. " in said(full, ("semantic",))
    assert "two vectors" not in said(full, ("user", "item"))


NONE = [NO_CODE] * 3
CODES = {
    "user": np.array([[1, 128, 255], [0, 7, 10], NONE, [99, 99, 99]]),
    "item": np.array([[254, 0, 1], NONE, NONE, [99, 99, 99]]),
}
"""Of ROWS."""


def with_codes(text: str, written: dict[str, str]) -> str:
    """A fused text with codes, each behind a space, or nothing, in its slots."""
    for slot, code in written.items():
        before, _, after = text.partition(f"{{{slot}}}")
        text = before.removesuffix(" ") + (f" {code}" if code else "") + after
    return text


def coded_text(values: list[int], form: str) -> str:
    """By words, as one would write it."""
    if NO_CODE in values:
        return ""
    return "".join(bin(256 + value)[3:] for value in values) if form == "binary" else ".".join(map(str, values))


@pytest.mark.parametrize("form", ["binary", "dotted"])
@pytest.mark.parametrize("template", ["full", "compact"])
@pytest.mark.parametrize("soft", [("user",), ("item",), ("user", "item")], ids=" ".join)
def test_codes_are_text_in_the_places_of_soft_tokens(tokenizer, titles, template, soft, form):
    """One that isn't there leaves nothing; the prefix that candidates share holds the user's and ends before the item's."""
    prompts = make(tokenizer, titles, "fused", template=template, soft=soft, coded=Coded(form, 3))
    found = build(prompts, ROWS, CODES)
    assert set(found) == {"tokens", "mask", "shown", LEFT_OUT}
    words = read_template(template)
    (turn,) = words.turns("fused", soft)
    read = 0
    for row, (item, history) in enumerate(ROWS):
        tokens = tokens_of(found, row)
        if tokenizer.unk_token_id in tokens:
            continue
        text = with_codes(turn.text, {slot: coded_text(CODES[slot][row].tolist(), form) for slot in soft})
        history = words.separator.join(titles[i] for i in history) if history else words.none
        text = text.format(noun="movie", history=history, title=titles[item])
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == text
        read += 1
    assert read > 1
    histories = pa.array([[1, 2]] * 4, pa.list_(pa.int64()))
    begin, codes = np.full(4, 3), {"user": CODES["user"][[0, 0, 1, 2]], "item": CODES["item"]}
    built = prompts.build(begin, histories, codes=codes)
    parts = [
        tokens[:length]
        for tokens, length in zip(built["tokens"].to_pylist(), built["prefix_tokens"].to_pylist(), strict=True)
    ]
    assert parts[0] == parts[1] and (parts[0] == parts[2]) == ("user" not in soft)
    for part, values in zip(parts, CODES["item"].tolist(), strict=True):
        written = coded_text(values, form)
        assert not written or "item" not in soft or written not in tokenizer.decode(part)


@settings(max_examples=25)
@given(data=st.data())
def test_histories_make_room_for_codes_as_long_as_they_are(embedded, titles, data):
    form, limit = data.draw(st.sampled_from(["binary", "dotted"])), data.draw(st.integers(60, 260))
    try:
        prompts, plenty = (
            make(embedded, titles, "fused", soft=("user", "item"), coded=Coded(form, 3), max_tokens=most)
            for most in (limit, PLENTY)
        )
    except UserError as error:
        assert str(limit) in str(error)
        assume(False)
    item = st.integers(0, len(titles) - 1)
    rows = data.draw(st.lists(st.tuples(item, st.lists(item, max_size=8)), min_size=4, max_size=4))
    found = build(prompts, rows, CODES)
    for row, (candidate, history) in enumerate(rows):
        tokens, shown = tokens_of(found, row), int(found["shown"][row])
        assert len(tokens) <= limit
        codes = {slot: values[row : row + 1] for slot, values in CODES.items()}
        assert tokens == tokens_of(build(plenty, [(candidate, history[len(history) - shown :])], codes), 0)
        if 0 < shown < len(history):
            longer = build(plenty, [(candidate, history[len(history) - shown - 1 :])], codes)
            assert len(longer["tokens"][0]) > limit, "one more title would have fitted"


def test_a_context_too_short_for_codes_is_refused(embedded, titles):
    """A dotted code takes less, and is named where a binary one doesn't fit; what is said to be needed is enough, just so."""
    needed = {}
    for form in (None, "dotted", "binary"):
        coded = None if form is None else Coded(form, 4)
        with pytest.raises(UserError, match="room for 20 ") as caught:
            make(embedded, titles, "fused", context=20, soft=("user", "item"), coded=coded)
        assert ("take fuse.code dotted" in str(caught.value)) == (form == "binary")
        needed[form] = sum(
            int(found) for found in re.findall(r"needs (\d+) tokens, and the longest title (\d+)", str(caught.value))[0]
        )
        with pytest.raises(UserError, match=f"room for {needed[form] - 1} "):
            make(embedded, titles, "fused", context=needed[form] - 1, soft=("user", "item"), coded=coded)
        longest = max(range(len(titles)), key=lambda i: len(embedded(titles[i])["input_ids"]))
        prompts = make(embedded, titles, "fused", context=needed[form], soft=("user", "item"), coded=coded)
        codes = {slot: np.array([[255, 199, 102, 250]]) for slot in ("user", "item")}
        assert build(prompts, [(longest, [])], codes)["tokens"].shape[1] <= needed[form]
    assert needed[None] + 8 < needed["dotted"] < needed["binary"]


def test_a_tokenizer_that_tells_no_codes_apart_is_refused(titles):
    """One without tokens for digits."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "Yes": 1, "No": 2, "a": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    make(tokenizer, titles, "fused")
    with pytest.raises(UserError, match=r"of the 256 values of 8 bits only 1 differ in their tokens, written binary"):
        make(tokenizer, titles, "fused", soft=("item",), coded=Coded("binary", 2))


def test_text_prompts_have_no_slots(embedded, titles):
    assert set(build(make(embedded, titles), ROWS)) == {"tokens", "mask", "shown", LEFT_OUT}


@settings(max_examples=60)
@given(data=st.data())
def test_histories_are_shortened_from_the_oldest_and_the_instruction_never(tokenizer, titles, data):
    template, kind = data.draw(st.sampled_from(BOTH))
    limit = data.draw(st.integers(30, 420))
    most, title_tokens = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([4, 16, 64]))
    try:
        prompts = make(
            tokenizer, titles, kind, template=template, max_tokens=limit, history=most, title_tokens=title_tokens
        )
    except UserError as error:
        assert str(limit) in str(error)
        assume(False)
    item = st.integers(0, len(titles) - 1)
    rows = data.draw(st.lists(st.tuples(item, st.lists(item, max_size=8)), min_size=1, max_size=5))
    found = build(prompts, rows)
    plenty = make(tokenizer, titles, kind, template=template, title_tokens=title_tokens)
    for row, (candidate, history) in enumerate(rows):
        tokens, shown = tokens_of(found, row), int(found["shown"][row])
        assert len(tokens) <= limit
        assert shown <= min(most, len(history))
        assert found[LEFT_OUT][row] == min(most, len(history)) - shown
        # the same as a prompt with room for all, of the history's most recent part
        assert tokens == tokens_of(build(plenty, [(candidate, history[len(history) - shown :])]), 0)
        if shown < min(most, len(history)):
            longer = build(plenty, [(candidate, history[len(history) - shown - 1 :])])
            if shown or len(longer["tokens"][0]) - len(tokens) > 0:
                assert len(longer["tokens"][0]) > limit, "one more title would have fitted"


def test_an_empty_history_is_said_so(tokenizer, titles):
    found = build(make(tokenizer, titles), [(0, []), (0, [1])])
    assert found["shown"].tolist() == [0, 1]
    assert f"Liked: {read_template('compact').none}." in tokenizer.decode(tokens_of(found, 0))


def test_histories_may_be_slices_of_a_column(embedded, titles):
    prompts = make(embedded, titles)
    histories = pa.array([[9, 9, 9], [], [1, 2], [3]], pa.list_(pa.int64()))
    part = prompts.build(np.array([5, 6]), histories.slice(2))
    whole = prompts.build(np.array([0, 0, 5, 6]), histories)
    assert part.equals(whole.slice(2))


def test_long_titles_are_cut_and_counted(embedded, titles):
    segmenter = SegmentTokenizer(embedded)
    written = Written("{title}", spaced=True)
    whole = Catalog(segmenter, titles, PLENTY, written)
    assert whole.shortened == 0 and len(whole.lengths) == len(titles)
    cut = Catalog(segmenter, titles, 6, written)
    assert cut.shortened == sum(whole.lengths > 6) > 0
    assert cut.longest == 6
    for item, title in enumerate(titles):
        long, short = (
            catalog.tokens[catalog.starts[item] :][: catalog.lengths[item]].tolist() for catalog in (whole, cut)
        )
        assert long == segmenter.titles([title], written)[0][0] and short == long[:6]


@pytest.mark.parametrize("kind", ["text", "fused"])
def test_auto_takes_the_full_template_where_it_fits_with_some_history(tokenizer, titles, kind):
    """The same for both kinds; and where it takes it, so many of the longest titles are shown."""
    chosen = {}
    longest = max(range(len(titles)), key=lambda i: len(tokenizer(titles[i])["input_ids"]))
    for context in range(120, 900, 20):
        prompts = make(tokenizer, titles, kind, context=context, template="auto", title_tokens=20)
        chosen[context] = prompts.template
        if prompts.template == "full":
            found = build(prompts, [(longest, [longest] * (MIN_HISTORY + 2))])
            assert found["shown"][0] >= MIN_HISTORY - 1  # the separator may take more than one token
    assert sorted(chosen.values()) == [chosen[context] for context in sorted(chosen)], "compact, then full"
    assert set(chosen.values()) == {"compact", "full"}
    other = "text" if kind == "fused" else "fused"
    for context, template in chosen.items():
        assert make(tokenizer, titles, other, context=context, template="auto", title_tokens=20).template == template
    assert (
        make(tokenizer, titles, kind, context=900, max_tokens=120, template="auto", title_tokens=20).template
        == "compact"
    )


@pytest.mark.parametrize(("template", "context"), [("full", 100), ("compact", 30), ("auto", 30)])
def test_a_context_that_is_too_short_is_refused(embedded, titles, template, context):
    with pytest.raises(UserError, match=f"room for {context}.*{context}"):
        make(embedded, titles, context=context, template=template)


def test_every_prompt_fits_in_the_shortest_context_that_is_taken(tokenizer, titles):
    """Candidates with the longest title and no history that is shown: nothing is left to shorten."""
    longest = max(range(len(titles)), key=lambda i: len(tokenizer(titles[i])["input_ids"]))

    def prompts(context: int) -> Prompts | None:
        try:
            return make(tokenizer, titles, "fused", context=context)
        except UserError:
            return None

    shortest = next(context for context in range(20, 400) if prompts(context))
    for history in ([], [longest], [9]):
        assert build(prompts(shortest), [(longest, history)])["tokens"].shape[1] <= shortest


def test_answers_that_begin_one_another_are_refused(embedded):
    template = replace(read_template("compact"), answers=(" Yes", " Yes."))
    with pytest.raises(UserError, match="Yes"):
        compile_template(SegmentTokenizer(embedded), template, "text", "movie", "auto")


def test_the_noun_is_the_datas(embedded, titles):
    prompts = Prompts(embedded, titles, Prompt(template="full", max_tokens=PLENTY), "book", PLENTY, "text")
    said = embedded.decode(tokens_of(build(prompts, ROWS), 0))
    assert "target book" in said and "movie" not in said and "Target book:" in said


def test_a_start_token_stands_once_in_front_whatever_the_tokenizer_puts_behind(embedded, titles):
    """Some tokenizers end every text with a token; in the middle of a prompt it has no place."""
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    ending = deepcopy(embedded)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert ending("a")["input_ids"][-1] == 1
    plain, other = (build(make(which, titles), ROWS) for which in (embedded, ending))
    np.testing.assert_array_equal(plain["tokens"], other["tokens"])
    assert all(tokens_of(plain, row).count(0) == 1 for row in range(len(ROWS)))


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
)


@pytest.fixture
def chat(embedded):
    """The embedded decoder's tokenizer with a chat template, and with soft tokens as the published code has them."""
    from copy import deepcopy

    tokenizer = deepcopy(embedded)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<User_ID>", "<Item_ID>", "<Warm_ID>"]}
    )
    tokenizer.chat_template = CHATML
    return tokenizer


PUBLISHED = {
    "text": [
        "A user has given high ratings to the following movies. Given the movie list and a target movie's title. Please identify "
        "whether the user will like the target movie by answering 'Yes.' or 'No.'",
        "MovieList: {history}, TargetMovie: {title}",
    ],
    "fused": [
        "A user has given high ratings to the following movies. Given the movielist, the user's feature and a target movie's "
        "feature and Title. Please Use all available information to identify whether the user will like the target movie by "
        "answering 'Yes.' or 'No.'",
        "The MovieList: {history}. The user's feature is <User_ID>. The target movie's feature is <Item_ID>, <Warm_ID>. "
        "Targetmovie: {title}.",
    ],
}


@pytest.mark.parametrize("kind", ["text", "fused"])
def test_the_published_prompt_is_made_token_for_token(chat, kind):
    """SeLLa-Rec's three turns in ChatML, the history as Python prints a list; also with quotes in titles and none to show."""
    titles = ["the harbor sea", 'Sailor\'s "tide"', "it's golden", "x", "2001"]
    prompts = make(chat, titles, kind, template="sella")
    rows = [(0, [1, 2, 3]), (1, [4]), (2, [])]
    items, histories = zip(*rows, strict=True)
    answered = prompts.build(
        np.array(items), pa.array(histories, pa.list_(pa.int64())), labels=np.array([1, 0, 1])
    ).to_pylist()
    system, user = PUBLISHED[kind]
    for (item, history), label, found in zip(rows, (1, 0, 1), answered, strict=True):
        said = user.format(history=str([titles[i] for i in history]), title=titles[item])
        answer = "Yes." if label else "No."
        turns = [("system", system), ("user", said), ("assistant", answer)]
        text = chat.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False).rstrip()
        whole = chat(text, add_special_tokens=False)["input_ids"]
        slots = dict(zip(SOFT, chat.convert_tokens_to_ids(["<User_ID>", "<Item_ID>", "<Warm_ID>"]), strict=True))
        places = {slot: found[f"{slot}_position"] for slot in slots if kind == "fused"}
        ours = list(found["tokens"])
        for slot, at in places.items():
            assert ours[at] == 0
            ours[at] = slots[slot]
        assert ours == whole, chat.decode(ours)
        end = chat("<|im_end|>", add_special_tokens=False)["input_ids"]
        assert chat.decode(ours[-found["answer"] :]) == answer + chat.decode(end)


@pytest.mark.parametrize("kind", ["text", "fused"])
def test_answers_follow_the_deciding_position(tokenizer, titles, kind):
    """The prompt with an answer is the prompt and the answer's tokens."""
    prompts = make(tokenizer, titles, kind, template="full")
    items, histories = np.array([0, 4]), pa.array([[1], []], pa.list_(pa.int64()))
    bare = prompts.build(items, histories).to_pylist()
    whole = prompts.build(items, histories, labels=np.array([1, 0])).to_pylist()
    for row, answer in enumerate(prompts.segments.answers):
        assert whole[row]["tokens"] == [*bare[row]["tokens"], *answer] and whole[row]["answer"] == len(answer)
        assert tokenizer.decode(whole[row]["tokens"]).endswith(("Yes.", "No.")[row])


def test_roles_without_a_chat_template_stand_line_by_line(embedded, titles):
    found = build(make(embedded, titles, template="sella"), [(3, [1, 2])])
    said = embedded.decode(tokens_of(found, 0))
    assert "\nMovieList: ['golden anchor and tide', 'lunar orbit space'], TargetMovie: detective" in said
    assert said.endswith("crime\n") and said.startswith("<s>A user has")


def test_a_text_without_roles_is_a_users_turn_where_the_chat_template_is_asked_for(chat, titles):
    plain, wrapped = (
        chat.decode(tokens_of(build(make(chat, titles, template="compact", chat=how), [(3, [1])]), 0))
        for how in ("auto", "model")
    )
    text = "Liked: golden anchor and tide. Next: detective alibi crime. Good?"
    assert plain.removeprefix("<s>") == text
    assert wrapped == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        chat.chat_template = None
        make(chat, titles, template="compact", chat="model")


def test_prompts_are_the_same_on_any_day(chat, titles):
    """Some chat templates write today's date."""
    chat.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    said = chat.decode(tokens_of(build(make(chat, titles, template="sella"), [(3, [1])]), 0))
    assert said.startswith("26 Jul 2024\n<|im_start|>system")


def test_a_chat_template_that_takes_no_system_turn_is_refused(chat, titles):
    chat.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(UserError, match=r"System role not supported.*prompt\.chat plain"):
        make(chat, titles, template="sella")
    chat.chat_template = "{% for message in messages[-1:] %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="chat template makes answer of a prompt's history, title"):
        make(chat, titles, template="sella")


def test_a_title_that_is_cut_keeps_its_quotes(embedded, titles):
    long = next(title for title in titles if len(title) > 60)
    prompts = make(embedded, [long, "x"], template="collm", title_tokens=5)
    said = embedded.decode(tokens_of(build(prompts, [(0, [0, 1])]), 0))
    assert '"the last' in said and '", "x"' in said and long not in said
    assert prompts.facts()["titles_cut"] == 1


def test_the_context_holds_the_answer_too(embedded, titles):
    """Where it is trained on; the history gives way."""
    rows = [(6, list(range(8)))]
    for context in range(80, 120):
        bare = make(embedded, titles, context=context)
        prompts = Prompts(
            embedded, titles, Prompt(template="compact", max_tokens=PLENTY), "movie", context, "text", answers=True
        )
        items, histories = np.array([6]), pa.array([rows[0][1]], pa.list_(pa.int64()))
        whole = prompts.build(items, histories, labels=np.array([0]))
        assert len(whole["tokens"][0]) <= context
        assert whole["shown"][0].as_py() <= bare.build(items, histories)["shown"][0].as_py()


def test_a_template_that_says_more_of_some_tokens_than_of_all(embedded, titles, tmp_path):
    """By its own file: what is measured is what is read, and titles are made as they are written there."""
    words = "whose vector follows and tells of many things " * 20
    all_of_them = {"user item semantic": " {user} {item} {semantic}:{title}"}
    fused = ["Liked {history}.", {**all_of_them, "item": f" {words} {{item}}: {{title}}"}, " Good?"]
    own = {"text": "Liked {history}. {title} Good?", "fused": fused, "separator": "; ", "none": "none"}
    own["answers"] = [" Yes.", " No."]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own, sort_keys=False))

    def of(context: int, soft: tuple[str, ...]) -> Prompts:
        return make(embedded, titles, "fused", context, soft, template=str(tmp_path / "own.yaml"))

    histories = pa.array([[0, 1]], pa.list_(pa.int64()))
    found = of(PLENTY, ("item",)).build(np.array([2]), histories)
    assert f"{titles[2]} Good?" in embedded.decode(found["tokens"][0].as_py())
    without = pa.array([[]] * len(titles), pa.list_(pa.int64()))
    longest = max(map(len, of(PLENTY, ("item",)).build(np.arange(len(titles)), without)["tokens"].to_pylist()))
    of(longest, ("item",))
    with pytest.raises(UserError, match=r"own.yaml prompt needs"):
        of(longest - 1, ("item",))
    assert len(of(longest - 1, SOFT).build(np.array([2]), histories)) == 1
