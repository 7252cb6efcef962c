"""The tables of results that jobs/reproduce.py makes."""

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from sellarec.command_line import parse
from sellarec.config import Config, result_settings
from sellarec.errors import UserError
from sellarec.run import settings_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "jobs"))
import reproduce  # noqa: E402


@functools.cache
def configs_of(name: str) -> dict[str, Config]:
    """The config of each of a table's variants, for one seed."""
    table = reproduce.TABLES[name]
    stages = () if table.evaluation is None else ("--stages", "prepare,collab")
    return {
        variant: parse(
            [*table.recipes, *flags, "--seed", "1", "--name", f"{name}-{variant.replace(' ', '-')}", *stages]
        )
        for variant, flags in table.variants.items()
    }


@pytest.mark.parametrize("name", reproduce.TABLES)
def test_the_recipes_of_a_table_go_together(name: str) -> None:
    """With the flags of every variant; and no two of them ask for the same."""
    found: list[dict] = []
    for variant, config in configs_of(name).items():
        assert result_settings(config) not in found, variant
        found.append(result_settings(config))


@pytest.mark.parametrize("name", [name for name, table in reproduce.TABLES.items() if table.evaluation is None])
def test_every_published_figure_stands_beside_a_row_of_the_table(name: str) -> None:
    rows: set[str] = set()
    first: Config | None = None
    for variant, config in configs_of(name).items():
        first = first or config
        stages = ("adapt", "collab", "fuse")
        differs = {stage for stage in stages if settings_of(stage, config) != settings_of(stage, first)}
        models = [{**record(1, "auc", 0.7), "model": model} for model in ("collab", "text-only", reproduce.MAIN)]
        rows |= {found["model"] for found in reproduce.of_variant(models, variant, differs)}
    assert set(reproduce.TABLES[name].published) <= rows


@pytest.mark.parametrize("name", ["sella-ml-1m", "sella-book"])
def test_the_tables_of_sella_rec_have_every_subset_of_tokens_and_the_other_ways_to_tell_of_users_and_items(
    name: str,
) -> None:
    configs = dict(configs_of(name))
    main = configs.pop(reproduce.MAIN)
    subsets = {
        config.fuse.tokens
        for config in [main, *configs.values()]
        if config.align == main.align and config.fuse.represent == "collaborative"
    }
    tokens = ("user", "item", "semantic")
    assert subsets == {some for size in (1, 2, 3) for some in itertools.combinations(tokens, size)}
    assert configs["CoLLM style"].fuse.train == ("projections",) and not configs["CoLLM style"].fuse.warm_start
    assert configs["PersonPrompt"].fuse.represent == "learned" and configs["BinLLM"].fuse.represent == "codes"
    assert configs["BinLLM"].collab.table_learning_rate == 0.01


def record(seed: int, metric: str, value: float | None, rows: str = "all") -> dict:
    return {"model": "mf", "seed": seed, "metric": metric, "value": value, "rows": rows}


def test_means_and_deviations_are_over_the_seeds_of_all_rows() -> None:
    """With what is published beside a model's first row."""
    records = [record(1, "auc", 0.7), record(2, "auc", 0.8), record(1, "auc", 0.1, "warm"), record(1, "uauc", 0.6)]
    records.append(record(2, "uauc", None))
    heading, auc, uauc = reproduce.over_seeds(records, {"mf": ".6482 / .6361"}).splitlines()
    assert auc.split() == ["mf", "auc", "0.7500", "0.0707", "2", ".6482", "/", ".6361"]
    assert uauc.split() == ["mf", "uauc", "0.6000", "n/a", "1"]
    assert "published" in heading and "published" not in reproduce.over_seeds(records, {})


def test_of_a_later_variant_what_it_has_itself_is_kept_under_its_name() -> None:
    models = ("item mean", "collab", "text-only", "sella-rec", "sella-rec - collab", "sella-rec - text-only")
    records = [{**record(1, "auc", 0.7), "model": model} for model in models]

    def named(variant: str, differs: set[str]) -> list[str]:
        return [found["model"] for found in reproduce.of_variant(records, variant, differs)]

    assert named("first", set()) == ["item mean", "collab", "text-only", "first", "first - collab", "first - text-only"]
    assert named("other", {"fuse"}) == ["other", "other - collab", "other - text-only"]
    assert named("other", {"collab", "align", "fuse"}) == [
        "collab (other)", "other", "other - collab (other)", "other - text-only"
    ]  # fmt: skip


def test_a_table_has_means_deviations_and_the_outermost_bounds_and_replaces_itself_in_a_file(tmp_path: Path) -> None:
    records = [{**record(1, "auc", 0.7), "low": 0.6, "high": 0.75}, {**record(2, "auc", 0.8), "low": 0.7, "high": 0.85}]
    records.append({**record(1, "uauc", None), "low": None, "high": None})
    text = reproduce.markdown(records, {"mf": ".6482 / .6361"})
    caption, _, head, _, row = text.splitlines()
    assert caption == reproduce.CAPTION
    assert head == "| model | auc, all | published, all rows | seeds |"
    assert row == "| mf | 0.7500 (0.0707) [0.6000, 0.8500] | .6482 / .6361 | 1, 2 |"
    file = tmp_path / "results.md"
    file.write_text("# Results\n")
    reproduce.put_between(file, "sella", text)
    reproduce.put_between(file, "other", "nothing\n")
    reproduce.put_between(file, "sella", "new\n")
    found = file.read_text()
    assert found.startswith("# Results\n") and "nothing" in found and "new" in found and "mf" not in found
    assert found.count("<!-- sella -->") == found.count("<!-- end of sella -->") == 1


def test_a_file_that_lost_one_of_a_tables_lines_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "results.md"
    for text in ("a\n<!-- sella -->\nold\n\n## More\n", "<!-- end of sella -->\n<!-- sella -->\n## More\n"):
        file.write_text(text)
        with pytest.raises(UserError, match="or both the wrong way round"):
            reproduce.put_between(file, "sella", "new\n")
        assert file.read_text() == text


def test_a_file_with_one_of_the_lines_is_refused_before_the_grid(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- world -->\n")
    flags = ["world", "--into", tmp_path / "page.md", "--workspace", tmp_path / "w"]
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "reproduce.py", *flags], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "only one of the lines" in done.stderr and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the table comes first"),
        (["moon"], "not moon"),
        (["collm-mf", "--seed", "3"], "--seed is given"),
        (["collm-mf", "--into", "/nowhere/at/all.md"], "no file can be written"),
        (["collm-mf", "--seeds", "1,two"], "--seeds is '1,two'"),
        (["collm-mf", "--seeds"], "--seeds is ''"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "reproduce.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
