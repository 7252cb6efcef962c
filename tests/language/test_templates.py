"""Prompt templates as files: the built-in ones, a user's own, and what is refused."""

import pytest
import yaml

from sellarec.command_line import parse
from sellarec.errors import UserError
from sellarec.language.templates import AUTO, Turn, built_in_templates, read_template, read_templates, template_mark
from sellarec.run import settings_of

GOOD = {
    "text": [{"user": "Liked: {history}. Next {noun}: {title}. Good?"}],
    "fused": [{"system": "Judge {noun}s."}, {"user": "{user} liked {history}. Next: {item} {semantic} {title}"}],
    "separator": "; ",
    "none": "none",
    "answers": [" Yes", " No"],
}


def write(folder, content) -> str:
    path = folder / "own.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_the_built_in_ones_can_be_read():
    assert set(built_in_templates()) == {"full", "compact", "sella", "sella-book", "collm"}
    for name in built_in_templates():
        assert read_template(name).words()
    assert tuple(read_templates("auto")) == AUTO and tuple(read_templates("sella")) == ("sella",)


def test_a_file_of_ones_own_is_read(tmp_path):
    template = read_template(write(tmp_path, GOOD | {"history_title": "'{title}'"}))
    assert template.turns("text") == (Turn("user", "Liked: {history}. Next {noun}: {title}. Good?"),)
    assert template.turns("fused") == (Turn("system", "Judge {noun}s."), Turn("user", GOOD["fused"][1]["user"]))
    assert (template.history_title, template.answers) == ("'{title}'", (" Yes", " No"))


def test_a_text_in_pieces_says_what_the_injected_tokens_need(tmp_path):
    pieces = [
        "Liked {history}.",
        {"user": " User {user}."},
        {"item semantic": " {item} {semantic}", "item": " {item}"},
        " {title}",
    ]
    template = read_template(write(tmp_path, GOOD | {"fused": [{"system": "Judge."}, {"user": pieces}]}))
    assert template.turns("fused")[1] == Turn("user", "Liked {history}. User {user}. {item} {semantic} {title}")
    assert template.turns("fused", ("item", "user"))[1].text == "Liked {history}. User {user}. {item} {title}"
    with pytest.raises(UserError, match=r"fused with the tokens semantic has no place for \{semantic\}"):
        template.turns("fused", ("semantic",))
    plain = read_template(write(tmp_path, GOOD))
    with pytest.raises(UserError, match=r"fused with the tokens user has a slot \{item\}"):
        plain.turns("fused", ("user",))
    with pytest.raises(UserError, match="fused with the tokens user has a slot"):
        parse(["demo", "--prompt.template", write(tmp_path, GOOD), "--fuse.tokens", "user"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": "Yes"}, "no key 'answer'"),
        ({"answers": None}, "has no answers"),
        ({"answers": [True, False]}, r"answers is \[True, False\]"),
        ({"answers": [" Yes"]}, "two different texts"),
        ({"answers": [" Yes", " Yes"]}, "two different texts"),
        ({"answers": ["Yes", " "]}, "two different texts"),
        ({"none": 3}, "none is 3"),
        ({"text": "Liked: {history}. Good?"}, r"text has no place for \{title\}"),
        ({"text": "{title} {history} {title}"}, r"text has 2 places for \{title\}"),
        ({"text": "{title}"}, r"no place for \{history\}"),
        ({"text": "{user} {history} {title}"}, r"text has a slot \{user\}"),
        (
            {"fused": "{user} {history} {item} {title}"},
            r"fused with the tokens user item semantic has no place for \{semantic\}",
        ),
        ({"text": "{history} {title} {year}"}, r"a slot \{year\}, but its slots are history, title, noun"),
        ({"text": "{history!r} {title}"}, r"slot \{history!r\}"),
        ({"text": "{history} {title:5}"}, r"slot \{title:5\}"),
        ({"text": "{history} {title} {"}, "no text with slots"),
        ({"text": [{"bot": "{history} {title}"}]}, "a turn of 'bot'"),
        ({"text": [{"user": "{history}", "system": "{title}"}]}, "one role and its text"),
        ({"text": []}, "list of turns"),
        ({"text": "{history} {title}"}, "one of text and fused has roles"),
        ({"fused": ["{user} {history} {item} {semantic} {title}", {"year": "a"}]}, "a piece for 'year'"),
        ({"fused": ["{user} {history} {item} {semantic} {title}", 3]}, "the piece 3"),
        ({"fused": [{"user": [{}, "{user} {history} {item} {semantic} {title}"]}]}, r"the piece \{\}"),
        ({"history_title": "{noun}"}, "history_title has a slot"),
        ({"history_title": "a"}, r"history_title has no place for \{title\}"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, changes, said):
    if isinstance(changes.get("text"), str) and "one of" not in said:
        changes = {"fused": "{user} {history} {item} {semantic} {title}"} | changes
    if isinstance(changes.get("fused"), str) and "text" not in changes:
        changes = {"text": "{history} {title}"} | changes
    content = {key: value for key, value in (GOOD | changes).items() if value is not None}
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=said) as caught:
        read_template(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=said):
        parse(["demo", "--prompt.template", path])


@pytest.mark.parametrize(
    ("content", "said"), [("a: [", "not readable YAML"), ("- a", "must hold text"), ("", "must hold")]
)
def test_a_file_that_is_no_template_is_refused(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        read_template(write(tmp_path, content))


def test_a_template_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="did you mean sella"):
        parse(["demo", "--prompt.template", "sela"])
    with pytest.raises(UserError, match=r"no prompt template 'nothing\.yaml'"):
        read_template("nothing.yaml")


def test_a_file_is_named_by_its_whole_path(tmp_path, monkeypatch):
    """Workers read it too, from another folder."""
    path = write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    assert parse(["demo", "--prompt.template", "own.yaml"]).prompt.template == path


def test_the_embedded_model_has_no_chat_template():
    with pytest.raises(UserError, match=r"prompt\.chat is model, but llm\.model is embedded"):
        parse(["demo", "--prompt.chat", "model"])
    assert parse(["demo", "--prompt.chat", "model", "--llm", "a/b"]).prompt.chat == "model"


def test_a_templates_mark_is_what_it_says_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    one, two = (write(tmp_path / name, GOOD) for name in ("a", "b"))
    assert template_mark(one) == template_mark(two) != template_mark(write(tmp_path / "b", GOOD | {"none": "nothing"}))
    runs = [parse(["demo", "--prompt.template", path]) for path in (one, two)]
    assert settings_of("fuse", runs[0]) == settings_of("fuse", runs[1])


def test_prompts_of_books_are_those_of_movies_but_for_one_letter():
    movies, books = read_template("sella"), read_template("sella-book")
    assert [turn.text.replace("Target{noun}", "Target{Noun}") for turn in books.turns("text")] == [
        turn.text for turn in movies.turns("text")
    ]
    assert books.turns("text") != movies.turns("text") and books.turns("fused") == movies.turns("fused")
    assert (books.history_title, books.separator, books.none, books.answers) == (
        movies.history_title, movies.separator, movies.none, movies.answers
    )  # fmt: skip
