"""The grid of a table: interrupted and taken up, written into a file, and not made again where it stands."""

import dataclasses
import json
import sys
from pathlib import Path

import main_job
import pytest

from sellarec import pipeline
from sellarec.errors import StageFailed
from sellarec.run import Run

sys.path.insert(0, str(main_job.ROOT / "jobs"))
import reproduce

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def finished(workspace: Path) -> dict[Path, int]:
    """When each artifact, and the results of each collaborative model, were written."""
    found = [*workspace.glob("artifacts/*/manifest.json"), *workspace.glob("runs/*/results-collab-*.json")]
    return {path: path.stat().st_mtime_ns for path in found}


FEW = {"pretrain": {"max_steps": 2}, "adapt": {"max_steps": 2}, "fuse": {"max_steps": 2}}
USER = {reproduce.MAIN: (), "user only": ("--fuse.tokens", "user")}


@pytest.mark.parametrize(
    ("table", "seeds", "last", "model"),
    [
        (reproduce.Table((), (1, 2), reproduce.SCORES, published={"mf": ".6482 / .6361"}), (1, 2), "tiny-seed-2", "mf"),
        (
            reproduce.Table((), (2, 3), variants=USER, published={"user only": ".7606 / .7464"}),
            (1,),
            "tiny-user-only-seed-1",
            "user only",
        ),
    ],
    ids=["seeds of a collaborative model", "variants of the whole job"],
)
def test_a_table_goes_on_where_it_was_and_is_not_made_again(
    table: reproduce.Table,
    seeds: tuple[int, ...],
    last: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is interrupted before its last run."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe, workspace, file = main_job.write_recipe(tmp_path, main_job.TINY | FEW), tmp_path / "w", tmp_path / "a.md"
    monkeypatch.setitem(reproduce.TABLES, "tiny", dataclasses.replace(table, recipes=("demo", str(recipe))))
    file.write_text("# Results\n\n<!-- tiny -->\nNot run.\n<!-- end of tiny -->\n\n## More\n")
    arguments = ["tiny", "--workspace", str(workspace), "--workers", "1", "--into", str(file)]
    if seeds != table.seeds:
        arguments += ["--seeds", ",".join(map(str, seeds))]

    with monkeypatch.context() as interrupted:
        run = pipeline.run

        def interrupt(this: Run) -> None:
            if this.config.name == last:
                raise StageFailed("interrupted")
            run(this)

        interrupted.setattr(pipeline, "run", interrupt)
        with pytest.raises(StageFailed, match="interrupted"):
            reproduce.main(arguments)
    first = finished(workspace)
    assert first and "Not run." in file.read_text()

    reproduce.main(arguments)
    printed, made, text = capsys.readouterr().out, finished(workspace), file.read_text()
    assert made.items() > first.items()
    assert text.startswith("# Results\n\n<!-- tiny -->\n") and text.endswith("<!-- end of tiny -->\n\n## More\n")
    assert (workspace / "tables" / "tiny.md").read_text() in text and "Not run." not in text
    beside = tmp_path / "a" / "tiny.json"
    assert beside.read_text().strip() == (workspace / "tables" / "tiny.json").read_text().strip()
    runs = json.loads(beside.read_text())
    assert [found["seed"] for found in runs] == [seed for seed in seeds for _ in table.variants]
    for found in runs:
        assert found["stages"]["collab"]["settings"]["seed"] == found["seed"] and found["values"]
        assert found["stages"]["collab"]["settings"]["collab"]["model"] == "mf"
        assert found["stages"]["prepare"]["facts"]["rows"]["train"] > 0
        assert found["stages"]["collab"]["facts"]["kept_step"] <= found["stages"]["collab"]["facts"]["steps"]
    assert "[tiny.json](a/tiny.json)" in text
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {model} |")]
    assert row.endswith(f"| {table.published[model]} | {', '.join(map(str, seeds))} |")
    assert table.published[model] in printed

    reproduce.main(arguments)
    assert finished(workspace) == made and file.read_text() == text
    summary = printed.rpartition("\nmodel")[2].partition("\ntable")[0]
    assert summary and summary in capsys.readouterr().out
