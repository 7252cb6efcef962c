"""What is in a prepared log: python jobs/describe.py DIR [--out report.html] [--llm FOLDER]"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sellarec.errors import UserError, exit_status


@dataclass(frozen=True)
class Settings:
    """Print what is in a prepared log (counts, shares, dates) and write a page with distributions and examples."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the prepared log."""
    out: Path | None = None
    """HTML page to write (default: describe.html in the folder)."""
    llm: str | None = None
    """Hugging Face folder or hub id whose tokenizer shows examples as prompts, with their tokens."""
    examples: int = 2
    """Rows of each split to show, the latest ones."""


def main(arguments: list[str]) -> None:
    settings = tyro.cli(Settings, args=arguments, prog="describe.py", description=__doc__)
    if settings.examples < 0:
        raise UserError(f"examples is {settings.examples}: a number from 0 is needed")
    from sellarec.data.describe import as_page, as_text, describe

    description = describe(settings.folder)
    print(as_text(description))
    out = settings.out or settings.folder / "describe.html"
    page = as_page(description, show_examples(settings, description.facts.get("noun", "item")))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write {out}: {error.strerror}; give --out") from error
    print(f"\npage           {out}")


def show_examples(settings: Settings, noun: str) -> list[dict]:
    """The latest rows of each split, as prompts where a tokenizer is given."""
    from sellarec.data.describe import example_rows

    examples = example_rows(settings.folder, settings.examples)
    shown = [asdict(example) for example in examples]
    if settings.llm is None or not examples:
        return shown
    import numpy as np
    import pyarrow as pa

    from sellarec.config import Prompt
    from sellarec.language.llm import find_llm, load_tokenizer
    from sellarec.language.prompts import Prompts

    tokenizer = load_tokenizer(find_llm(settings.llm, None).folder())
    # Only the titles that these rows need, numbered anew.
    titles = {item: title for e in examples for item, title in zip(e.items, [e.title, *e.history], strict=True)}
    place = {item: number for number, item in enumerate(titles)}
    prompts = Prompts(tokenizer, list(titles.values()), Prompt(), noun, Prompt().max_tokens, "text")
    histories = pa.array([[place[item] for item in e.items[1:]] for e in examples], pa.list_(pa.int64()))
    built = prompts.build(np.array([place[e.items[0]] for e in examples]), histories)
    for example, tokens in zip(shown, built["tokens"].to_pylist(), strict=True):
        example["prompt"] = tokenizer.decode(tokens)
        example["tokens"] = len(tokens)
    return shown


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
